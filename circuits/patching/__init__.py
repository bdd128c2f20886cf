"""Patch activations and paths between two runs of a pair. Private; `circuits` has the public names."""
