"""Scores of heads without patching: attention to the image, direct logit attribution. Private."""
