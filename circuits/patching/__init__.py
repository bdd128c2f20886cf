"""Patch activations and paths between the two runs of a pair. Private; `circuits` exports the public names."""
