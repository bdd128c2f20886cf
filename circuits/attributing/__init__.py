"""The parts of attribution: slopes read, attention opened, streams split; `circuits.attribution` is what is used."""
