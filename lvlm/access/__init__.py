"""Access to a loaded model: hook points of sites, attention patterns, weights, shared vision runs."""
