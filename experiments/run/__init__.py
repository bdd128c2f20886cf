"""One run: its folder, locks and interrupts, what its stages share, its live table."""
