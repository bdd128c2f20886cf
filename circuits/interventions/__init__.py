"""Changes of activations during a forward pass, as hooks."""
