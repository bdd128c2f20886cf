"""Options of preference tuning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from groundscope.core.errors import ConfigError
from groundscope.core.text import nearest

LOSSES = ("dpo", "sft")


@dataclass(frozen=True)
class TuneOptions:
    """Options of `tune`.

    The defaults are for small models; for 7B models, POVID and CSR use rank 128, alpha 256 and learning rates from 1e-7 to 2e-6.

    Raises
    ------
    ConfigError
        For values out of range.

    Examples
    --------
    >>> import groundscope as gs
    >>> gs.TuneOptions(beta=0)
    Traceback (most recent call last):
    groundscope.core.errors.ConfigError: beta=0; give a number above 0
    """

    loss: Literal["dpo", "sft"] = "dpo"
    """``dpo`` (arXiv 2305.18290), or ``sft``: cross-entropy of the chosen answers, without the rejected ones."""
    beta: float = 0.1
    """DPO: strength of the constraint to the model before."""
    rank: int = 8
    alpha: float = 16.0
    """The additions are scaled by alpha / rank."""
    targets: tuple[str, ...] = ()
    """Names of the linear layers of the decoder that are adapted, such as ``("q_proj", "v_proj")``; empty for all."""
    learning_rate: float = 2e-4
    """Of AdamW without weight decay; it rises over the first `warmup` of the training and then falls linearly to 0."""
    warmup: float = 0.1
    epochs: int = 4
    batch_size: int = 16
    """Pairs per step."""
    validation_share: float = 0.2
    """Share of the pairs, on images of their own, that choose the epoch."""
    seed: int = 0
    """Seed of the initial matrices, of the order of the pairs and of the validation images."""

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            msg = f"unknown loss '{self.loss}'; choose from {', '.join(LOSSES)}{nearest(str(self.loss), LOSSES)}"
            raise ConfigError(msg)
        object.__setattr__(self, "targets", tuple(self.targets))
        for name in ("beta", "alpha", "learning_rate"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
                msg = f"{name}={value}; give a number above 0"
                raise ConfigError(msg)
        for name in ("rank", "epochs", "batch_size"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                msg = f"{name}={value}; give a whole number of at least 1"
                raise ConfigError(msg)
        if not 0 <= self.warmup < 1 or not 0 < self.validation_share < 1:
            msg = f"warmup={self.warmup}, validation_share={self.validation_share}; give shares between 0 and 1"
            raise ConfigError(msg)
