"""General helpers for all rooms: errors, files, locks, progress, statistics, text."""
