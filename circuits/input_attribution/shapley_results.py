"""Results of input attribution: contributions of input parts to one answer, and over many answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from circuits.input_attribution.group_summary import ABOUT, summarize
from groundscope.core import artifacts
from groundscope.core.errors import StoreError
from groundscope.core.result_fields import building, check_fields
from groundscope.core.short_repr import short_repr

if TYPE_CHECKING:
    import pandas as pd

VERSION = 1
_KIND = "sources"
_ARRAYS = ("shares", "spread", "error", "coalitions", "values")
PARTS = ("prior", "image", "prompt", "interaction", "log_odds")


@dataclass(frozen=True, eq=False)
class ShapleyShares:
    """The split of one answer's log-odds: ``prior + shares.sum() == log_odds``, all in natural log-odds.

    Examples
    --------
    >>> import numpy as np
    >>> from circuits import ShapleyShares
    >>> about = dict.fromkeys(("id", "group", "level", "split", "kind"), "") | {"question": "Is it red?", "truth": "yes"}
    >>> shares, zeros = np.array([2.0, 0.5]), np.zeros(2)
    >>> coalitions, values = np.array([[0, 0], [1, 0], [0, 1], [1, 1]]), np.array([1.0, 3.0, 1.5, 3.5])
    >>> answer = ("yes", "yes", ("image", "prompt"), 1, 3.5, 1.0, shares, zeros, zeros, 0.0, coalitions, values, 4)
    >>> print(ShapleyShares(about, *answer))
    'yes' to 'Is it red?': log-odds +3.50 = prior +1.00, image +2.00, prompt +0.50
    """

    example: Mapping[str, str]
    """``id``, ``group``, ``level``, ``split``, ``kind``, ``question`` and ``truth`` of the example."""
    answer: str
    """The answer whose log-odds are split."""
    said: str
    """The model's answer."""
    players: tuple[str, ...]
    """Parts of the image first, then parts of the prompt, or the prefix."""
    of_image: int
    """Number of players that are parts of the image."""
    log_odds: float
    """Log-odds of `answer` against all other candidates, with all parts present."""
    prior: float
    """Log-odds of `answer` with all parts neutral."""
    shares: np.ndarray
    """Shapley value of each player, float64 ``[n_players]``."""
    spread: np.ndarray
    """Standard deviation of each share over the neutral inputs, ``[n_players]``; NaN for a single neutral input."""
    error: np.ndarray
    """Standard error from sampling orders of arrival, ``[n_players]``; 0 if all coalitions are run."""
    interaction: float
    """Joint effect of image and prompt beyond their separate effects."""
    coalitions: np.ndarray
    """bool ``[m, n_players]``."""
    values: np.ndarray
    """Log-odds of each coalition, mean over the neutral inputs, float64 ``[m]``."""
    forwards: int
    """Number of distinct inputs that were run."""

    __repr__ = short_repr

    def __post_init__(self) -> None:
        object.__setattr__(self, "example", MappingProxyType({name: self.example[name] for name in ABOUT}))
        object.__setattr__(self, "players", tuple(self.players))
        for name in _ARRAYS:
            array = np.array(getattr(self, name), bool if name == "coalitions" else np.float64)
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    @property
    def image(self) -> float:
        """Share of the image, summed over its parts."""
        return float(self.shares[: self.of_image].sum())

    @property
    def prompt(self) -> float:
        """Share of the text, summed over its parts: of the prompt, or of the prefix with ``prompt="prefix"``."""
        return float(self.shares[self.of_image :].sum())

    @property
    def correct(self) -> bool:
        """Whether the model's answer is the true answer."""
        return self.said == self.example["truth"]

    def __str__(self) -> str:
        parts = sorted(zip(self.players, self.shares, strict=True), key=lambda item: -abs(item[1]))
        named = ", ".join(f"{name} {share:+.2f}" for name, share in parts)
        return (
            f"'{self.answer}' to '{self.example['question']}': log-odds {self.log_odds:+.2f} = "
            f"prior {self.prior:+.2f}, {named}"
        )


@dataclass(frozen=True, eq=False)
class ShapleySources:
    """Splits of the answers to some examples; returned by `circuits.input_attribution.split`.

    Examples
    --------
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> questions = gs.scenes.dataset(n_images=10, seed=0)[:3]
    >>> other = {e.id: [e.question] for e in questions}
    >>> sources = gs.input_attribution.split(model, questions, method="shapley", neutral_questions=other)
    >>> len(sources), sorted(set(sources.frame()["part"]))
    (3, ['image', 'prompt'])
    """

    examples: tuple[ShapleyShares, ...]
    of: str
    """The answer that was split: ``said`` (the model's) or ``true``."""
    neutral_images: tuple[str, ...]
    """Replacements of an absent image."""
    model: str
    config_hash: str
    weights_hash: str

    __repr__ = short_repr

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> ShapleyShares:
        return self.examples[index]

    def frame(self) -> pd.DataFrame:
        """Return one row per example and player: its share, the example's columns, prior and log-odds."""
        import pandas as pd

        rows = [
            {
                **answer.example,
                "said": answer.said,
                "answer": answer.answer,
                "player": player,
                "part": "image" if k < answer.of_image else "prefix" if player == "prefix" else "prompt",
                "share": answer.shares[k],
                "spread": answer.spread[k],
                "error": answer.error[k],
                "prior": answer.prior,
                "log_odds": answer.log_odds,
            }
            for answer in self.examples
            for k, player in enumerate(answer.players)
        ]
        return pd.DataFrame(rows)

    def summary(self, by: Sequence[str] = ("level",), *, resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
        """Return mean log-odds and their parts per group of examples, with 95 % intervals clustered by image.

        Parameters
        ----------
        by
            Columns to group by, from ``level``, ``split``, ``kind``, ``said_true``.
        resamples, seed
            Number of draws and seed of the bootstrap over groups.

        Returns
        -------
        DataFrame
            One row per combination and part (`PARTS`): ``n``, ``mean``, ``low``, ``high``.

        Raises
        ------
        ConfigError
            If a column is unknown.
        """
        return summarize(self.examples, PARTS, by, resamples=resamples, seed=seed)

    def save(self, path: str | Path) -> Path:
        """Write one ``.safetensors`` file, including coalition values; raise `StoreError` if it cannot be written."""
        path = Path(path)
        fields_of_card = [f.name for f in fields(ShapleyShares) if f.name not in _ARRAYS]
        listed = [
            {n: dict(e.example) if n == "example" else getattr(e, n) for n in fields_of_card} for e in self.examples
        ]
        card = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "examples"}
        sizes = [len(e.values) for e in self.examples]
        flat = {n: np.concatenate([getattr(e, n).ravel() for e in self.examples]) for n in _ARRAYS}
        artifacts.write(path, _KIND, VERSION, flat, {**card, "examples": listed, "coalitions": sizes})
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file written by `save`; raise `StoreError` if it is missing, damaged, of another kind or newer."""
        flat, card = artifacts.read(Path(path), _KIND, VERSION)
        at: dict[str, int] = dict.fromkeys(_ARRAYS, 0)

        def take(name: str, size: int) -> np.ndarray:
            at[name] += size
            part = flat[name][at[name] - size : at[name]]
            if len(part) != size:
                msg = f"'{name}' ends early"
                raise ValueError(msg)
            return part

        with building(f"{path} is a damaged file of input attributions", StoreError):
            answers = []
            for about, m in zip(card.pop("examples"), card.pop("coalitions"), strict=True):
                n = len(check_fields(about, ShapleyShares, "examples")["players"])
                arrays: dict[str, Any] = {name: take(name, n) for name in ("shares", "spread", "error")}
                arrays |= {"coalitions": take("coalitions", m * n).reshape(m, n), "values": take("values", m)}
                answers.append(ShapleyShares(**about, **arrays))
            card["neutral_images"] = tuple(check_fields(card, cls)["neutral_images"])
            return cls(tuple(answers), **card)
