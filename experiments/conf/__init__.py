"""Configuration groups; a package so that the console script finds them."""
