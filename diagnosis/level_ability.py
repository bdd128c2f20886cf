"""The ability gap: what the vision tower shows, what the language model does with the same facts as text, and the whole model.

The survey of Shu et al. (arXiv 2501.01346, section 3.2.2) explains misalignment by a language model that is more capable than the
vision encoder. Three accuracies on the same questions: of probes of the vision tower, of the language model that gets the
annotation as text and no image, and of the whole model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from activation_store import ActivationStore, trace
from concepts.concept import LEVELS
from concepts.image_captions import caption_images
from concepts.image_source import NoImage
from concepts.schema import ConceptDataset, Example
from diagnosis.ceiling import cross_fitted_margins, folds_of
from diagnosis.claims import Claim, claims_of
from groundscope.core.errors import DataError
from groundscope.core.statistics import FEW_GROUPS, Estimate, cluster_bootstrap, estimate
from lvlm import Lvlm

if TYPE_CHECKING:
    import pandas as pd

MIN_GROUPS = 6
"""Smallest number of images with and without a concept for a probe of it."""
FOLDS = 5
Describe = Callable[[Example], str]


@dataclass(frozen=True)
class LevelAbility:
    """Shares of right answers to the questions of one level.

    Examples
    --------
    >>> from diagnosis import LevelAbility
    >>> from groundscope.core.statistics import Estimate
    >>> share = Estimate(0.9, 0.8, 1.0, 50)
    >>> LevelAbility("object", 50, share, share, share, Estimate(0.0, -0.1, 0.1, 50), ()).gap.value
    0.0
    """

    level: str
    n: int
    """Number of questions that all three answer."""
    tower: Estimate
    """Cross-fitted probes of the vision tower, at the place that is best on other images."""
    text: Estimate
    """The language model with the annotation as text, without the image."""
    model: Estimate
    """The whole model."""
    gap: Estimate
    """``text - tower``, paired by question: positive if the language model is more capable."""
    places: tuple[str, ...]
    """Site and tokens that each fold reads."""


def ability_gap(
    model: Lvlm,
    data: ConceptDataset,
    store: ActivationStore,
    *,
    describe: Describe | None = None,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool | None = None,
) -> tuple[LevelAbility, ...]:
    """Compare the vision tower, the language model and the whole model, level by level.

    Parameters
    ----------
    model
        The model of the store; it must run on text alone.
    data
        The questions of the store.
    store
        Activations with ``vision.resid_post`` at ``object:mean`` or ``image:mean``, labels, and the model's answers.
    describe
        Returns the annotation of an example as text, which is put before its question; by default `describe_annotation`.
    batch_size, seed, progress
        Examples per forward pass; seed of the folds; whether to show progress, by default on a terminal only.

    Notes
    -----
    Probes read the concept of the question (`object:dog`, `attribute:red`). A relation of two objects is read from the tokens of
    the one that the question is about, or of the whole image, so its tower accuracy is a lower bound. Questions whose concept has
    fewer than 6 images with or without it are left out.

    Raises
    ------
    DataError
        If no level has a question that all three can answer, or an example of the store is missing in the data.
    StoreError, ModelError
        As for `activation_store.trace`.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import groundscope as gs
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(100, splits=("neutral",)).where(kind="color")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sites = ["vision.resid_post"]
    ...     store = gs.trace(model, data, sites=sites, tokens=["object:mean"], out=Path(folder) / "s", progress=False)
    ...     (ability,) = gs.ability_gap(model, data, store, progress=False)
    >>> ability.level, ability.tower.value > 0.8
    ('attribute', True)
    """
    by_id = {e.id: e for e in data}
    ids = [str(v) for v in store.columns["id"]]
    if missing := next((i for i in ids if i not in by_id), None):
        msg = f"example '{missing}' of the store is not in the dataset; pass the dataset that was traced"
        raise DataError(msg)
    groups = np.array([str(g) for g in store.columns["group"]])
    claims = claims_of(store)
    tower, places = _tower(store, claims, groups, seed)
    captions = {e.image.identity: e.answer for e in caption_images(data)}
    to_text = describe or (lambda e: describe_annotation(e, captions.get(e.image.identity, "")))
    questions = [by_id[i] for i in ids]
    texts = [
        replace(e, image=NoImage(), further_images=(), question=f"{to_text(e)} {e.question}".strip()) for e in questions
    ]
    with tempfile.TemporaryDirectory() as folder:
        answered = trace(
            model, ConceptDataset(data.name, tuple(texts)), ["resid_post"], ["last"], Path(folder) / "text",
            batch_size=batch_size, unembedding=False, progress=progress,
        )  # fmt: skip
        text = np.asarray(answered.columns["correct"], float)
    whole = np.asarray(store.columns["correct"], float)
    abilities = []
    for level in LEVELS:
        at = np.array([c is not None and c.level == level for c in claims])
        at &= np.isfinite(tower) & np.isfinite(text) & np.isfinite(whole)
        if not at.any():
            continue
        names = groups[at].tolist()
        of_tower, of_text, of_model = (estimate(values[at], names) for values in (tower, text, whole))
        difference = text[at] - tower[at]
        low, high = cluster_bootstrap(difference, names)
        gap = Estimate(float(difference.mean()), low, high, int(at.sum()), len(set(names)) < FEW_GROUPS)
        abilities.append(LevelAbility(level, int(at.sum()), of_tower, of_text, of_model, gap, places.get(level, ())))
    if not abilities:
        msg = (
            "no question can be answered by probes of the vision tower: trace vision.resid_post at object:mean or image:mean, "
            "with labels of the concepts in question"
        )
        raise DataError(msg)
    return tuple(abilities)


def ability_frame(abilities: tuple[LevelAbility, ...]) -> pd.DataFrame:
    """Return one row per level: n, and each share with its interval.

    Examples
    --------
    >>> from diagnosis import LevelAbility, ability_frame
    >>> from groundscope.core.statistics import Estimate
    >>> share = Estimate(0.9, 0.8, 1.0, 50)
    >>> frame = ability_frame((LevelAbility("object", 50, share, share, share, Estimate(0.0, -0.1, 0.1, 50), ()),))
    >>> frame[["level", "n", "tower", "gap"]].values.tolist()
    [['object', 50, 0.9, 0.0]]
    """
    import pandas as pd

    rows = []
    for ability in abilities:
        row: dict[str, object] = {"level": ability.level, "n": ability.n}
        for name in ("tower", "text", "model", "gap"):
            effect: Estimate = getattr(ability, name)
            row |= {name: effect.value, f"{name}_low": effect.low, f"{name}_high": effect.high}
        rows.append(row)
    return pd.DataFrame(rows)


def describe_annotation(example: Example, caption: str = "") -> str:
    """Return the annotation of an example as text: a true caption, else its objects; and how objects in question lie.

    Examples
    --------
    >>> import groundscope as gs
    >>> from diagnosis.level_ability import describe_annotation
    >>> data = gs.scenes.dataset(10)
    >>> describe_annotation(data[0])
    'a yellow chair, a blue airplane and a red banana.'
    >>> describe_annotation(data.where(kind="relation")[0]).partition(". ")[2]
    'the airplane is left of the chair. the airplane is above the chair.'
    """
    from concepts.scenes.questions import article

    named = [f"{o.attributes.get('color', '')} {o.noun}".strip() for o in example.objects]
    listed = [f"{article(name)} {name}" for name in named]
    text = caption or (
        f"{', '.join(listed[:-1])} and {listed[-1]}." if len(listed) > 1 else "".join(f"{n}." for n in listed)
    )
    asked = [o for o in example.objects if o.box is not None and o.noun in example.question.lower()]
    if example.level == "relation" and len(asked) == 2:
        asked.sort(key=lambda o: example.question.lower().index(o.noun))
        (x1, y1), (x2, y2) = (o.require_box().center for o in asked)
        a, b = (o.noun for o in asked)
        text += f" the {a} is {'left' if x1 < x2 else 'right'} of the {b}. the {a} is {'above' if y1 < y2 else 'below'} the {b}."
    return text


def _tower(
    store: ActivationStore, claims: list[Claim | None], groups: np.ndarray, seed: int
) -> tuple[np.ndarray, dict[str, tuple[str, ...]]]:
    """Return whether probes of the tower answer each question, float ``[n]`` (NaN: no probe), and the places by level."""
    n = len(claims)
    fold_of = folds_of(groups, FOLDS, seed)
    right, names = np.full(n, np.nan), {}
    sites = [
        (f"vision.L{layer}.resid_post", str(a.tokens))
        for a in store.arrays
        if (a.stack, a.component) == ("vision", "resid_post") and str(a.tokens) in {"object:mean", "image:mean"}
        for layer in a.layers
    ]
    frame = store.frame()
    for level in LEVELS:
        asked = {i: c for i, c in enumerate(claims) if c is not None and c.level == level and c.concept in frame}
        if not asked or not sites:
            continue
        read = np.full((len(sites), n), np.nan)
        for s, (site, tokens) in enumerate(sites):
            x = store.read(site, tokens).astype(np.float64)
            present = ~np.isnan(x).any(axis=1)
            for concept in {c.concept for c in asked.values()}:
                labels = frame[concept].to_numpy(float)
                rows = np.flatnonzero(present & ~np.isnan(labels))
                counts = [len(set(groups[rows[labels[rows] == value]])) for value in (0, 1)]
                if min(counts) < MIN_GROUPS:
                    continue
                truth = np.where(labels[rows] == 1, "yes", "no")
                margins = dict(zip(rows.tolist(), cross_fitted_margins(x[rows], truth, fold_of[rows]), strict=True))
                for i, claim in asked.items():
                    if claim.concept == concept and i in margins:
                        read[s, i] = margins[i] > 0
        # A place answers only what it has tokens for; the best one of those that answer most questions is chosen.
        covered = (~np.isnan(read)).sum(axis=1)
        eligible = np.flatnonzero(covered == covered.max()) if covered.max() else np.array([], int)
        if not len(eligible):
            continue
        chosen = []
        for fold in range(FOLDS):
            others = read[eligible][:, fold_of != fold]
            best = int(eligible[np.nan_to_num(np.nanmean(others, axis=1), nan=-1).argmax()])
            right[fold_of == fold] = np.where(
                np.isnan(read[best, fold_of == fold]), right[fold_of == fold], read[best, fold_of == fold]
            )
            chosen.append(" at ".join(sites[best]))
        names[level] = tuple(chosen)
    return right, names
