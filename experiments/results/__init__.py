"""Results of runs side by side: headline figures, comparisons of methods and models."""
