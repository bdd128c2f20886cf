"""PAI: pay more attention to the image, and contrast with the answer without it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lvlm.decoding.attention_edits import Editor, edit_attention
from lvlm.decoding.attention_rows import AttentionRows
from lvlm.decoding.decoder import Branch, Step
from mitigation.protocol import ForwardCost
from mitigation.training_free.attention import AttentionMethod, check_layers
from mitigation.training_free.branch_methods import BranchDecoder, BranchMethod
from mitigation.training_free.branches import check_runs_without_image, without_image
from mitigation.training_free.method import check_range
from mitigation.training_free.plausibility import contrast
from mitigation.training_free.published_sizes import scaled_layers

if TYPE_CHECKING:
    from lvlm.decoding.decoder import Decoder
    from lvlm.encoding.encode import Batch
    from lvlm.model import Lvlm


@dataclass(frozen=True)
class PAI(AttentionMethod, BranchMethod):
    """Pay attention to image: raise the attention scores of image tokens, and subtract what the model says without an image.

    Before the softmax, scores of the last query to image tokens become ``w + alpha |w|`` in `layers`. The next token is chosen
    from ``gamma (log p - log p') + log p' = gamma log p - (gamma - 1) log p'`` among tokens with at least `beta` times the
    largest p, where p is the distribution with edited attention and p' that of the prompt without its image tokens, whose
    attention is not edited. Liu et al. 2024, arXiv 2407.21771; the release computes the same rule.

    Published layers are 2 to 31 of 32; `gamma` is 1.1 in the paper and 2 by default in the release's scripts. In families with
    softcapped scores, scores are edited after the cap.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.methods.pai import PAI
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["conflict"])
    >>> with PAI().applied(model):
    ...     answers = gs.answer(model, data)
    >>> len(answers)
    6
    """

    label: ClassVar[str] = "PAI"
    source: ClassVar[str] = "arXiv 2407.21771"
    cost: ClassVar[ForwardCost] = ForwardCost(per_token=2, prompts=1)

    alpha: float = 0.2
    """Relative increase of the scores; at least 0."""
    gamma: float = 1.1
    """Weight of the answer with the image; 1 for no contrast."""
    beta: float = 0.1
    """Smallest probability of a candidate, as a share of the largest; in [0, 1], 0 for all tokens."""
    layers: tuple[int, ...] | None = None
    """Blocks that are edited; None for 2 to 31 of 32, scaled."""

    def __post_init__(self) -> None:
        check_range("alpha", self.alpha, 0)
        check_range("gamma", self.gamma, 1)
        check_range("beta", self.beta, 0, 1)
        check_layers(self.layers)

    @property
    def forward_cost(self) -> ForwardCost:
        """Without a contrast there is no second pass."""
        return ForwardCost() if self.gamma == 1 else self.cost

    def edited_layers(self, model: Lvlm) -> tuple[int, ...]:
        """Return the blocks whose attention is edited."""
        return tuple(scaled_layers(2, 31, model.n_layers)) if self.layers is None else self.layers

    def edited(self, rows: AttentionRows) -> AttentionRows:
        """Return attention with raised scores of image tokens."""
        return rows.with_scores(torch.where(rows.image, rows.scores + self.alpha * rows.scores.abs(), rows.scores))

    def _check(self, model: Lvlm) -> None:
        super()._check(model)
        if self.gamma != 1:
            check_runs_without_image(model, self.label)

    def _enter_edit(self, model: Lvlm, stack: ExitStack, editor: Editor) -> Decoder | None:
        if self.alpha:
            layers = self.edited_layers(model)
            stack.enter_context(edit_attention(model, editor, layers=layers, branches=[0], registered=True))
        return None if self.gamma == 1 and (self.alpha == 0 or self.beta == 0) else BranchDecoder(self)

    def _branches(self, model: Lvlm, batch: Batch, state: Any) -> Sequence[Branch]:
        return [] if self.gamma == 1 else [without_image(model, batch)]

    def _combine(self, step: Step, state: Any) -> Tensor:
        log_p = step.logits.log_softmax(-1)
        blind = step.branches[0].log_softmax(-1) if step.branches else torch.zeros_like(log_p)
        return contrast(log_p, blind, self.gamma - 1, self.beta)
