"""Results: scores of heads, of patches, graphs, their statistics and plots."""
