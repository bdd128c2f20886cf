"""What each part of the input brought to an answer, and over many answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from groundscope.core import artifacts
from groundscope.core.errors import ConfigError, StoreError
from groundscope.core.statistics import cluster_bootstrap

if TYPE_CHECKING:
    import pandas as pd

VERSION = 1
_KIND = "sources"
_ARRAYS = ("shares", "spread", "error", "coalitions", "values")
ABOUT = ("id", "group", "level", "split", "kind", "question", "truth")
BY = ("level", "split", "kind", "said_true")
PARTS = ("prior", "image", "prompt", "interaction", "log_odds")


@dataclass(frozen=True, eq=False)
class SourceShares:
    """One answer's log-odds, split: ``prior + shares.sum() == log_odds``. Everything in natural log-odds."""

    example: Mapping[str, str]
    """``id``, ``group``, ``level``, ``split``, ``kind``, ``question`` and ``truth`` of the example."""
    answer: str
    """Whose log-odds are split."""
    said: str
    """What the model answers."""
    players: tuple[str, ...]
    """Parts of the image first, then parts of the prompt."""
    of_image: int
    """How many of the players are parts of the image."""
    log_odds: float
    """Of `answer` against all other candidates, with everything given."""
    prior: float
    """The same with everything neutral: what the model would say anyway."""
    shares: np.ndarray
    """Shapley value of each player, float64 ``[n_players]``."""
    spread: np.ndarray
    """Standard deviation of each share over the neutral inputs, ``[n_players]``; NaN with one only."""
    error: np.ndarray
    """Standard error from drawing orders of arrival, ``[n_players]``; 0 where all coalitions were run."""
    interaction: float
    """What image and prompt bring together beyond what each brings alone."""
    coalitions: np.ndarray
    """bool ``[m, n_players]``."""
    values: np.ndarray
    """Log-odds of each coalition, mean over the neutral inputs, float64 ``[m]``."""
    forwards: int
    """Different inputs that were run."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "example", MappingProxyType({name: self.example[name] for name in ABOUT}))
        object.__setattr__(self, "players", tuple(self.players))
        for name in _ARRAYS:
            array = np.array(getattr(self, name), bool if name == "coalitions" else np.float64)
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    @property
    def image(self) -> float:
        """Share of the image, all its parts together."""
        return float(self.shares[: self.of_image].sum())

    @property
    def prompt(self) -> float:
        """Share of the prompt, all its parts together."""
        return float(self.shares[self.of_image :].sum())

    @property
    def correct(self) -> bool:
        """Whether the model's answer is the true one."""
        return self.said == self.example["truth"]

    def __str__(self) -> str:
        parts = sorted(zip(self.players, self.shares, strict=True), key=lambda item: -abs(item[1]))
        named = ", ".join(f"{name} {share:+.2f}" for name, share in parts)
        return (
            f"'{self.answer}' to '{self.example['question']}': log-odds {self.log_odds:+.2f} = "
            f"prior {self.prior:+.2f}, {named}"
        )


@dataclass(frozen=True, eq=False)
class Sources:
    """Where the answers to some examples came from; made by `circuits.input_attribution.attribute.split`."""

    examples: tuple[SourceShares, ...]
    of: str
    """``said`` or ``true``: whose log-odds were split."""
    neutral_images: tuple[str, ...]
    """What stood for an image that is not given."""
    model: str
    config_hash: str
    weights_hash: str

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> SourceShares:
        return self.examples[index]

    def frame(self) -> pd.DataFrame:
        """Return one row for each example and player: its share, the example's columns, prior and log-odds."""
        import pandas as pd

        rows = [
            {
                **one.example,
                "said": one.said,
                "answer": one.answer,
                "player": player,
                "part": "image" if k < one.of_image else "prompt",
                "share": one.shares[k],
                "spread": one.spread[k],
                "error": one.error[k],
                "prior": one.prior,
                "log_odds": one.log_odds,
            }
            for one in self.examples
            for k, player in enumerate(one.players)
        ]
        return pd.DataFrame(rows)

    def summary(self, by: Sequence[str] = ("level",), *, resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
        """Return mean log-odds and their parts for each kind of example, with 95 % intervals clustered by image.

        Parameters
        ----------
        by
            Columns to group by: of ``level``, ``split``, ``kind``, ``said_true``.
        resamples, seed
            Of the bootstrap over groups.

        Returns
        -------
        DataFrame
            One row for each combination and part (`PARTS`): ``n``, ``mean``, ``low``, ``high``.

        Raises
        ------
        ConfigError
            For another column.
        """
        import pandas as pd

        wrong = [name for name in by if name not in BY]
        if wrong:
            msg = f"by='{wrong[0]}': choose of {', '.join(BY)}"
            raise ConfigError(msg)
        members: dict[tuple[str, ...], list[SourceShares]] = {}
        for one in self.examples:
            about = {**one.example, "said_true": "yes" if one.correct else "no"}
            members.setdefault(tuple(about[name] for name in by), []).append(one)
        rows = []
        for key, ones in sorted(members.items()):
            groups = [one.example["group"] for one in ones]
            for part in PARTS:
                values = np.array([getattr(one, part) for one in ones])
                low, high = cluster_bootstrap(values, groups, n=resamples, seed=seed)
                if len(set(groups)) < 2:
                    low, high = math.nan, math.nan
                ends = {"n": len(ones), "mean": values.mean(), "low": low, "high": high}
                rows.append({**dict(zip(by, key, strict=True)), "part": part, **ends})
        return pd.DataFrame(rows)

    def save(self, path: str | Path) -> Path:
        """Write one ``.safetensors`` file, coalition values included; raises `StoreError` where that cannot be done."""
        path = Path(path)
        rest = [f.name for f in fields(SourceShares) if f.name not in _ARRAYS]
        listed = [{n: dict(e.example) if n == "example" else getattr(e, n) for n in rest} for e in self.examples]
        card = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "examples"}
        sizes = [len(e.values) for e in self.examples]
        flat = {n: np.concatenate([getattr(e, n).ravel() for e in self.examples]) for n in _ARRAYS}
        artifacts.write(path, _KIND, VERSION, flat, {**card, "examples": listed, "coalitions": sizes})
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote; raises `StoreError` where it is missing, damaged, something else or newer."""
        flat, card = artifacts.read(Path(path), _KIND, VERSION)
        at: dict[str, int] = dict.fromkeys(_ARRAYS, 0)

        def take(name: str, size: int) -> np.ndarray:
            at[name] += size
            part = flat[name][at[name] - size : at[name]]
            if len(part) != size:
                msg = f"'{name}' ends early"
                raise ValueError(msg)
            return part

        try:
            made = []
            for about, m in zip(card.pop("examples"), card.pop("coalitions"), strict=True):
                n = len(about["players"])
                arrays: dict[str, Any] = {name: take(name, n) for name in ("shares", "spread", "error")}
                arrays |= {"coalitions": take("coalitions", m * n).reshape(m, n), "values": take("values", m)}
                made.append(SourceShares(**about, **arrays))
            card["neutral_images"] = tuple(card["neutral_images"])
            return cls(tuple(made), **card)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            msg = f"{path}: damaged sources: {error}"
            raise StoreError(msg) from error
