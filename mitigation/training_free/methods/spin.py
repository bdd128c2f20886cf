"""SPIN: suppress heads that attend least to the image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from lvlm.decoding.attention_rows import AttentionRows
from mitigation.training_free.attention import AttentionMethod, check_layers
from mitigation.training_free.method import Category, check_range

if TYPE_CHECKING:
    from lvlm.model import Lvlm


@dataclass(frozen=True)
class SPIN(AttentionMethod):
    """Image-guided head suppression: scale the outputs of heads that attend least to image tokens, at every token again.

    The score of a head is the sum of its scores, before the softmax, of the last query to image tokens. In each layer the
    ``floor(keep H)`` heads with the highest scores stay, and outputs of all other heads are multiplied by `factor` before the
    output projection. Sarkar et al. 2025, arXiv 2505.16411; the release computes the same rule. Defaults are those of the
    release for captions (CHAIR); for POPE it uses ``keep=0.8, factor=0.1``. Rows without an image are not edited.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.methods.spin import SPIN
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["conflict"])
    >>> with SPIN(keep=0.8, factor=0.1).applied(model):
    ...     answers = gs.answer(model, data)
    >>> len(answers)
    6
    """

    label: ClassVar[str] = "SPIN"
    category: ClassVar[Category] = "heads"
    source: ClassVar[str] = "arXiv 2505.16411"

    keep: float = 0.95
    """Share of heads that stay; in [0, 1]."""
    factor: float = 0.08
    """Factor of the outputs of other heads; at least 0."""
    layers: tuple[int, ...] | None = None
    """Blocks that are edited; None for all."""

    def __post_init__(self) -> None:
        check_range("keep", self.keep, 0, 1)
        check_range("factor", self.factor, 0)
        check_layers(self.layers)

    @property
    def neutral(self) -> bool:
        """Whether the parameters leave attention unchanged."""
        return self.keep == 1 or self.factor == 1

    def edited_layers(self, model: Lvlm) -> tuple[int, ...]:
        """Return the blocks whose attention is edited."""
        return super().edited_layers(model) if self.layers is None else self.layers

    def edited(self, rows: AttentionRows) -> AttentionRows:
        """Return attention with scaled outputs of heads."""
        stays = top_heads(rows.scores, rows.image, self.keep) | ~rows.image.any(-1)
        factors = torch.full_like(rows.scores[..., 0], self.factor).masked_fill_(stays, 1)
        return rows.with_outputs(rows.outputs * factors[..., None])


def top_heads(scores: Tensor, image: Tensor, keep: float) -> Tensor:
    """Return the heads with the highest sums of scores to image tokens, bool ``[rows, heads, queries]``."""
    sums = torch.where(image, scores, 0).sum(-1)
    top = sums.topk(kept_count(keep, sums.shape[1]), dim=1).indices
    return torch.zeros_like(sums, dtype=torch.bool).scatter(1, top, value=True)


def kept_count(keep: float, heads: int) -> int:
    """Return the number of heads that stay, rounded down.

    Examples
    --------
    >>> from mitigation.training_free.methods.spin import kept_count
    >>> kept_count(0.8, 5), kept_count(0.95, 8)
    (4, 7)
    """
    # Shares such as .8 of 5 heads are whole numbers that floating point may put just below.
    return math.floor(keep * heads + 1e-9)
