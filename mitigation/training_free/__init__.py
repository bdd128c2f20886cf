"""Training-free mitigations: one class per method, one file each in `methods`, listed in `table`."""
