"""Results of `circuits.input_attribution.split`: an answer's log-odds as four shares, as tables and files."""

from __future__ import annotations

import math
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
_KIND = "source_shares"
_ARRAYS = ("blank", "matched", "neutral")
SHARES = ("lean", "form", "knowledge", "image")
"""The shares, in the order in which the input is completed."""
PARTS = (*SHARES, "log_odds")


@dataclass(frozen=True, eq=False)
class SourceShares:
    """The split of the log-odds of one answer against another: ``lean + form + knowledge + image == log_odds``, in nats.

    Examples
    --------
    >>> import numpy as np
    >>> from circuits import SourceShares
    >>> about = dict.fromkeys(("id", "group", "level", "split", "kind"), "") | {"question": "Is the apple red?", "truth": "no"}
    >>> neutral, matched, blank = np.array([[-0.5]]), np.array([[-1.0, -0.6]]), np.array([-3.0])
    >>> texts = ("Is the car red?", "Is the dog red?")
    >>> answer = SourceShares(about, "no", "yes", "yes", -1.0, blank, matched, neutral, -2.5, texts, 5)
    >>> print(answer)
    'no' against 'yes' to 'Is the apple red?': log-odds -1.00 = lean -0.50, form -0.30, knowledge -2.20, image +2.00
    >>> round(answer.words, 2), round(answer.noun_spread, 2)
    (-3.0, 0.28)
    """

    example: Mapping[str, str]
    """``id``, ``group``, ``level``, ``split``, ``kind``, ``question`` and ``truth`` of the example."""
    answer: str
    """The answer whose log-odds are split."""
    rival: str
    """The other answer: ``log_odds = log p(answer) - log p(rival)``."""
    said: str
    """The model's answer."""
    log_odds: float
    """Log-odds for the image and the question."""
    blank: np.ndarray
    """Log-odds for each blank image and the question, float64 ``[blanks]``."""
    matched: np.ndarray
    """Log-odds for each blank image and each of `matched_texts`, ``[blanks, texts]``."""
    neutral: np.ndarray
    """Log-odds for each blank image and each neutral question, ``[blanks, questions]``."""
    no_image: float
    """Log-odds for the question without any image; NaN if the model needs an image."""
    matched_texts: tuple[str, ...]
    """The questions with other nouns, or the other prefixes."""
    forwards: int
    """Number of distinct inputs that were run for this example and for none before it."""

    __repr__ = short_repr

    def __post_init__(self) -> None:
        object.__setattr__(self, "example", MappingProxyType({name: self.example[name] for name in ABOUT}))
        object.__setattr__(self, "matched_texts", tuple(self.matched_texts))
        for name in _ARRAYS:
            array = np.array(getattr(self, name), np.float64)
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    @property
    def lean(self) -> float:
        """Log-odds for a blank image and a neutral question: the preference for an answer whatever is asked."""
        return float(self.neutral.mean())

    @property
    def form(self) -> float:
        """Change by the form of the question: by the question about other nouns in place of the neutral one."""
        return float(self.matched.mean() - self.neutral.mean())

    @property
    def knowledge(self) -> float:
        """Change by the nouns of the question: what they suggest without an image."""
        return float(self.blank.mean() - self.matched.mean())

    @property
    def image(self) -> float:
        """Change by the image."""
        return float(self.log_odds - self.blank.mean())

    @property
    def words(self) -> float:
        """Log-odds without the image's content, mean over blank images: ``lean + form + knowledge``."""
        return float(self.blank.mean())

    @property
    def noun_spread(self) -> float:
        """Standard deviation (n - 1) of the log-odds over the matched texts, each a mean over blank images; NaN for one text."""
        return _spread(self.matched.mean(0))

    @property
    def neutral_spread(self) -> float:
        """The same over neutral questions."""
        return _spread(self.neutral.mean(0))

    @property
    def blank_spread(self) -> Mapping[str, float]:
        """Standard deviation (n - 1) of each share over the blank images, by share; NaN for one blank image."""
        neutral, matched = self.neutral.mean(1), self.matched.mean(1)
        each = {
            "lean": neutral,
            "form": matched - neutral,
            "knowledge": self.blank - matched,
            "image": self.log_odds - self.blank,
        }
        return MappingProxyType({name: _spread(values) for name, values in each.items()})

    @property
    def correct(self) -> bool:
        """Whether the model's answer is the true answer."""
        return self.said == self.example["truth"]

    def __str__(self) -> str:
        shares = ", ".join(f"{name} {getattr(self, name):+.2f}" for name in SHARES)
        return f"'{self.answer}' against '{self.rival}' to '{self.example['question']}': log-odds {self.log_odds:+.2f} = {shares}"


@dataclass(frozen=True, eq=False)
class Sources:
    """Splits of the answers to some examples; returned by `circuits.input_attribution.split`.

    Examples
    --------
    >>> import groundscope as gs
    >>> sources = gs.input_attribution.split(gs.load_lvlm("tiny"), gs.scenes.dataset(n_images=10, seed=0)[:3])
    >>> len(sources), sources.summary(by=())["part"].tolist()
    (3, ['lean', 'form', 'knowledge', 'image', 'log_odds'])
    """

    examples: tuple[SourceShares, ...]
    of: str
    """The answer that was split: ``true`` or ``said`` (the model's)."""
    blanks: tuple[str, ...]
    """Images in place of the image."""
    neutral_questions: tuple[str, ...]
    """Questions in place of the question."""
    model: str
    config_hash: str
    weights_hash: str

    __repr__ = short_repr

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> SourceShares:
        return self.examples[index]

    def frame(self) -> pd.DataFrame:
        """Return one row per example: its columns, the answers, the shares, their spreads, and the log-odds without any image."""
        import pandas as pd

        rows = []
        for shares in self.examples:
            row = {**shares.example, "said": shares.said, "answer": shares.answer, "rival": shares.rival}
            row |= {part: getattr(shares, part) for part in PARTS}
            row |= {"no_image": shares.no_image, "noun_spread": shares.noun_spread}
            row |= {"neutral_spread": shares.neutral_spread}
            row |= {f"{name}_blank_spread": value for name, value in shares.blank_spread.items()}
            rows.append(row)
        return pd.DataFrame(rows)

    def summary(self, by: Sequence[str] = ("level",), *, resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
        """Return the mean log-odds and shares per group of examples, with 95 % intervals clustered by image.

        Parameters
        ----------
        by
            Columns to group by, from ``level``, ``split``, ``kind``, ``said_true``; none for one group.
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
        """Write one ``.safetensors`` file with the log-odds of every run; raise `StoreError` if it cannot be written."""
        path = Path(path)
        names = [f.name for f in fields(SourceShares) if f.name not in _ARRAYS]
        listed = []
        for e in self.examples:
            plain = {n: dict(e.example) if n == "example" else getattr(e, n) for n in names}
            plain["no_image"] = e.no_image if math.isfinite(e.no_image) else None
            listed.append({**plain, "shape": [e.matched.shape[0], e.matched.shape[1], e.neutral.shape[1]]})
        card = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "examples"}
        flat = {n: np.concatenate([getattr(e, n).ravel() for e in self.examples]) for n in _ARRAYS}
        artifacts.write(path, _KIND, VERSION, flat, {**card, "examples": listed})
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file written by `save`; raise `StoreError` if it is missing, damaged, of another kind or newer."""
        flat, card = artifacts.read(Path(path), _KIND, VERSION)
        at: dict[str, int] = dict.fromkeys(_ARRAYS, 0)

        def take(name: str, *shape: int) -> np.ndarray:
            size = math.prod(shape)
            at[name] += size
            part = flat[name][at[name] - size : at[name]]
            if len(part) != size or size < 1:
                msg = f"'{name}' ends early"
                raise ValueError(msg)
            return part.reshape(shape)

        with building(f"{path} is a damaged file of source shares", StoreError):
            answers = []
            for stored in card.pop("examples"):
                blanks, texts, questions = shape = stored.pop("shape")
                if any(type(size) is not int for size in shape):
                    msg = f"shape {shape} is not three integers"
                    raise ValueError(msg)
                stored["no_image"] = math.nan if stored["no_image"] is None else stored["no_image"]
                about = check_fields(stored, SourceShares, "examples")
                arrays: dict[str, Any] = {"blank": take("blank", blanks), "matched": take("matched", blanks, texts)}
                answers.append(SourceShares(**about, **arrays, neutral=take("neutral", blanks, questions)))
            checked = check_fields(card, cls)
            for name in ("blanks", "neutral_questions"):
                checked[name] = tuple(checked[name])
            return cls(tuple(answers), **checked)


def _spread(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else math.nan
