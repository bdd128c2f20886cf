"""Decoding: prompts and their branches are prefilled once, then continued token by token under a rule that combines logits."""
