"""RITUAL: add the answer to a randomly transformed image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from torch import Tensor

from lvlm.decoding.decoder import Branch, Step
from mitigation.protocol import ForwardCost
from mitigation.training_free.branch_methods import BranchMethod
from mitigation.training_free.branches import with_images
from mitigation.training_free.method import Category, Regime, check_choice, check_range
from mitigation.training_free.plausibility import plausible
from mitigation.training_free.random_transforms import KINDS, Kind, TransformedImage, draw
from mitigation.training_free.seeds import generator_of

if TYPE_CHECKING:
    from concepts.image_source import ImageSource
    from concepts.schema import Example
    from lvlm.encoding.encode import Batch
    from lvlm.model import Lvlm


@dataclass(frozen=True)
class RITUAL(BranchMethod):
    """Random image transformations: add the logits that the model has for a transformed image.

    The next token is chosen from ``l + kappa l'`` among tokens with at least `beta` times the largest probability under l, where
    ``l'`` are the logits with one random transform of the image, drawn once for each answer: a flip, a rotation, color jitter, a
    blur or a crop (`mitigation.training_free.random_transforms`). Woo et al. 2024, arXiv 2405.17821; transforms and parameters
    are those of the release. Images of a question with several are transformed one by one.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.methods.ritual import RITUAL
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["conflict"])
    >>> with RITUAL(transform="horizontal flip").applied(model):
    ...     answers = gs.answer(model, data)
    >>> len(answers)
    6
    """

    label: ClassVar[str] = "RITUAL"
    category: ClassVar[Category] = "decoding"
    source: ClassVar[str] = "arXiv 2405.17821"
    regime: ClassVar[Regime] = "sampling"
    cost: ClassVar[ForwardCost] = ForwardCost(per_token=2, prompts=1)

    kappa: float = 3.0
    """Weight of the transformed image; at least 0."""
    beta: float = 0.1
    """Smallest probability of a candidate, as a share of the largest; in [0, 1], 0 for all tokens."""
    transform: str = "random"
    """The transform, one of `random_transforms.KINDS`; ``random`` draws one of them."""
    seed: int = 0
    """Seed of the transform, together with the id of the question."""

    def __post_init__(self) -> None:
        check_range("kappa", self.kappa, 0)
        check_range("beta", self.beta, 0, 1)
        check_choice("transform", self.transform, ("random", *KINDS))

    @property
    def _neutral(self) -> bool:
        return self.kappa == 0 and self.beta == 0

    def _branches(self, model: Lvlm, batch: Batch, state: Any) -> Sequence[Branch]:
        images = [self._transformed(encoding.example) for encoding in batch.encodings]
        return [with_images(model, batch, "transformed image", images)]

    def _transformed(self, example: Example) -> list[ImageSource]:
        rng = generator_of(self.seed, example.id, "transform")
        kind = KINDS[int(rng.integers(len(KINDS)))] if self.transform == "random" else cast("Kind", self.transform)
        return [TransformedImage(image, draw(kind, image.load().size, rng)) for image in example.images]

    def _combine(self, step: Step, state: Any) -> Tensor:
        logits = step.logits + self.kappa * step.branches[0]
        return logits.masked_fill(~plausible(step.logits, self.beta), -math.inf)
