"""VAF (ClearSight): amplify attention to the image in layers that fuse image and text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from lvlm.decoding.attention_edits import Queries
from lvlm.decoding.attention_rows import AttentionRows
from mitigation.training_free.attention import AttentionMethod, check_layers
from mitigation.training_free.method import check_range
from mitigation.training_free.published_sizes import scaled_layers

if TYPE_CHECKING:
    from lvlm.model import Lvlm


@dataclass(frozen=True)
class VAF(AttentionMethod):
    """Visual amplification fusion (ClearSight): multiply scores of image tokens, and of the tokens before the image.

    Before the softmax, scores to image tokens are multiplied by `enhance` and scores to the tokens before the image (the system
    prompt) by `suppress`, at every token after the image, in the prompt too. Signed scores are multiplied, so a negative score
    of an image token decreases. Yin et al. 2025 (CVPR), arXiv 2503.13107; the release computes the same rule. Published layers
    are 9 to 14 of 32, the factors 1.15 and 0.95. Prompts without an image are not edited.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.methods.vaf import VAF
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["conflict"])
    >>> with VAF().applied(model):
    ...     answers = gs.answer(model, data)
    >>> len(answers), VAF().edited_layers(model)
    (6, (2,))
    """

    label: ClassVar[str] = "VAF"
    source: ClassVar[str] = "arXiv 2503.13107"
    queries: ClassVar[Queries] = "after image"

    enhance: float = 1.15
    """Factor of scores to image tokens; at least 0."""
    suppress: float = 0.95
    """Factor of scores to tokens before the image; at least 0."""
    layers: tuple[int, ...] | None = None
    """Blocks that are edited; None for 9 to 14 of 32, scaled."""

    def __post_init__(self) -> None:
        check_range("enhance", self.enhance, 0)
        check_range("suppress", self.suppress, 0)
        check_layers(self.layers)

    @property
    def neutral(self) -> bool:
        """Whether the parameters leave attention unchanged."""
        return self.enhance == self.suppress == 1

    def edited_layers(self, model: Lvlm) -> tuple[int, ...]:
        """Return the blocks whose attention is edited."""
        return tuple(scaled_layers(9, 14, model.n_layers)) if self.layers is None else self.layers

    def edited(self, rows: AttentionRows) -> AttentionRows:
        """Return attention with multiplied scores."""
        system = rows.keys(rows.layout.before_image)
        scores = torch.where(rows.image, rows.scores * self.enhance, rows.scores)
        return rows.with_scores(torch.where(system, rows.scores * self.suppress, scores))
