"""A recorded forward pass: resume it from a layer, or use it as a patch source."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from circuits.execution.prefix_attention import NotShared, closed
from lvlm.family.specification import find
from lvlm.model import Lvlm
from lvlm.sites import Site

See = Callable[[int, tuple[int, ...], Tensor], None]
"""Called for each layer with its index, the rows that run through it, and their head outputs ``[P, rows, S, width]``."""


@dataclass(frozen=True, eq=False)
class Values:
    """Values of some sites in a forward pass of P examples of equal length T, from position `start` on (S = T - start)."""

    start: int
    length: int
    logits: Tensor
    """At the last `keep` positions, ``[P, keep, V]``."""
    sites: Mapping[Site, Tensor]
    """By site, ``[P, S, width]``."""

    def at(self, site: Site, positions: tuple[int, ...], columns: slice = slice(None)) -> Tensor:
        """Return a site's value at positions counted from 0 in the prompt, ``[P, positions, columns]``."""
        first = positions[0]
        if positions == tuple(range(first, first + len(positions))):
            return self.sites[site][:, first - self.start : first - self.start + len(positions), columns]
        return self.sites[site][:, [p - self.start for p in positions], columns]


@dataclass(frozen=True, eq=False)
class Recording(Values):
    """A forward pass that can be resumed at any layer, from position `start` on."""

    residual: tuple[Tensor, ...]
    """Input of each layer at the suffix positions, ``[P, S, D]``."""
    keys: tuple[Tensor, ...]
    """Keys of each layer at all positions, after positional encoding, ``[P, key heads, T, head_dim]``; for a
    cross-attention layer at all positions that it attends to."""
    values: tuple[Tensor, ...]
    masks: tuple[Tensor | None, ...]
    """Attention mask of each layer, ``[P or 1, heads or 1, T, keys]``."""
    arguments: tuple[Mapping[str, Any], ...]
    """Other arguments of each layer, by name."""
    cross: frozenset[int]
    """Cross-attention layers."""
    added: tuple[Tensor | None, ...]
    """Values that the model adds between a layer and the next, ``[P, S, D]``; empty for most families."""
    first: int = 0
    """Position of the first query of `masks` and `arguments`: the tokens before it ran earlier (`tail_recording`)."""

    def closed(self, start: int) -> int:
        """Return the last position s <= `start` such that in no layer a position before s attends to s or later."""
        if self.first:  # prefixes are continued only where no token attends to later ones
            return start
        for mask in {id(m): m for i, m in enumerate(self.masks) if m is not None and i not in self.cross}.values():
            start = closed(mask, start)
        return start


@torch.no_grad()
def record(
    model: Lvlm, inputs: Mapping[str, Tensor], start: int, sites: Collection[Site] = (), keep: int = 1
) -> Recording:
    """Run examples once without changes, and record what patches at positions from `start` on need.

    If earlier positions attend to later ones (bidirectional attention over an image), the recording starts earlier.

    Raises
    ------
    NotShared
        If the model returns no keys and values, or calls its layers with unknown arguments.
    """
    from transformers import DynamicCache

    if model.encoder_decoder or not model.accepts & {"past_key_values", "kwargs"}:
        msg = "an encoder reads the prompt" if model.encoder_decoder else "its forward takes no cache"
        raise NotShared(msg)
    # Without a configuration every layer caches all keys, also outside a sliding window, where its mask hides them.
    cache: Any = DynamicCache()
    begin, residual, after, calls = start, {}, {}, {}
    layers = range(model.n_layers)
    with ExitStack() as hooks:
        for layer in layers:

            def called(module: nn.Module, args: Any, kwargs: Any, layer: int = layer) -> None:
                nonlocal begin
                calls[layer] = named_arguments(module, args, kwargs)
                if not crosses(model, layer):
                    begin = closed(layer_mask(model, layer, calls[layer]), begin)

            def entered(x: Tensor, layer: int = layer) -> None:
                residual[layer] = x[:, begin:].clone()

            def keep_output(x: Tensor, layer: int = layer) -> None:
                after[layer] = x[:, begin:].clone()

            place = model.place("decoder", layer, "resid_pre")
            hooks.callback(place.module.register_forward_pre_hook(called, with_kwargs=True).remove)
            hooks.callback(place.watch(entered).remove)
            if layer < _added(model):
                hooks.callback(model.place("decoder", layer, "resid_post").watch(keep_output).remove)
        site_values, logits = _watched(model, inputs, start, sites, keep, {"past_key_values": cache, "use_cache": True})
    if len(calls) != model.n_layers or len(getattr(cache, "layers", ())) != model.n_layers:
        msg = "its forward pass returns no keys and values of its layers"
        raise NotShared(msg)
    if residual and any(x.shape[1] != residual[model.n_layers - 1].shape[1] for x in residual.values()):
        return record(model, inputs, begin, sites, keep)  # a later layer's bidirectional span is longer
    suffix_values = {site: x[:, begin - start :] if begin > start else x for site, x in site_values.items()}
    if begin < start:
        suffix_values = _watched(model, inputs, begin, sites, keep, {"use_cache": False})[0] if sites else {}
    length = next(iter(residual.values())).shape[1] + begin
    for name in ("keys", "values"):
        if any(getattr(cache.layers[i], name, None) is None for i in layers):
            msg = "its forward pass returns no keys and values of its layers"
            raise NotShared(msg)
    return Recording(
        begin,
        length,
        logits,
        suffix_values,
        tuple(residual[i] for i in layers),
        tuple(cache.layers[i].keys for i in layers),
        tuple(cache.layers[i].values for i in layers),
        tuple(layer_mask(model, i, calls[i]) for i in layers),
        tuple({n: v for n, v in calls[i].items() if v is not cache} | cache_argument(calls[i], cache) for i in layers),
        frozenset(i for i in layers if crosses(model, i)),
        tuple(residual[i + 1] - after[i] if i in after and i + 1 < model.n_layers else None for i in layers)
        if after
        else (),
    )


@torch.no_grad()
def observe(model: Lvlm, inputs: Mapping[str, Tensor], start: int, sites: Collection[Site], keep: int = 1) -> Values:
    """Run examples once without changes, and record the values of sites from position `start` on."""
    from transformers import DynamicCache

    # Run as `record` does, so that equal inputs give bitwise equal values.
    cached = not model.encoder_decoder and model.accepts & {"past_key_values", "kwargs"}
    options: dict[str, Any] = {"past_key_values": DynamicCache(), "use_cache": True} if cached else {"use_cache": False}
    site_values, logits = _watched(model, inputs, start, sites, keep, options)
    name = "decoder_input_ids" if model.encoder_decoder else "input_ids"
    return Values(start, inputs[name].shape[1], logits, site_values)


def _watched(
    model: Lvlm,
    inputs: Mapping[str, Tensor],
    start: int,
    sites: Collection[Site],
    keep: int,
    options: Mapping[str, Any],
) -> tuple[dict[Site, Tensor], Tensor]:
    site_values: dict[Site, Tensor] = {}
    with ExitStack() as hooks:
        for site in sites:

            def see(x: Tensor, site: Site = site) -> None:
                site_values[site] = x[:, start:].clone()

            hooks.callback(model.locate(site).watch(see).remove)
        logits = model.forward(inputs, keep=keep, **options)
    return site_values, logits


def crosses(model: Lvlm, layer: int) -> bool:
    """Whether a layer attends to the image only."""
    return model.attends("decoder", layer, cross=True) and not model.attends("decoder", layer, cross=False)


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a layer's arguments by name, without the first one, the hidden states."""
    if not args:
        return {n: v for n, v in kwargs.items() if n != "hidden_states"}
    names = list(inspect.signature(module.forward).parameters)[: len(args)]
    return {**dict(zip(names[1:], args[1:], strict=True)), **kwargs}


def layer_mask(model: Lvlm, layer: int, call: Mapping[str, Any]) -> Tensor | None:
    """Return the attention mask that a layer was called with, by query and key; None without one."""
    mask = call.get("cross_attention_mask" if crosses(model, layer) else "attention_mask")
    return mask if isinstance(mask, Tensor) and mask.dim() == 4 else None


def cache_argument(call: Mapping[str, Any], cache: Any) -> dict[str, Any]:
    """Return the argument name of a layer's cache, with a marker in place of the cache."""
    return {name: CACHE for name, value in call.items() if value is cache}


class _Cache:
    """Marker for a layer's cache in recorded arguments."""


CACHE = _Cache()


def _added(model: Lvlm) -> int:
    """Return the number of first layers after which the model adds values at image positions."""
    path = model.spec.added_after
    return len(find(model.hf.config, path)) if path else 0
