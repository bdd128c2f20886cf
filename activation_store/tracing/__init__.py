"""Trace a model into a store. Private; `activation_store` has the public names."""
