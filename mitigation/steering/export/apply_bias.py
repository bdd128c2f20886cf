"""Put a baked steering vector into a Hugging Face model: copy this file, it needs torch and safetensors only.

    from apply_bias import apply
    undo = apply(model, "vector.safetensors")   # the model is steered until undo() is called
    model.save_pretrained("steered")            # or for good; set config.attention_bias=True where the config has one

The file holds what to add to the biases of linear layers, by parameter name; a bias that is not there is zero.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn


def read(path: str | Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Return the changes by parameter name, and the card; raises `ValueError` for any other file."""
    if not Path(path).is_file():  # a FIFO would block for ever
        raise ValueError(f"{path} is no bias patch: it is not a regular file")  # noqa: EM102  # stands alone
    try:
        with safe_open(str(path), framework="pt") as file:
            card = json.loads((file.metadata() or {})["bias_patch"])
            return {name: file.get_tensor(name) for name in file.keys()}, card  # noqa: SIM118  # not a mapping
    except (SafetensorError, KeyError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no bias patch: {error}") from error  # noqa: EM102  # stands alone


@torch.no_grad()
def apply(model: nn.Module, path: str | Path) -> Callable[[], None]:
    """Add the changes to a model in place and return what takes them back, bit for bit.

    Raises `ValueError` where the model has no such linear layer; then nothing was changed.
    """
    changes, _ = read(path)
    modules = dict(model.named_modules())
    found: list[tuple[nn.Linear, torch.Tensor]] = []
    for name, change in changes.items():
        linear = modules.get(name.removesuffix(".bias"))
        if not isinstance(linear, nn.Linear) or linear.out_features != len(change):
            text = f"{path}: '{name}' [{len(change)}] has no linear layer of that width in {type(model).__name__}"
            raise ValueError(text)
        found.append((linear, change))
    before = [linear.bias for linear, _ in found]
    for linear, change in found:
        old = torch.zeros_like(linear.weight[:, 0]) if linear.bias is None else linear.bias
        linear.bias = nn.Parameter(old + change.to(old), requires_grad=False)

    def undo() -> None:
        for (linear, _), bias in zip(found, before, strict=True):
            linear.bias = bias

    return undo
