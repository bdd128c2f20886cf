"""SID: contrast with an answer that sees only the image tokens that are attended to least."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from groundscope.core.errors import ModelError
from lvlm.decoding.attention_edits import edit_attention, read_attention
from lvlm.decoding.attention_rows import AttentionRows
from lvlm.decoding.decoder import Branch, Step
from mitigation.protocol import ForwardCost
from mitigation.training_free.attention import check_attention_method
from mitigation.training_free.branch_methods import BranchMethod
from mitigation.training_free.method import Category, Variant, check_choice, check_count, check_range
from mitigation.training_free.plausibility import contrast
from mitigation.training_free.published_sizes import scaled_count

if TYPE_CHECKING:
    from lvlm.decoding.decoder import Decoder
    from lvlm.encoding.encode import Batch
    from lvlm.model import Lvlm

SELECTION_BLOCK = 1
"""Block whose attention selects image tokens; blocks after it see the selected ones only. It is not scaled to the depth."""


@dataclass(frozen=True)
class SID(BranchMethod):
    """Self-introspective decoding: subtract the logits of a model that sees only unimportant image tokens.

    In the branch, the attention of block 1, averaged over heads, selects for each query the K image tokens with the lowest
    weights; from block 2 on the query attends to no other image tokens. All rows of the prompt share the set of its last row, and
    each generated token has its own, so the set is selected again at every token. The branch has its own cache. The next token is
    chosen from ``(1 + alpha) l - alpha l'`` among tokens with at least `beta` times the largest probability. Huo et al. 2025,
    arXiv 2408.02032.

    ``variant="release"``: the greedy decoding of the released code takes the maximum of the contrast without the restriction to
    plausible tokens, and its `alpha` does not reach the contrast, which uses 0.5. K is 100 of 576 in its POPE scripts and 50 in
    others; it is scaled to the number of image tokens. Blocks 0 and 1 of prompt and branch are computed twice, although they are
    equal at the prompt.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.methods.sid import SID
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["conflict"])
    >>> with SID().applied(model):
    ...     answers = gs.answer(model, data)
    >>> len(answers)
    6
    """

    label: ClassVar[str] = "SID"
    category: ClassVar[Category] = "decoding"
    source: ClassVar[str] = "arXiv 2408.02032"
    cost: ClassVar[ForwardCost] = ForwardCost(per_token=2, prompts=1)

    alpha: float = 1.0
    """Weight of the contrast; at least 0."""
    beta: float = 0.1
    """Smallest probability of a candidate, as a share of the largest; in [0, 1], 0 for all tokens."""
    count: int = 100
    """Number of image tokens that stay, of 576."""
    variant: Variant = "paper"
    """``release``: weight 0.5 and all tokens as candidates, whatever `alpha` and `beta` are."""

    def __post_init__(self) -> None:
        check_range("alpha", self.alpha, 0)
        check_range("beta", self.beta, 0, 1)
        check_count("count", self.count)
        check_choice("variant", self.variant, ("paper", "release"))

    @property
    def _neutral(self) -> bool:
        return self.variant == "paper" and self.alpha == self.beta == 0

    def used_parameters(self, model: Lvlm) -> Mapping[str, Any]:
        """Return the parameters with the weight and the threshold that are used."""
        alpha, beta = self._weights
        return {**self.parameters, "alpha": alpha, "beta": beta}

    @property
    def _weights(self) -> tuple[float, float]:
        return (self.alpha, self.beta) if self.variant == "paper" else (0.5, 0.0)

    def _check(self, model: Lvlm) -> None:
        check_attention_method(self.label, model)
        if model.n_layers <= SELECTION_BLOCK + 1:
            msg = f"{self.label} needs a decoder of at least 3 layers, and {model.name} has {model.n_layers}"
            raise ModelError(msg)

    def _enter(self, model: Lvlm, stack: ExitStack) -> Decoder | None:
        decoder = super()._enter(model, stack)
        if decoder is not None:
            selection = _Selection(self.count)
            stack.enter_context(read_attention(model, selection.read, layers=[SELECTION_BLOCK], branches=[1]))
            later = range(SELECTION_BLOCK + 1, model.n_layers)
            stack.enter_context(
                edit_attention(model, selection.mask, layers=later, queries="all", branches=[1], registered=True)
            )
        return decoder

    def _branches(self, model: Lvlm, batch: Batch, state: Any) -> list[Branch]:
        return [Branch.of("least attended image tokens", model, batch.encodings)]

    def _combine(self, step: Step, state: Any) -> Tensor:
        return contrast(step.logits, step.branches[0], *self._weights)


class _Selection:
    """Image tokens that are excluded from attention in the current forward pass."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._excluded: Tensor | None = None

    def read(self, rows: AttentionRows) -> None:
        """Select by the attention of one block at the last prompt token and the generated ones."""
        live = int(rows.queries.any(0).sum())
        weights, image = rows.weights[:, :, -live:].mean(1), rows.image[:, 0, -live:]
        counts = [scaled_count(self._count, max(int(n), 1)) for n in rows.layout.image.sum(1)]
        self._excluded = image & ~lowest(weights, image, torch.tensor(counts, device=weights.device))

    def mask(self, rows: AttentionRows) -> AttentionRows | None:
        """Exclude the other image tokens from attention; prompt rows share the set of the last one."""
        if self._excluded is None:
            return None
        excluded, queries = self._excluded, rows.scores.shape[2]
        earlier = excluded[:, :1].expand(-1, queries - excluded.shape[1], -1)
        mask = torch.cat([earlier, excluded], dim=1)[:, None]
        return rows.with_scores(rows.scores.masked_fill(mask, -math.inf))


def lowest(weights: Tensor, image: Tensor, counts: Tensor) -> Tensor:
    """Return the image tokens with the lowest weights, bool ``[rows, queries, keys]``: as many as `counts` states for a row."""
    rank = weights.masked_fill(~image, math.inf).argsort(dim=-1, stable=True).argsort(dim=-1)
    return image & (rank < counts[:, None, None])
