"""Choose the concepts to probe at each array of a store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from concepts.concept import Concept
from groundscope.core.errors import ProbeError
from groundscope.core.text import nearest
from probes.protocol.inputs import concept_columns, expand_concepts, probeable, row_mask

if TYPE_CHECKING:
    import pandas as pd

    from activation_store import ActivationSource

PRESENCE_NOUNS = 4
"""Maximum number of nouns whose presence is probed by default; the noun in the question covers all of them."""
_AT_LAST = ("z", "resid_post")


@dataclass(frozen=True)
class GridPlan:
    """One grid to fit: an array of a store, and the concepts to decode from it.

    Examples
    --------
    >>> from probes import GridPlan
    >>> plan = GridPlan("vision", "resid_post", "object:mean", ("attribute:red",))
    >>> plan.site, plan.name
    ('vision.resid_post', 'vision.resid_post@object-mean')
    """

    stack: str
    component: str
    tokens: str
    concepts: tuple[str, ...]

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> GridPlan:
        """Return the plan of a record that was written as JSON."""
        return cls(record["stack"], record["component"], record["tokens"], tuple(record["concepts"]))

    @property
    def site(self) -> str:
        """The site of the array, as `fit_grid` takes it."""
        return f"{self.stack}.{self.component}"

    @property
    def name(self) -> str:
        """Name of the grid's folder."""
        return f"{self.stack}.{self.component}@{self.tokens.replace(':', '-')}"


def plan_grids(
    store: ActivationSource,
    concepts: Sequence[str] | None = None,
    *,
    folds: int = 5,
    test_fraction: float = 0.3,
    rows: Sequence[bool] | np.ndarray | pd.Series | None = None,
) -> list[GridPlan]:
    """Choose concepts for every array worth probing.

    At the last token: what the question is about (the named concept of each level, attributes, relations). At the
    object's tokens: its attributes. At all image tokens: which nouns are in the image, the `PRESENCE_NOUNS` that are most
    evenly divided. Concepts without a level, of label columns of the user's own: at the last token, and at all image tokens.

    Parameters
    ----------
    store
        The traced activations.
    concepts
        Concepts to use; each must be in the store. By default those with enough groups (`probeable`).
    folds, test_fraction, rows
        As for `fit_grid`.

    Raises
    ------
    ProbeError
        If a concept is not in the store.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from activation_store import ActivationStore, ArrayInfo, Schema, StoreWriter
    >>> from probes import plan_grids
    >>> n = 40
    >>> table = {"id": [f"e{i}" for i in range(n)], "group": [f"g{i}" for i in range(n)]}
    >>> table["object:cat"] = [float(i % 2) for i in range(n)]
    >>> info = ArrayInfo("decoder", "resid_post", "image:mean", n_layers=1, width=4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with StoreWriter(folder, Schema((info,)), {}) as writer:
    ...         writer.append({info.key: np.zeros((n, 1, 4), np.float32)}, table)
    ...     plan_grids(ActivationStore(folder))
    [GridPlan(stack='decoder', component='resid_post', tokens='image:mean', concepts=('object:cat',))]
    """
    frame: Any = store.frame()
    frame = frame[row_mask(rows, len(frame))]
    if concepts is not None:
        columns, concepts = concept_columns(frame), expand_concepts(frame, concepts)
        missing = [c for c in concepts if c not in columns]
        if missing:
            msg = f"concept '{missing[0]}' not in store; choose from {', '.join(columns)}{nearest(missing[0], columns)}"
            raise ProbeError(msg)
        names = list(concepts)
    else:
        names = list(probeable(store, folds=folds, test_fraction=test_fraction, rows=rows))
    parsed = [Concept.parse(c) for c in names]
    attributes = tuple(str(c) for c in parsed if c.level == "attribute" and c.name != "named")
    relations = tuple(str(c) for c in parsed if c.level == "relation" and c.name != "named")
    named = tuple(str(c) for c in parsed if c.level and c.name == "named")
    nouns = tuple(str(c) for c in parsed if c.level == "object" and c.name != "named")
    free = tuple(str(c) for c in parsed if not c.level)
    if concepts is None:
        imbalance = {c: abs(frame.groupby("group")[c].first().mean() - 0.5) for c in nouns}
        nouns = tuple(sorted(nouns, key=lambda c: imbalance[c])[:PRESENCE_NOUNS])
    plans: list[GridPlan] = []
    for info in store.arrays:
        tokens = str(info.tokens)
        if tokens == "last" and info.component in _AT_LAST:
            chosen = (*named, *attributes, *relations, *free)
        elif tokens == "object:mean" and info.component in {"resid_post", "out"}:
            chosen = attributes
        elif tokens == "image:mean" and info.component in {"resid_post", "out"}:
            chosen = (*nouns, *free)
        else:
            continue
        if chosen:
            plans.append(GridPlan(info.stack, info.component, tokens, chosen))
    return plans
