"""The module that runs the decoder's layers."""

from __future__ import annotations

from torch import nn

from lvlm.interfaces import Model


def decoder_of(model: Model) -> nn.Module:
    """Return the module that contains the decoder's list of layers and runs them."""
    first = model.layers("decoder")[0]
    path = next(name for name, module in model.hf.named_modules() if module is first).split(".")[:-2]
    return model.hf.get_submodule(".".join(path))
