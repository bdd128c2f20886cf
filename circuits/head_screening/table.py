"""Scores of heads that cost one forward, beside the causal ones, and how well the two agree."""

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
from circuits.results.statistics import Comparison, Rows, compare_rows, mean_interval
from concepts.schema import CounterfactualPair, Example
from groundscope.core import artifacts
from groundscope.core.errors import ConfigError, PatchError, StoreError
from groundscope.core.progress import progress_bar
from lvlm.answers import answer_key
from lvlm.model import Lvlm
from lvlm.sites import Head

if TYPE_CHECKING:
    import pandas as pd

CORRELATIONAL = ("image_mass", "box_mass", "localisation", "vhd", "direct")
CAUSAL = ("patching", "ablation")
SELECTED = 10
"""How many heads an example selects for ``localisation`` (Kang et al. 2025)."""
VERSION = 1
_KIND = "head_table"
_LISTS = ("ids", "groups", "levels")


@dataclass(frozen=True, eq=False)
class HeadTable:
    """Several scores of every head for the same examples; made by `head_scores`."""

    values: Mapping[str, np.ndarray]
    """Method to scores, float32 ``[n_examples, n_layers, n_heads]``; NaN where an example has none."""
    ids: tuple[str, ...]
    groups: tuple[str, ...]
    levels: tuple[str, ...]
    model: str
    config_hash: str
    weights_hash: str

    def __post_init__(self) -> None:
        for name in _LISTS:
            object.__setattr__(self, name, tuple(getattr(self, name)))
        values = {name: np.array(array, np.float32) for name, array in self.values.items()}
        for array in values.values():
            array.setflags(write=False)
        object.__setattr__(self, "values", MappingProxyType(values))
        if not values or {a.shape[0] for a in values.values()} != {len(getattr(self, name)) for name in _LISTS}:
            msg = (
                "a table of head scores needs [n_examples, n_layers, n_heads] for each method, and as many of the rest"
            )
            raise PatchError(msg)

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the scores, in the order asked for."""
        return tuple(self.values)

    def rows(self, method: str) -> Rows:
        """Return a method's scores without the examples that have none; raises `PatchError` where none has."""
        if method not in self.values:
            msg = f"no scores '{method}': there are {', '.join(self.values)}"
            raise PatchError(msg)
        known = np.isfinite(self.values[method]).all(axis=(1, 2))
        if not known.any():
            msg = f"no example has scores '{method}'"
            raise PatchError(msg)
        return Rows(self.values[method][known], tuple(np.array(self.groups)[known].tolist()))

    def mean(self, method: str) -> np.ndarray:
        """Return a method's mean over the examples that have it, float64 ``[n_layers, n_heads]``."""
        return self.rows(method).values.mean(axis=0, dtype=np.float64)

    def top(self, method: str, k: int) -> tuple[Head, ...]:
        """Return the `k` heads of largest mean score, largest first."""
        mean = self.mean(method)
        order = np.argsort(-mean, axis=None, kind="stable")[:k]
        return tuple(Head(*divmod(int(i), mean.shape[1])) for i in order)

    def select(self, keep: np.ndarray) -> Self:
        """Return the table of some examples only: a boolean mask or numbers."""
        which = np.arange(len(self.ids))[keep]
        lists: dict[str, Any] = {name: tuple(getattr(self, name)[i] for i in which) for name in _LISTS}
        return replace(self, values={name: array[which] for name, array in self.values.items()}, **lists)

    def frame(self, level: float = 0.95) -> pd.DataFrame:
        """Return one row a head: its name, and each method's mean with its bootstrap interval over groups."""
        import pandas as pd

        shape = next(iter(self.values.values())).shape[1:]
        columns: dict[str, object] = {"name": [str(Head(i, h)) for i in range(shape[0]) for h in range(shape[1])]}
        for method in self.values:
            rows = self.rows(method)
            low, high = mean_interval(rows.values, rows.groups, level)
            columns |= {method: self.mean(method).ravel(), f"{method}_low": low.ravel(), f"{method}_high": high.ravel()}
        return pd.DataFrame(columns)

    def compare(
        self, method: str, truth: str = "patching", k: Sequence[int] = (5, 10), *, resamples: int = 1000, seed: int = 0
    ) -> Comparison:
        """Say how a method's ranking of the heads agrees with another's; groups are drawn for both at once."""
        return compare_rows(self.rows(method), self.rows(truth), k, resamples=resamples, seed=seed)

    def agreement(
        self, truth: str = "patching", k: Sequence[int] = (5, 10), *, resamples: int = 1000, seed: int = 0
    ) -> pd.DataFrame:
        """Return how each method agrees with one of them, over all examples and for each level.

        Columns: ``level`` (``all`` first), ``method``, ``rank_correlation`` (Spearman, over all heads) with its interval,
        ``overlap@k`` (share of the top k in common) with its interval and ``chance@k``, ``groups``. A method of which
        a level has no example is left out there.
        """
        import pandas as pd

        out = []
        for level in ("all", *dict.fromkeys(self.levels)):
            part = self if level == "all" else self.select(np.array(self.levels) == level)
            known = [m for m in part.methods if np.isfinite(part.values[m]).all(axis=(1, 2)).any()]
            for method in known:
                if method == truth or truth not in known:
                    continue
                found = part.compare(method, truth, k, resamples=resamples, seed=seed)
                row: dict[str, object] = {"level": level, "method": method, "groups": sum(found.groups)}
                measured = {"rank_correlation": found.rank_correlation}
                measured |= {f"overlap@{one}": found.overlap[one] for one in k}
                for name, estimate in measured.items():
                    row |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
                out.append(row | {f"chance@{one}": found.chance(one) for one in k})
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
        """Read what `save` wrote; raises `StoreError` where it is missing, damaged, something else or newer."""
        tensors, card = artifacts.read(Path(path), _KIND, VERSION)
        try:
            return cls(values={name: tensors[name] for name in card.pop("methods")}, **card)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            msg = f"{path}: damaged table of head scores: {error}"
            raise StoreError(msg) from error


def head_scores(
    model: Lvlm,
    data: Sequence[CounterfactualPair] | Sequence[Example],
    methods: Sequence[str] = CORRELATIONAL,
    *,
    batch_size: int = 32,
    min_effect: float = 0.5,
    progress: bool | None = None,
) -> HeadTable:
    """Score every head of the decoder in several ways, for the same examples, at the last prompt token.

    Parameters
    ----------
    model
        In evaluation mode.
    data
        Examples, or pairs: then scores that look at one run look at the clean one.
    methods
        ``image_mass``: share of the attention that falls on the image.
        ``box_mass``: share that falls on the object asked about; NaN for examples without it.
        ``localisation``: whether an example selects the head as one of `SELECTED` that look at few compact spots
        (Kang et al. 2025, arXiv 2503.06287); the mean is their selection frequency.
        ``vhd``: how far the head's output moves when the image is left out of the prompt (arXiv 2412.13949).
        ``direct``: what the head adds to the margin of the true answer over the best other, past all later layers.
        ``patching`` (pairs only): effect of its clean output in the corrupt run, `patch_heads`.
        ``ablation``: margin lost with the head's output at its mean over all examples given (of pairs: both sides).
    batch_size
        Examples side by side.
    min_effect
        As in `patch_heads`; pairs under it have NaN for ``patching``.
    progress
        Show progress; by default where standard error is a terminal.

    Returns
    -------
    HeadTable
        Scores ``[n_examples, n_layers, n_heads]`` for each method.

    Raises
    ------
    ConfigError
        For a method that does not exist, or ``patching`` without pairs.
    PatchError
        For no examples, a model in training mode, or pairs that cannot be patched.
    DataError
        Where an answer cannot be read from one token, or the images have unlike numbers of patches.
    ModelError
        Where a family does not allow a method.
    """
    unknown = [m for m in methods if m not in CORRELATIONAL + CAUSAL]
    pairs = [item for item in data if isinstance(item, CounterfactualPair)]
    if unknown or not methods or len(set(methods)) < len(methods):
        msg = f"methods {list(methods)}: choose among {', '.join(CORRELATIONAL + CAUSAL)}, each once"
        raise ConfigError(msg)
    if "patching" in methods and len(pairs) != len(data):
        msg = (
            "'patching' needs counterfactual pairs, examples alone have nothing to patch from: counterfactuals.pairs(…)"
        )
        raise ConfigError(msg)
    if not data:
        msg = "no examples to score heads on"
        raise PatchError(msg)
    check_evaluating(model)
    examples = [item.clean if isinstance(item, CounterfactualPair) else item for item in data]
    made: dict[str, np.ndarray] = {}
    if {"image_mass", "box_mass", "localisation"} & set(methods):
        made |= _attention(model, examples, methods, batch_size)
    if {"vhd", "direct"} & set(methods):
        made |= _outputs(model, examples, methods, batch_size, progress)
    if "ablation" in methods:
        every = examples if not pairs else [e for pair in pairs for e in (pair.clean, pair.corrupt)]
        lost = ablate(
            model, examples, "heads", "mean", "last", reference=every, batch_size=batch_size, progress=progress
        )
        made["ablation"] = lost.effects.reshape(len(examples), model.n_layers, model.n_heads)
    if "patching" in methods:
        made["patching"] = _patching(model, pairs, min_effect, progress)
    return HeadTable(
        values={method: made[method] for method in methods},
        ids=tuple(e.id for e in examples),
        groups=tuple(e.group for e in examples),
        levels=tuple(e.level for e in examples),
        model=model.name,
        config_hash=model.config_hash,
        weights_hash=model.weights_hash,
    )


def _attention(
    model: Lvlm, examples: Sequence[Example], methods: Sequence[str], batch_size: int
) -> dict[str, np.ndarray]:
    heads = [Head(i, h) for i in range(model.n_layers) for h in range(model.n_heads)]
    seen = attention_to_image(model, examples, heads, batch_size=batch_size)
    shape = (len(examples), model.n_layers, model.n_heads)
    made = {"image_mass": seen.image_mass.reshape(shape), "box_mass": seen.box_mass.reshape(shape)}
    if "localisation" in methods:
        made["localisation"] = selected(seen.maps, seen.grid, SELECTED).reshape(shape)
    return made


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
                asked = [e.example for e in batch.encodings]
                keys, answers = [answer_key(model, e) for e in asked], [e.answer for e in asked]
                out["direct"][rows] = direct_attribution(model, batch, keys, answers).cpu().numpy()
            bar.advance(task, len(rows))
    return out


def _patching(model: Lvlm, pairs: Sequence[CounterfactualPair], min_effect: float, progress: bool | None) -> np.ndarray:
    """Return effects of patching for each pair, NaN for those that were left out."""
    # Numbered, because one example may be in several pairs.
    numbered = [replace(pair, clean=replace(pair.clean, id=str(row))) for row, pair in enumerate(pairs)]
    scores = patch_heads(model, numbered, "last", "denoise", min_effect=min_effect, progress=progress)
    out = np.full((len(pairs), *scores.shape), np.nan, np.float32)
    out[[int(row) for row in scores.ids]] = scores.effects
    return out
