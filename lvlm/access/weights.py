"""Weights wherever they are: in their module, or kept elsewhere by accelerate until the module runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def weight(module: nn.Module, name: str = "weight") -> Tensor | None:
    """Return a parameter of a module; None where there is none.

    A model too large for its GPUs is spread by accelerate over main memory and disk. A parameter there is an empty shell
    on the device ``meta`` and is filled while its module runs; its values are what accelerate keeps for it.
    """
    found = getattr(module, name, None)
    if isinstance(found, Tensor) and found.is_meta:
        for hook in _hooks(module):
            kept = getattr(hook, "weights_map", None)
            if kept is not None:
                return kept[name]
    return found if isinstance(found, Tensor) else None


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter of a model by name, as `weight` gives it."""
    for path, parameter in model.named_parameters():
        parent, _, name = path.rpartition(".")
        found = weight(model.get_submodule(parent), name) if parameter.is_meta else parameter
        yield path, parameter if found is None else found


def empty(model: nn.Module) -> bool:
    """Whether a model has parameters without values: made on ``meta``, and not kept elsewhere."""
    return any(tensor.is_meta for _, tensor in named_weights(model))


def device_of(model: nn.Module) -> torch.device:
    """Return where a model takes its inputs: where its first parameter is, or will be when it runs."""
    first = next(model.parameters()).device
    if first.type != "meta":
        return first
    places = (getattr(hook, "execution_device", None) for module in model.modules() for hook in _hooks(module))
    place = next((p for p in places if p is not None), "cpu")
    return torch.device(f"cuda:{place}" if isinstance(place, int) else place)


def _hooks(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return list(getattr(hook, "hooks", [hook])) if hook is not None else []
