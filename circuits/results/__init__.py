"""Results: head scores, patch scores and graphs, with their statistics and plots."""
