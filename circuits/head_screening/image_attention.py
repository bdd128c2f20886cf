"""Attention of heads from the last position to the image tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from concepts.schema import Example
from groundscope.core.errors import DataError, ModelError, SiteError
from groundscope.core.progress import progress_bar
from groundscope.core.short_repr import short_repr
from lvlm.model import Lvlm
from lvlm.sites import Head, parse_heads


@dataclass(frozen=True, eq=False)
class ImageAttention:
    """Attention of some heads from the last prompt token to the image, for some examples.

    Examples
    --------
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> questions = gs.scenes.dataset(n_images=10, seed=0)[:3]
    >>> attention = gs.attention_to_image(model, questions, "L1.H0")
    >>> rows, columns = attention.grid
    >>> attention.maps.shape == (3, 1, rows * columns)
    True
    """

    heads: tuple[Head, ...]
    maps: np.ndarray
    """Weight on each image token, in patch order, float32 ``[n_examples, n_heads, n_patches]``; not renormalized."""
    image_mass: np.ndarray
    """Share of the attention on the image, float32 ``[n_examples, n_heads]``."""
    box_mass: np.ndarray
    """Share of the attention on the object in question, float32 ``[n_examples, n_heads]``; NaN if it is absent."""
    grid: tuple[int, int]
    """Rows and columns of patches: ``maps.reshape(n_examples, n_heads, *grid)``."""

    __repr__ = short_repr


@torch.no_grad()
def attention_to_image(
    model: Lvlm,
    examples: Sequence[Example],
    heads: Head | str | Sequence[Head | str],
    *,
    batch_size: int = 32,
    progress: bool | None = None,
) -> ImageAttention:
    """Return the attention of heads from the last position to the image.

    Fused attention returns no weights, so the decoder runs with transformers' ``eager`` attention for these forward
    passes. The previous setting is restored afterwards, also after an error; no other forward pass is affected.

    Parameters
    ----------
    model
        The model.
    examples
        Examples whose images have the same number of patches.
    heads
        Heads, in the order of the result.
    batch_size
        Number of examples per batch.
    progress
        Whether to show progress; by default only if standard error is a terminal.

    Raises
    ------
    SiteError
        If the model has no such head, or `heads` is empty.
    DataError
        If the images differ in their patch grid, or `examples` is empty.
    ModelError
        If the family's attention returns no weights.

    Examples
    --------
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> questions = gs.scenes.dataset(n_images=10, seed=0)[:3]
    >>> attention = gs.attention_to_image(model, questions, ["L1.H0", "L2.H1"])
    >>> attention.image_mass.shape
    (3, 2)
    """
    heads = parse_heads(heads)
    unknown = [str(h) for h in heads if not (0 <= h.layer < model.n_layers and 0 <= h.head < model.n_heads)]
    if unknown or not heads:
        problem = f"unknown heads {', '.join(unknown)}" if unknown else "heads is empty"
        msg = f"{problem}: {model.name} has {model.n_layers} layers of {model.n_heads} heads"
        raise SiteError(msg)
    if not examples:
        msg = "examples is empty; pass at least one"
        raise DataError(msg)
    maps: list[np.ndarray] = [np.empty(0)] * len(examples)
    box = np.full((len(examples), len(heads)), np.nan, np.float32)
    grids: set[tuple[int, int]] = set()
    with _eager(model), _last_rows(model, sorted({h.layer for h in heads})) as rows, progress_bar(progress) as bar:
        task = bar.add_task("reading attention", total=len(examples))
        for batch in model.batches(examples, batch_size):
            model.logits(batch.inputs)
            weights = (
                torch.stack([rows[h.layer][:, h.head] for h in heads], dim=1).float().cpu().numpy()
            )  # [B, n_heads, T]
            for row, number, encoding in zip(weights, batch.index, batch.encodings, strict=True):
                tokens = encoding.tokens
                grids.add((tokens.grid.rows, tokens.grid.columns))
                maps[number] = row[:, list(tokens.image)]
                if tokens.subject is not None and tokens.subject in tokens.objects:
                    box[number] = maps[number][:, list(tokens.objects[tokens.subject])].sum(-1)
            bar.advance(task, len(batch.index))
    if len(grids) != 1:
        msg = f"the images have different patch grids ({', '.join(f'{r} x {c}' for r, c in sorted(grids))})"
        raise DataError(msg)
    stacked = np.stack(maps).astype(np.float32)
    return ImageAttention(heads, stacked, stacked.sum(-1), box, grids.pop())


@contextmanager
def _eager(model: Lvlm) -> Iterator[None]:
    """Switch the decoder to eager attention while the context is open; restore its configurations afterwards."""
    root = model.hf.get_submodule(model.spec.decoder.layers.rpartition(".")[0])
    candidates: list[Any] = [m.config for m in root.modules() if hasattr(m, "config")]
    configs = {id(c): c for c in candidates if hasattr(c, "_attn_implementation")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = "eager"
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


@contextmanager
def _last_rows(model: Lvlm, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Yield a dictionary that every forward pass fills with each layer's attention from the last position ``[B, H, T]``."""
    rows: dict[int, Tensor] = {}
    with ExitStack() as hooks:
        for layer in layers:

            def keep(module: nn.Module, _args: tuple[Any, ...], output: Any, layer: int = layer) -> None:
                pattern = output[1] if isinstance(output, tuple) and len(output) > 1 else None
                if pattern is None:
                    msg = f"{type(module).__name__} of {model.name} returns no attention weights with eager attention"
                    raise ModelError(msg)
                rows[layer] = pattern[:, :, -1].clone()

            hooks.callback(model.place("decoder", layer, "pattern").module.register_forward_hook(keep).remove)
        yield rows
