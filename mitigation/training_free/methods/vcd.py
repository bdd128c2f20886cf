"""VCD: contrast with the answer to a noisy image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lvlm.decoding.decoder import Branch, Step
from mitigation.protocol import ForwardCost
from mitigation.training_free.branch_methods import BranchMethod
from mitigation.training_free.branches import with_pixels
from mitigation.training_free.method import Category, Regime, check_range
from mitigation.training_free.plausibility import contrast
from mitigation.training_free.seeds import torch_generator_of

if TYPE_CHECKING:
    from concepts.schema import Example
    from lvlm.encoding.encode import Batch
    from lvlm.model import Lvlm


@dataclass(frozen=True)
class VCD(BranchMethod):
    """Visual contrastive decoding: subtract the logits that the model has for the image under diffusion noise.

    The next token is chosen from ``(1 + alpha) l - alpha l'`` among tokens with at least `beta` times the largest probability,
    where ``l'`` are the logits with noise in the image. Noise is that of step `step` (counted from 0) of a diffusion process of
    1,000 steps on the preprocessed pixels, drawn once for each answer. Leng et al. 2024, arXiv 2311.16922; parameters and
    schedule are those of the release, whose scripts for single benchmarks use `beta` 0.2.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.methods.vcd import VCD
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["conflict"])
    >>> with VCD().applied(model):
    ...     answers = gs.answer(model, data)
    >>> len(answers)
    6
    """

    label: ClassVar[str] = "VCD"
    category: ClassVar[Category] = "decoding"
    source: ClassVar[str] = "arXiv 2311.16922"
    regime: ClassVar[Regime] = "sampling"
    cost: ClassVar[ForwardCost] = ForwardCost(per_token=2, prompts=1)

    alpha: float = 1.0
    """Weight of the contrast; at least 0."""
    beta: float = 0.1
    """Smallest probability of a candidate, as a share of the largest; in [0, 1], 0 for all tokens."""
    step: int = 500
    """Step of the diffusion process, 0 to 999; later steps are noisier."""
    seed: int = 0
    """Seed of the noise, together with the id of the question."""

    def __post_init__(self) -> None:
        check_range("alpha", self.alpha, 0)
        check_range("beta", self.beta, 0, 1)
        check_range("step", self.step, 0, 999)

    @property
    def _neutral(self) -> bool:
        return self.alpha == 0 and self.beta == 0

    def _branches(self, model: Lvlm, batch: Batch, state: Any) -> Sequence[Branch]:
        def noisy(example: Example, name: str, pixels: Tensor) -> Tensor:
            return add_noise(pixels, self.step, self.seed, example.id, name)

        return [with_pixels(model, batch, "noisy image", noisy)]

    def _combine(self, step: Step, state: Any) -> Tensor:
        return contrast(step.logits, step.branches[0], self.alpha, self.beta)


def kept_signal(step: int) -> float:
    """Return the share of the variance of pixels that remains after a step of the diffusion process, in float64."""
    betas = 1 / (1 + np.exp(-np.linspace(-6, 6, 1000))) * (0.5e-2 - 1e-5) + 1e-5
    return float(np.cumprod(1 - betas)[step])


def add_noise(pixels: Tensor, step: int, *names: object) -> Tensor:
    """Return pixels after a step of the diffusion process; the noise depends on the names only."""
    noise = torch.randn(pixels.shape, generator=torch_generator_of(*names), dtype=torch.float32)
    signal = kept_signal(step)
    return (signal**0.5 * pixels.float() + (1 - signal) ** 0.5 * noise.to(pixels.device)).to(pixels.dtype)
