"""Detectors: scores of the objects that a written answer mentions, to find those that are not in the image."""
