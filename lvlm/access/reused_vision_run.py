"""Run the vision tower once for prompts and branches with the same pixels."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lvlm.interfaces import Model


@contextmanager
def reuse_vision_runs(model: Model) -> Iterator[None]:
    """Return the stored output of the vision tower for inputs that it has received before, while the context is open.

    Nothing is reused if gradients are enabled, or if the tower has hooks (other than those with which transformers collects
    outputs), which may read or change every run.
    """
    tower = model.tower
    if tower is None or torch.is_grad_enabled():
        yield
        return
    original, replaced = tower.forward, vars(tower).get("forward")
    runs: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        if _has_hooks(tower):
            return original(*args, **kwargs)
        for earlier, named, output in runs:
            if _equal((earlier, named), (args, kwargs)):
                return copy.copy(output)
        output = original(*args, **kwargs)
        runs.append((args, kwargs, copy.copy(output)))  # families write into the output's fields
        return output

    tower.forward = forward
    try:
        yield
    finally:
        if replaced is None:
            del tower.forward
        else:
            tower.forward = replaced


def _has_hooks(tower: torch.nn.Module) -> bool:
    hooks = (
        h
        for m in tower.modules()
        if m is not tower
        for t in (m._forward_hooks, m._forward_pre_hooks)
        for h in t.values()
    )
    return any(not str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks)


def _equal(a: Any, b: Any) -> bool:
    """Whether two nested arguments are equal; False for objects that cannot be compared."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        same = isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype
        return same and (a is b or bool(torch.equal(a, b)))
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return a is None or (isinstance(a, bool | int | float | str | torch.dtype | torch.device) and a == b)
