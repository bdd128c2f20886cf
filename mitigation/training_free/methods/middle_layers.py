"""Guided heads of middle layers: add the attention of an average head to every head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from lvlm.decoding.attention_rows import AttentionRows
from mitigation.training_free.attention import AttentionMethod, check_layers
from mitigation.training_free.method import Category, Variant, check_choice, check_range
from mitigation.training_free.published_sizes import scaled_layers

if TYPE_CHECKING:
    from lvlm.model import Lvlm


@dataclass(frozen=True)
class MiddleLayers(AttentionMethod):
    """Heads guided in middle layers: raise each head's scores of image tokens by what heads attend to on average.

    Before the softmax, scores of the last query to image token j become ``w_hj + alpha mean_h' |w_h'j|`` in middle layers, where
    attention to the image is largest and heads of hallucinated objects disagree. Jiang et al. 2024, arXiv 2411.16724. Published
    layers are 5 to 17 of 32 in the paper and 5 to 18 in the release's evaluation (`variant`); `alpha` is 0.5.

    `mitigation.training_free.attention.image_attention` is the paper's visual attention ratio, as a detector.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.methods.middle_layers import MiddleLayers
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["conflict"])
    >>> with MiddleLayers().applied(model):
    ...     answers = gs.answer(model, data)
    >>> len(answers), MiddleLayers().edited_layers(model)
    (6, (1, 2))
    """

    label: ClassVar[str] = "middle layers"
    category: ClassVar[Category] = "attention"
    source: ClassVar[str] = "arXiv 2411.16724"

    alpha: float = 0.5
    """Weight of the average head; at least 0."""
    layers: tuple[int, ...] | None = None
    """Blocks that are edited; None for the published ones, scaled."""
    variant: Variant = "paper"
    """``release``: layers 5 to 18 of 32 in place of 5 to 17."""

    def __post_init__(self) -> None:
        check_range("alpha", self.alpha, 0)
        check_layers(self.layers)
        check_choice("variant", self.variant, ("paper", "release"))

    @property
    def neutral(self) -> bool:
        """Whether the parameters leave attention unchanged."""
        return self.alpha == 0

    def edited_layers(self, model: Lvlm) -> tuple[int, ...]:
        """Return the blocks whose attention is edited."""
        if self.layers is not None:
            return self.layers
        return tuple(scaled_layers(5, 17 if self.variant == "paper" else 18, model.n_layers))

    def edited(self, rows: AttentionRows) -> AttentionRows:
        """Return attention with raised scores of image tokens."""
        raised = rows.scores + self.alpha * rows.scores.abs().mean(1, keepdim=True)
        return rows.with_scores(torch.where(rows.image, raised, rows.scores))
