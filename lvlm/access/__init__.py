"""Reach into a loaded model: modules of a site, attention patterns, weights, shared vision runs."""
