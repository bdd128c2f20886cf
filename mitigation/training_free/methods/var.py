"""VAR: move the attention of sink tokens to the other image tokens."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from groundscope.core.errors import ConfigError, ModelError
from lvlm.decoding.attention_edits import Editor, current_layout, edit_attention
from lvlm.decoding.attention_rows import AttentionRows
from lvlm.decoding.cache_check import check_prompts
from lvlm.sites import Site
from mitigation.training_free.attention import AttentionMethod, check_layers
from mitigation.training_free.lens import check_blocks
from mitigation.training_free.method import check_choice, check_range

if TYPE_CHECKING:
    from lvlm.decoding.decoder import Decoder
    from lvlm.model import Lvlm


@dataclass(frozen=True)
class VAR(AttentionMethod):
    """Visual attention redistribution: attention sinks receive weight that image tokens with content could use.

    A token is a sink in a layer if the layer's input, divided by its root mean square, exceeds `threshold` in absolute value
    at one of a few `dimensions`. In heads whose weights to the image add to at least `mass`, of which sinks have at most the
    share `sink_share`, the last query's weights to sinks are multiplied by `factor`, and the freed weight is distributed over
    the image tokens that are no sinks, in proportion to their weights. Kang et al. 2025 (ICLR), arXiv 2503.03321.

    Open points: sinks are those of the text too, such as the first token (``sinks="image"``: image tokens only). The dimensions
    depend on the model; None measures them: the two with the largest normalized values of the first token, averaged over layers.
    A normalized value is at most the square root of the width, so a model of width 400 or less has no sinks at the published
    threshold of 20, and is refused.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.methods.var import VAR
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["conflict"])
    >>> with VAR(threshold=4).applied(model):
    ...     answers = gs.answer(model, data)
    >>> len(answers)
    6
    """

    label: ClassVar[str] = "VAR"
    source: ClassVar[str] = "arXiv 2503.03321"

    factor: float = 0.6
    """Factor of the weights to sinks; in [0, 1]."""
    mass: float = 0.2
    """Smallest sum of a head's weights to the image; in [0, 1]."""
    sink_share: float = 0.5
    """Largest share of that sum that sinks have; in [0, 1]."""
    threshold: float = 20.0
    """Smallest normalized value of a sink; above 0."""
    dimensions: tuple[int, ...] | None = None
    """Dimensions of the residual stream that mark sinks; None to measure them."""
    sinks: Literal["all", "image"] = "all"
    """Tokens that may be sinks."""
    layers: tuple[int, ...] | None = None
    """Blocks that are edited; None for all."""

    def __post_init__(self) -> None:
        check_range("factor", self.factor, 0, 1)
        check_range("mass", self.mass, 0, 1)
        check_range("sink_share", self.sink_share, 0, 1)
        check_range("threshold", self.threshold, 0, above=True)
        check_blocks(self.dimensions, "dimensions")
        check_choice("sinks", self.sinks, ("all", "image"))
        check_layers(self.layers)

    @property
    def neutral(self) -> bool:
        """Whether the parameters leave attention unchanged."""
        return self.factor == 1

    def edited_layers(self, model: Lvlm) -> tuple[int, ...]:
        """Return the blocks whose attention is edited."""
        return super().edited_layers(model) if self.layers is None else self.layers

    def used_parameters(self, model: Lvlm) -> Mapping[str, Any]:
        """Return the parameters with the blocks and dimensions that are used."""
        return {**super().used_parameters(model), "dimensions": self._dimensions(model)}

    def _dimensions(self, model: Lvlm) -> tuple[int, ...]:
        if self.dimensions is not None:
            return self.dimensions
        return model.remember(("sink dimensions", str(model.dtype)), lambda: sink_dimensions(model))

    def _check(self, model: Lvlm) -> None:
        super()._check(model)
        if self.threshold**2 >= model.width:
            msg = (
                f"{self.label}: no token of {model.name} can be a sink, because normalized values are at most "
                f"sqrt({model.width}) = {model.width**0.5:.1f}; set a threshold below it"
            )
            raise ModelError(msg)
        if max(self.dimensions or (0,)) >= model.width:
            msg = f"{self.label}: dimension {max(self.dimensions or (0,))}, but {model.name} has dimensions 0-{model.width - 1}"
            raise ConfigError(msg)

    def _enter_edit(self, model: Lvlm, stack: ExitStack, editor: Editor) -> Decoder | None:
        if self.neutral:
            return None
        layers, dimensions = self.edited_layers(model), self._dimensions(model)
        stack.enter_context(edit_attention(model, editor, layers=layers, registered=True))
        for layer in layers:

            def mark(x: Tensor, layer: int = layer) -> None:
                layout = current_layout(model)
                marks = layout.marks.get(_name(layer), torch.zeros_like(layout.valid))
                new = sink_tokens(x, dimensions, self.threshold).to(marks.device)
                layout.marks[_name(layer)] = torch.cat([marks[:, : -new.shape[1]], new], dim=1)

            stack.callback(model.locate(Site("decoder", layer, "resid_pre")).watch(mark).remove)
        return None

    def edited(self, rows: AttentionRows) -> AttentionRows:
        """Return attention with redistributed weights."""
        marks = rows.layout.marks.get(_name(rows.layer))
        if marks is None:
            msg = f"{self.label} needs a cache that contains all tokens; generate without a cache of sliding windows"
            raise ModelError(msg)
        sinks = rows.keys(marks & rows.layout.image if self.sinks == "image" else marks)
        return rows.with_weights(
            redistributed(rows.weights, rows.image, sinks, self.factor, self.mass, self.sink_share)
        )


def _name(layer: int) -> str:
    return f"sinks of layer {layer}"


def normalized(x: Tensor) -> Tensor:
    """Return residual streams ``[..., D]`` divided by their root mean square, in at least float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def sink_tokens(x: Tensor, dimensions: tuple[int, ...], threshold: float) -> Tensor:
    """Return which tokens of residual streams ``[rows, tokens, D]`` are sinks, bool ``[rows, tokens]``."""
    return normalized(x)[..., list(dimensions)].abs().amax(-1) > threshold


@torch.no_grad()
def sink_dimensions(model: Lvlm, count: int = 2) -> tuple[int, ...]:
    """Return the dimensions with the largest normalized values of a prompt's first token, averaged over layers from 1."""
    sites = [Site("decoder", layer, "resid_pre") for layer in range(min(1, model.n_layers - 1), model.n_layers)]
    values = model.read(check_prompts(model)[0].inputs, sites, take=lambda _, x: normalized(x[0, 0]).abs())
    mean = torch.stack([x.cpu() for x in values.values()]).mean(0)
    return tuple(sorted(mean.topk(count).indices.tolist()))


def redistributed(
    weights: Tensor, image: Tensor, sinks: Tensor, factor: float, mass: float, sink_share: float
) -> Tensor:
    """Return weights ``[rows, heads, queries, keys]`` with the sinks' weight moved to other image tokens, in chosen heads."""
    on_image = (weights * image).sum(-1, keepdim=True)
    on_image_sinks = (weights * (image & sinks)).sum(-1, keepdim=True)
    others = image & ~sinks
    on_others = (weights * others).sum(-1, keepdim=True)
    chosen = (on_image >= mass) & (on_image_sinks <= sink_share * on_image) & (on_others > 0)
    freed = (1 - factor) * (weights * sinks).sum(-1, keepdim=True)
    share = weights / on_others.masked_fill(on_others == 0, 1)
    new = torch.where(others, weights + freed * share, torch.where(sinks, weights * factor, weights))
    return torch.where(chosen, new, weights)
