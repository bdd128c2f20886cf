"""From a prompt and its images to model inputs and token positions."""
