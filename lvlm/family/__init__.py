"""Families of models: what a spec says, the table of specs, and the proof at load that a spec is right."""
