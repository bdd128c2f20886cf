"""Private: checks and scaling of rows that are compared."""

from __future__ import annotations

import numpy as np

from groundscope.core.errors import ProbeError

CLAMP = 0.95
"""Quantile of absolute values at which rows are clamped before a search of neighbors."""
NEIGHBORS = 10


def check_pairs(x: np.ndarray, y: np.ndarray, *, same_width: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return paired rows [N, D] and [N, E] in float64; raise `ProbeError` if they do not pair or are not finite."""
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


def center(values: np.ndarray) -> np.ndarray:
    """Subtract the mean over rows."""
    return values - values.mean(axis=0)


def unit(values: np.ndarray) -> np.ndarray:
    """Scale rows to length 1; rows of length 0 stay 0."""
    length = np.linalg.norm(values, axis=1, keepdims=True)
    return np.divide(values, length, out=np.zeros_like(values), where=length > 0)


def clamp_limit(values: np.ndarray, quantile: float = CLAMP) -> float:
    """Return the mean over rows of the quantile of each row's absolute values: rows [N, D], or [N, L, D] for all layers."""
    return float(np.quantile(np.abs(values).reshape(len(values), -1), quantile, axis=1).mean())


def clamped_unit(values: np.ndarray, clamp: float | None, limit: float | None = None) -> np.ndarray:
    """Clamp absolute values at `limit`, by default `clamp_limit` (not at all if `clamp` is None), and scale rows to length 1."""
    if limit is None and clamp is not None:
        limit = clamp_limit(values, clamp)
    return unit(values if limit is None else np.clip(values, -limit, limit))
