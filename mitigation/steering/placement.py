"""Places that a steering vector acts on, the change at each place, and the gate that switches it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from groundscope.core.errors import PatchError, SiteError
from lvlm.sites import Head, Site

if TYPE_CHECKING:
    from activation_store.direction import ConceptDirection

Key = Head | int | Site
"""A head (its ``z``), a decoder layer by number (``resid_post``), or any other site."""
_COMPUTATION_ORDER = ("resid_pre", "q", "k", "v", "z", "attn_out", "resid_mid", "mlp_out", "resid_post")
_STACKS = ("vision", "projector", "decoder")


@dataclass(frozen=True, eq=False)
class Entry:
    """The change at one place; arrays are float32 and read-only."""

    vector: np.ndarray
    """``[d]``, or ``[n, d]`` with a row for each token. ``add`` and ``project``: the direction, of length 1.
    ``amplify``: the mean that deviations are measured from."""
    sigma: float = 1.0
    """``add``: standard deviation of the projections on the direction, in activation units: one unit of strength."""
    reads: np.ndarray | None = None
    """``amplify``: orthonormal rows ``[k, d]`` of the subspace in which deviations are measured; None for the full space."""
    writes: np.ndarray | None = None
    """``amplify``: orthogonal rows, ``[k, d]`` or ``[d, d]``, that the deviation's coordinates are mapped to, with their
    scale; None for the rows of `reads`."""

    def __post_init__(self) -> None:
        for name in ("vector", "reads", "writes"):
            value = getattr(self, name)
            if value is None:
                continue
            array = _real(name, value)
            if array.ndim not in ((1, 2) if name == "vector" else (2,)) or not np.isfinite(array).all():
                msg = (
                    f"{name} of shape {list(array.shape)} must be finite and {'[d]' if name == 'vector' else '[k, d]'}"
                )
                raise PatchError(msg)
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        object.__setattr__(self, "sigma", real_number("sigma", self.sigma))
        if not (math.isfinite(self.sigma) and self.sigma > 0):
            msg = f"sigma={self.sigma}: it must be positive and finite"
            raise PatchError(msg)
        rows = [len(a) for a in (self.reads, self.writes) if a is not None]
        if self.writes is not None and len(self.writes) != len(self.vector if self.reads is None else self.reads):
            msg = f"reads and writes must have the same number of rows, not {rows}"
            raise PatchError(msg)

    @property
    def by_token(self) -> bool:
        """Whether every token has a separate direction."""
        return self.vector.ndim == 2


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


@dataclass(frozen=True, eq=False)
class ProbeGate:
    """A probe that restricts a vector to tokens where ``weights . x + bias > 0``."""

    place: Key
    """Place that the probe reads: a head's ``z``, a layer's ``resid_post``, or another decoder site; computed no later than
    the steered places."""
    weights: np.ndarray
    """float32 ``[d]``, read-only."""
    bias: float = 0.0
    about: str = field(default="")
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


def canonical(key: Key | str) -> Key:
    """Return a place in canonical form: text is parsed, and ``resid_post`` of a decoder layer becomes its number.

    Raises
    ------
    SiteError
        For anything else than a head, a layer's number, a site, or text that names a head or a site.
    """
    if isinstance(key, str):
        key = Head.parse(key) if key.startswith("L") else Site.parse(key)
    if isinstance(key, Site) and key.stack == "decoder" and key.component == "resid_post" and not key.cross:
        return key.layer
    if isinstance(key, Head | Site):
        return key
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        return int(key)
    msg = f"{key!r} is not a place: write a head ('L3.H5'), the number of a layer, or a site ('decoder.L3.mlp_out')"
    raise SiteError(msg)


def site_of(key: Key) -> Site:
    """Return the site of an entry: ``z`` of a head's layer, ``resid_post`` of a layer, or the site itself."""
    if isinstance(key, Site):
        return key
    return Site("decoder", key.layer, "z") if isinstance(key, Head) else Site("decoder", key, "resid_post")


def name_of(key: Key) -> str:
    """Return ``L3.H5``, ``L3`` or ``decoder.L3.mlp_out``."""
    return f"L{key}" if isinstance(key, int) else str(key)


def order(key: Key) -> tuple[int, int, int, int]:
    """Return a sort key: stack, layer, order of computation in the layer; heads come before their layer's whole ``z``."""
    site = site_of(key)
    part = _COMPUTATION_ORDER.index(site.component) if site.component in _COMPUTATION_ORDER else len(_COMPUTATION_ORDER)
    head = key.head if isinstance(key, Head) else 1 << 30
    return (_STACKS.index(site.stack), site.layer, part, head)
