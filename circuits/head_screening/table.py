"""Correlational scores of heads (one forward pass each) next to causal scores, and their agreement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from circuits.ablation import ablate
from circuits.head_screening.direct_logit import direct_attribution, image_difference
from circuits.head_screening.image_attention import attention_to_image
from circuits.head_screening.localization import selected
from circuits.patching.activation import check_evaluating, patch_heads
from circuits.results.statistics import GroupedScores, RankingComparison, compare_rows, mean_interval
from concepts.counterfactual_pair import CounterfactualPair
from concepts.schema import Example
from groundscope.core import artifacts
from groundscope.core.errors import ConfigError, PatchError, StoreError
from groundscope.core.progress import progress_bar
from groundscope.core.result_fields import building, check_fields
from groundscope.core.short_repr import short_repr
from lvlm.answer_keys import answer_key
from lvlm.model import Lvlm
from lvlm.sites import Head

if TYPE_CHECKING:
    import pandas as pd

CORRELATIONAL = ("image_mass", "box_mass", "localisation", "vhd", "direct")
CAUSAL = ("patching", "ablation")
SELECTED = 10
"""Number of heads that an example selects for ``localisation`` (Kang et al. 2025)."""
VERSION = 1
_KIND = "head_table"
_LISTS = ("ids", "groups", "levels")


@dataclass(frozen=True, eq=False)
class HeadTable:
    """Several scores of every head for the same examples; returned by `head_table`.

    Examples
    --------
    >>> import numpy as np
    >>> from circuits import HeadTable
    >>> effects = np.array([[[0.1, 0.9]], [[0.3, 0.7]]])
    >>> about = {"ids": ("a", "b"), "groups": ("a", "b"), "levels": ("object", "object"), "model": "toy"}
    >>> table = HeadTable({"direct": effects, "patching": 2 * effects}, **about, config_hash="", weights_hash="")
    >>> table.top("direct", 1), table.compare("direct", k=[1]).overlap[1].value
    ((Head(layer=0, head=1),), 1.0)
    """

    values: Mapping[str, np.ndarray]
    """Scores by method, float32 ``[n_examples, n_layers, n_heads]``; NaN if an example has no score."""
    ids: tuple[str, ...]
    groups: tuple[str, ...]
    levels: tuple[str, ...]
    model: str
    config_hash: str
    weights_hash: str

    __repr__ = short_repr

    def __post_init__(self) -> None:
        for name in _LISTS:
            object.__setattr__(self, name, tuple(getattr(self, name)))
        values = {name: np.array(array, np.float32) for name, array in self.values.items()}
        object.__setattr__(self, "values", MappingProxyType(values))
        artifacts.freeze(self)
        if not values or {a.shape[0] for a in values.values()} != {len(getattr(self, name)) for name in _LISTS}:
            msg = (
                "invalid head table: each method needs scores [n_examples, n_layers, n_heads], and ids, groups and levels "
                "need n_examples entries"
            )
            raise PatchError(msg)

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the scores, in the order of the request."""
        return tuple(self.values)

    def rows(self, method: str) -> GroupedScores:
        """Return a method's scores of the examples that have them; raise `PatchError` if no example has."""
        if method not in self.values:
            msg = f"unknown method '{method}'; choose from {', '.join(self.values)}"
            raise PatchError(msg)
        finite = np.isfinite(self.values[method]).all(axis=(1, 2))
        if not finite.any():
            msg = f"no example has a '{method}' score"
            raise PatchError(msg)
        return GroupedScores(self.values[method][finite], tuple(np.array(self.groups)[finite].tolist()))

    def mean(self, method: str) -> np.ndarray:
        """Return a method's mean over the examples with a score, float64 ``[n_layers, n_heads]``."""
        return self.rows(method).values.mean(axis=0, dtype=np.float64)

    def top(self, method: str, k: int) -> tuple[Head, ...]:
        """Return the `k` heads of largest mean score, largest first."""
        mean = self.mean(method)
        order = np.argsort(-mean, axis=None, kind="stable")[:k]
        return tuple(Head(*divmod(int(i), mean.shape[1])) for i in order)

    def select(self, keep: np.ndarray) -> Self:
        """Return the table of a subset of the examples, selected by a boolean mask or by indices."""
        which = np.arange(len(self.ids))[keep]
        lists: dict[str, Any] = {name: tuple(getattr(self, name)[i] for i in which) for name in _LISTS}
        return replace(self, values={name: array[which] for name, array in self.values.items()}, **lists)

    def frame(self, *, confidence: float = 0.95) -> pd.DataFrame:
        """Return one row per head: its name, and each method's mean with its bootstrap interval over groups."""
        import pandas as pd

        shape = next(iter(self.values.values())).shape[1:]
        columns: dict[str, object] = {"name": [str(Head(i, h)) for i in range(shape[0]) for h in range(shape[1])]}
        for method in self.values:
            rows = self.rows(method)
            low, high = mean_interval(rows.values, rows.groups, confidence=confidence)
            columns |= {method: self.mean(method).ravel(), f"{method}_low": low.ravel(), f"{method}_high": high.ravel()}
        return pd.DataFrame(columns)

    def compare(
        self, method: str, *, truth: str = "patching", k: Sequence[int] = (5, 10), resamples: int = 1000, seed: int = 0
    ) -> RankingComparison:
        """Compare the rankings of heads by two methods; both use the same bootstrap draws of groups."""
        return compare_rows(self.rows(method), self.rows(truth), k, resamples=resamples, seed=seed)

    def agreement(
        self, *, truth: str = "patching", k: Sequence[int] = (5, 10), resamples: int = 1000, seed: int = 0
    ) -> pd.DataFrame:
        """Return the agreement of each method with `truth`, over all examples and for each level.

        Columns: ``level`` (``all`` first), ``method``, ``rank_correlation`` (Spearman, over all heads) with its interval,
        ``overlap@k`` (share of the top k in common) with its interval and ``chance@k``, ``groups``. A level has no row for
        a method without scores there.
        """
        import pandas as pd

        out = []
        for level in ("all", *dict.fromkeys(self.levels)):
            part = self if level == "all" else self.select(np.array(self.levels) == level)
            available = [m for m in part.methods if np.isfinite(part.values[m]).all(axis=(1, 2)).any()]
            for method in available:
                if method == truth or truth not in available:
                    continue
                comparison = part.compare(method, truth=truth, k=k, resamples=resamples, seed=seed)
                row: dict[str, object] = {"level": level, "method": method, "groups": sum(comparison.groups)}
                measured = {"rank_correlation": comparison.rank_correlation}
                measured |= {f"overlap@{count}": comparison.overlap[count] for count in k}
                for name, estimate in measured.items():
                    row |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
                out.append(row | {f"chance@{count}": comparison.chance(count) for count in k})
        return pd.DataFrame(out)

    def save(self, path: str | Path) -> Path:
        """Write one ``.safetensors`` file."""
        path = Path(path)
        card = {name: list(getattr(self, name)) for name in _LISTS}
        card |= {"model": self.model, "config_hash": self.config_hash, "weights_hash": self.weights_hash}
        artifacts.write(path, _KIND, VERSION, self.values, {**card, "methods": list(self.values)})
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file written by `save`; raise `StoreError` if it is missing, damaged, of another kind or newer."""
        tensors, card = artifacts.read(Path(path), _KIND, VERSION)
        with building(f"{path} is a damaged head table", StoreError):
            return cls(values={name: tensors[name] for name in card.pop("methods")}, **check_fields(card, cls))


def head_table(
    model: Lvlm,
    data: Sequence[CounterfactualPair] | Sequence[Example],
    *,
    methods: Sequence[str] = CORRELATIONAL,
    min_effect: float = 0.5,
    batch_size: int = 32,
    progress: bool | None = None,
) -> HeadTable:
    """Score every head of the decoder by several methods, on the same examples, at the last prompt token.

    Parameters
    ----------
    model
        In evaluation mode.
    data
        Examples, or pairs; scores of a single run then use the clean example.
    methods
        ``image_mass``: share of the attention on the image.
        ``box_mass``: share of the attention on the object in question; NaN for examples without it.
        ``localisation``: whether an example selects the head as one of `SELECTED` that attend to few compact regions
        (Kang et al. 2025, arXiv 2503.06287); the mean is the selection frequency.
        ``vhd``: change of the head's output when the image is removed from the prompt (arXiv 2412.13949).
        ``direct``: direct contribution to the margin of the true answer over the best other, not through later layers.
        ``patching`` (pairs only): effect of the head's clean output in the corrupt run, see `patch_heads`.
        ``ablation``: margin lost when the head's output is its mean over all examples in `data` (for pairs: both sides).
    min_effect
        As in `patch_heads`; pairs below it have NaN for ``patching``.
    batch_size
        Number of examples per batch.
    progress
        Whether to show progress; by default only if standard error is a terminal.

    Returns
    -------
    HeadTable
        Scores ``[n_examples, n_layers, n_heads]`` for each method.

    Raises
    ------
    ConfigError
        If a method is unknown, or ``patching`` is requested without pairs.
    PatchError
        If `data` is empty, the model is in training mode, or pairs cannot be patched.
    DataError
        If an answer cannot be read from one token, or the images differ in their patch grid.
    ModelError
        If the family does not support a method.

    Examples
    --------
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> questions = gs.scenes.dataset(n_images=10, seed=0)[:3]
    >>> table = gs.head_table(model, questions, methods=["image_mass", "direct"])
    >>> table.methods, table.mean("direct").shape
    (('image_mass', 'direct'), (6, 8))
    """
    unknown = [m for m in methods if m not in CORRELATIONAL + CAUSAL]
    pairs = [item for item in data if isinstance(item, CounterfactualPair)]
    if unknown or not methods or len(set(methods)) < len(methods):
        msg = f"invalid methods {list(methods)}; choose from {', '.join(CORRELATIONAL + CAUSAL)}, each at most once"
        raise ConfigError(msg)
    if "patching" in methods and len(pairs) != len(data):
        msg = "method 'patching' needs counterfactual pairs, not examples; make pairs with counterfactuals.pairs(…)"
        raise ConfigError(msg)
    if not data:
        msg = "data is empty; pass at least one example or pair"
        raise PatchError(msg)
    check_evaluating(model)
    examples = [item.clean if isinstance(item, CounterfactualPair) else item for item in data]
    scores: dict[str, np.ndarray] = {}
    if {"image_mass", "box_mass", "localisation"} & set(methods):
        scores |= _attention(model, examples, methods, batch_size)
    if {"vhd", "direct"} & set(methods):
        scores |= _outputs(model, examples, methods, batch_size, progress)
    if "ablation" in methods:
        reference = examples if not pairs else [e for pair in pairs for e in (pair.clean, pair.corrupt)]
        lost = ablate(model, examples, tokens="last", reference=reference, batch_size=batch_size, progress=progress)
        scores["ablation"] = lost.effects.reshape(len(examples), model.n_layers, model.n_heads)
    if "patching" in methods:
        scores["patching"] = _patching(model, pairs, min_effect, progress)
    return HeadTable(
        values={method: scores[method] for method in methods},
        ids=tuple(e.id for e in examples),
        groups=tuple(e.group for e in examples),
        levels=tuple(e.level or "" for e in examples),
        model=model.name,
        config_hash=model.config_hash,
        weights_hash=model.weights_hash,
    )


def _attention(
    model: Lvlm, examples: Sequence[Example], methods: Sequence[str], batch_size: int
) -> dict[str, np.ndarray]:
    heads = [Head(i, h) for i in range(model.n_layers) for h in range(model.n_heads)]
    attention = attention_to_image(model, examples, heads, batch_size=batch_size)
    shape = (len(examples), model.n_layers, model.n_heads)
    scores = {"image_mass": attention.image_mass.reshape(shape), "box_mass": attention.box_mass.reshape(shape)}
    if "localisation" in methods:
        scores["localisation"] = selected(attention.maps, attention.grid, SELECTED).reshape(shape)
    return scores


@torch.no_grad()
def _outputs(
    model: Lvlm, examples: Sequence[Example], methods: Sequence[str], batch_size: int, progress: bool | None
) -> dict[str, np.ndarray]:
    shape = (len(examples), model.n_layers, model.n_heads)
    out = {method: np.empty(shape, np.float32) for method in ("vhd", "direct") if method in methods}
    with progress_bar(progress) as bar:
        task = bar.add_task("reading heads", total=len(examples))
        for batch in model.batches(examples, batch_size):
            rows = list(batch.index)
            if "vhd" in out:
                out["vhd"][rows] = image_difference(model, batch).cpu().numpy()
            if "direct" in out:
                examples_of_batch = [e.example for e in batch.encodings]
                keys, answers = [answer_key(model, e) for e in examples_of_batch], [e.answer for e in examples_of_batch]
                out["direct"][rows] = direct_attribution(model, batch, keys, answers).cpu().numpy()
            bar.advance(task, len(rows))
    return out


def _patching(model: Lvlm, pairs: Sequence[CounterfactualPair], min_effect: float, progress: bool | None) -> np.ndarray:
    """Return effects of patching for each pair, NaN for excluded pairs."""
    # Unique ids, because one example may be in several pairs.
    numbered = [replace(pair, clean=replace(pair.clean, id=str(row))) for row, pair in enumerate(pairs)]
    scores = patch_heads(model, numbered, min_effect=min_effect, progress=progress)
    out = np.full((len(pairs), *scores.shape), np.nan, np.float32)
    out[[int(row) for row in scores.ids]] = scores.effects
    return out
