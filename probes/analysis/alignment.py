"""How alike two sets of representations of the same examples are: cosine, mutual neighbours, CKA, modality gap.

The measures of representational alignment in appendix C of Shu et al. (arXiv 2501.01346), on arrays [N, D] whose rows
belong together. Widths may differ where a measure does not need the same space.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from groundscope.core.errors import ProbeError
from probes.protocol.inputs import Store, find_place, read_features, read_groups, row_mask

if TYPE_CHECKING:
    import pandas as pd

CLAMP = 0.95
"""Quantile of absolute values at which features are clamped before neighbours are looked for."""
NEIGHBOURS = 10


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    """Return the mean cosine of paired rows [N, D]; rows of length 0 count 0."""
    x, y = _paired(x, y, same_width=True)
    return float(np.mean((_unit(x) * _unit(y)).sum(axis=1)))


def mutual_knn(x: np.ndarray, y: np.ndarray, k: int = NEIGHBOURS, clamp: float | None = CLAMP) -> float:
    """Return the mean share of the k nearest neighbours that rows [N, D] and [N, E] have in common.

    As published with Huh et al. 2024 (arXiv 2405.07987): absolute values are clamped at the mean over rows of each row's
    `clamp` quantile (None: not at all), rows are scaled to unit length, neighbours are those of largest inner product,
    a row itself left out. Between equals the first row counts as nearer.

    Raises
    ------
    ProbeError
        Where there are not more than k rows.
    """
    x, y = _paired(x, y)
    if not 1 <= k < len(x):
        msg = f"k={k} neighbours of {len(x)} rows: k must be at least 1 and less than the number of rows"
        raise ProbeError(msg)
    near = [_neighbours(values, k, clamp) for values in (x, y)]
    shared = [len(np.intersect1d(a, b, assume_unique=True)) for a, b in zip(*near, strict=True)]
    return float(np.mean(shared) / k)


def cka(x: np.ndarray, y: np.ndarray, *, unbiased: bool = True, batch: int | None = None, seed: int = 0) -> float:
    """Return linear centred kernel alignment of rows [N, D] and [N, E] (Kornblith et al. 2019).

    Parameters
    ----------
    unbiased
        With the unbiased estimate of HSIC (Song et al. 2012), which is 0 on average for independent rows; the biased one,
        ``tr(K H L H)``, grows with the widths over N.
    batch
        Rows at a time: HSIC is averaged over batches drawn without replacement (Nguyen et al. 2021), so that memory is
        ``batch^2``, not ``N^2``. None: all at once.
    seed
        Of the batches.

    Returns
    -------
    1 for rotated and scaled copies; the unbiased estimate may lie below 0. NaN where a set of rows does not vary.

    Raises
    ------
    ProbeError
        Where there are fewer than 4 rows, or a batch is smaller.
    """
    x, y = _paired(x, y)
    size = len(x) if batch is None else min(batch, len(x))
    if size < 4:
        msg = f"CKA of {len(x)} rows, {size} at a time: it needs at least 4"
        raise ProbeError(msg)
    order = np.random.default_rng(seed).permutation(len(x)) if size < len(x) else np.arange(len(x))
    measure = hsic_unbiased if unbiased else hsic_biased
    total = np.zeros(3)
    # A last batch that is too small is left out: its estimate would be another.
    for start in range(0, len(x) - size + 1, size):
        part = order[start : start + size]
        a, b = x[part] - x[part].mean(axis=0), y[part] - y[part].mean(axis=0)
        k, l = a @ a.T, b @ b.T  # noqa: E741
        total += [measure(k, l), measure(k, k), measure(l, l)]
    return float(total[0] / math.sqrt(total[1] * total[2])) if total[1] > 0 and total[2] > 0 else math.nan


def hsic_biased(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
    """Return ``tr(K H L H)`` of Gram matrices [N, N] (Gretton et al. 2005), not divided by ``(N - 1)^2``."""
    centred = k - k.mean(axis=0) - k.mean(axis=1, keepdims=True) + k.mean()
    return float((centred * l).sum())


def hsic_unbiased(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
    """Return the unbiased estimate of HSIC of Gram matrices [N, N] (Song et al. 2012, equation 5)."""
    n = len(k)
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))  # noqa: E741
    trace = float((k * l).sum())
    sums = float(k.sum()) * float(l.sum()) / ((n - 1) * (n - 2))
    cross = 2.0 * float(k.sum(axis=0) @ l.sum(axis=0)) / (n - 2)
    return (trace + sums - cross) / (n * (n - 3))


def modality_gap(x: np.ndarray, y: np.ndarray) -> float:
    """Return the distance of the means of rows [N, D] and [M, D] scaled to unit length (Liang et al. 2022)."""
    x, y = (np.asarray(values, dtype=np.float64) for values in (x, y))
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        msg = f"a modality gap needs rows of one width, got {list(x.shape)} and {list(y.shape)}"
        raise ProbeError(msg)
    return float(np.linalg.norm(_unit(x).mean(axis=0) - _unit(y).mean(axis=0)))


MEASURES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "cosine": cosine,
    "mutual_knn": mutual_knn,
    "cka_biased": lambda x, y: cka(x, y, unbiased=False),
    "cka_unbiased": cka,
    "modality_gap": modality_gap,
}
"""Name to measure of two sets of rows."""


def compare(
    x: np.ndarray, y: np.ndarray, *, permutations: int = 200, seed: int = 0, measures: Sequence[str] | None = None
) -> pd.DataFrame:
    """Measure rows [N, D] against rows [N, E] of the same examples, beside a permutation baseline.

    The baseline pairs rows at random; for the modality gap, which knows no pairs, it exchanges the two members of
    randomly chosen pairs. Measures that need one width are NaN where widths differ.

    Returns
    -------
    A row a measure: value, baseline (mean over permutations), its standard deviation, and p: the share of permutations
    at least as high, ``(1 + b) / (1 + B)``.

    Raises
    ------
    ProbeError
        Where rows do not pair, are not finite, or are too few, or a measure is unknown.
    """
    import pandas as pd

    x, y = _paired(x, y)
    names = list(MEASURES) if measures is None else list(measures)
    unknown = [name for name in names if name not in MEASURES]
    if unknown or permutations < 0:
        msg = f"measures {unknown}, permutations={permutations}: there are {', '.join(MEASURES)}"
        raise ProbeError(msg)
    table = []
    for name in names:
        one_space = name in {"cosine", "modality_gap"}
        if one_space and x.shape[1] != y.shape[1]:
            table.append((name, math.nan, math.nan, math.nan, math.nan))
            continue
        rng = np.random.default_rng(seed)
        measure = _shuffled(name, x, y)
        value, drawn = measure(None), np.array([measure(rng) for _ in range(permutations)])
        p = (1 + int((drawn >= value).sum())) / (1 + permutations)
        mean, spread = (float(drawn.mean()), float(drawn.std())) if permutations else (math.nan, math.nan)
        table.append((name, value, mean, spread, p))
    return pd.DataFrame(table, columns=["measure", "value", "baseline", "baseline_sd", "p"])


def layerwise(
    store: Store,
    site: str = "resid_post",
    image: str = "image:mean",
    text: str = "question:mean",
    stack: str = "decoder",
    *,
    text_store: Store | None = None,
    joint: bool = False,
    rows: Sequence[bool] | np.ndarray | pd.Series | None = None,
    permutations: int = 200,
    limit: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare image-token with text-token representations at every layer.

    How alike a model represents an image and a text about it is measured on the image alone and the text alone (Shu et al.,
    arXiv 2501.01346, appendix C). In one prompt the tokens of the question have attended to the image, so that
    they resemble it because it was copied there. Give the text from `text_store`: the same examples traced with every
    image replaced by one and the same blank one (the store that `lexical_control` takes), or without images. Image tokens
    have not seen the question where they come before it, as in the decoders of most families; else take a stack that
    knows no text, ``vision`` or ``projector``, for both.

    One example of each group is used, the first, because questions about one image share their image tokens exactly.

    Parameters
    ----------
    store
        Holds the image tokens; without `text_store` both token selections of the site.
    image, text
        Token selections.
    text_store
        Holds the text tokens of the same examples, matched by id, that have not seen the image.
    joint
        Compare the image with question tokens of the same prompt, which have seen it: how far the two have mixed.
    rows
        Booleans, one for each example: which to use at all.
    permutations, seed
        Of the baselines.
    limit
        Examples at most, the first ones: Gram matrices are ``limit^2``.

    Returns
    -------
    The rows of `compare` for each layer, with ``layer``, ``n`` and ``text``: ``alone`` or ``joint``.

    Raises
    ------
    SiteError
        Where a store has not its array.
    ProbeError
        Where neither `text_store` nor `joint` is given, or both are, an example is missing in the text store, or fewer than
        12 groups have both selections.
    """
    import pandas as pd

    if joint == (text_store is not None):
        msg = (
            "question tokens of a prompt with an image have attended to that image: give text_store=, the same examples "
            "traced with blank images, to compare an image alone with a text alone; or joint=True, and no text_store, to "
            "compare the image with the question that has seen it"
        )
        raise ProbeError(msg)
    other = store if text_store is None else text_store
    places = [find_place(one, stack, site, tokens, heads=False) for one, tokens in ((store, image), (other, text))]
    frame = store.frame()
    mask = row_mask(rows, len(frame))
    groups, ids = read_groups(frame), frame["id"].to_numpy()
    chosen = np.zeros(len(frame), dtype=bool)
    used = np.flatnonzero(mask)
    chosen[used[np.unique(groups[used], return_index=True)[1]]] = True
    theirs = np.flatnonzero(chosen) if text_store is None else _find_rows(text_store, ids[chosen])
    selected = np.zeros(len(frame) if text_store is None else len(text_store.frame()), dtype=bool)
    selected[theirs] = True
    # Read in the order of their store, put in that of ours.
    order = np.searchsorted(np.sort(theirs), theirs)
    layers = [layer for layer in places[0].layers if layer in places[1].layers]
    parts = []
    for layer in layers:
        x = read_features(store, places[0], layer, chosen, ids[chosen])
        y = read_features(other, places[1], layer, selected, ids[chosen][np.argsort(theirs)])[order]
        both = np.flatnonzero(~np.isnan(x).any(axis=1) & ~np.isnan(y).any(axis=1))[:limit]
        if len(both) < NEIGHBOURS + 2:
            msg = (
                f"{places[0].site(layer)}: {len(both)} groups have both {image} and {text}; {NEIGHBOURS + 2} are needed"
            )
            raise ProbeError(msg)
        part = compare(x[both], y[both], permutations=permutations, seed=seed)
        part.insert(0, "layer", layer)
        part["n"] = len(both)
        part["text"] = "joint" if joint else "alone"
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def _find_rows(store: Store, ids: np.ndarray) -> np.ndarray:
    """Return the row numbers of examples in a store; raises `ProbeError` where one is missing."""
    place = {name: at for at, name in enumerate(store.frame()["id"].tolist())}
    missing = [name for name in ids.tolist() if name not in place]
    if missing:
        msg = (
            f"the text store has no example '{missing[0]}' ({len(missing)} of {len(ids)} are missing): trace the same "
            f"examples with blank images"
        )
        raise ProbeError(msg)
    return np.array([place[name] for name in ids.tolist()], dtype=np.int64)


def _shuffled(name: str, x: np.ndarray, y: np.ndarray) -> Callable[[np.random.Generator | None], float]:
    """Return a function that measures the rows as paired (None), or paired anew; what a pairing leaves is made once."""
    if name == "modality_gap":
        a, b = _unit(x), _unit(y)

        def gap(rng: np.random.Generator | None) -> float:
            swap = np.zeros(len(a), bool) if rng is None else rng.random(len(a)) < 0.5
            sign = np.where(swap, -1.0, 1.0)[:, None]
            return float(np.linalg.norm((sign * (a - b)).mean(axis=0)))

        return gap
    if name == "mutual_knn":
        near = [_adjacency(values) for values in (x, y)]

        def neighbours(rng: np.random.Generator | None) -> float:
            order = np.arange(len(x)) if rng is None else rng.permutation(len(x))
            return float((near[0] & near[1][np.ix_(order, order)]).sum() / (len(x) * NEIGHBOURS))

        return neighbours
    if name.startswith("cka"):
        measure = hsic_unbiased if name == "cka_unbiased" else hsic_biased
        a, b = x - x.mean(axis=0), y - y.mean(axis=0)
        k, l = a @ a.T, b @ b.T  # noqa: E741
        scale = measure(k, k) * measure(l, l)

        def alignment(rng: np.random.Generator | None) -> float:
            order = np.arange(len(x)) if rng is None else rng.permutation(len(x))
            return measure(k, l[np.ix_(order, order)]) / math.sqrt(scale) if scale > 0 else math.nan

        return alignment

    def plain(rng: np.random.Generator | None) -> float:
        return MEASURES[name](x, y if rng is None else y[rng.permutation(len(y))])

    return plain


def _neighbours(values: np.ndarray, k: int, clamp: float | None) -> np.ndarray:
    if clamp is not None:
        limit = float(np.quantile(np.abs(values), clamp, axis=1).mean())
        values = np.clip(values, -limit, limit)
    unit = _unit(values)
    similar = unit @ unit.T
    np.fill_diagonal(similar, -np.inf)
    return np.argsort(-similar, axis=1, kind="stable")[:, :k]


def _adjacency(values: np.ndarray) -> np.ndarray:
    near = _neighbours(values, NEIGHBOURS, CLAMP)
    out = np.zeros((len(values), len(values)), dtype=bool)
    out[np.arange(len(values))[:, None], near] = True
    return out


def _unit(values: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(values, axis=1, keepdims=True)
    return np.divide(values, length, out=np.zeros_like(values), where=length > 0)


def _paired(x: np.ndarray, y: np.ndarray, *, same_width: bool = False) -> tuple[np.ndarray, np.ndarray]:
    a, b = (np.asarray(values, dtype=np.float64) for values in (x, y))
    if a.ndim != 2 or b.ndim != 2 or len(a) != len(b) or (same_width and a.shape[1] != b.shape[1]):
        msg = (
            f"rows do not pair: {list(a.shape)} and {list(b.shape)}; give [N, D] and [N, {'D' if same_width else 'E'}]"
        )
        raise ProbeError(msg)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        msg = "representations must be finite; leave out examples whose token selection is empty"
        raise ProbeError(msg)
    return a, b
