"""AdaptVis: sharpen or smooth attention to the image by the confidence of the first token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from lvlm.access.reused_vision_run import reuse_vision_runs
from lvlm.decoding.attention_edits import edit_attention
from lvlm.decoding.attention_rows import AttentionRows
from lvlm.decoding.decoder import AnswerRule
from lvlm.decoding.loop import first_logits, generate
from mitigation.protocol import ForwardCost
from mitigation.training_free.attention import AttentionMethod, check_layers
from mitigation.training_free.method import check_choice, check_range

if TYPE_CHECKING:
    from lvlm.decoding.decoder import Decoder
    from lvlm.encoding.encode import Batch
    from lvlm.model import Lvlm
    from lvlm.sampling import Sampling


@dataclass(frozen=True)
class AdaptVis(AttentionMethod):
    """Adaptive temperature of attention to the image, for questions about relations.

    The prompt is read once as usual. If the probability of the most likely first token is below `threshold`, the scores of the
    prompt's last token to image tokens are multiplied by `smooth` before the softmax, otherwise by `sharpen`, and the prompt is
    read again; the answer continues from this second reading. Attention of generated tokens is not edited. Chen et al. 2025,
    arXiv 2503.01773; release read. Factors are .5 and 1.5; `threshold` is .4 in its script and .3 in its readme, and it chooses
    both per data set on validation data. ``rows="all"`` multiplies the scores of every token of the prompt.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.methods.adapt_vis import AdaptVis
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["conflict"])
    >>> with AdaptVis().applied(model):
    ...     answers = gs.answer(model, data)
    >>> len(answers)
    6
    """

    label: ClassVar[str] = "AdaptVis"
    source: ClassVar[str] = "arXiv 2503.01773"
    cost: ClassVar[ForwardCost] = ForwardCost(per_token=1, prompts=1)

    smooth: float = 0.5
    """Factor of scores if the model is not confident; at least 0."""
    sharpen: float = 1.5
    """Factor of scores if it is confident; at least 0."""
    threshold: float = 0.4
    """Smallest probability of the first token at which the model is confident; in [0, 1]."""
    rows: Literal["last", "all"] = "last"
    """Tokens of the prompt whose attention is edited."""
    layers: tuple[int, ...] | None = None
    """Blocks that are edited; None for all."""

    def __post_init__(self) -> None:
        check_range("smooth", self.smooth, 0)
        check_range("sharpen", self.sharpen, 0)
        check_range("threshold", self.threshold, 0, 1)
        check_choice("rows", self.rows, ("last", "all"))
        check_layers(self.layers)

    def edited_layers(self, model: Lvlm) -> tuple[int, ...]:
        """Return the blocks whose attention is edited."""
        return super().edited_layers(model) if self.layers is None else self.layers

    def _enter(self, model: Lvlm, stack: ExitStack) -> Decoder | None:
        return None if self.smooth == self.sharpen == 1 else _Decoder(self)


@dataclass(frozen=True)
class _Decoder:
    method: AdaptVis

    def first_logits(self, model: Lvlm, batch: Batch) -> Tensor:
        with self._edited(model, batch):
            return first_logits(model, batch, AnswerRule())

    def generate(
        self, model: Lvlm, batch: Batch, max_new_tokens: int, sampling: Sampling | None = None
    ) -> list[list[int]]:
        with self._edited(model, batch):
            return generate(model, batch, AnswerRule(), max_new_tokens, sampling=sampling)

    @contextmanager
    def _edited(self, model: Lvlm, batch: Batch) -> Iterator[None]:
        method = self.method
        with reuse_vision_runs(model):
            confidence = first_logits(model, batch, AnswerRule()).softmax(-1).amax(-1)
            factors = torch.where(confidence < method.threshold, method.smooth, method.sharpen)
            edit = prompt_factors(factors)
            layers, queries = method.edited_layers(model), "last of prompt" if method.rows == "last" else "prompt"
            with edit_attention(model, edit, layers=layers, queries=queries, registered=True):
                yield


def prompt_factors(factors: Tensor) -> Callable[[AttentionRows], AttentionRows]:
    """Return an edit that multiplies the scores of image tokens by the factor of each row, ``[rows]``."""

    def edit(rows: AttentionRows) -> AttentionRows:
        factor = factors.to(rows.scores)[:, None, None, None]
        return rows.with_scores(torch.where(rows.image, rows.scores * factor, rows.scores))

    return edit
