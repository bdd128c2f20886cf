"""Results of alignment at several places, with tests that include the choice of a place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from groundscope.core.artifacts import freeze
from groundscope.core.errors import ProbeError
from groundscope.core.short_repr import short_repr
from groundscope.core.text import nearest
from probes.alignment.comparison import one_sided_p, summarize_null

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class LayerAlignment:
    """Measures of alignment by place (layer pair, head); returned by `measure_layers`.

    Examples
    --------
    >>> import numpy as np
    >>> from activation_store import MemorySource
    >>> from probes import alignment
    >>> x = np.random.default_rng(0).normal(size=(30, 2, 8))
    >>> table = {"id": range(30), "group": range(30)}
    >>> images = MemorySource({("resid_post", "image:mean"): x}, table, provenance={"input": "image"})
    >>> texts = MemorySource({("resid_post", "question:mean"): x[:, ::-1]}, table, provenance={"input": "text"})
    >>> scores = alignment.measure_layers(images, texts, pairs="all", measures=["cka"])
    >>> scores.table()[["image_layer", "text_layer", "p", "p_choice"]].round(3)
       image_layer  text_layer      p  p_choice
    0            0           0  0.860     1.000
    1            0           1  0.005     0.005
    2            1           0  0.005     0.005
    3            1           1  0.885     1.000
    """

    places: tuple[tuple[int, int, int | None], ...]
    """Layer of the images, layer of the texts, and head (None for whole layers) of each place."""
    outputs: tuple[tuple[str, str], ...]
    """Measure and name of each value."""
    values: np.ndarray
    """float64 [places, outputs]; NaN where widths differ and the measure needs one space."""
    null: np.ndarray
    """float64 [B, places, outputs]: the values in each permutation of images, the same at every place; NaN without a null."""
    low: np.ndarray
    high: np.ndarray
    """Interval of the modality gap [places, outputs], NaN for the others."""
    scores: Mapping[str, np.ndarray]
    """Scores of each example, float32 [places, N], by measure: ``cosine``, ``mutual_knn`` (share of neighbors in common), and
    ``retrieval`` (rank of the image that it belongs to, from 1); NaN for captions after an image's first where it uses one."""
    ids: tuple[str, ...]
    groups: tuple[str, ...]
    """Image of each example."""
    rows: Literal["alone", "joint"]
    """Whether the rows have seen one modality alone, or both."""
    variant: Literal["layer", "release"]

    __repr__ = short_repr

    def __post_init__(self) -> None:
        freeze(self)

    def table(self) -> pd.DataFrame:
        """Return one row per place and value.

        Columns: measure, image_layer, text_layer, head; value; baseline and baseline_sd (mean and standard deviation over
        permutations); p (of this place alone) and p_choice (of the largest value over all places, so that the place may be
        chosen by its value); low and high (modality gap); n (examples), images, and rows (``alone`` or ``joint``).
        """
        import pandas as pd

        largest = _largest(self.null)
        table = []
        for i, (image_layer, text_layer, head) in enumerate(self.places):
            for j, (_, output) in enumerate(self.outputs):
                value, null = float(self.values[i, j]), self.null[:, i, j]
                null = null if not np.isnan(null).any() else null[:0]
                chosen = largest[:, j] if len(null) else largest[:0, j]
                row = (output, image_layer, text_layer, head, value, *summarize_null(value, null))
                table.append((*row, one_sided_p(value, chosen), self.low[i, j], self.high[i, j]))
        columns = ["measure", "image_layer", "text_layer", "head", "value", "baseline", "baseline_sd"]
        frame = pd.DataFrame(table, columns=[*columns, "p", "p_choice", "low", "high"])
        frame["head"] = frame["head"].astype("Int64")
        return frame.assign(n=len(self.ids), images=len(set(self.groups)), rows=self.rows)

    def best(self) -> pd.DataFrame:
        """Return for each value that has a null its place of the largest value, with p that includes this choice.

        ``baseline`` is the mean over permutations of the largest value over places, chosen again in each.
        """
        import pandas as pd

        largest = _largest(self.null)
        table = []
        for j, (_, output) in enumerate(self.outputs):
            if np.isnan(self.values[:, j]).all() or np.isnan(self.null[:, :, j]).all():
                continue
            i = int(np.nanargmax(self.values[:, j]))
            value = float(self.values[i, j])
            table.append((output, *self.places[i], value, *summarize_null(value, largest[:, j])))
        columns = ["measure", "image_layer", "text_layer", "head", "value", "baseline", "baseline_sd", "p"]
        frame = pd.DataFrame(table, columns=columns)
        frame["head"] = frame["head"].astype("Int64")
        return frame

    def example_scores(self, measure: str) -> pd.DataFrame:
        """Return the scores of each example at each place: id, group, image_layer, text_layer, head, score.

        Raises
        ------
        ProbeError
            If the measure has no scores of examples.
        """
        import pandas as pd

        if measure not in self.scores:
            msg = f"no scores of examples for '{measure}'; choose from {', '.join(self.scores)}{nearest(measure, self.scores)}"
            raise ProbeError(msg)
        parts = []
        for (image_layer, text_layer, head), scores in zip(self.places, self.scores[measure], strict=True):
            columns = {"id": self.ids, "group": self.groups, "image_layer": image_layer, "text_layer": text_layer}
            parts.append(
                pd.DataFrame({**columns, "head": pd.array([head] * len(scores), dtype="Int64"), "score": scores})
            )
        return pd.concat(parts, ignore_index=True)


def _largest(null: np.ndarray) -> np.ndarray:
    """Return the largest value over places in each permutation, [B, outputs]; NaN without a null."""
    low = np.where(np.isnan(null), -np.inf, null).max(axis=1)
    return np.where(np.isinf(low), np.nan, low)
