"""Test probes of one modality on the other, to see whether a concept is represented alike in images and texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from groundscope.core.short_repr import short_repr
from probes.alignment.layers import check_inputs
from probes.analysis.transfer import transfer
from probes.fit import fit_grid
from probes.grid import ProbeGrid
from probes.protocol.inputs import find_array

if TYPE_CHECKING:
    import pandas as pd

    from activation_store import ActivationSource


@dataclass(frozen=True, eq=False)
class ModalityTransfer:
    """Probes of images and of texts, each tested on both; returned by `transfer_modalities`.

    Examples
    --------
    >>> from probes.alignment import ModalityTransfer
    >>> [field for field in ModalityTransfer.__dataclass_fields__]
    ['images', 'texts', 'transfers']
    """

    images: ProbeGrid
    """Probes fitted to images."""
    texts: ProbeGrid
    """Probes fitted to texts."""
    transfers: pd.DataFrame
    """The rows of `table`."""

    __repr__ = short_repr

    def table(self) -> pd.DataFrame:
        """Return one row per concept, layer, head and direction.

        Columns: concept, layer, head, source and target (``image`` or ``text``); auc, auc_low, auc_high and
        balanced_accuracy, low, high of the source's probes on the target; source_auc and target_auc (each modality's own
        probes on its own held-out images); n. AUC does not change if the modality gap shifts all margins; balanced accuracy does.
        """
        return self.transfers.copy()


def transfer_modalities(
    images: ActivationSource,
    texts: ActivationSource,
    concepts: Sequence[str],
    site: str = "resid_post",
    *,
    image: str = "image:mean",
    text: str = "question:mean",
    joint: bool = False,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    **options: Any,
) -> ModalityTransfer:
    """Fit probes to images and to texts, each alone, and test each on held-out examples of the other modality.

    Functionally equivalent representations (Shu et al., arXiv 2501.01346, equation 4) give an AUC of the transfer near that of
    each modality's own probes. Labels must be true of both sides of an example: of what the image shows, and of what the text
    says (a caption, not a question about something that may be absent).

    Parameters
    ----------
    images, texts
        Stores of the same groups, traced with ``input="image"`` and ``input="text"``.
    concepts
        Label columns of both stores.
    site
        A component at every layer, or one site, of both stores; ``z`` for probes of heads.
    image, text
        Token selections.
    joint
        Accept rows that have seen both modalities.
    resamples, confidence, seed
        Of the intervals over images, and of the split.
    options
        Of `probes.fit_grid`, such as ``folds``, ``C``, ``estimator``.

    Raises
    ------
    SiteError
        If a store does not have its array.
    ProbeError
        If rows have seen both modalities and `joint` is false, a concept is missing or has too few images of a class, or widths
        differ.

    Examples
    --------
    >>> import numpy as np
    >>> from activation_store import MemorySource
    >>> from probes import alignment
    >>> rng, cat = np.random.default_rng(0), np.arange(160) % 2
    >>> x, y = rng.normal(size=(2, 160, 1, 4)) + 4.0 * cat[:, None, None] * [1, 0, 0, 0]
    >>> table = {"id": range(160), "group": range(160), "object:cat": cat}
    >>> images = MemorySource({("resid_post", "image:mean"): x}, table, provenance={"input": "image"})
    >>> texts = MemorySource({("resid_post", "question:mean"): y + 50}, table, provenance={"input": "text"})
    >>> options = {"C": (0.1,), "folds": 2, "resamples": 50}
    >>> moved = alignment.transfer_modalities(images, texts, ["object:cat"], **options)
    >>> moved.table()[["source", "target", "auc", "target_auc"]].round(1)
      source target  auc  target_auc
    0  image   text  1.0         1.0
    1   text  image  1.0         1.0
    """
    import pandas as pd

    check_inputs(images, texts, find_array(images, site, image).stack, joint=joint)
    shared: dict[str, Any] = {"resamples": resamples, "confidence": confidence, "seed": seed}
    grids = {
        "image": fit_grid(images, concepts, site, tokens=image, **shared, **options),
        "text": fit_grid(texts, concepts, site, tokens=text, **shared, **options),
    }
    sides = {"image": (images, image), "text": (texts, text)}
    keys = ["concept", "layer", "head"]
    parts = []
    for source, target in (("image", "text"), ("text", "image")):
        store, tokens = sides[target]
        part: Any = transfer(grids[source], {target: store}, tokens=tokens, **shared).drop(columns=["home", "n_known"])
        part.insert(0, "source", source)
        for name in (source, target):
            own: Any = grids[name].frame()[[*keys, "auc"]]
            column = "source_auc" if name == source else "target_auc"
            part = part.merge(own.rename(columns={"auc": column}), on=keys, how="left")
        parts.append(part)
    table: Any = pd.concat(parts, ignore_index=True)
    order = ["auc", "auc_low", "auc_high", "balanced_accuracy", "low", "high", "source_auc", "target_auc", "n"]
    return ModalityTransfer(grids["image"], grids["text"], table[[*keys, "source", "target", *order]])
