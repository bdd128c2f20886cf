"""Notebooks, stored as text. `python -m experiments.notebooks.render` runs them on a finished run."""
