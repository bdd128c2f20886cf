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


def columns(module: nn.Linear, which: slice, like: Tensor) -> Tensor:
    """Return columns of the matrix that a linear layer applies, ``[out, n]``, in the dtype and on the device of `like`.

    A plain layer's matrix is its weight. A quantized layer stores codes in another dtype or shape: it is given unit
    vectors, and what it returns, less what it returns for zero, are the columns that it really applies.

    Parameters
    ----------
    module
        The layer.
    which
        Columns, with plain bounds: ``slice(start, stop)``.
    like
        A tensor with the dtype and device of the layer's inputs.
    """
    stored = weight(module)
    if stored is not None and not quantized(module):
        return stored[:, which].to(like)
    units = like.new_zeros(which.stop - which.start + 1, module.in_features)
    units[torch.arange(len(units) - 1), torch.arange(which.start, which.stop)] = 1
    # `forward`, not a call: hooks on the module watch the forward pass of the model, and this is none.
    out = module.forward(units).to(like)
    return (out[:-1] - out[-1]).T


def quantized(module: nn.Linear) -> bool:
    """Whether a linear layer stores anything but its matrix in floating point of at least two bytes."""
    stored = weight(module)
    return (
        stored is None
        or type(stored) not in (Tensor, nn.Parameter)
        or not stored.is_floating_point()
        or stored.element_size() < 2
        or tuple(stored.shape) != (module.out_features, module.in_features)
    )


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
