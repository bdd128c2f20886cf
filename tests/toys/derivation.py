"""An activation store in memory with a planted direction, and the shrunk covariance of Ledoit and Wolf."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from groundscope.core.errors import SiteError
from lvlm import Head, Site

HEAD, D, DIM, N = Head(2, 1), 32, 8, 400


@dataclass(frozen=True)
class Arrays:
    """A store in memory: activations with a planted concept, some rows without any."""

    x: np.ndarray
    labels: Mapping[str, np.ndarray]

    @property
    def provenance(self) -> Mapping[str, Any]:
        return {"model": {"name": "m", "config": "c" * 64}}

    @property
    def digest(self) -> str:
        return "s" * 64

    def read(self, site: str | Site, tokens: str, head: int | None = None, examples: Any = None) -> np.ndarray:
        assert tokens == "last"
        if str(site) not in ("decoder.L2.z", "decoder.L2.resid_post"):
            raise SiteError(str(site))
        return self.x if head is None else self.x[:, head * DIM : (head + 1) * DIM]

    def frame(self) -> pd.DataFrame:
        return pd.DataFrame({"id": [str(i) for i in range(len(self))], **self.labels})

    def __len__(self) -> int:
        return len(self.x)


def ledoit_wolf(x: np.ndarray) -> np.ndarray:
    """Shrunk covariance of centered rows, by the formulas of Ledoit and Wolf (2004), row by row."""
    n, d = x.shape
    sample = x.T @ x / n
    scale = np.trace(sample) / d
    spread = sum(((np.outer(row, row) - sample) ** 2).sum() for row in x) / n**2
    distance = ((sample - scale * np.eye(d)) ** 2).sum()
    share = min(spread, distance) / distance
    return (1 - share) * sample + share * scale * np.eye(d)
