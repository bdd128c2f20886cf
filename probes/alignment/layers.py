"""Measures of alignment at every layer of a store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from groundscope.core.errors import ProbeError
from groundscope.core.text import format_count
from probes.alignment.comparison import PERMUTATIONS, compare
from probes.alignment.rows import NEIGHBORS
from probes.protocol.inputs import find_array, read_features, read_groups, row_mask

if TYPE_CHECKING:
    import pandas as pd

    from activation_store import ActivationSource


def layerwise(
    store: ActivationSource,
    site: str = "resid_post",
    *,
    image: str = "image:mean",
    text: str = "question:mean",
    text_store: ActivationSource | None = None,
    joint: bool = False,
    rows: Sequence[bool] | np.ndarray | pd.Series | None = None,
    permutations: int = PERMUTATIONS,
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
    >>> table = alignment.layerwise(store, text_store=blank, permutations=199)
    >>> table[["layer", "measure", "value", "p"]].round(3).head(2)
       layer          measure  value      p
    0      0           cosine    1.0  0.005
    1      0  image_to_text@1    1.0  0.005
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
