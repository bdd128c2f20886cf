"""The result of a grid of probes: scores, directions and held-out margins of every concept, layer and head."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from concepts.concept import Concept
from groundscope.core import artifacts
from groundscope.core.errors import ProbeError
from groundscope.core.files import write_whole
from groundscope.core.result_fields import building, check_fields
from groundscope.core.short_repr import short_repr
from groundscope.core.tensor_files import MAX_TENSOR_BYTES
from groundscope.core.text import nearest
from groundscope.core.user_files import read_bytes
from probes.protocol.checkpoint import STORED_NAMES
from probes.protocol.inputs import ProbedArray
from probes.protocol.number_labels import NUMBER_SCORES
from probes.protocol.splits import is_number

if TYPE_CHECKING:
    import pandas as pd

    from activation_store import ConceptDirection

GRID_FORMAT = "groundscope.probe_grid"
GRID_VERSION = 5
_LAST_WITHOUT_HEADS = 4
_LAST_WITHOUT_NUMBERS = 3
_LAST_WITHOUT_DIGEST = 2
_TENSORS, _CARD = "grid.safetensors", "grid.json"


@dataclass(frozen=True)
class Cell:
    """The scores of a concept's probe at one layer or head.

    Examples
    --------
    >>> from probes import Cell
    >>> cell = Cell("object:cat", 3, 7, validation=0.91, balanced_accuracy=0.88, low=0.8, high=0.94, control=0.5)
    >>> cell.layer, cell.head
    (3, 7)
    """

    concept: str
    layer: int
    head: int | None
    validation: float
    """Cross-validated balanced accuracy on the training rows."""
    balanced_accuracy: float
    """On the held-out rows."""
    low: float
    high: float
    control: float
    r2: float = float("nan")
    """On the held-out rows, for a concept whose labels are numbers; otherwise NaN."""
    r2_low: float = float("nan")
    r2_high: float = float("nan")


@dataclass(frozen=True, eq=False)
class ProbeGrid:
    """Probes of K concepts at L layers and H heads (H = 1 for probes on whole layers).

    Score arrays are float64 [K, L, H], in the order of `concepts` and `layers`. A concept whose labels are numbers has `r2`; its
    accuracies, areas and log-losses are NaN.

    Examples
    --------
    >>> import numpy as np
    >>> from activation_store import MemorySource
    >>> from probes import ProbeGrid, fit_grid
    >>> cat = np.arange(240) // 2 % 2  # two examples of each of 120 images
    >>> x = np.random.default_rng(0).normal(size=(240, 2, 8)) + 2.0 * cat[:, None, None] * [[0], [1]]  # not in layer 0
    >>> table = {"id": range(240), "group": np.arange(240) // 2, "object:cat": cat}
    >>> store = MemorySource({"resid_post": x}, table)
    >>> grid = fit_grid(store, ["object:cat"], "resid_post", C=(0.1,), folds=2, resamples=50)
    >>> grid.array("object:cat").round(2)
    array([0.53, 1.  ])
    >>> grid.best("object:cat").layer
    1
    >>> grid.direction("object:cat", layer=1).site
    'decoder.L1.resid_post'
    """

    concepts: tuple[str, ...]
    stack: str
    component: str
    tokens: str
    layers: tuple[int, ...]
    """Layer numbers."""
    n_heads: int | None
    """None for probes on whole layers."""

    balanced_accuracy: np.ndarray
    """On the held-out rows; chance is 0.5 for any class sizes."""
    low: np.ndarray
    """Lower end of the interval of `balanced_accuracy` over held-out groups."""
    high: np.ndarray
    auc: np.ndarray
    """Area under the ROC curve on the held-out rows."""
    auc_low: np.ndarray
    auc_high: np.ndarray
    accuracy: np.ndarray
    """Plain accuracy on the held-out rows, for comparison with `majority`."""
    log_loss: np.ndarray
    """Held-out log-loss in nats with balanced classes; chance is ln 2."""
    calibration: np.ndarray
    """Expected calibration error on the held-out rows, with balanced classes."""
    control: np.ndarray
    """Mean balanced accuracy (of numbers: R2) of the same procedure on shuffled labels; NaN without controls."""
    validation: np.ndarray
    """Cross-validated balanced accuracy (of numbers: R2) on the training rows, for the selection of cells."""
    C: np.ndarray
    """The selected C; NaN for a scikit-learn estimator with its own parameters."""
    gap: np.ndarray
    """Proven relative distance of each probe's objective from its minimum; 0 for a closed form, NaN if not certified."""
    sigma: np.ndarray
    """Standard deviation of the projections of the training rows on the unit direction."""
    weights: np.ndarray
    """float64 [K, L, H, D], in the units of the activations; NaN for an estimator that is not linear."""
    intercepts: np.ndarray
    """float64 [K, L, H]."""

    majority: np.ndarray
    """float64 [K]: plain accuracy of always predicting the more frequent class of the held-out rows."""
    n_train: np.ndarray
    """int64 [K]: training rows where the concept is defined."""
    n_test: np.ndarray
    """int64 [K]: held-out rows where the concept is defined."""
    n_dropped: np.ndarray
    """int64 [K]: rows where the concept is defined but the token selection is empty."""

    held_out: tuple[str, ...]
    """Ids of all T held-out examples, in the store's order."""
    held_out_groups: tuple[str, ...]
    held_out_labels: np.ndarray
    """float64 [K, T], NaN where undefined."""
    held_out_margins: np.ndarray
    """float32 [K, L, H, T]: the probes' margins (of numbers: predictions), also where the label is undefined."""
    train_groups: tuple[str, ...]
    """Groups of the training rows: their examples must not test these probes, in any store."""
    provenance: Mapping[str, Any]
    """Plain JSON: the store's digest, the split's seed, and every option."""
    heads: tuple[int, ...] = ()
    """Numbers of the heads if the store has only some of them; else 0 to n_heads-1 (`head_numbers`)."""
    r2: np.ndarray = None  # pyright: ignore[reportAssignmentType]  # replaced by NaN in __post_init__
    """Coefficient of determination on the held-out rows, for concepts whose labels are numbers; NaN for others."""
    r2_low: np.ndarray = None  # pyright: ignore[reportAssignmentType]
    """Lower end of the interval of `r2` over held-out groups."""
    r2_high: np.ndarray = None  # pyright: ignore[reportAssignmentType]

    __repr__ = short_repr

    def __post_init__(self) -> None:
        for name in NUMBER_SCORES:
            if getattr(self, name) is None:
                object.__setattr__(self, name, np.full(self.balanced_accuracy.shape, np.nan))
        artifacts.freeze(self)
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))

    @property
    def selectivity(self) -> np.ndarray:
        """Balanced accuracy (of numbers: R2) minus the control's, float64 [K, L, H] (Hewitt and Liang 2019)."""
        return np.where(np.isnan(self.r2), self.balanced_accuracy, self.r2) - self.control

    @property
    def numbers(self) -> tuple[str, ...]:
        """The concepts whose labels are numbers."""
        scored = np.asarray(~np.isnan(self.r2).all(axis=(1, 2)))
        return tuple(c for k, c in enumerate(self.concepts) if scored[k] or is_number(self.held_out_labels[k]))

    def require_classes(self, what: str, concepts: Sequence[str] | None = None) -> None:
        """Raise `ProbeError` if the labels of one of the concepts (default: all) are numbers; `what` begins the message."""
        number = next((c for c in concepts or self.concepts if c in self.numbers), None)
        if number is not None:
            msg = f"{what} scores classes, but '{number}' holds numbers; fit a grid without it: fit_grid(store, [...])"
            raise ProbeError(msg)

    @property
    def n_undefined(self) -> np.ndarray:
        """int64 [K]: used examples without a label of the concept, which are left out for it."""
        return int(self.provenance["n_rows"]) - self.n_train - self.n_test - self.n_dropped

    def frame(self) -> pd.DataFrame:
        """Return one row per concept, layer and head with every score; `head` is missing for probes on whole layers."""
        import pandas as pd

        k, at, head = (index.ravel() for index in np.indices(self.balanced_accuracy.shape))
        names = np.array(self.concepts, dtype=object)[k]
        columns: dict[str, Any] = {
            "concept": names,
            "level": [Concept.parse(name).level for name in names],
            "stack": self.stack,
            "component": self.component,
            "tokens": self.tokens,
            "layer": np.array(self.layers)[at],
            "head": self._array.head_column(head),
        }
        for score in (
            "balanced_accuracy",
            "low",
            "high",
            "auc",
            "auc_low",
            "auc_high",
            "accuracy",
            "log_loss",
            "calibration",
        ):
            columns[score] = getattr(self, score).ravel()
        columns["majority"] = self.majority[k]
        for score in ("control", "selectivity", "validation", "C", "gap"):
            columns[score] = getattr(self, score).ravel()
        if self.numbers:
            columns |= {score: getattr(self, score).ravel() for score in NUMBER_SCORES}
        for count in ("n_train", "n_test", "n_dropped"):
            columns[count] = getattr(self, count)[k]
        return pd.DataFrame(columns)

    def site(self, layer: int) -> str:
        """Return the site of a layer, ``decoder.L3.z``."""
        return self._array.site(layer)

    def array(self, concept: str, score: str | None = None) -> np.ndarray:
        """Return a score of a concept over the grid, float64 [L], or [L, H] for probes on heads.

        By default the balanced accuracy, or R2 if the concept's labels are numbers.

        Raises
        ------
        ProbeError
            If the grid has no such concept or score.
        """
        scores = [f.name for f in fields(self) if np.shape(getattr(self, f.name)) == self.balanced_accuracy.shape]
        scores.append("selectivity")
        score = score or ("r2" if concept in self.numbers else "balanced_accuracy")
        if score not in scores:
            msg = f"unknown score '{score}'; choose from {', '.join(scores)}{nearest(score, scores)}"
            raise ProbeError(msg)
        values = getattr(self, score)[self._concept(concept)]
        return values.copy() if self.n_heads else values[:, 0].copy()

    def best(self, concept: str) -> Cell:
        """Return the cell with the highest validation score of a concept, the first if several are equal.

        The selection uses only the training rows, so that it does not inflate the held-out score.
        """
        k = self._concept(concept)
        at, head = np.unravel_index(np.argmax(self.validation[k]), self.validation[k].shape)
        where = (k, int(at), int(head))
        return Cell(
            concept,
            self.layers[at],
            self.head_numbers[int(head)] if self.n_heads else None,
            *(float(getattr(self, s)[where]) for s in ("validation", "balanced_accuracy", "low", "high", "control")),
            *(float(getattr(self, s)[where]) for s in NUMBER_SCORES),
        )

    def decision(self, concept: str, layer: int, head: int | None, x: np.ndarray) -> np.ndarray:
        """Return margins float64 [n] of activations [n, D]; positive where the concept is predicted to be true.

        Raises
        ------
        ProbeError
            If the grid has no such concept, layer or head, or the width differs.
        """
        where = self._linear(concept, layer, head)
        rows = np.asarray(x, dtype=np.float64)
        if rows.ndim != 2 or rows.shape[1] != self.weights.shape[-1]:
            msg = f"activations have shape {list(rows.shape)}, the probe needs [n, {self.weights.shape[-1]}]"
            raise ProbeError(msg)
        return rows @ self.weights[where] + self.intercepts[where]

    def direction(self, concept: str, layer: int, head: int | None = None) -> ConceptDirection:
        """Return the probe as a unit direction in the units of the activations, with the same decision function.

        Raises
        ------
        ProbeError
            If the grid has no such concept, layer or head, or its probe has no direction (all features constant).
        """
        from activation_store.direction import ConceptDirection

        where = self._linear(concept, layer, head)
        if not self.weights[where].any():
            msg = f"the probe of '{concept}' at {self._array.site(layer)} has no direction: its features are constant"
            raise ProbeError(msg)
        k = where[0]
        scores = (
            (*NUMBER_SCORES, "control")
            if concept in self.numbers
            else ("balanced_accuracy", "low", "high", "auc", "control")
        )
        statistics = {s: float(getattr(self, s)[where]) for s in scores}
        statistics |= {"validation": float(self.validation[where])}
        statistics |= {"n_train": float(self.n_train[k]), "n_test": float(self.n_test[k])}
        return ConceptDirection.from_weights(
            self._array.site(layer),
            self.tokens,
            concept,
            self.weights[where],
            head=head,
            sigma=float(self.sigma[where]),
            intercept=float(self.intercepts[where]),
            statistics=statistics,
            provenance={**self.provenance, "penalty": float(self.C[where])},
            train_groups=self.train_groups,
        )

    def held_out_frame(self, concept: str, layer: int, head: int | None = None) -> pd.DataFrame:
        """Return the held-out examples: id, group, label (NaN where undefined) and the probe's margin."""
        import pandas as pd

        where = self._where(concept, layer, head)
        return pd.DataFrame(
            {
                "id": self.held_out,
                "group": self.held_out_groups,
                "label": self.held_out_labels[where[0]],
                "margin": self.held_out_margins[where],
            }
        )

    def save(self, folder: str | Path) -> Path:
        """Write ``grid.safetensors`` (arrays) and ``grid.json`` (all other fields) into a folder, created if missing."""
        from safetensors.numpy import save

        arrays, plain = {}, {}
        for item in fields(self):
            if item.name in NUMBER_SCORES and not self.numbers:
                continue  # a grid without them is a file that earlier versions read
            if item.name == "heads" and not self.heads:
                continue
            value = getattr(self, item.name)
            if isinstance(value, np.ndarray):
                arrays[STORED_NAMES.get(item.name, item.name)] = np.ascontiguousarray(value)
            else:
                plain[item.name] = dict(value) if isinstance(value, Mapping) else value
        data = save(arrays)
        card = artifacts.sign_document(
            GRID_FORMAT,
            self._version,
            {"sha256": hashlib.sha256(data).hexdigest(), **plain},
        )
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        # Each file is written under a temporary name and renamed, the card last: a run killed here leaves the old grid, or
        # a card that does not match.
        for name, content in ((_TENSORS, data), (_CARD, json.dumps(card, indent=1).encode())):
            write_whole(path / name, content)
        return path

    @classmethod
    def load(cls, folder: str | Path) -> ProbeGrid:
        """Read a grid that `save` wrote.

        Raises
        ------
        ProbeError
            If there is no grid, it is damaged, or it has another version.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        path = Path(folder)
        advice = "fit the grid again from its store"
        card = artifacts.read_document(
            path / _CARD,
            GRID_FORMAT,
            "probe grid",
            GRID_VERSION,
            oldest=_LAST_WITHOUT_DIGEST,
            last_without_digest=_LAST_WITHOUT_DIGEST,
            error=ProbeError,
            advice=advice,
        )
        with artifacts.reading_result(path / _TENSORS, "probe grid", ProbeError):
            data = read_bytes(path / _TENSORS, limit=MAX_TENSOR_BYTES, error=ProbeError)
        if card.pop("sha256", None) != hashlib.sha256(data).hexdigest():
            msg = f"{path / _TENSORS} does not match its card: the grid is damaged or half written; {advice}"
            raise ProbeError(msg)
        with building(f"{path / _CARD}: the grid is damaged", ProbeError, f"; {advice}"):
            try:
                tensors = load(data)
            except SafetensorError as error:
                raise ValueError(str(error)) from error
            # Copies: safetensors' own arrays are views into the file's bytes.
            values: dict[str, Any] = {name: np.array(array) for name, array in tensors.items()} | check_fields(
                card, cls
            )
            for name, stored in STORED_NAMES.items():
                values[name] = values.pop(stored)
            for name in ("concepts", "layers", "held_out", "held_out_groups", "train_groups", "heads"):
                values[name] = tuple(values.get(name, ()))
            grid = cls(**values)
            shape = (len(grid.concepts), len(grid.layers), 1 if grid.n_heads is None else grid.n_heads)
            if grid.balanced_accuracy.shape != shape:
                msg = f"scores {list(grid.balanced_accuracy.shape)} are not concepts x layers x heads {list(shape)}"
                raise ValueError(msg)
            return grid

    def _linear(self, concept: str, layer: int, head: int | None) -> tuple[int, int, int]:
        """Return the index of a cell; raises `ProbeError` if its probe is not linear."""
        where = self._where(concept, layer, head)
        if np.isnan(self.weights[where]).any():
            msg = (
                f"the probes of this grid ({self.provenance['estimator']}) are not linear, so they have no weights; use "
                "held_out_frame, or fit the grid with a linear estimator"
            )
            raise ProbeError(msg)
        return where

    @property
    def _array(self) -> ProbedArray:
        return ProbedArray(self.stack, self.component, self.tokens, self.layers, self.n_heads, self.heads)

    @property
    def _version(self) -> int:
        """The lowest version of files that can hold this grid."""
        if self.heads:
            return GRID_VERSION
        return _LAST_WITHOUT_HEADS if self.numbers else _LAST_WITHOUT_NUMBERS

    @property
    def head_numbers(self) -> tuple[int, ...]:
        """The number of each head along the axis of heads; one entry, 0, for probes on whole layers."""
        return self._array.head_numbers

    def _concept(self, concept: str) -> int:
        if concept not in self.concepts:
            msg = f"concept '{concept}' not in this grid; choose from {', '.join(self.concepts)}{nearest(concept, self.concepts)}"
            raise ProbeError(msg)
        return self.concepts.index(concept)

    def _where(self, concept: str, layer: int, head: int | None) -> tuple[int, int, int]:
        k = self._concept(concept)
        if layer not in self.layers:
            msg = f"layer {layer} not in this grid; choose from {', '.join(map(str, self.layers))}"
            raise ProbeError(msg)
        at = self.layers.index(layer)
        if self.n_heads is None:
            if head is not None:
                msg = f"head={head} is not valid for a grid of whole layers; omit it, or fit the grid with heads=True"
                raise ProbeError(msg)
            return k, at, 0
        if head is None or head not in self.head_numbers:
            numbers = ", ".join(map(str, self.heads)) or f"0-{self.n_heads - 1}"
            msg = f"head {head} not in this grid; choose from {numbers}"
            raise ProbeError(msg)
        return k, at, self.head_numbers.index(head)
