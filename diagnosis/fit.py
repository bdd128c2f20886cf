"""Fit the probes that a diagnosis reads activations with, from a store, and choose the answers to diagnose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from concepts.concept import LEVELS
from concepts.schema import ConceptDataset, Example
from diagnosis.checks import check_store
from diagnosis.fit_without_boxes import fit_located, locate
from groundscope.core.document_digest import value_digest
from groundscope.core.errors import ConfigError, DataError
from lvlm.token_selection import ALL_IMAGE_TOKENS, IMAGE_MEAN
from probes import fit_grid, probeable
from probes.protocol.tasks import UnplaceableError

if TYPE_CHECKING:
    import pandas as pd

    from activation_store import ActivationStore, ArrayInfo, ConceptDirection
    from lvlm import Lvlm

FOLDS = 3
NOUN_FOLDS = 2
TEST_FRACTION = 0.3
C_VALUES = (0.001, 0.01, 0.1)
CALIBRATION_SHARE = 0.2
"""Share of the images that no probe is fitted to: they calibrate the probes, and answers about them can be diagnosed."""
MAX_CHOICES = 20
"""Largest number of true answers to a kind of question for which an answer without a label gets a probe."""
MIN_IMAGES = 6
"""Images of each class that a concept needs; with fewer, the split would leave a part without the class."""


@dataclass(frozen=True)
class DirectionSet(Sequence["ConceptDirection"]):
    """Directions for `diagnosis.diagnose`; made by `fit_directions`.

    Examples
    --------
    >>> import numpy as np
    >>> from activation_store import ConceptDirection
    >>> from diagnosis import DirectionSet
    >>> cat = ConceptDirection("decoder.L0.resid_post", "last", "object:cat", np.array([1.0, 0.0]), train_groups=("g1",))
    >>> directions = DirectionSet((cat,), {"object:dog": "fewer than 6 images of a class"})
    >>> len(directions), directions.train_groups
    (1, frozenset({'g1'}))
    """

    directions: tuple[ConceptDirection, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Concepts without a probe at some place, with the reason."""
    train_images: frozenset[str] = frozenset()
    """Digests of the images that a probe was fitted to, as in the column ``image`` of a store: answers about them cannot be
    diagnosed, in whatever store they are."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "left_out", MappingProxyType(dict(self.left_out)))

    @overload
    def __getitem__(self, index: int) -> ConceptDirection: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[ConceptDirection, ...]: ...
    def __getitem__(self, index: int | slice) -> ConceptDirection | tuple[ConceptDirection, ...]:
        return self.directions[index]

    def __len__(self) -> int:
        return len(self.directions)

    @cached_property
    def train_groups(self) -> frozenset[str]:
        """Groups that a probe was fitted to; answers about their images cannot be diagnosed."""
        return frozenset[str]().union(*{direction.train_groups for direction in self.directions})


def training_rows(store: ActivationStore, *, seed: int = 0) -> np.ndarray:
    """Return the examples that probes of a diagnosis are fitted to, boolean ``[N]``.

    The split ``neutral`` where the store has it and others, because nothing in its images misleads; otherwise the examples of
    half of the images.

    Examples
    --------
    >>> import pandas as pd
    >>> from diagnosis import training_rows
    >>> class Memory:
    ...     def frame(self):
    ...         return pd.DataFrame({"group": ["a", "b", "c"], "split": ["neutral", "conflict", "neutral"]})
    >>> training_rows(Memory()).tolist()
    [True, False, True]
    """
    frame: pd.DataFrame = store.frame()
    neutral = (frame["split"] == "neutral").to_numpy()
    if neutral.any() and not neutral.all():
        return neutral
    half = {g: int(value_digest([g, seed])[:8], 16) % 2 == 0 for g in set(frame["group"])}
    return np.array([half[g] for g in frame["group"]])


def select_evenly(examples: Sequence[Example], limit: int, *, seed: int = 0) -> list[Example]:
    """Return at most `limit` examples, distributed as evenly over levels and splits as they allow.

    Examples
    --------
    >>> import groundscope as gs
    >>> examples = gs.scenes.dataset(10)
    >>> len({(e.level, e.split) for e in gs.diagnosis.select_evenly(examples, 6)})
    6
    """
    rng = np.random.default_rng(seed)
    parts: dict[tuple[str, str], list[Example]] = {}
    for i in rng.permutation(len(examples)):
        example = examples[int(i)]
        parts.setdefault((example.level or "", example.split), []).append(example)
    selected: list[Example] = []
    while len(selected) < limit and any(parts.values()):
        for key in sorted(parts):
            if parts[key] and len(selected) < limit:
                selected.append(parts[key].pop())
    return selected


def exclude_images(data: ConceptDataset, other: Sequence[Example]) -> ConceptDataset:
    """Return the examples of a dataset about images that another one does not have: to fit probes for the other one.

    Raises
    ------
    DataError
        If no example is left.

    Examples
    --------
    >>> import groundscope as gs
    >>> data = gs.scenes.dataset(20)
    >>> half = gs.diagnosis.exclude_images(data, data[:60])
    >>> {e.image.identity for e in half} & {e.image.identity for e in data[:60]}, 0 < len(half) < len(data)
    (set(), True)
    """
    identities = {image.identity for e in other for image in e.images}
    other_images = data.filter(lambda e: not identities & {image.identity for image in e.images})
    if not len(other_images):
        msg = f"all images of '{data.name}' are among those that are diagnosed; fit probes on other images"
        raise DataError(msg)
    return other_images


def fit_directions(
    store: ActivationStore,
    rows: np.ndarray | None = None,
    *,
    model: Lvlm | None = None,
    data: Sequence[Example] | None = None,
    without_boxes: bool | None = None,
    seed: int = 0,
) -> DirectionSet:
    """Fit the probes that `diagnose` reads activations with, on some rows of a store.

    Probes of attributes read the object's tokens. Probes of nouns are fitted there too and read every image token. At the
    last token, each kind of question has probes of whether its statement is true, or of which of its answers is true.
    Concepts with too few images, and those that no split into whole images can place, are left out.

    Where objects have no boxes, probes read image tokens: the mean over all of them, and, with `model` and `data`, single
    tokens. A noun is read at the token with the largest decision of a probe that is fitted to labels of whole images
    (`diagnosis.noun_probes`); an attribute at the token where its noun is read; a relation as the difference between the tokens
    of its two nouns. Nouns with too few images share one probe of image token and word embedding, if it reads nouns that it was
    not fitted to.

    Parameters
    ----------
    store
        Store with ``resid_post`` and ``projector.out`` at ``object:mean`` or ``image:mean``, and ``resid_post`` at ``last``;
        arrays that it lacks get no probes. It may be of other data than the diagnosed answers, but of the same model.
    rows
        Boolean ``[N]``: examples that probes may be fitted to; by default `training_rows`. About a fifth of their images, the
        same for all probes, are held out: they calibrate, and answers about them can be diagnosed.
    model, data
        The model and the examples of the store, to read single image tokens.
    without_boxes
        Whether to fit probes that need no boxes; by default for levels of questions whose images have none. True for probes that
        read other data without boxes.
    seed
        Seed of the splits.

    Raises
    ------
    ConfigError
        If only one of `model` and `data` is given.
    StoreError
        If the store is of another model.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import groundscope as gs
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(40, splits=("neutral",)).where(level="object")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = gs.trace(model, data, sites=("resid_post",), tokens=("last",), out=Path(folder) / "store")
    ...     directions = gs.fit_directions(store)
    >>> sorted({d.concept for d in directions}), sorted({d.tokens for d in directions})
    (['object:named'], ['last'])
    """
    if (model is None) != (data is None):
        msg = "give both model and data, the examples of the store, or neither"
        raise ConfigError(msg)
    if model is not None:
        check_store(model, store)
    rows = training_rows(store, seed=seed) if rows is None else rows
    left_out: dict[str, str] = {}
    frame = _with_answer_labels(store.frame())
    # The word "kept" is part of the hash that decides the split; another word would change results.
    shares = {g: int(value_digest([str(g), "kept", seed])[:8], 16) / 0xFFFFFFFF for g in set(frame["group"])}
    calibration = np.array([shares[g] < CALIBRATION_SHARE for g in frame["group"]])
    rows = rows & ~calibration
    labelled: Any = _Relabelled(store, frame)
    attributes = [c for c in store.labels if c.startswith("attribute:") and c != "attribute:named"]
    boxes = {level: _has_boxes(store, frame, level) for level in LEVELS}
    directions: list[ConceptDirection] = []
    for stack, component in (("vision", "resid_post"), ("projector", "out"), ("decoder", "resid_post")):
        if any(boxes.values()) and store.has(stack, component, "object:mean"):
            site = f"{stack}.{component}"
            directions += _fit(store, attributes, site, "object:mean", rows, seed, left_out)
            nouns = _fit_nouns(store, site, rows, seed, left_out)
            directions += [replace(d, tokens=ALL_IMAGE_TOKENS) for d in nouns]
    if without_boxes is None:
        levels_of_questions = set(frame["level"])
        levels = [level for level in LEVELS if not boxes[level] and level in levels_of_questions]
    else:
        levels = list(LEVELS) if without_boxes else []
    if levels:
        directions += _fit_image_tokens(labelled, levels, rows, model, data, seed, left_out, directions)
    if store.has("decoder", "resid_post", "last"):
        kinds: Any = frame["level"].astype(str) + " " + frame["kind"].astype(str)
        for kind in dict.fromkeys(kinds[rows]):
            rows_of_kind = rows & (kinds == kind).to_numpy()
            answers = set(frame["answer"][rows_of_kind])
            level = kind.partition(" ")[0]
            concepts = [f"{level}:named"] if answers & {"yes", "no"} else [f"{level}:{a}" for a in sorted(answers)]
            available = [c for c in concepts if c in frame and level in LEVELS]
            directions += _fit(labelled, available, "decoder.resid_post", "last", rows_of_kind, seed, left_out, kind)
    groups = {g for d in directions for g in d.train_groups}
    trained = np.array([group in groups for group in frame["group"]], bool)
    images = frozenset(str(i) for i in frame["image"][trained] if i) if "image" in frame else frozenset()
    return DirectionSet(tuple(directions), left_out, images)


def _has_boxes(store: ActivationStore, frame: pd.DataFrame, level: str) -> bool:
    """Return whether at least half of the questions of a level are about images with boxes."""
    of_level = (frame["level"] == level).to_numpy()
    if "box_ids" not in store.columns:  # an earlier store
        return store.has("decoder", "resid_post", "object:mean") or store.has("projector", "out", "object:mean")
    counts = np.array([len(boxes) for boxes in store.columns["box_ids"]])
    return bool(of_level.any()) and float((counts[of_level] > 0).mean()) >= 0.5


def _with_answer_labels(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a table with labels that follow from true answers, where it has none: of statements, and of choices."""
    columns: dict[str, np.ndarray] = {}
    choice = ~frame["answer"].isin(["yes", "no"]).to_numpy()
    for level in LEVELS:
        of_level = (frame["level"] == level).to_numpy()
        names = {f"{level}:named": (of_level & ~choice, "yes")} if (of_level & ~choice).any() else {}
        kinds = frame["kind"].astype(str)
        for kind in dict.fromkeys(kinds[of_level & choice]):
            of_kind = of_level & choice & (kinds == kind).to_numpy()
            answers = sorted(set(frame["answer"][of_kind]))
            if 1 < len(answers) <= MAX_CHOICES:
                names |= {f"{level}:{answer}": (of_kind, answer) for answer in answers}
        for name, (defined, answer) in names.items():
            old = frame[name].to_numpy(float) if name in frame else np.full(len(frame), np.nan)
            new = np.where(defined & np.isnan(old), (frame["answer"] == answer).to_numpy(float), old)
            if not np.array_equal(new, old, equal_nan=True):
                columns[name] = new.astype(np.float32)
    return frame.assign(**columns)


class _Relabelled:
    """A store with another example table."""

    def __init__(self, store: ActivationStore, frame: pd.DataFrame) -> None:
        self._store, self._frame = store, frame

    @property
    def arrays(self) -> Sequence[ArrayInfo]:
        return self._store.arrays

    @property
    def digest(self) -> str:
        return self._store.digest

    @property
    def provenance(self) -> Mapping[str, Any]:
        return self._store.provenance

    def has(self, stack: str, component: str, tokens: str) -> bool:
        return self._store.has(stack, component, tokens)

    def frame(self) -> pd.DataFrame:
        return self._frame

    def read(self, site: str, tokens: str, head: int | None = None, examples: Any = None) -> np.ndarray:
        return self._store.read(site, tokens, head=head, examples=examples)


def _fit_image_tokens(
    store: Any,
    levels: Sequence[str],
    rows: np.ndarray,
    model: Lvlm | None,
    data: Sequence[Example] | None,
    seed: int,
    left_out: dict[str, str],
    others: Sequence[ConceptDirection],
) -> Iterator[ConceptDirection]:
    """Yield directions that need no boxes, for some levels: at the mean of all image tokens, and at single tokens."""
    frame: Any = store.frame()
    other_keys = {(d.site, d.tokens, d.concept) for d in others}
    concepts = {
        level: [str(c) for c in frame if str(c).startswith(f"{level}:") and c != f"{level}:named"] for level in levels
    }
    for stack, component in (("vision", "resid_post"), ("projector", "out"), ("decoder", "resid_post")):
        if store.has(stack, component, IMAGE_MEAN):
            for level, names in concepts.items():
                of_level = rows & (frame["level"] == level).to_numpy()
                site = f"{stack}.{component}"
                yield from _fit(store, names, site, IMAGE_MEAN, of_level, seed, left_out)
    if model is None or data is None:
        return
    probes = locate(model, store, frame, {e.id: e for e in data if len(e.images) == 1}, rows, seed, left_out)
    yield from (d for d in probes.nouns if (d.site, d.tokens, d.concept) not in other_keys)

    def fit(
        source: Any, names: Sequence[str], site: str, tokens: str, of_level: np.ndarray
    ) -> Iterator[ConceptDirection]:
        yield from _fit(source, names, site, tokens, of_level, seed, left_out)

    yield from fit_located(probes, {level: names for level, names in concepts.items() if level != "object"}, fit, rows)


def _fit_nouns(
    store: ActivationStore, site: str, rows: np.ndarray, seed: int, left_out: dict[str, str]
) -> Iterator[ConceptDirection]:
    """Yield directions of the noun of an object, fitted to one question about each object."""
    frame = store.frame()
    first = ~frame.duplicated(["group", "subject"]).to_numpy() & (frame["subject"] != "").to_numpy() & rows
    nouns = [str(c) for c in frame if str(c).startswith("object:") and c != "object:named"]
    # A noun's label says whether it is the object that the question is about, if that is in the image.
    subject = frame["subject"].astype(str)
    labels = {c: np.where(subject == "", np.nan, subject == c.partition(":")[2]) for c in nouns}
    view: Any = _Relabelled(store, frame.assign(**labels))
    yield from _fit(view, nouns, site, "object:mean", first, seed, left_out, folds=NOUN_FOLDS)


def _fit(
    store: ActivationStore,
    concepts: Sequence[str],
    site: str,
    tokens: str,
    rows: np.ndarray,
    seed: int,
    left_out: dict[str, str],
    kind: str = "",
    folds: int = FOLDS,
) -> Iterator[ConceptDirection]:
    """Yield the directions of some concepts at every layer; concepts without a probe are added to `left_out`."""
    possible = set(probeable(store, folds=folds, test_fraction=TEST_FRACTION, rows=rows)) if rows.any() else set()
    frame: Any = store.frame()[rows]
    images = {c: frame.loc[frame[c].notna()].groupby(c)["group"].nunique() for c in possible}
    possible = {c for c, count in images.items() if len(count) == 2 and count.min() >= MIN_IMAGES}
    suffix = f" ({kind})" if kind else ""
    reason = f"fewer than {MIN_IMAGES} images of a class, or fewer than the split needs"
    left_out.update({f"{c}{suffix}": reason for c in concepts if c not in possible})
    fitted = [c for c in concepts if c in possible]
    if not fitted:
        return
    try:
        grid = fit_grid(
            store, fitted, site, tokens=tokens, heads=False, C=C_VALUES, folds=folds, test_fraction=TEST_FRACTION,
            control=0, rows=rows, skip_unplaceable=True, resamples=1, seed=seed, progress=False,
        )  # fmt: skip
    except UnplaceableError as error:
        left_out.update({f"{c}{suffix}": reason for c, reason in error.reasons.items()})
        return
    left_out.update({f"{c}{suffix}": reason for c, reason in grid.provenance.get("left_out", {}).items()})
    for concept in grid.concepts:
        for layer in grid.layers:
            if grid.weights[grid.concepts.index(concept), grid.layers.index(layer), 0].any():
                yield replace(grid.direction(concept, layer), kind=kind)
