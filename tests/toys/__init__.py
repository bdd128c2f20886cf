"""Small models, examples, files and independent implementations that several test files use."""
