"""The command: arguments, help, plan, status, comparison, sweeps, resuming."""
