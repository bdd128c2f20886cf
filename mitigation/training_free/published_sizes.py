"""Published layer numbers and token counts (32 layers, 576 image tokens) on models of other sizes."""

from __future__ import annotations

import math


def _half_up(value: float) -> int:
    return math.floor(value + 0.5)


def scaled_layers(first: int, last: int, n_layers: int, published: int = 32) -> range:
    """Return the blocks that correspond to blocks ``first .. last`` of a model with `published` layers; at least one.

    Examples
    --------
    >>> from mitigation.training_free.published_sizes import scaled_layers
    >>> list(scaled_layers(9, 14, 32)), list(scaled_layers(9, 14, 6))
    ([9, 10, 11, 12, 13, 14], [2])
    """
    start = min(_half_up(first * n_layers / published), n_layers - 1)
    stop = _half_up((last + 1) * n_layers / published)
    return range(start, min(max(stop, start + 1), n_layers))


def scaled_count(count: int, n_tokens: int, published: int = 576) -> int:
    """Return the number of image tokens that corresponds to `count` of `published`: at least 1, at most `n_tokens`."""
    return min(max(1, _half_up(count / published * n_tokens)), n_tokens)
