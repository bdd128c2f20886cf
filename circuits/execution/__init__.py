"""Run many patched versions of one prompt: with a shared prefix if the family allows it, else as full forward passes."""
