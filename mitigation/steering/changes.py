"""The change that a steering vector makes at one place: add a direction, amplify a deviation, or project a direction out.

Each has the form of the intervention that it becomes (`circuits.Add`, `circuits.Amplify`, `circuits.Project`), without the
strength and without torch, so that vectors can be read and checked without a model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt

from circuits.interventions.options import Norm
from groundscope.core.errors import PatchError, SiteError
from lvlm.sites import Head, Site
from mitigation.steering.places import Key, canonical

if TYPE_CHECKING:
    from activation_store.direction import ConceptDirection
    from circuits.interventions.transforms import Change

Kind = Literal["add", "amplify", "project"]
KINDS: tuple[Kind, ...] = ("add", "amplify", "project")


@dataclass(frozen=True, eq=False)
class AddChange:
    """``x <- x + strength * sigma * direction``: the same addition for every input.

    The form of ITI (Li et al. 2023, arXiv 2306.03341). It suits errors in one direction, such as yes instead of no.

    Examples
    --------
    >>> import numpy as np
    >>> from mitigation import AddChange
    >>> AddChange(np.array([0.6, 0.8]), sigma=2.5).displacement(strength=2.0).round(3)
    array([3., 4.])
    """

    kind: ClassVar[Kind] = "add"
    direction: np.ndarray
    """float32 ``[d]`` of length 1, read-only; or ``[n, d]``, a row for each token, with zeros for tokens that do not change."""
    sigma: float = 1.0
    """One unit of strength, in activation units: the standard deviation of the activations' projections on the direction."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "direction", _direction(self.direction, (1, 2)))
        object.__setattr__(self, "sigma", real_number("sigma", self.sigma))
        if not (math.isfinite(self.sigma) and self.sigma > 0):
            msg = f"sigma={self.sigma}: it must be positive and finite"
            raise PatchError(msg)

    @property
    def by_token(self) -> bool:
        """Whether every token has a separate direction."""
        return self.direction.ndim == 2

    def displacement(self, strength: float) -> np.ndarray:
        """Return the addition at a strength, float64 ``[d]`` or ``[n, d]``."""
        return strength * self.sigma * self.direction.astype(np.float64)

    def transform(self, strength: float, norm: Norm) -> Change:
        """Return the change of a tensor at a strength."""
        from torch import tensor

        from circuits.interventions.transforms import Add

        return Add(strength * self.sigma * tensor(self.direction), norm)

    def randomized(self, rng: np.random.Generator) -> Self:
        """Return a random direction with the same length and sigma."""
        return replace(self, direction=_random_direction(self.direction, rng))


@dataclass(frozen=True, eq=False)
class AmplifyChange:
    """``x <- x + strength * (x - mean)``, in full or within a subspace: the deviation of each input from the mean grows.

    The effect depends on the input, so questions may have opposite answers. A strength of -1 removes the deviation. If the
    mean is that of blank images, the deviation is the response to this image.

    Examples
    --------
    >>> import numpy as np
    >>> from mitigation import AmplifyChange
    >>> change = AmplifyChange(mean=np.zeros(3), reads=np.eye(3)[:1])  # the deviation along the first axis only
    >>> change.displacements(np.array([[2.0, 5.0, 5.0]]))
    array([[2., 0., 0.]])
    """

    kind: ClassVar[Kind] = "amplify"
    mean: np.ndarray
    """float32 ``[d]``, read-only: the point that deviations are measured from."""
    reads: np.ndarray | None = None
    """Orthonormal rows ``[k, d]`` of the subspace in which deviations are measured; None for the full space."""
    writes: np.ndarray | None = None
    """Orthogonal rows, ``[k, d]`` or ``[d, d]``, that the deviation's coordinates are mapped to, with their scale; None for
    the rows of `reads`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", _array("mean", self.mean, (1,)))
        for name in ("reads", "writes"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _array(name, value, (2,)))
        rows = [len(a) for a in (self.reads, self.writes) if a is not None]
        if self.writes is not None and len(self.writes) != len(self.mean if self.reads is None else self.reads):
            msg = f"reads and writes must have the same number of rows, not {rows}"
            raise PatchError(msg)

    by_token: ClassVar[bool] = False

    def displacements(self, x: np.ndarray) -> np.ndarray:
        """Return the change of activations at strength 1, float64 ``[n, d]``."""
        deviation = x - self.mean.astype(np.float64)
        if self.reads is not None:
            deviation = deviation @ self.reads.astype(np.float64).T
            return deviation @ (self.reads if self.writes is None else self.writes).astype(np.float64)
        return deviation if self.writes is None else deviation @ self.writes.astype(np.float64)

    def transform(self, strength: float, norm: Norm) -> Change:
        """Return the change of a tensor at a strength; `norm` does not apply."""
        from torch import tensor

        from circuits.interventions.transforms import Amplify

        reads, writes = (None if array is None else tensor(array) for array in (self.reads, self.writes))
        return Amplify(tensor(self.mean), strength, reads, writes)

    def randomized(self, rng: np.random.Generator) -> Self:
        """Return the change with each input's deviation rotated at random, which preserves its length."""
        d = len(self.mean)
        k = d if self.reads is None else len(self.reads)
        rotated = np.linalg.qr(rng.standard_normal((d, k)))[0].T
        if self.writes is not None:
            rotated = rotated * np.linalg.norm(self.writes, axis=1, keepdims=True)
        return replace(self, writes=rotated)


@dataclass(frozen=True, eq=False)
class ProjectChange:
    """``x <- x - strength * max(<x, t>, 0) * t``: remove the positive component along a direction t.

    ProjectAway (Jiang et al. 2024, arXiv 2410.02762).

    Examples
    --------
    >>> import numpy as np
    >>> from mitigation import ProjectChange
    >>> ProjectChange(np.array([0.0, 1.0])).direction.dtype
    dtype('float32')
    """

    kind: ClassVar[Kind] = "project"
    direction: np.ndarray
    """float32 ``[d]`` of length 1, read-only."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "direction", _direction(self.direction, (1,)))

    by_token: ClassVar[bool] = False

    def transform(self, strength: float, norm: Norm) -> Change:
        """Return the change of a tensor at a strength; `norm` does not apply."""
        from torch import tensor

        from circuits.interventions.transforms import Project

        return Project(tensor(self.direction), strength)

    def randomized(self, rng: np.random.Generator) -> Self:
        """Return a random direction."""
        return replace(self, direction=_random_direction(self.direction, rng))


VectorChange = AddChange | AmplifyChange | ProjectChange


@dataclass(frozen=True, eq=False)
class ProbeGate:
    """A linear probe that lets a steering vector act only at tokens where ``weights . x + bias > 0``.

    Examples
    --------
    >>> import numpy as np
    >>> from mitigation import ProbeGate
    >>> ProbeGate("L3.H5", np.array([1.0, -1.0]), bias=0.5).place
    Head(layer=3, head=5)
    """

    place: Key
    """Place that the probe reads: a head's ``z``, a layer's ``resid_post``, or another decoder site; computed no later than
    the steered places. Text such as ``L3.H5`` is parsed."""
    weights: np.ndarray
    """float32 ``[d]``, read-only."""
    bias: float = 0.0
    about: str = ""
    """Concept that the probe was fitted for, such as ``attribute:green``."""

    def __post_init__(self) -> None:
        weights, bias = _real("weights", self.weights), real_number("bias", self.bias)
        if weights.ndim != 1 or not np.isfinite(weights).all() or not weights.any() or not math.isfinite(bias):
            msg = (
                f"gate with weights {list(weights.shape)} and bias {self.bias}: weights must be finite, [d] and not all 0, "
                "bias finite"
            )
            raise PatchError(msg)
        weights.setflags(write=False)
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "bias", bias)
        object.__setattr__(self, "place", canonical(self.place))

    @classmethod
    def from_direction(cls, direction: ConceptDirection, *, when: bool = True, threshold: float = 0.0) -> Self:
        """Return the gate of a probe: open where the probe predicts that its concept is true, or false.

        Parameters
        ----------
        direction
            Direction of a probe grid.
        when
            Prediction that opens the gate.
        threshold
            Threshold on the probe's scale: log-odds for a logistic probe.

        Raises
        ------
        SiteError
            For a head of another component than ``z``.
        """
        site = Site.parse(direction.site)
        if direction.head is not None and (site.component != "z" or site.stack != "decoder"):
            msg = f"head {direction.head} at '{site}'; a gate reads heads only at decoder 'z'"
            raise SiteError(msg)
        place: Key = site if direction.head is None else Head(site.layer, direction.head)
        sign = 1 if when else -1
        about = f"{direction.concept} read as {str(when).lower()}"
        return cls(place, sign * direction.scale * direction.vector, sign * (direction.intercept - threshold), about)


def real_number(name: str, value: Any) -> float:
    """Return a number as float; raise `PatchError` for text and anything else that is not a real number."""
    try:
        if not isinstance(value, str | bytes):
            return float(value)
    except (TypeError, ValueError, OverflowError):
        pass
    msg = f"{name}={value!r}: it must be a number, not {type(value).__name__}"
    raise PatchError(msg)


def _real(name: str, value: npt.ArrayLike) -> np.ndarray:
    """Return numbers as float32, in one memory order, so that a file gives the same sums."""
    try:
        if not np.iscomplexobj(value):
            return np.array(value, np.float32, order="C")
    except (TypeError, ValueError):
        pass
    msg = f"{name}: it must be an array of real numbers, not {type(value).__name__}"
    raise PatchError(msg)


def _array(name: str, value: npt.ArrayLike, dimensions: tuple[int, ...]) -> np.ndarray:
    """Return a finite, read-only float32 array with one of some numbers of dimensions."""
    array = _real(name, value)
    if array.ndim not in dimensions or not np.isfinite(array).all():
        allowed = " or ".join({1: "[d]", 2: "[k, d]"}[n] for n in dimensions)
        msg = f"{name} of shape {list(array.shape)} must be finite and {allowed}"
        raise PatchError(msg)
    array.setflags(write=False)
    return array


def _direction(value: npt.ArrayLike, dimensions: tuple[int, ...]) -> np.ndarray:
    """Return a read-only float32 array whose rows have length 1, or 0 if there is a row for each token."""
    array = _array("direction", value, dimensions)
    lengths = np.atleast_1d(np.linalg.norm(array.astype(np.float64), axis=-1))
    not_unit = lengths[(np.abs(lengths - 1) > 1e-4) & ((lengths > 0) | (array.ndim == 1))]
    if len(not_unit):
        msg = f"direction of length {not_unit[0]:g}, not 1; normalize it and put its length into sigma"
        raise PatchError(msg)
    return array


def _random_direction(direction: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    random = rng.standard_normal(direction.shape)
    length = np.linalg.norm(direction, axis=-1, keepdims=True)  # 0 for a token that is not steered
    return length * random / np.linalg.norm(random, axis=-1, keepdims=True)
