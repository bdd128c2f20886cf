"""Readers of the results in a run folder; no model, no data files."""
