"""The stages of a run, one module each; `table` lists them in order."""
