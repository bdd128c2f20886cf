"""Controls: rows of a table that a method must beat before its gain is its own."""
