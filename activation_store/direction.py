"""A direction in activation space that represents a concept, with its provenance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import numpy as np

from groundscope.core import artifacts
from groundscope.core.errors import SiteError, StoreError
from groundscope.core.result_fields import building, check_fields
from groundscope.core.short_repr import short_repr
from lvlm.sites import Site
from lvlm.token_selection import TokenSelection

DIRECTION_VERSION = 2
_KIND = "direction"
_UNIT_TOLERANCE = 1e-4


@dataclass(frozen=True, eq=False)
class ConceptDirection:
    """A unit vector at a site that points towards activations for which a concept is true.

    ``decision(x) = scale * (x @ vector) + intercept`` is positive where the concept is predicted to be true; `x` is the
    array that `ActivationStore.read` returns for the site, token selection and head.

    Raises
    ------
    SiteError
        If the site or token selection is not valid, or a head is given for a component without heads.
    StoreError
        If the vector is not one-dimensional, finite and of length 1, or a number is not finite.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from activation_store import ConceptDirection
    >>> weights = np.array([3.0, 4.0])  # of a linear classifier
    >>> direction = ConceptDirection.from_weights("decoder.L3.z", "last", "object:cat", weights, head=1, intercept=-5)
    >>> direction.vector, direction.scale
    (array([0.6, 0.8], dtype=float32), 5.0)
    >>> direction.decision(np.array([[1.0, 1.0]])).round(3)
    array([2.])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = direction.save(f"{folder}/cat.safetensors")
    ...     ConceptDirection.load(path).concept
    'object:cat'
    """

    site: str
    """For example ``decoder.L3.z``."""
    tokens: str
    """Token selection, for example ``last``."""
    concept: str
    """For example ``attribute:green``."""
    vector: np.ndarray
    """Unit float32 [D]; [head_dim] if `head` is set. Read-only."""
    head: int | None = None
    sigma: float = 1.0
    """Standard deviation of ``x @ vector`` over the training examples, in activation units; one step of steering."""
    scale: float = 1.0
    """Change of the decision per unit along the vector, > 0; for a linear classifier the norm of its weights."""
    intercept: float = 0.0
    """The decision at ``x = 0``."""
    statistics: Mapping[str, float] = field(default_factory=dict)
    """Separation statistics: ``balanced_accuracy`` (held out), ``n_train``, …; NaN where undefined."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Plain JSON: digest of the store's manifest, method, split, penalty, …"""
    train_groups: tuple[str, ...] = ()
    """Groups of the training examples: their examples must not test or calibrate it. Empty if unknown."""
    kind: str = ""
    """Level and kind of the questions it was fitted on, ``attribute what_color``; empty for any."""

    __repr__ = short_repr

    def __post_init__(self) -> None:
        component = Site.parse(self.site).component
        TokenSelection.parse(self.tokens)
        if self.head is not None and (component not in ("z", "q", "k", "v") or self.head < 0):
            msg = f"site '{self.site}' has no head {self.head}; heads exist at 'z' (or q, k, v) and are numbered from 0"
            raise SiteError(msg)
        vector = np.array(self.vector, dtype=np.float32)
        norm = float(np.linalg.norm(vector.astype(np.float64)))
        if vector.ndim != 1 or not abs(norm - 1) <= _UNIT_TOLERANCE:
            msg = (
                f"a direction needs a vector [D] of length 1, not shape {list(vector.shape)} and length {norm:g}; "
                f"use ConceptDirection.from_weights, which normalizes it"
            )
            raise StoreError(msg)
        numbers = {"sigma": self.sigma, "scale": self.scale, "intercept": self.intercept}
        wrong = [f"{name}={value}" for name, value in numbers.items() if not math.isfinite(value)]
        if wrong or self.sigma < 0 or self.scale <= 0:
            msg = f"direction for '{self.concept}': sigma={self.sigma} must be >= 0, scale={self.scale} > 0, all finite"
            raise StoreError(msg)
        object.__setattr__(self, "vector", vector)
        artifacts.freeze(self)
        for name, value in numbers.items():
            object.__setattr__(self, name, float(value))
        statistics = {name: float(value) for name, value in self.statistics.items()}
        object.__setattr__(self, "statistics", MappingProxyType(statistics))
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))
        object.__setattr__(self, "train_groups", tuple(self.train_groups))

    @classmethod
    def from_weights(
        cls,
        site: str,
        tokens: str,
        concept: str,
        weights: np.ndarray,
        *,
        head: int | None = None,
        sigma: float = 1.0,
        intercept: float = 0.0,
        statistics: Mapping[str, float] | None = None,
        provenance: Mapping[str, Any] | None = None,
        train_groups: Sequence[str] = (),
        kind: str = "",
    ) -> Self:
        """Return the direction of a linear classifier ``x @ weights + intercept``; its decision is the same.

        Parameters
        ----------
        weights
            [D], any length but 0.
        sigma
            Standard deviation of the projections on the *unit* vector.

        Raises
        ------
        StoreError
            If the weights are all zero or not finite.
        """
        exact = np.asarray(weights, np.float64)
        norm = float(np.linalg.norm(exact))
        if not (math.isfinite(norm) and norm > 0):
            msg = f"weights for '{concept}' at {site} have norm {norm}; give finite weights that are not all 0"
            raise StoreError(msg)
        return cls(
            site=site,
            tokens=tokens,
            concept=concept,
            vector=(exact / norm).astype(np.float32),
            head=head,
            sigma=sigma,
            scale=norm,
            intercept=intercept,
            statistics=statistics or {},
            provenance=provenance or {},
            train_groups=tuple(train_groups),
            kind=kind,
        )

    def decision(self, x: np.ndarray) -> np.ndarray:
        """Return ``scale * (x @ vector) + intercept`` of activations [..., D]; positive where the concept is predicted."""
        return self.scale * (x @ self.vector) + self.intercept

    def save(self, path: str | Path) -> Path:
        """Write one ``.safetensors`` file: the tensor ``vector``, and every other field as JSON metadata."""
        card = {
            "site": self.site,
            "tokens": self.tokens,
            "concept": self.concept,
            "head": self.head,
            "sigma": self.sigma,
            "scale": self.scale,
            "intercept": self.intercept,
            # JSON has no NaN: an undefined statistic is null in the file.
            "statistics": {k: v if math.isfinite(v) else None for k, v in self.statistics.items()},
            "provenance": dict(self.provenance),
            "train_groups": list(self.train_groups),
            "kind": self.kind,
        }
        path = Path(path)
        artifacts.write(path, _KIND, DIRECTION_VERSION, {"vector": self.vector}, card)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file that `save` wrote; raise `StoreError` if it is missing, damaged or of another kind."""
        tensors, card = artifacts.read(Path(path), _KIND, DIRECTION_VERSION, oldest=0)
        with building(f"{path}: damaged direction", StoreError):
            vector = tensors["vector"]
            card["statistics"] = {k: math.nan if v is None else v for k, v in card["statistics"].items()}
            return cls(vector=vector, **check_fields(card, cls))
