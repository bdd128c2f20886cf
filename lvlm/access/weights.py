"""Weights of modules, also of those whose weights accelerate keeps outside the module until it runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def weight(module: nn.Module, name: str = "weight") -> Tensor | None:
    """Return a parameter of a module; None if the module has no such parameter.

    accelerate distributes a model that is too large for its GPUs over main memory and disk. Such a parameter is on the device
    ``meta``, without values, except while its module runs; its values are then in accelerate's table of weights.
    """
    parameter = getattr(module, name, None)
    if isinstance(parameter, Tensor) and parameter.is_meta:
        for hook in _accelerate_hooks(module):
            table = getattr(hook, "weights_map", None)
            if table is not None:
                return table[name]
    return parameter if isinstance(parameter, Tensor) else None


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter of a model with its name; values as returned by `weight`."""
    for path, parameter in model.named_parameters():
        parent, _, name = path.rpartition(".")
        values = weight(model.get_submodule(parent), name) if parameter.is_meta else parameter
        yield path, parameter if values is None else values


def columns(module: nn.Linear, which: slice, like: Tensor) -> Tensor:
    """Return columns of the matrix that a linear layer applies, ``[out, n]``, in the dtype and on the device of `like`.

    The matrix of an ordinary layer is its weight. A quantized layer stores codes in another dtype or shape, so its columns are
    its outputs for unit vectors minus its output for zero.

    Parameters
    ----------
    module
        The layer.
    which
        Columns, as ``slice(start, stop)``.
    like
        A tensor with the dtype and device of the layer's inputs.
    """
    stored = weight(module)
    if stored is not None and not quantized(module):
        return stored[:, which].to(like)
    units = like.new_zeros(which.stop - which.start + 1, module.in_features)
    units[torch.arange(len(units) - 1), torch.arange(which.start, which.stop)] = 1
    # `forward` and not a call, because hooks on the module are for forward passes of the model.
    out = module.forward(units).to(like)
    return (out[:-1] - out[-1]).T


def matrix_of(module: nn.Linear, like: Tensor) -> Tensor:
    """Return the matrix that a linear layer applies, ``[out, in]``: its weight, or all `columns` if it is quantized.

    Parameters
    ----------
    module
        The layer.
    like
        A tensor with the dtype and device of the layer's inputs.
    """
    stored = weight(module)
    if stored is not None and not quantized(module):
        return stored.detach()
    with torch.no_grad():
        return columns(module, slice(0, module.in_features), like)


def quantized(module: nn.Linear) -> bool:
    """Whether a linear layer stores anything other than its matrix in a floating type of at least two bytes."""
    stored = weight(module)
    return (
        stored is None
        or type(stored) not in (Tensor, nn.Parameter)
        or not stored.is_floating_point()
        or stored.element_size() < 2
        or tuple(stored.shape) != (module.out_features, module.in_features)
    )


def empty(model: nn.Module) -> bool:
    """Whether a model has parameters without values: on the device ``meta``, and not in accelerate's tables."""
    return any(tensor.is_meta for _, tensor in named_weights(model))


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's inputs: that of its first parameter while the model runs."""
    first = next(model.parameters()).device
    if first.type != "meta":
        return first
    hooks = (hook for module in model.modules() for hook in _accelerate_hooks(module))
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    device = next((d for d in devices if d is not None), "cpu")
    return torch.device(f"cuda:{device}" if isinstance(device, int) else device)


def _accelerate_hooks(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return list(getattr(hook, "hooks", [hook])) if hook is not None else []
