"""The file format: what is on disk, encoded and checked. Private; `activation_store` has the public names."""
