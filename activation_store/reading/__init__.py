"""Read stores: open a folder, select rows, check integrity. Private; `activation_store` has the public names."""
