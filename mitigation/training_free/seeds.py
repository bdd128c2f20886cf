"""Random numbers that depend on names only, so that neither the batch nor the order of questions changes them."""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def seed_of(*names: object) -> int:
    """Return a seed of 63 bits that depends on the names only.

    Examples
    --------
    >>> from mitigation.training_free.seeds import seed_of
    >>> seed_of(0, "question 1") == seed_of(0, "question 1"), seed_of(0, "question 1") == seed_of(1, "question 1")
    (True, False)
    """
    text = "\0".join(str(name) for name in names)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator_of(*names: object) -> np.random.Generator:
    """Return numpy's generator for names."""
    return np.random.default_rng(seed_of(*names))


def torch_generator_of(*names: object) -> torch.Generator:
    """Return torch's generator for names, on the CPU."""
    return torch.Generator().manual_seed(seed_of(*names))
