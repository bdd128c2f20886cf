"""DeCo: add the logits of the inner layer that is most confident about a candidate token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lvlm.decoding.decoder import AnswerRule, RuleDecoder, Step
from mitigation.training_free.lens import (
    at_least_float32,
    block_outputs,
    check_blocks,
    check_depth,
    lens,
    stacked,
)
from mitigation.training_free.method import Category, TrainingFree, check_count, check_range
from mitigation.training_free.published_sizes import scaled_layers

if TYPE_CHECKING:
    from lvlm.decoding.decoder import Decoder
    from lvlm.encoding.encode import Batch
    from lvlm.model import Lvlm


@dataclass(frozen=True)
class DeCo(TrainingFree):
    """Dynamic correction decoding: models often recognize an object in inner layers that the last layer suppresses.

    Candidates are the `top_k` most likely tokens, cut where their probabilities add up to `top_p` (the token that
    crosses it stays). Among the inner layers i and the candidates v, the pair with the largest probability ``p_i(v)``
    selects the layer ``i*``; the next token is chosen from ``l + alpha p_i*(v) l_i*`` among the candidates. Logits
    ``l_i`` of a layer are those of the logit lens (final norm, then unembedding), and probabilities are over the whole
    vocabulary. Wang et al. 2024, arXiv 2410.11779; the release computes the same rule.

    Published layers are the outputs of blocks 19 to 27 of 32 (``hidden_states`` 20 to 28). They are scaled to the depth
    of the model; in one of fewer than 8 layers they may be the last block alone, whose logits are the model's own, so
    that the rule only sharpens the distribution. Set `layers` there. With `alpha` 0 the model is unchanged, without the
    restriction to candidates.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.methods.deco import DeCo
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["conflict"])
    >>> with DeCo().applied(model):
    ...     answers = gs.answer(model, data, generate=True)
    >>> len(answers), DeCo().used_parameters(model)["layers"]
    (6, (4,))
    """

    label: ClassVar[str] = "DeCo"
    category: ClassVar[Category] = "layers"
    source: ClassVar[str] = "arXiv 2410.11779"

    alpha: float = 0.6
    """Weight of the inner layer's logits; at least 0."""
    top_k: int = 20
    """Largest number of candidates."""
    top_p: float = 0.9
    """Probability of the candidates, in (0, 1]."""
    layers: tuple[int, ...] | None = None
    """Blocks whose outputs are compared; None for 19 to 27 of 32, scaled."""

    def __post_init__(self) -> None:
        check_range("alpha", self.alpha, 0)
        check_count("top_k", self.top_k)
        check_range("top_p", self.top_p, 0, 1, above=True)
        check_blocks(self.layers)

    def used_parameters(self, model: Lvlm) -> Mapping[str, Any]:
        """Return the parameters with the blocks that are used."""
        return {**self.parameters, "layers": self._layers(model)}

    def _layers(self, model: Lvlm) -> tuple[int, ...]:
        return tuple(scaled_layers(19, 27, model.n_layers)) if self.layers is None else self.layers

    def _check(self, model: Lvlm) -> None:
        check_depth(self.layers, model.n_layers, self.label, model)

    def _enter(self, model: Lvlm, stack: ExitStack) -> Decoder | None:
        return _Decoder(self) if self.alpha else None


@dataclass(frozen=True)
class _Decoder(RuleDecoder):
    method: DeCo

    def start(self, model: Lvlm, batch: Batch) -> AnswerRule:
        return _Rule(self.method, model)


class _Rule(AnswerRule):
    def __init__(self, method: DeCo, model: Lvlm) -> None:
        self._method, self._model = method, model
        self.sites = block_outputs(method._layers(model))

    def combine(self, step: Step) -> Tensor:
        method = self._method
        logits = at_least_float32(step.logits)
        inner = lens(self._model, stacked(step.activations, self.sites)).to(logits.device)
        return corrected(logits, inner, truncated(logits, method.top_k, method.top_p), method.alpha)


def truncated(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Return the candidates, bool ``[B, V]``: the `top_k` most likely tokens, up to the one that crosses `top_p`."""
    values, order = logits.softmax(-1).topk(min(top_k, logits.shape[-1]))
    inside = values.cumsum(-1) - values < top_p
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, inside)


def corrected(logits: Tensor, inner: Tensor, candidates: Tensor, alpha: float) -> Tensor:
    """Return DeCo's logits from those of the model ``[B, V]`` and of inner layers ``[B, layers, V]``."""
    confidence = inner.softmax(-1).masked_fill(~candidates[:, None], 0).amax(-1)  # [B, layers]
    most, layer = confidence.max(-1)
    chosen = inner[torch.arange(len(inner), device=inner.device), layer]
    return (logits + alpha * most[:, None] * chosen).masked_fill(~candidates, -math.inf)
