"""The embedded model: its shape, its lessons, its training and its measurement."""
