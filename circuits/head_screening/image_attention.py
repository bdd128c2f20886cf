"""Where heads look: attention from the last position over the image's tokens."""

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
from lvlm.model import Lvlm
from lvlm.sites import Head, parse_heads


@dataclass(frozen=True, eq=False)
class ImageAttention:
    """Attention of some heads from the last prompt token to the image, for some examples."""

    heads: tuple[Head, ...]
    maps: np.ndarray
    """Weight on each image token, in patch order, float32 ``[n_examples, n_heads, n_patches]``; not renormalised."""
    image_mass: np.ndarray
    """Share of the attention that falls on the image, float32 ``[n_examples, n_heads]``."""
    box_mass: np.ndarray
    """Share that falls on the object asked about, float32 ``[n_examples, n_heads]``; NaN where it is not there."""
    grid: tuple[int, int]
    """Rows and columns of patches: ``maps.reshape(n_examples, n_heads, *grid)``."""


@torch.no_grad()
def attention_to_image(
    model: Lvlm, examples: Sequence[Example], heads: Sequence[Head | str], *, batch_size: int = 32
) -> ImageAttention:
    """Return where heads look from the last position.

    Fused attention does not give its weights away, so the decoder runs with transformers' ``eager`` attention for
    these forwards, and what was set before is put back afterwards, after an error too: no other forward is affected.

    Parameters
    ----------
    model
        The model.
    examples
        Examples whose images have the same number of patches.
    heads
        Which heads, in the order of the result.
    batch_size
        Examples side by side.

    Raises
    ------
    SiteError
        For a head that the model lacks, or no head.
    DataError
        Where the images have unlike numbers of patches, or there are no examples.
    ModelError
        Where the family's attention gives no weights.
    """
    heads = parse_heads(heads)
    wrong = [str(h) for h in heads if not (0 <= h.layer < model.n_layers and 0 <= h.head < model.n_heads)]
    if wrong or not heads:
        msg = f"heads {', '.join(wrong) or 'none'}: {model.name} has {model.n_layers} layers of {model.n_heads} heads"
        raise SiteError(msg)
    if not examples:
        msg = "no examples to look at"
        raise DataError(msg)
    maps: list[np.ndarray] = [np.empty(0)] * len(examples)
    box = np.full((len(examples), len(heads)), np.nan, np.float32)
    grids: set[tuple[int, int]] = set()
    with _eager(model), _last_rows(model, sorted({h.layer for h in heads})) as rows, progress_bar() as bar:
        task = bar.add_task("reading attention", total=len(examples))
        for batch in model.batches(examples, batch_size):
            model.logits(batch.inputs)
            chosen = (
                torch.stack([rows[h.layer][:, h.head] for h in heads], dim=1).float().cpu().numpy()
            )  # [B, n_heads, T]
            for row, number, encoding in zip(chosen, batch.index, batch.encodings, strict=True):
                tokens = encoding.tokens
                grids.add((tokens.grid.rows, tokens.grid.columns))
                maps[number] = row[:, list(tokens.image)]
                if tokens.subject is not None and tokens.subject in tokens.objects:
                    box[number] = maps[number][:, list(tokens.objects[tokens.subject])].sum(-1)
            bar.advance(task, len(batch.index))
    if len(grids) != 1:
        msg = f"the images have unlike grids of patches ({', '.join(f'{r} x {c}' for r, c in sorted(grids))})"
        raise DataError(msg)
    stacked = np.stack(maps).astype(np.float32)
    return ImageAttention(heads, stacked, stacked.sum(-1), box, grids.pop())


@contextmanager
def _eager(model: Lvlm) -> Iterator[None]:
    """Let the decoder compute attention step by step; its configurations are afterwards what they were."""
    root = model.hf.get_submodule(model.spec.decoder.layers.rpartition(".")[0])
    found: list[Any] = [m.config for m in root.modules() if hasattr(m, "config")]
    configs = {id(c): c for c in found if hasattr(c, "_attn_implementation")}
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
    """Fill a dictionary, at every forward, with each layer's attention from the last position ``[B, H, T]``."""
    rows: dict[int, Tensor] = {}
    with ExitStack() as hooks:
        for layer in layers:

            def keep(module: nn.Module, _args: tuple[Any, ...], output: Any, layer: int = layer) -> None:
                pattern = output[1] if isinstance(output, tuple) and len(output) > 1 else None
                if pattern is None:
                    msg = f"{type(module).__name__} of {model.name} gives no attention weights with eager attention"
                    raise ModelError(msg)
                rows[layer] = pattern[:, :, -1].clone()

            hooks.callback(model.place("decoder", layer, "pattern").module.register_forward_hook(keep).remove)
        yield rows
