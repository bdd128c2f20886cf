"""General helpers for all packages: errors, files, locks, progress, statistics, text."""
