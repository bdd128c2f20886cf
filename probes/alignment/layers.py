"""Measures of alignment at every layer or head of two stores, each of one modality alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from activation_store.row_input import describe_input, row_input
from groundscope.core.errors import ProbeError
from groundscope.core.progress import step_bar
from probes.alignment.comparison import PERMUTATIONS, Draws, choose_measures, draw_values, make_test
from probes.alignment.layer_scores import LayerAlignment
from probes.alignment.measures import Settings
from probes.alignment.pairing import ImageRows
from probes.alignment.rows import CLAMP, NEIGHBORS, clamp_limit
from probes.protocol.inputs import ProbedArray, find_array, read_features, read_groups, row_mask

if TYPE_CHECKING:
    import pandas as pd

    from activation_store import ActivationSource

_BLOCK = 64
"""Rows of which all layers are read at one time for a limit of all layers."""


def measure_layers(
    images: ActivationSource,
    texts: ActivationSource | None = None,
    site: str = "resid_post",
    *,
    text_site: str | None = None,
    image: str = "image:mean",
    text: str = "question:mean",
    heads: bool = False,
    pairs: Literal["same", "all"] = "same",
    measures: Sequence[str] | None = None,
    k: int = NEIGHBORS,
    clamp: float | None = CLAMP,
    variant: Literal["layer", "release"] = "layer",
    joint: bool = False,
    rows: Sequence[bool] | np.ndarray | pd.Series | None = None,
    limit: int = 1000,
    permutations: int = PERMUTATIONS,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool | None = None,
) -> LayerAlignment:
    """Measure the alignment of images with texts about them, per layer or head.

    An image and a text are compared as the model represents each alone (Shu et al., arXiv 2501.01346, appendix C): in a joint
    prompt, question tokens attend to the image, and that alone makes them similar. All places and measures share the same
    permutations of images, so that the choice of the best place is repeated in each of them (`LayerAlignment.best`).

    Parameters
    ----------
    images, texts
        Stores of the same examples, traced with ``input="image"`` and ``input="text"``, matched by id.
    site, text_site
        A component at every layer, or one site; of the texts by default the same.
    image, text
        Token selections.
    heads
        Compare each head's output (component ``z``) instead of whole layers.
    pairs
        ``same``: an image's layer with the same layer of the text. ``all``: with every layer, as Huh et al. (arXiv 2405.07987)
        search; with `heads`, the same head of every layer.
    measures
        Names of `probes.alignment.measures`.
    k, clamp
        Neighbors, and the quantile at which rows are clamped before they are searched.
    variant
        ``layer``: rows of neighbors are clamped at a limit of their layer, and CKA reads rows without a limit. ``release``: as in
        the code of Huh et al., the limit is one of all layers, and CKA reads clamped rows of unit length too.
    joint
        Accept rows that have seen both modalities; without `texts`, the text tokens of the same prompts. The result measures
        how much a prompt mixes its image with its text (or, with one blank image, what the questions share); its `rows` is
        ``joint``.
    rows
        Boolean mask over the examples of `images`.
    limit
        Maximum number of images (the first ones): kernels take ``limit^2``.
    permutations
        Of the nulls: 0, or at least 199.
    resamples, confidence
        Of the interval of the modality gap.
    seed
        Of permutations and bootstrap.
    progress
        Whether to show a progress bar; by default only on a terminal.

    Raises
    ------
    SiteError
        If a store does not have its array.
    ProbeError
        If rows have seen both modalities and `joint` is false, the stores differ in their examples, a measure is unknown or has
        too few images, or no layer pairs.

    Examples
    --------
    >>> import numpy as np
    >>> from activation_store import MemorySource
    >>> from probes import alignment
    >>> x = np.random.default_rng(0).normal(size=(30, 2, 8))
    >>> table = {"id": range(30), "group": range(30)}
    >>> images = MemorySource({("resid_post", "image:mean"): x}, table, provenance={"input": "image"})
    >>> texts = MemorySource({("resid_post", "question:mean"): 2 * x}, table, provenance={"input": "text"})
    >>> scores = alignment.measure_layers(images, texts, measures=["cosine", "cka"])
    >>> scores.best()[["measure", "value", "p"]].round(3)
      measure  value      p
    0  cosine    1.0  0.005
    1     cka    1.0  0.005
    """
    if pairs not in ("same", "all") or variant not in ("layer", "release") or limit < 1:
        msg = f"pairs='{pairs}' must be 'same' or 'all', variant='{variant}' 'layer' or 'release', and limit={limit} at least 1"
        raise ProbeError(msg)
    other = images if texts is None else texts
    arrays = (
        find_array(images, site, image, heads=heads),
        find_array(other, text_site or site, text, heads=heads),
    )
    check_inputs(images, texts, arrays[0].stack, joint=joint)
    layer_pairs = [(a, b) for a in arrays[0].layers for b in arrays[1].layers if pairs == "all" or a == b]
    if not layer_pairs or arrays[0].head_numbers != arrays[1].head_numbers:
        msg = (
            f"{site} and {text_site or site} have no layer in common, or other heads; set pairs='all' to compare "
            "every layer, and heads=False"
        )
        raise ProbeError(msg)
    sides, ids, groups = _match(images, other, arrays, rows, limit)
    of = ImageRows.of(groups.tolist())
    settings = Settings(k, clamp)
    chosen = choose_measures(measures, of, settings)
    test = make_test(of, permutations, resamples, confidence, seed)
    forms = [replace(settings, limit=side.limit(clamp)) if variant == "release" else settings for side in sides]
    outputs = tuple((name, output) for name, measure in chosen.items() for output in measure.names(name))
    places: list[tuple[int, int, int | None]] = []
    draws_by_place: list[list[Draws]] = []
    examples: dict[str, list[np.ndarray]] = {name: [] for name, m in chosen.items() if m.examples is not None}

    def prepare(side: _Side, form: Settings, layer: int) -> list[dict[str, Any]]:
        return [
            {name: measure.prepare(x, of, form) for name, measure in chosen.items()} for x in side.parts(layer)
        ]  # one entry for each head

    texts_at = {b: prepare(sides[1], forms[1], b) for b in arrays[1].layers} if pairs == "all" else {}
    equal = sides[0].width == sides[1].width
    with step_bar("measuring alignment", len(layer_pairs), show=progress) as advance:
        done: tuple[int, list[dict[str, Any]]] | None = None
        for a, b in layer_pairs:
            if done is None or done[0] != a:
                done = a, prepare(sides[0], forms[0], a)
            against = texts_at[b] if pairs == "all" else prepare(sides[1], forms[1], b)
            for head, x, y in zip(arrays[0].head_numbers, done[1], against, strict=True):
                places.append((a, b, head if heads else None))
                draws_by_place.append([])
                for name, measure in chosen.items():
                    comparable = equal or not measure.equal_width
                    count = len(measure.names(name))
                    draws_by_place[-1].append(
                        draw_values(measure, x[name], y[name], of, test)
                        if comparable
                        else _undefined(count, permutations)
                    )
                    if measure.examples is not None:
                        scores = (
                            measure.examples(x[name], y[name], of) if comparable else np.full(len(of.image), np.nan)
                        )
                        examples[name].append(scores.astype(np.float32))
            advance()
    return LayerAlignment(
        tuple(places),
        outputs,
        np.array([np.concatenate([d.values for d in row]) for row in draws_by_place]),
        np.stack([np.concatenate([_filled(d, permutations) for d in row], axis=1) for row in draws_by_place], axis=1),
        np.array([np.concatenate([d.low for d in row]) for row in draws_by_place]),
        np.array([np.concatenate([d.high for d in row]) for row in draws_by_place]),
        {name: np.array(scores) for name, scores in examples.items()},
        tuple(ids.tolist()),
        tuple(groups.tolist()),
        "joint" if joint else "alone",
        variant,
    )


def check_inputs(images: ActivationSource, texts: ActivationSource | None, stack: str, *, joint: bool) -> None:
    """Raise `ProbeError` unless images and texts have each seen one modality alone, or `joint` accepts rows that saw both.

    Sites of the vision tower have seen no text in any prompt.
    """
    modalities = row_input(images), row_input(images if texts is None else texts)
    if modalities[0] == "text" or modalities[1] == "image":
        msg = (
            f"the rows of the images have seen {describe_input(modalities[0])}, those of the texts "
            f"{describe_input(modalities[1])}; give the store traced with input='image' first, then that with input='text'"
        )
        raise ProbeError(msg)
    alone = (modalities[0] == "image" or stack == "vision") and modalities[1] == "text"
    if not alone and not joint:
        which = "images" if modalities[1] == "text" else "texts"
        msg = (
            f"the rows of the {which} have seen image and text: alignment compares an image alone with a text alone, so trace "
            "the same examples with input='image' and with input='text'; or set joint=True to measure how a prompt mixes both"
        )
        raise ProbeError(msg)


@dataclass(frozen=True, eq=False)
class _Side:
    """The rows of one modality, in the order of the images' store."""

    store: ActivationSource
    array: ProbedArray
    mask: np.ndarray
    """bool: rows of the store."""
    order: np.ndarray
    """int64 [N]: place of each row among the masked ones."""
    ids: np.ndarray

    def read(self, layer: int) -> np.ndarray:
        """Return float64 [N, D]; NaN where the token selection was empty."""
        x = read_features(self.store, self.array, layer, self.mask, self.ids[np.argsort(self.order)])
        return x[self.order].astype(np.float64)

    def parts(self, layer: int) -> Iterator[np.ndarray]:
        """Yield the rows of a layer, or of each of its heads."""
        yield from np.split(self.read(layer), len(self.array.head_numbers), axis=1)

    @property
    def width(self) -> int:
        """Width of a layer's rows."""
        array = next(a for a in self.store.arrays if (a.stack, a.component, a.tokens) == _key(self.array))
        return array.width

    def select(self, used: np.ndarray) -> _Side:
        """Return some of the rows, by a boolean mask [N]."""
        numbers = np.flatnonzero(self.mask)[self.order][used]
        mask = np.zeros_like(self.mask)
        mask[numbers] = True
        return replace(self, mask=mask, order=np.searchsorted(np.sort(numbers), numbers), ids=self.ids[used])

    def limit(self, clamp: float | None) -> float | None:
        """Return the value at which rows of all layers are clamped, or None."""
        if clamp is None:
            return None
        limits, sizes = [], []
        for start in range(0, len(self.ids), _BLOCK):
            part = self.select((np.arange(len(self.ids)) // _BLOCK) == start // _BLOCK)
            values = np.stack([part.read(layer) for layer in self.array.layers], axis=1)
            limits.append(clamp_limit(values, clamp))
            sizes.append(len(values))
        return float(np.average(limits, weights=sizes))


def _key(array: ProbedArray) -> tuple[str, str, str]:
    return array.stack, array.component, array.tokens


def _match(
    images: ActivationSource,
    texts: ActivationSource,
    arrays: tuple[ProbedArray, ProbedArray],
    rows: Sequence[bool] | np.ndarray | pd.Series | None,
    limit: int,
) -> tuple[tuple[_Side, _Side], np.ndarray, np.ndarray]:
    """Return both sides with equal examples in equal order, and their ids and groups."""
    frame = images.frame()
    mask = row_mask(rows, len(frame))
    groups = read_groups(frame)
    ids = frame["id"].to_numpy()
    row_of = {name: i for i, name in enumerate(texts.frame()["id"].tolist())}
    missing = [name for name in ids.tolist() if name not in row_of]
    more = set(row_of) - set(ids.tolist())
    if missing or more:
        name, where = (missing[0], "images") if missing else (min(map(str, more)), "texts")
        msg = (
            f"the two stores differ in their examples: '{name}' is only among the {where} ({len(missing)} only among the images, "
            f"{len(more)} only among the texts); trace the same data with both inputs"
        )
        raise ProbeError(msg)
    of = ImageRows.of(groups[mask].tolist())
    used = np.flatnonzero(mask)[of.image < limit]
    numbers = np.array([row_of[name] for name in ids[used].tolist()], dtype=np.int64)
    chosen = []
    for store, array, at in zip((images, texts), arrays, (used, numbers), strict=True):
        selected = np.zeros(len(frame), dtype=bool)
        selected[at] = True
        chosen.append(_Side(store, array, selected, np.searchsorted(np.sort(at), at), ids[used]))
    # An empty token selection is empty at every layer.
    both = ~np.any([np.isnan(side.read(side.array.layers[0])).any(axis=1) for side in chosen], axis=0)
    if not both.any():
        msg = (
            f"no example has both {arrays[0].tokens} and {arrays[1].tokens}; choose token selections that examples have"
        )
        raise ProbeError(msg)
    first, second = (side.select(both) for side in chosen)
    return (first, second), ids[used][both], groups[used][both]


def _undefined(outputs: int, permutations: int) -> Draws:
    unknown = np.full(outputs, np.nan)
    return Draws(unknown, np.full((permutations, outputs), np.nan), unknown, unknown)


def _filled(draws: Draws, permutations: int) -> np.ndarray:
    """Return the null [B, outputs], NaN for measures that have none."""
    return draws.null if len(draws.null) else np.full((permutations, len(draws.values)), np.nan)
