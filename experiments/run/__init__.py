"""The folder of a run, its locks and receipts, and what its stages share."""
