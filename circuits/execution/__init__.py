"""Run many patched suffixes of one prompt: shared prefix where the family allows, whole forwards elsewhere. Private."""
