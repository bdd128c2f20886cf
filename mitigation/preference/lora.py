"""Low-rank additions to linear layers (LoRA, Hu et al. 2021, arXiv 2106.09685): y = W x + (alpha / r) B A x."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from groundscope.core.errors import ConfigError, ModelError
from groundscope.core.text import nearest
from lvlm.active_interventions import ActiveIntervention, mark_intervention
from lvlm.model import Lvlm


def linear_layers(model: Lvlm, names: Sequence[str] = ()) -> dict[str, nn.Linear]:
    """Return the linear layers of the decoder's layers by their path in the model, in order.

    Parameters
    ----------
    model
        The model.
    names
        Last parts of paths, such as ``("q_proj", "v_proj")``; empty for all.

    Raises
    ------
    ConfigError
        For a name that no linear layer has.
    ModelError
        If the decoder has no linear layers, for example because they are quantized.
    """
    inside = {id(module) for layer in model.layers("decoder") for module in layer.modules()}
    layers = {
        path: module
        for path, module in model.hf.named_modules()
        if isinstance(module, nn.Linear) and id(module) in inside and module.weight.is_floating_point()
    }
    if not layers:
        msg = f"{model.name} has no linear layers with floating-point weights in its decoder; load it without quantization"
        raise ModelError(msg)
    last = {path.rpartition(".")[2] for path in layers}
    unknown = next((name for name in names if name not in last), None)
    if unknown is not None:
        msg = f"targets: no linear layer is named '{unknown}'; choose from {', '.join(sorted(last))}{nearest(unknown, last)}"
        raise ConfigError(msg)
    return {path: m for path, m in layers.items() if not names or path.rpartition(".")[2] in names}


@dataclass(frozen=True, eq=False)
class LowRank:
    """The two matrices of a linear layer."""

    down: Tensor
    """A, float32 ``[r, in]``."""
    up: Tensor
    """B, float32 ``[out, r]``."""

    def added(self, x: Tensor) -> Tensor:
        """Return B A x in float32 for ``[..., in]``."""
        return x.to(self.down) @ self.down.T @ self.up.T


def initial(layers: Mapping[str, nn.Linear], rank: int, seed: int) -> dict[str, LowRank]:
    """Return trainable matrices as PEFT begins: A uniform within 1 / sqrt(in), B zero, so that nothing is changed at first."""
    draw = torch.Generator().manual_seed(seed)
    parts = {}
    for path, layer in layers.items():
        bound = layer.in_features**-0.5
        down = (torch.rand(rank, layer.in_features, generator=draw) * 2 - 1) * bound
        device = layer.weight.device
        up = torch.zeros(layer.out_features, rank, device=device)
        parts[path] = LowRank(down.to(device).requires_grad_(), up.requires_grad_())
    return parts


@contextmanager
def active(model: Lvlm, layers: Mapping[str, nn.Linear], parts: Mapping[str, LowRank], scale: float) -> Iterator[None]:
    """Add the low-rank parts to the outputs of linear layers while the context is open."""
    with ExitStack() as stack:
        stack.callback(model.register(ActiveIntervention("adapter", "LoRA", lambda: None)).remove)
        for path, part in parts.items():

            @mark_intervention
            def add(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor, part: LowRank = part) -> Tensor:
                return output + (scale * part.added(args[0])).to(output)

            stack.callback(layers[path].register_forward_hook(add).remove)
        yield


@contextmanager
def frozen(model: Lvlm) -> Iterator[None]:
    """Compute no gradients for the model's own weights while the context is open."""
    weights = [p for p in model.hf.parameters() if p.requires_grad]
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)
