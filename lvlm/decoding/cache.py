"""Key-value caches of several prefills as one cache, padded at the beginning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def new_cache() -> Any:
    """Return an empty cache that keeps all keys and values of every layer.

    Layers with a sliding window keep all of them too: the window is applied by the mask, so that rows of different length can
    be merged.
    """
    from transformers.cache_utils import DynamicCache

    return DynamicCache()


def merge_caches(caches: Sequence[Any]) -> Any:
    """Return one cache with the rows of several, each padded with zeros at its beginning to the longest.

    Raises
    ------
    TypeError
        If a layer is not a plain list of keys and values, as in recurrent layers.
    """
    from transformers.cache_utils import DynamicLayer

    length = max(int(cache.get_seq_length()) for cache in caches)
    merged = new_cache()
    for number, layers in enumerate(zip(*(cache.layers for cache in caches), strict=True)):
        if any(type(layer) is not DynamicLayer for layer in layers):
            msg = f"layer {number} of the cache is a {type(layers[0]).__name__}"
            raise TypeError(msg)
        merged.update(
            torch.cat([_padded(layer.keys, length) for layer in layers]),
            torch.cat([_padded(layer.values, length) for layer in layers]),
            number,
        )
    return merged


def _padded(x: Tensor, length: int) -> Tensor:
    """Pad ``[rows, heads, tokens, width]`` with zeros before its tokens."""
    return torch.nn.functional.pad(x, (0, 0, length - x.shape[-2], 0))
