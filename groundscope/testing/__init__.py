"""Models with planted circuits and planted failures, for tests, benchmarks and people who test new methods."""
