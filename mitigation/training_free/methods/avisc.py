"""AvisC: contrast with an answer without the image tokens that attention does not concentrate on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from groundscope.core.errors import ModelError
from lvlm.access.decoder_module import decoder_of
from lvlm.active_interventions import mark_intervention
from lvlm.decoding.attention_edits import read_attention
from lvlm.decoding.attention_rows import AttentionRows
from lvlm.decoding.decoder import AnswerRule, Branch, RuleDecoder, Step
from mitigation.protocol import ForwardCost
from mitigation.training_free.attention import check_attention_method
from mitigation.training_free.method import Category, Regime, TrainingFree, check_range
from mitigation.training_free.plausibility import contrast

if TYPE_CHECKING:
    from lvlm.decoding.decoder import Decoder
    from lvlm.encoding.encode import Batch
    from lvlm.model import Lvlm


@dataclass(frozen=True)
class AvisC(TrainingFree):
    """Attentional vision calibration: subtract the logits of a model that sees only the image tokens with outlying attention.

    Attention of the prompt's last query, averaged over heads, gives each layer's attention to the image; of the layers, the
    smallest set whose shares of the sum add to `share` is averaged. Image tokens with less than mean + `deviations` standard
    deviations get zero embeddings (after the projector) in the branch; their positions stay. The next token is chosen from
    ``(1 + alpha) l - alpha l'`` among tokens with at least `beta` times the largest probability. Woo et al. 2024,
    arXiv 2405.17820; release read: `alpha` is 1 by default there and 2.5 in its scripts for AMBER and LLaVA-Bench.

    The standard deviation divides by n - 1. The branch is read after the prompt, because its tokens come from the prompt's
    attention. In families that add features of the image in later layers (DeepStack), these are not changed.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.methods.avisc import AvisC
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["conflict"])
    >>> with AvisC().applied(model):
    ...     answers = gs.answer(model, data)
    >>> len(answers)
    6
    """

    label: ClassVar[str] = "AvisC"
    category: ClassVar[Category] = "decoding"
    source: ClassVar[str] = "arXiv 2405.17820"
    regime: ClassVar[Regime] = "sampling"
    cost: ClassVar[ForwardCost] = ForwardCost(per_token=2, prompts=1)

    alpha: float = 1.0
    """Weight of the contrast; at least 0."""
    beta: float = 0.1
    """Smallest probability of a candidate, as a share of the largest; in [0, 1], 0 for all tokens."""
    share: float = 0.5
    """Share of all attention to the image that the selected layers have; in (0, 1]."""
    deviations: float = 1.0
    """Number of standard deviations above the mean from which a token keeps its embedding."""

    def __post_init__(self) -> None:
        check_range("alpha", self.alpha, 0)
        check_range("beta", self.beta, 0, 1)
        check_range("share", self.share, 0, 1, above=True)
        check_range("deviations", self.deviations, 0)

    def _check(self, model: Lvlm) -> None:
        check_attention_method(self.label, model)
        if decoder_of(model) is model.hf or decoder_of(model) is getattr(model.hf, "model", None):
            msg = (
                f"{self.label} changes embeddings of the image, and in {model.name} ({model.spec.model_type}) image tokens are "
                "entries of the vocabulary"
            )
            raise ModelError(msg)

    def _enter(self, model: Lvlm, stack: ExitStack) -> Decoder | None:
        if self.alpha == self.beta == 0:
            return None
        attention = _PromptAttention()
        stack.enter_context(read_attention(model, attention.read, branches=[0]))
        return _Decoder(self, attention)


class _PromptAttention:
    """Attention of the last query of the current prompts to the keys, averaged over heads, by layer."""

    def __init__(self) -> None:
        self.layers: dict[int, Tensor] = {}
        self.image: Tensor | None = None

    def read(self, rows: AttentionRows) -> None:
        if rows.scores.shape[-1] == rows.layout.prompt:
            self.layers[rows.layer] = rows.weights[:, :, -1].mean(1)
            self.image = rows.layout.image


@dataclass(frozen=True, eq=False)
class _Decoder(RuleDecoder):
    method: AvisC
    attention: _PromptAttention

    def start(self, model: Lvlm, batch: Batch) -> AnswerRule:
        return _Rule(self.method, self.attention, model, batch)


class _Rule(AnswerRule):
    def __init__(self, method: AvisC, attention: _PromptAttention, model: Lvlm, batch: Batch) -> None:
        self._method, self._attention, self._model, self._batch = method, attention, model, batch

    def branches(self, first: Step) -> list[Branch]:
        model, method, image = self._model, self._method, self._attention.image
        if image is None:
            msg = f"{method.label}: no attention of the prompts of {model.name} was read"
            raise ModelError(msg)
        weights = torch.stack([w.to(image.device) for _, w in sorted(self._attention.layers.items())], dim=1)
        zeroed = image & ~outlying(weights, image, method.share, method.deviations)
        return [
            Branch.of(
                "outlying image tokens",
                model,
                self._batch.encodings,
                context=lambda: zero_embeddings(model, zeroed),
            )
        ]

    def combine(self, step: Step) -> Tensor:
        return contrast(step.logits, step.branches[0], self._method.alpha, self._method.beta)


def outlying(weights: Tensor, image: Tensor, share: float, deviations: float) -> Tensor:
    """Return the image tokens with outlying attention, bool ``[rows, keys]``.

    Parameters
    ----------
    weights
        Attention of one query, averaged over heads, ``[rows, layers, keys]``.
    image
        Which keys are image tokens, bool ``[rows, keys]``.
    share
        Share of the attention to the image that the selected layers have.
    deviations
        Number of standard deviations above the mean from which attention is outlying.
    """
    weights = weights.masked_fill(~image[:, None], 0)
    sums = weights.sum(-1)
    shares, order = (sums / sums.sum(-1, keepdim=True)).sort(dim=-1, descending=True)
    # A layer belongs to the smallest set if those before it do not reach the share.
    chosen = torch.zeros_like(sums).scatter(-1, order, (shares.cumsum(-1) - shares < share).to(sums))
    mean = (weights * chosen[..., None]).sum(1) / chosen.sum(-1, keepdim=True)
    outliers = torch.zeros_like(image)
    for row, tokens in enumerate(image):
        values = mean[row][tokens]
        if len(values) > 1:
            outliers[row, tokens] = values >= values.mean() + deviations * values.std()
    return outliers


@contextmanager
def zero_embeddings(model: Lvlm, columns: Tensor) -> Iterator[None]:
    """Set the embeddings of some tokens of a prompt to zero, bool ``[rows, tokens]``, while the context is open."""

    @mark_intervention
    def before(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        embeddings = kwargs.get("inputs_embeds")
        if not isinstance(embeddings, Tensor):
            msg = f"the decoder of {model.name} receives no embeddings that could be set to zero"
            raise ModelError(msg)
        mask = torch.nn.functional.pad(columns, (0, embeddings.shape[1] - columns.shape[1]))
        return args, {**kwargs, "inputs_embeds": embeddings.masked_fill(mask[..., None].to(embeddings.device), 0)}

    handle = decoder_of(model).register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
