"""Read results of probes further: significance, baselines, transfer, alignment, lens, trajectory."""
