"""Why answers are wrong: probes for every kind of question, and a diagnosis of the wrong answers of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from concepts.schema import LEVELS, Example
from diagnosis.pipeline import diagnose
from diagnosis.results import Diagnoses
from experiments.run.context import Context
from experiments.run.folder import digest, write_json
from experiments.stages.illustrate import illustrate_diagnoses
from groundscope.core.errors import GroundscopeError
from probes import fit_grid, probeable
from probes.protocol.tasks import UnplaceableError

if TYPE_CHECKING:
    import pandas as pd

    from activation_store import ActivationStore, ArrayInfo, ConceptDirection

FOLDS, TEST, PENALTIES = 3, 0.3, (0.001, 0.01, 0.1)
KEPT = 0.2
"""Share of the images that no probe is fitted to: they calibrate, and their answers can be diagnosed."""
SHOWN = 5
"""Concepts without a probe that the stage's message names; the result names all."""
FEWEST = 6
"""Images of either class without which a concept is left out: the split would leave a part without it."""


def make_diagnoses(context: Context, root: Path) -> str:
    """Diagnose wrong answers to the questions that things are found on; what cannot be diagnosed is said, not raised."""
    options = context.config.diagnose
    try:
        found = _diagnosed(context)
    except GroundscopeError as error:
        # Other data or fewer sites than usual: the rest of the run does not depend on it.
        write_json(root / "left_out.json", {"reason": str(error)})
        return f"nothing diagnosed: {error}"
    if found is None:
        reason = (
            "no wrong answers on images that the probes were not fitted to" if options.limit else "diagnose.limit=0"
        )
        write_json(root / "left_out.json", {"reason": reason})
        return f"nothing diagnosed: {reason}"
    found.save(root / "diagnoses.json")
    illustrate_diagnoses(context, root, found)
    counts: dict[str, int] = {}
    for one in found.wrong:
        counts[str(one.verdict)] = counts.get(str(one.verdict), 0) + 1
    verdicts = ", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items(), key=lambda item: -item[1]))
    missing = sorted(found.provenance.get("left_out", {}))
    more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
    without = f"; no probe of {', '.join(missing[:SHOWN])}{more}" if missing else ""
    return f"{len(found.wrong)} wrong answers: {verdicts}{without}"


def _diagnosed(context: Context) -> Diagnoses | None:
    options, store = context.config.diagnose, context.store
    frame = store.frame()
    correct = dict(zip(frame["id"], frame["correct"], strict=True))
    left_out: dict[str, str] = {}
    directions = fit_directions(store, learning_rows(frame, options.seed), seed=options.seed, left_out=left_out)
    trained = {g for d in directions for g in d.train_groups}
    free = [e for e in context.discovery if e.id in correct and e.group not in trained]
    wrong = spread([e for e in free if correct[e.id] == 0], options.limit, options.seed)
    if not wrong:
        return None
    right = [e for e in free if correct[e.id] == 1]
    compared = [e.id for e in spread(right, options.compared, options.seed)]
    found = diagnose(
        context.model,
        store,
        directions,
        [*wrong, *right],
        with_sources=options.sources,
        compared=compared,
        seed=options.seed,
    )
    return replace(found, provenance={**found.provenance, "left_out": left_out})


def learning_rows(frame: pd.DataFrame, seed: int) -> np.ndarray:
    """Return which examples probes learn from: the split that nothing misleads in, else those of half the images."""
    neutral = (frame["split"] == "neutral").to_numpy()
    if neutral.any() and not neutral.all():
        return neutral
    half = {g: int(digest([g, seed])[:8], 16) % 2 == 0 for g in set(frame["group"])}
    return np.array([half[g] for g in frame["group"]])


def spread(examples: Sequence[Example], limit: int, seed: int) -> list[Example]:
    """Choose at most so many examples, as evenly over levels and splits as they allow."""
    rng = np.random.default_rng(seed)
    parts: dict[tuple[str, str], list[Example]] = {}
    for i in rng.permutation(len(examples)):
        e = examples[int(i)]
        parts.setdefault((e.level, e.split), []).append(e)
    chosen: list[Example] = []
    while len(chosen) < limit and any(parts.values()):
        for key in sorted(parts):
            if parts[key] and len(chosen) < limit:
                chosen.append(parts[key].pop())
    return chosen


class _Subjects:
    """A store in which a noun's label says whether it is the object the question is about, where that is in the image."""

    def __init__(self, store: ActivationStore) -> None:
        self._store = store

    @property
    def arrays(self) -> Sequence[ArrayInfo]:
        return self._store.arrays

    @property
    def digest(self) -> str:
        return self._store.digest

    @property
    def provenance(self) -> Mapping[str, Any]:
        return self._store.provenance

    def frame(self) -> pd.DataFrame:
        frame = self._store.frame()
        nouns = [c for c in frame if str(c).startswith("object:") and c != "object:named"]
        subject = frame["subject"].astype(str)
        there = {c: np.where(subject == "", np.nan, subject == str(c).partition(":")[2]) for c in nouns}
        return frame.assign(**there)

    def read(self, site: str, tokens: str, head: int | None = None, examples: Any = None) -> np.ndarray:
        return self._store.read(site, tokens, head=head, examples=examples)


def fit_directions(
    store: ActivationStore, rows: np.ndarray, *, seed: int = 0, left_out: dict[str, str] | None = None
) -> list[ConceptDirection]:
    """Fit what `diagnosis.diagnose` reads with, on some rows of a store.

    Attributes at the object's tokens; nouns there too, to be read at each of the image's tokens; at the last token, for each
    kind of question, whether what it asks is true, or which of its answers is. Concepts with too few images, and those that
    no split into whole images can place, are left out; all others are fitted.

    Parameters
    ----------
    store
        With ``resid_post`` and ``projector.out`` at ``object:mean`` and ``resid_post`` at ``last``.
    rows
        bool ``[n]``: which examples probes may learn from. About a fifth of their images, the same for all probes, are kept
        out: they calibrate, and answers about them can be diagnosed.
    seed
        Of the split.
    left_out
        Where given, concepts without a probe at some place are added to it, each with the reason.
    """
    left_out = {} if left_out is None else left_out
    frame = store.frame()
    kept = {g for g in set(frame["group"]) if int(digest([str(g), "kept", seed])[:8], 16) / 0xFFFFFFFF < KEPT}
    rows = rows & ~np.array([g in kept for g in frame["group"]])
    attributes = [c for c in store.labels if c.startswith("attribute:") and c != "attribute:named"]
    found: list[ConceptDirection] = []
    for stack, component in (("vision", "resid_post"), ("projector", "out"), ("decoder", "resid_post")):
        if store.has(stack, component, "object:mean"):
            found += _fitted(store, attributes, component, "object:mean", stack, rows, seed, left_out)
            found += [replace(d, tokens="image:all") for d in _nouns(store, component, stack, rows, seed, left_out)]
    if store.has("decoder", "resid_post", "last"):
        kinds: Any = frame["level"].astype(str) + " " + frame["kind"].astype(str)
        for kind in dict.fromkeys(kinds[rows]):
            mine = rows & (kinds == kind).to_numpy()
            answers = set(frame["answer"][mine])
            level = kind.partition(" ")[0]
            asked = [f"{level}:named"] if answers & {"yes", "no"} else [f"{level}:{a}" for a in sorted(answers)]
            wanted = [c for c in asked if c in frame and level in LEVELS]
            found += _fitted(store, wanted, "resid_post", "last", "decoder", mine, seed, left_out, kind)
    return found


def _nouns(
    store: ActivationStore, component: str, stack: str, rows: np.ndarray, seed: int, left_out: dict[str, str]
) -> Iterator[ConceptDirection]:
    """Yield directions for which noun an object is, from one question about each object."""
    frame = store.frame()
    first = ~frame.duplicated(["group", "subject"]).to_numpy() & (frame["subject"] != "").to_numpy() & rows
    view: Any = _Subjects(store)
    nouns = [str(c) for c in frame if str(c).startswith("object:") and c != "object:named"]
    yield from _fitted(view, nouns, component, "object:mean", stack, first, seed, left_out, folds=2)


def _fitted(
    store: ActivationStore,
    concepts: Sequence[str],
    component: str,
    tokens: str,
    stack: str,
    rows: np.ndarray,
    seed: int,
    left_out: dict[str, str],
    kind: str = "",
    folds: int = FOLDS,
) -> Iterator[ConceptDirection]:
    possible = set(probeable(store, folds=folds, test_fraction=TEST, rows=rows)) if rows.any() else set()
    frame: Any = store.frame()[rows]
    both = {c: frame.loc[frame[c].notna()].groupby(c)["group"].nunique() for c in possible}
    possible = {c for c, count in both.items() if len(count) == 2 and count.min() >= FEWEST}
    of = f" ({kind})" if kind else ""
    few = f"fewer than {FEWEST} images of a class, or fewer than the split needs"
    left_out.update({f"{c}{of}": few for c in concepts if c not in possible})
    wanted = [c for c in concepts if c in possible]
    if not wanted:
        return
    try:
        grid = fit_grid(
            store, wanted, f"{stack}.{component}", tokens=tokens, heads=False, C=PENALTIES, folds=folds, test_fraction=TEST,
            control=0, rows=rows, skip_unplaceable=True, resamples=1, seed=seed, progress=False,
        )  # fmt: skip
    except UnplaceableError as error:
        left_out.update({f"{c}{of}": reason for c, reason in error.reasons.items()})
        return
    left_out.update({f"{c}{of}": reason for c, reason in grid.provenance.get("left_out", {}).items()})
    for concept in grid.concepts:
        for layer in grid.layers:
            if grid.weights[grid.concepts.index(concept), grid.layers.index(layer), 0].any():
                yield replace(grid.direction(concept, layer), kind=kind)
