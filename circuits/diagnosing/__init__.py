"""The parts of a diagnosis, which `circuits.diagnosis` puts together: what is claimed, read, calibrated, judged and undone."""
