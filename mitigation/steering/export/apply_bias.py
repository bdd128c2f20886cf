"""Add a baked steering vector to a Hugging Face model: copy this file, it needs only torch and safetensors.

    from apply_bias import apply
    undo = apply(model, "vector.safetensors")   # the model is steered until undo() is called
    model.save_pretrained("steered")            # or permanently; set config.attention_bias=True if the config has one

The file contains additions to the biases of linear layers, by parameter name; a missing bias counts as zero.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn


def read(path: str | Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Return the changes by parameter name, and the metadata; raises `ValueError` for any other file."""
    if not Path(path).is_file():  # a FIFO would block forever
        raise ValueError(f"{path} is not a bias patch: not a regular file")  # noqa: EM102  # self-contained file
    try:
        with safe_open(str(path), framework="pt") as file:
            card = json.loads((file.metadata() or {})["bias_patch"])
            return {name: file.get_tensor(name) for name in file.keys()}, card  # noqa: SIM118  # not a mapping
    except (SafetensorError, KeyError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a bias patch: {error}") from error  # noqa: EM102  # self-contained file


@torch.no_grad()
def apply(model: nn.Module, path: str | Path) -> Callable[[], None]:
    """Add the changes to a model in place and return a function that restores the model bit for bit.

    Raises `ValueError` if the model lacks one of the linear layers or it is offloaded; the model is then unchanged.
    """
    changes, _ = read(path)
    modules = dict(model.named_modules())
    targets: list[tuple[nn.Linear, torch.Tensor]] = []
    for name, change in changes.items():
        linear = modules.get(name.removesuffix(".bias"))
        if not isinstance(linear, nn.Linear) or linear.out_features != len(change):
            text = f"{path}: {type(model).__name__} has no linear layer of width {len(change)} for '{name}'"
            raise ValueError(text)
        if linear.weight.is_meta:
            text = f"{path}: '{name}' is offloaded by accelerate, which replaces its bias; load the model without offloading"
            raise ValueError(text)
        targets.append((linear, change))
    before = [linear.bias for linear, _ in targets]
    for linear, change in targets:
        old = _zeros(linear, change) if linear.bias is None else linear.bias
        linear.bias = nn.Parameter(old + change.to(old), requires_grad=False)

    def undo() -> None:
        for (linear, _), bias in zip(targets, before, strict=True):
            linear.bias = bias

    return undo


def _zeros(linear: nn.Linear, change: torch.Tensor) -> torch.Tensor:
    """Return a bias of zeros in the layer's number type; a quantized weight has none, so there it is that of the change."""
    weight = linear.weight
    kind = weight.dtype if weight.is_floating_point() and weight.element_size() > 1 else change.dtype
    return torch.zeros(linear.out_features, dtype=kind, device=weight.device)
