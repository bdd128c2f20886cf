"""The file format: encoding, layout and integrity checks. Private; `activation_store` has the public names."""
