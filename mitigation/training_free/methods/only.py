"""ONLY: contrast with text-biased logits from one intervened layer of the same forward pass."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from groundscope.core.errors import ModelError
from lvlm.decoding.attention_edits import read_attention
from lvlm.decoding.attention_rows import AttentionRows
from lvlm.decoding.decoder import AnswerRule, RuleDecoder, Step
from lvlm.family.specification import find, resolve
from lvlm.sites import Site
from mitigation.protocol import ForwardCost
from mitigation.training_free.attention import check_attention_method
from mitigation.training_free.lens import at_least_float32
from mitigation.training_free.method import Category, Regime, TrainingFree, check_range
from mitigation.training_free.plausibility import plausible

if TYPE_CHECKING:
    from lvlm.decoding.decoder import Decoder
    from lvlm.encoding.encode import Batch
    from lvlm.model import Lvlm


@dataclass(frozen=True)
class ONLY(TrainingFree):
    """One-layer intervention: logits from the text-biased heads of layer 0 are added or subtracted.

    Of the softmax weights of layer 0 at the last query, weights to text (without the first token) above their mean + sd
    become 0, and weights to the image above theirs too; nothing is renormalized. Heads whose ratio of entropies of the
    remaining weights, text over image, each normalized to sum 1, is below the mean ratio are zeroed. The output projection of
    what remains is u. With h the input of the last layer and ``h_L`` its output, ::

        u = input_norm(u) + 0.2 h;   u = u + MLP(post_norm(u));   u = final_norm(u) + 0.5 final_norm(h_L);   l' = lm_head(u)

    With ``d = sum |p - p'|``, the next token is chosen from ``l + 3 l'`` if d < `threshold`, else from ``2 l - l'``, among tokens
    with at least `beta` times the largest probability. Wan et al. 2025, arXiv 2507.00898; release read, which always samples;
    `threshold` is 0.2 for POPE and 0.25 elsewhere. Standard deviations divide by n - 1. The layers are those of decoders in the
    form of LLaMA; others are refused.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.methods.only import ONLY
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["conflict"])
    >>> with ONLY().applied(model):
    ...     answers = gs.answer(model, data)
    >>> len(answers)
    6
    """

    label: ClassVar[str] = "ONLY"
    category: ClassVar[Category] = "decoding"
    source: ClassVar[str] = "arXiv 2507.00898"
    regime: ClassVar[Regime] = "sampling"
    cost: ClassVar[ForwardCost] = ForwardCost(per_token=1.05)

    added: float = 3.0
    """Weight of ``l'`` if the distributions are close; at least 0."""
    subtracted: float = 1.0
    """Weight of the contrast if they are not; at least 0."""
    threshold: float = 0.2
    """Sum of absolute differences of probabilities below which distributions are close; in [0, 2]."""
    beta: float = 0.1
    """Smallest probability of a candidate, as a share of the largest; in [0, 1], 0 for all tokens."""

    def __post_init__(self) -> None:
        check_range("added", self.added, 0)
        check_range("subtracted", self.subtracted, 0)
        check_range("threshold", self.threshold, 0, 2)
        check_range("beta", self.beta, 0, 1)

    def _check(self, model: Lvlm) -> None:
        check_attention_method(self.label, model)
        _parts(model, self.label)

    def _enter(self, model: Lvlm, stack: ExitStack) -> Decoder | None:
        if self.added == self.subtracted == self.beta == 0:
            return None
        reader = _FirstLayer()
        stack.enter_context(read_attention(model, reader.read, layers=[0], branches=[0]))
        return _Decoder(self, reader)


class _FirstLayer:
    """Outputs of the text-biased heads of layer 0 at the last query of the current forward pass, ``[rows, heads x width]``."""

    def __init__(self) -> None:
        self.heads: Tensor | None = None

    def read(self, rows: AttentionRows) -> None:
        layout = rows.layout
        text = layout.valid & ~layout.image & (layout.valid.cumsum(1) > 1)
        weights = biased(rows.weights[:, :, -1], text[:, None], layout.image[:, None])
        self.heads = rows.with_weights(weights[:, :, None]).outputs[:, :, 0].flatten(1)


@dataclass(frozen=True, eq=False)
class _Decoder(RuleDecoder):
    method: ONLY
    reader: _FirstLayer

    def start(self, model: Lvlm, batch: Batch) -> AnswerRule:
        return _Rule(self.method, self.reader, model)


class _Rule(AnswerRule):
    def __init__(self, method: ONLY, reader: _FirstLayer, model: Lvlm) -> None:
        self._method, self._reader, self._model = method, reader, model
        self.sites = (
            Site("decoder", model.n_layers - 1, "resid_pre"),
            Site("decoder", model.n_layers - 1, "resid_post"),
        )

    @torch.no_grad()
    def combine(self, step: Step) -> Tensor:
        method, model = self._method, self._model
        entering, leaving = (step.activations[str(site)] for site in self.sites)
        if self._reader.heads is None:
            msg = f"{method.label}: attention of layer 0 of {model.name} was not read"
            raise ModelError(msg)
        input_norm, post_norm, mlp, final_norm = _parts(model, method.label)
        u = model.output_projection("decoder", 0)(self._reader.heads.to(entering.dtype))
        u = input_norm(u) + 0.2 * entering
        u = u + mlp(post_norm(u))
        # The final norm is applied to both parts before their sum, so the unembedding is applied without it.
        u = final_norm(u) + 0.5 * final_norm(leaving)
        other = at_least_float32(resolve(model.hf, model.spec.unembedding or "", model.spec)(u))
        logits = at_least_float32(step.logits)
        return mixed_logits(logits, other, method.added, method.subtracted, method.threshold, method.beta)


def biased(weights: Tensor, text: Tensor, image: Tensor) -> Tensor:
    """Return the weights ``[rows, heads, keys]`` of text-biased heads without the outliers; other heads are zero.

    `text` and `image` are masks ``[rows, 1, keys]``.
    """
    weights = weights.masked_fill(_outliers(weights, text) | _outliers(weights, image), 0)
    ratio = _entropy(weights, text) / _entropy(weights, image)
    return weights * (ratio >= ratio.mean(1, keepdim=True))[..., None]


def _outliers(weights: Tensor, tokens: Tensor) -> Tensor:
    """Return which weights to some tokens are above their mean + sd."""
    count = tokens.sum(-1, keepdim=True)
    inside = weights.masked_fill(~tokens, 0)
    mean = inside.sum(-1, keepdim=True) / count.clamp(min=1)
    squares = (weights - mean).square().masked_fill(~tokens, 0).sum(-1, keepdim=True)
    return tokens & (weights > mean + (squares / (count - 1).clamp(min=1)).sqrt())


def _entropy(weights: Tensor, tokens: Tensor) -> Tensor:
    """Return the entropy of the weights to some tokens, normalized to sum 1, in nats."""
    inside = weights.masked_fill(~tokens, 0)
    p = inside / inside.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    return -torch.xlogy(p, p).sum(-1)


def mixed_logits(
    logits: Tensor, other: Tensor, added: float, subtracted: float, threshold: float, beta: float
) -> Tensor:
    """Return ``l + added l'`` where the distributions are close, else ``(1 + subtracted) l - subtracted l'``, of candidates."""
    close = (logits.softmax(-1) - other.softmax(-1)).abs().sum(-1, keepdim=True) < threshold
    mixed = torch.where(close, logits + added * other, (1 + subtracted) * logits - subtracted * other)
    return mixed.masked_fill(~plausible(logits, beta), -math.inf)


def _parts(model: Lvlm, label: str) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
    """Return the norms and the MLP of the last layer, and the final norm; raise `ModelError` for other forms of layers."""
    last = model.layers("decoder")[-1]
    paths = ("input_layernorm", "post_attention_layernorm", "mlp")
    modules = [find(last, path) for path in paths]
    final = find(model.hf, model.spec.final_norm) if model.spec.final_norm else None
    extra = find(last, "pre_feedforward_layernorm")
    if extra is not None or not all(isinstance(m, nn.Module) for m in (*modules, final)):
        msg = (
            f"{label} runs the last layer of decoders in the form of LLaMA (input norm, post-attention norm, MLP), and that of "
            f"{model.name} ({model.spec.model_type}) has another form"
        )
        raise ModelError(msg)
    return (*modules, final)  # type: ignore[return-value]
