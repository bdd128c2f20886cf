"""No subject: errors, files, locks, progress, statistics, text. Every room stands on it."""
