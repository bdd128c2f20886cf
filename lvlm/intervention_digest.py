"""Digests of interventions: equal digests, equal effects."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_OURS = {"groundscope", "concepts", "lvlm", "circuits", "mitigation", "diagnosis"}


def digest_of(value: Any) -> str | None:
    """Return a SHA-256 of a value; None if it contains an object whose effect cannot be known, such as a function.

    Numbers, text, tensors, arrays, sequences, mappings and dataclasses of this package are known.

    Examples
    --------
    >>> from lvlm.intervention_digest import digest_of
    >>> digest_of([1, "a"]) == digest_of([1, "a"]), digest_of(len)
    (True, None)
    """
    h = hashlib.sha256()
    return h.hexdigest() if _feed(h, value) else None


def _feed(h: Any, value: Any) -> bool:
    """Add a value to a digest; return False if a part has a type that the digest cannot represent."""
    h.update(f"{type(value).__module__}.{type(value).__qualname__}(".encode())
    complete = True
    if value is None or isinstance(value, str | int | float | bool | np.number):
        h.update(repr(value).encode())
    elif isinstance(value, Tensor):
        flat = value.detach().contiguous().cpu().reshape(-1)
        h.update(f"{value.dtype}{tuple(value.shape)}".encode())
        h.update(flat.view(torch.uint8).numpy().data)
    elif isinstance(value, np.ndarray):
        h.update(f"{value.dtype}{value.shape}".encode())
        h.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        for key, item in value.items():
            complete = _feed(h, key) and _feed(h, item) and complete
    elif isinstance(value, Sequence):
        for item in value:
            complete = _feed(h, item) and complete
    elif is_dataclass(value) and type(value).__module__.partition(".")[0] in _OURS:
        for field in fields(value):
            h.update(field.name.encode())
            complete = _feed(h, getattr(value, field.name)) and complete
    else:
        complete = False
    h.update(b")")
    return complete
