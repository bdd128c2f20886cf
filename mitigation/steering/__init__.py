"""Steering vectors: derive, apply, export. `mitigation` has the public names."""
