"""What every room stands on and what has no subject: bytes, numbers, files, terminals."""
