"""Mean log-odds and their parts over groups of examples, for every split of an answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from groundscope.core.errors import ConfigError
from groundscope.core.statistics import cluster_bootstrap
from groundscope.core.text import nearest

if TYPE_CHECKING:
    import pandas as pd

ABOUT = ("id", "group", "level", "split", "kind", "question", "truth")
"""What a split records of its example."""
BY = ("level", "split", "kind", "said_true")
"""Columns by which splits can be grouped."""


class AnswerSplit(Protocol):
    """The split of one answer; its parts are attributes."""

    @property
    def example(self) -> Mapping[str, str]:
        """The columns `ABOUT` of the example."""
        ...

    @property
    def correct(self) -> bool:
        """Whether the model's answer is the true answer."""
        ...


def summarize(
    splits: Sequence[AnswerSplit], parts: Sequence[str], by: Sequence[str], *, resamples: int, seed: int
) -> pd.DataFrame:
    """Return one row per combination of the columns and part: ``n``, ``mean``, and ends clustered by image.

    Raises
    ------
    ConfigError
        If a column is unknown.
    """
    import pandas as pd

    unknown = [name for name in by if name not in BY]
    if unknown:
        msg = f"unknown column '{unknown[0]}' in by; choose from {', '.join(BY)}{nearest(unknown[0], BY)}"
        raise ConfigError(msg)
    members: dict[tuple[str, ...], list[AnswerSplit]] = {}
    for split in splits:
        about = {**split.example, "said_true": "yes" if split.correct else "no"}
        members.setdefault(tuple(about[name] for name in by), []).append(split)
    rows = []
    for key, of_key in sorted(members.items()):
        groups = [split.example["group"] for split in of_key]
        for part in parts:
            values = np.array([getattr(split, part) for split in of_key])
            low, high = cluster_bootstrap(values, groups, resamples=resamples, seed=seed)
            if len(set(groups)) < 2:
                low, high = math.nan, math.nan
            ends = {"n": len(of_key), "mean": values.mean(), "low": low, "high": high}
            rows.append({**dict(zip(by, key, strict=True)), "part": part, **ends})
    return pd.DataFrame(rows)
