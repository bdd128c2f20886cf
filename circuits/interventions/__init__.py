"""Changes of activations during a forward, as hooks."""
