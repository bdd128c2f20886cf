"""The command line: dispatch, options, sweeps, and the commands `resume`, `status`, `compare`, `plan` and `help`."""
