"""Measure how similar two representations of the same examples are: cosine, mutual neighbors, CKA, modality gap.

The measures of representational alignment in appendix C of Shu et al. (arXiv 2501.01346), on arrays [N, D] with paired
rows. Widths can differ for measures that do not require a common space.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from groundscope.core.errors import ProbeError
from groundscope.core.text import format_count, nearest
from probes.protocol.inputs import find_array, read_features, read_groups, row_mask

if TYPE_CHECKING:
    import pandas as pd

    from activation_store import ActivationSource

CLAMP = 0.95
"""Quantile of absolute values at which features are clamped before the neighbor search."""
NEIGHBORS = 10


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    """Return the mean cosine of paired rows [N, D]; rows of length 0 contribute 0.

    Examples
    --------
    >>> import numpy as np
    >>> from probes import alignment
    >>> x = np.random.default_rng(0).normal(size=(50, 8))
    >>> round(alignment.cosine(x, 3 * x), 6)
    1.0
    """
    x, y = _paired(x, y, same_width=True)
    return float(np.mean((_unit(x) * _unit(y)).sum(axis=1)))


def mutual_knn(x: np.ndarray, y: np.ndarray, k: int = NEIGHBORS, clamp: float | None = CLAMP) -> float:
    """Return the mean share of k nearest neighbors that paired rows [N, D] and [N, E] have in common.

    As in the code of Huh et al. 2024 (arXiv 2405.07987): absolute values are clamped at the mean over rows of each row's
    `clamp` quantile (None: no clamping), rows are scaled to unit length, and neighbors are the other rows with the largest
    inner products. Ties are resolved in favor of the first row.

    Raises
    ------
    ProbeError
        If k is less than 1, or not less than the number of rows.

    Examples
    --------
    >>> import numpy as np
    >>> from probes import alignment
    >>> x = np.random.default_rng(0).normal(size=(50, 8))
    >>> rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(8, 8)))[0]
    >>> alignment.mutual_knn(x, x @ rotation, clamp=None)
    1.0
    """
    x, y = _paired(x, y)
    if not 1 <= k < len(x):
        msg = f"k={k} neighbors of {format_count(len(x), 'row')}: k must be at least 1 and less than the number of rows"
        raise ProbeError(msg)
    near = [_neighbors(values, k, clamp) for values in (x, y)]
    shared = [len(np.intersect1d(a, b, assume_unique=True)) for a, b in zip(*near, strict=True)]
    return float(np.mean(shared) / k)


def cka(x: np.ndarray, y: np.ndarray, *, unbiased: bool = True, batch: int | None = None, seed: int = 0) -> float:
    """Return linear centered kernel alignment of rows [N, D] and [N, E] (Kornblith et al. 2019).

    Parameters
    ----------
    unbiased
        Use the unbiased estimate of HSIC (Song et al. 2012), whose mean is 0 for independent rows; the biased estimate,
        ``tr(K H L H)``, increases with width / N.
    batch
        Rows per batch: HSIC is averaged over batches drawn without replacement (Nguyen et al. 2021), so that memory is
        ``batch^2``, not ``N^2``. None: one batch of all rows.
    seed
        Of the batches.

    Returns
    -------
    1 for rotated and scaled copies; the unbiased estimate can be negative. NaN if a set of rows is constant.

    Raises
    ------
    ProbeError
        If there are fewer than 4 rows, or a batch has fewer.

    Examples
    --------
    >>> import numpy as np
    >>> from probes import alignment
    >>> x = np.random.default_rng(0).normal(size=(50, 8))
    >>> rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(8, 8)))[0]
    >>> round(alignment.cka(x, 5 * x @ rotation), 6)
    1.0
    """
    x, y = _paired(x, y)
    size = len(x) if batch is None else min(batch, len(x))
    if size < 4:
        msg = f"CKA of {format_count(len(x), 'row')} in batches of {size}: at least 4 rows per batch are needed"
        raise ProbeError(msg)
    order = np.random.default_rng(seed).permutation(len(x)) if size < len(x) else np.arange(len(x))
    measure = hsic_unbiased if unbiased else hsic_biased
    total = np.zeros(3)
    # An incomplete last batch is skipped: its estimate would not be comparable.
    for start in range(0, len(x) - size + 1, size):
        part = order[start : start + size]
        a, b = x[part] - x[part].mean(axis=0), y[part] - y[part].mean(axis=0)
        k, l = a @ a.T, b @ b.T  # noqa: E741
        total += [measure(k, l), measure(k, k), measure(l, l)]
    return float(total[0] / math.sqrt(total[1] * total[2])) if total[1] > 0 and total[2] > 0 else math.nan


def hsic_biased(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
    """Return ``tr(K H L H)`` of Gram matrices [N, N] (Gretton et al. 2005), not divided by ``(N - 1)^2``.

    Examples
    --------
    >>> import numpy as np
    >>> from probes import alignment
    >>> x = np.array([[1.0], [-1.0]])
    >>> alignment.hsic_biased(x @ x.T, x @ x.T)
    4.0
    """
    centered = k - k.mean(axis=0) - k.mean(axis=1, keepdims=True) + k.mean()
    return float((centered * l).sum())


def hsic_unbiased(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
    """Return the unbiased estimate of HSIC of Gram matrices [N, N] (Song et al. 2012, equation 5).

    Examples
    --------
    >>> import numpy as np
    >>> from probes import alignment
    >>> rng = np.random.default_rng(0)
    >>> x, y = rng.normal(size=(2, 400, 1))
    >>> abs(alignment.hsic_unbiased(x @ x.T, y @ y.T)) < 0.01
    True
    """
    n = len(k)
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))  # noqa: E741
    trace = float((k * l).sum())
    sums = float(k.sum()) * float(l.sum()) / ((n - 1) * (n - 2))
    cross = 2.0 * float(k.sum(axis=0) @ l.sum(axis=0)) / (n - 2)
    return (trace + sums - cross) / (n * (n - 3))


def modality_gap(x: np.ndarray, y: np.ndarray) -> float:
    """Return the distance between the means of unit-length rows [N, D] and [M, D] (Liang et al. 2022).

    Examples
    --------
    >>> import numpy as np
    >>> from probes import alignment
    >>> images, texts = np.array([[1.0, 0.0], [2.0, 0.0]]), np.array([[0.0, 3.0]])
    >>> round(alignment.modality_gap(images, texts), 4)
    1.4142
    """
    x, y = (np.asarray(values, dtype=np.float64) for values in (x, y))
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        msg = f"the modality gap needs rows of equal width, got {list(x.shape)} and {list(y.shape)}"
        raise ProbeError(msg)
    return float(np.linalg.norm(_unit(x).mean(axis=0) - _unit(y).mean(axis=0)))


MEASURES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "cosine": cosine,
    "mutual_knn": mutual_knn,
    "cka_biased": lambda x, y: cka(x, y, unbiased=False),
    "cka_unbiased": cka,
    "modality_gap": modality_gap,
}
"""Measures of two sets of rows, by name."""


def compare(
    x: np.ndarray, y: np.ndarray, *, permutations: int = 200, seed: int = 0, measures: Sequence[str] | None = None
) -> pd.DataFrame:
    """Compare paired rows [N, D] and [N, E] of the same examples, with a permutation baseline.

    The baseline pairs rows at random; for the modality gap, which does not depend on pairs, it exchanges the two members
    of randomly chosen pairs. Measures that need equal widths are NaN if the widths differ.

    Returns
    -------
    One row per measure: value, baseline (mean over permutations), its standard deviation, and p: the share of
    permutations with a value at least as high, ``(1 + b) / (1 + B)``.

    Raises
    ------
    ProbeError
        If the arrays have different numbers of rows, too few rows or values that are not finite, or a measure is unknown.

    Examples
    --------
    >>> import numpy as np
    >>> from probes import alignment
    >>> x = np.random.default_rng(0).normal(size=(40, 8))
    >>> alignment.compare(x, x, permutations=19, measures=["cosine", "mutual_knn"]).round(2)
          measure  value  baseline  baseline_sd     p
    0      cosine    1.0      0.05         0.05  0.05
    1  mutual_knn    1.0      0.26         0.02  0.05
    """
    import pandas as pd

    x, y = _paired(x, y)
    names = list(MEASURES) if measures is None else list(measures)
    unknown = [name for name in names if name not in MEASURES]
    if unknown or permutations < 0:
        msg = (
            f"unknown measures {unknown}; choose from {', '.join(MEASURES)}{nearest(unknown[0], MEASURES)}"
            if unknown
            else f"permutations={permutations} must be at least 0"
        )
        raise ProbeError(msg)
    table = []
    for name in names:
        needs_equal_width = name in {"cosine", "modality_gap"}
        if needs_equal_width and x.shape[1] != y.shape[1]:
            table.append((name, math.nan, math.nan, math.nan, math.nan))
            continue
        rng = np.random.default_rng(seed)
        measure = _permuted_measure(name, x, y)
        value, null = measure(None), np.array([measure(rng) for _ in range(permutations)])
        p = (1 + int((null >= value).sum())) / (1 + permutations)
        mean, spread = (float(null.mean()), float(null.std())) if permutations else (math.nan, math.nan)
        table.append((name, value, mean, spread, p))
    return pd.DataFrame(table, columns=["measure", "value", "baseline", "baseline_sd", "p"])


def layerwise(
    store: ActivationSource,
    site: str = "resid_post",
    *,
    image: str = "image:mean",
    text: str = "question:mean",
    text_store: ActivationSource | None = None,
    joint: bool = False,
    rows: Sequence[bool] | np.ndarray | pd.Series | None = None,
    permutations: int = 200,
    limit: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare image-token with text-token representations at every layer.

    The similarity of an image and a text about it is measured on the image alone and the text alone (Shu et al., arXiv
    2501.01346, appendix C). In a joint prompt, question tokens attend to the image, so that attention itself makes them
    similar. Pass the text in `text_store`: the same examples traced with every image replaced by the same blank image (the
    store for `lexical_control`), or without images. Image tokens do not depend on the question if they precede it, as in
    the decoders of most families; otherwise use a site without text, ``vision.resid_post`` or ``projector.out``, for both.

    Only the first example of each group is used, because questions about one image have identical image tokens.

    Parameters
    ----------
    store
        Store of the image tokens; without `text_store`, of both token selections.
    site
        A component at every layer, or a single site, as in `probes.fit_grid`.
    image, text
        Token selections.
    text_store
        Store of the text tokens of the same examples, matched by id, computed without the image.
    joint
        Compare the image with question tokens of the same prompt, which attend to it: measures how much they mix.
    rows
        Boolean mask over the examples to use.
    permutations, seed
        Of the baselines.
    limit
        Maximum number of examples (the first ones): Gram matrices take ``limit^2``.

    Returns
    -------
    The rows of `compare` for each layer, with ``layer``, ``n`` and ``text``: ``alone`` or ``joint``.

    Raises
    ------
    SiteError
        If a store does not have its array.
    ProbeError
        If neither or both of `text_store` and `joint` are set, an example is missing in the text store, or fewer than 12
        groups have both selections.

    Examples
    --------
    >>> import numpy as np
    >>> from activation_store import MemorySource
    >>> from probes import alignment
    >>> image = np.random.default_rng(0).normal(size=(30, 1, 8))
    >>> table = {"id": range(30), "group": range(30)}
    >>> store = MemorySource({("resid_post", "image:mean"): image}, table)
    >>> blank = MemorySource({("resid_post", "question:mean"): 2 * image}, table)  # the same up to scale
    >>> found = alignment.layerwise(store, text_store=blank, permutations=19)
    >>> found[["layer", "measure", "value", "p"]].round(2).head(2)
       layer     measure  value     p
    0      0      cosine    1.0  0.05
    1      0  mutual_knn    1.0  0.05
    """
    import pandas as pd

    if joint == (text_store is not None):
        msg = (
            "question tokens of a prompt with an image have attended to that image: give text_store=, the same examples "
            "traced with blank images, to compare an image alone with a text alone; or set joint=True, without text_store, to "
            "compare the image with the question that attends to it"
        )
        raise ProbeError(msg)
    other = store if text_store is None else text_store
    arrays = [find_array(s, site, tokens, heads=False) for s, tokens in ((store, image), (other, text))]
    frame = store.frame()
    mask = row_mask(rows, len(frame))
    groups, ids = read_groups(frame), frame["id"].to_numpy()
    chosen = np.zeros(len(frame), dtype=bool)
    used = np.flatnonzero(mask)
    chosen[used[np.unique(groups[used], return_index=True)[1]]] = True
    text_rows = np.flatnonzero(chosen) if text_store is None else _find_rows(text_store, ids[chosen])
    selected = np.zeros(len(frame) if text_store is None else len(text_store.frame()), dtype=bool)
    selected[text_rows] = True
    # Rows are read in the order of the text store, then sorted into the order of `store`.
    order = np.searchsorted(np.sort(text_rows), text_rows)
    layers = [layer for layer in arrays[0].layers if layer in arrays[1].layers]
    parts = []
    for layer in layers:
        x = read_features(store, arrays[0], layer, chosen, ids[chosen])
        y = read_features(other, arrays[1], layer, selected, ids[chosen][np.argsort(text_rows)])[order]
        both = np.flatnonzero(~np.isnan(x).any(axis=1) & ~np.isnan(y).any(axis=1))[:limit]
        if len(both) < NEIGHBORS + 2:
            msg = (
                f"{arrays[0].site(layer)}: {format_count(len(both), 'group')} {'has' if len(both) == 1 else 'have'} both "
                f"{image} and {text}; {NEIGHBORS + 2} are needed"
            )
            raise ProbeError(msg)
        part = compare(x[both], y[both], permutations=permutations, seed=seed)
        part.insert(0, "layer", layer)
        part["n"] = len(both)
        part["text"] = "joint" if joint else "alone"
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def _find_rows(store: ActivationSource, ids: np.ndarray) -> np.ndarray:
    """Return the row numbers of examples in a store; raise `ProbeError` if one is missing."""
    row_of = {name: at for at, name in enumerate(store.frame()["id"].tolist())}
    missing = [name for name in ids.tolist() if name not in row_of]
    if missing:
        msg = (
            f"the text store has no example '{missing[0]}' ({len(missing)} of {len(ids)} are missing): trace the same "
            f"examples with blank images"
        )
        raise ProbeError(msg)
    return np.array([row_of[name] for name in ids.tolist()], dtype=np.int64)


def _permuted_measure(name: str, x: np.ndarray, y: np.ndarray) -> Callable[[np.random.Generator | None], float]:
    """Return a function that measures the given pairs (None) or random pairs; shared quantities are computed once."""
    if name == "modality_gap":
        a, b = _unit(x), _unit(y)

        def gap(rng: np.random.Generator | None) -> float:
            swap = np.zeros(len(a), bool) if rng is None else rng.random(len(a)) < 0.5
            sign = np.where(swap, -1.0, 1.0)[:, None]
            return float(np.linalg.norm((sign * (a - b)).mean(axis=0)))

        return gap
    if name == "mutual_knn":
        near = [_adjacency(values) for values in (x, y)]

        def neighbors(rng: np.random.Generator | None) -> float:
            order = np.arange(len(x)) if rng is None else rng.permutation(len(x))
            return float((near[0] & near[1][np.ix_(order, order)]).sum() / (len(x) * NEIGHBORS))

        return neighbors
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


def _neighbors(values: np.ndarray, k: int, clamp: float | None) -> np.ndarray:
    if clamp is not None:
        limit = float(np.quantile(np.abs(values), clamp, axis=1).mean())
        values = np.clip(values, -limit, limit)
    unit = _unit(values)
    similar = unit @ unit.T
    np.fill_diagonal(similar, -np.inf)
    return np.argsort(-similar, axis=1, kind="stable")[:, :k]


def _adjacency(values: np.ndarray) -> np.ndarray:
    near = _neighbors(values, NEIGHBORS, CLAMP)
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
        msg = "representations must be finite; exclude examples whose token selection is empty"
        raise ProbeError(msg)
    return a, b
