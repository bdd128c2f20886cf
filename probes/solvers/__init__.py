"""Numerical solvers of the probes, each with a bound on its error. Private."""
