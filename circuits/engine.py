"""Run many patches of one prompt for little more than one forward.

What precedes the first patched position never changes, and neither does what lies below the patched layer. So a run
is recorded once (keys and values of its prefix; at the suffix every layer's input and every head's output) and each
patch enters at its own layer as one more row of a batch that grows on the way up, and consists of the suffix alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from circuits.interventions import Intervention, Replace, intervened
from concepts.errors import ModelError
from lvlm.family import TOLERANCE
from lvlm.model import Lvlm
from lvlm.sites import Head, Site


@dataclass(frozen=True, eq=False)
class Recording:
    """One forward of P examples of equal length T, kept from position `start` on (S = T - start positions)."""

    start: int
    length: int
    logits: Tensor
    """At the last position, ``[P, V]``."""
    residual: tuple[Tensor, ...]
    """Input of each layer at the suffix, ``[P, S, D]``."""
    z: tuple[Tensor, ...]
    """Head outputs of each layer at the suffix, heads side by side, ``[P, S, H * head_dim]``."""
    keys: tuple[Tensor, ...]
    """Of each layer before the suffix, positions already applied, ``[P, key heads, start, head_dim]``."""
    values: tuple[Tensor, ...]
    arguments: tuple[Mapping[str, Any], ...]
    """What else each layer was called with."""


class _Prefix:
    """The part of a cache that a decoder layer uses: the prefix's keys and values, followed by the new ones."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._keys, self._values = keys, values

    def update(self, keys: Tensor, values: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return keys and values of prefix and suffix, ``[rows, key heads, T, head_dim]``; keeps nothing."""
        return torch.cat([self._keys, keys], dim=-2), torch.cat([self._values, values], dim=-2)


@torch.no_grad()
def record(model: Lvlm, inputs: Mapping[str, Tensor], start: int) -> Recording:
    """Run examples once, as they are, and keep what patches at positions from `start` on need."""
    from transformers import DynamicCache

    layers = range(model.n_layers)
    residual: dict[int, Tensor] = {}
    z: dict[int, Tensor] = {}
    arguments: dict[int, dict[str, Any]] = {}
    # Without a configuration every layer keeps all keys, also those outside a sliding window: its mask hides them.
    cache: Any = DynamicCache()
    with ExitStack() as hooks:
        for layer in layers:

            def called(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any], layer: int = layer) -> None:
                arguments[layer] = {name: value for name, value in kwargs.items() if name != "hidden_states"}

            def entered(x: Tensor, layer: int = layer) -> None:
                residual[layer] = x[:, start:].clone()

            def attended(x: Tensor, layer: int = layer) -> None:
                z[layer] = x[:, start:].clone()

            place = model.place("decoder", layer, "resid_pre")
            hooks.callback(place.module.register_forward_pre_hook(called, with_kwargs=True).remove)
            hooks.callback(place.watch(entered).remove)
            hooks.callback(model.place("decoder", layer, "z").watch(attended).remove)
        logits = model.hf(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    return Recording(
        start,
        inputs["input_ids"].shape[1],
        logits,
        tuple(residual[i] for i in layers),
        tuple(z[i] for i in layers),
        tuple(cache.layers[i].keys[:, :, :start] for i in layers),
        tuple(cache.layers[i].values[:, :, :start] for i in layers),
        tuple(arguments[i] for i in layers),
    )


@torch.no_grad()
def resume(model: Lvlm, run: Recording, rows: Sequence[tuple[int, Head]], source: Recording | None = None) -> Tensor:
    """Return the logits of `run` with one head's output at the suffix taken from `source`, a patch a row.

    Parameters
    ----------
    model
        The model of both recordings.
    run
        The run that is patched.
    rows
        For each patch the example (row of the recordings) and the head, layers ascending.
    source
        Where the patched head's output comes from; None patches nothing.

    Returns
    -------
    Tensor
        Logits at the last position, ``[rows, V]``.
    """
    hidden = run.residual[0][:0]
    owners = torch.zeros(0, dtype=torch.long, device=hidden.device)
    for layer in range(rows[0][1].layer, model.n_layers):
        entering = [(example, head.head) for example, head in rows if head.layer == layer]
        first = len(owners)
        new = torch.tensor([example for example, _ in entering], dtype=torch.long, device=hidden.device)
        hidden, owners = torch.cat([hidden, run.residual[layer][new]]), torch.cat([owners, new])
        patches = [] if source is None else _patches(layer, entering, first, source.z[layer], model.head_dim)
        with intervened(model, patches):
            out = model.place("decoder", layer, "resid_post").module(hidden, **_arguments(run, layer, owners))
        hidden = out[0] if isinstance(out, tuple) else out
    return model.unembed(hidden[:, -1])


def check_resumable(model: Lvlm, run: Recording) -> None:
    """Raise `ModelError` where running the layers one by one does not give the model's own logits."""
    again = resume(model, run, [(i, Head(0, 0)) for i in range(len(run.logits))])
    scale = max(float(run.logits.abs().max()), 1e-6)
    error = float((again.float() - run.logits.float()).abs().max()) / scale
    if not error <= TOLERANCE[model.dtype]:
        msg = (
            f"{model.name}: its decoder layers run one by one give other logits than the model (by {error:.1e} of the "
            f"largest); family '{model.spec.model_type}' does something between layers that patching cannot restart"
        )
        raise ModelError(msg)


def _patches(
    layer: int, entering: Sequence[tuple[int, int]], first: int, source: Tensor, head_dim: int
) -> list[Intervention]:
    """Return for each head that enters at a layer the intervention that patches it in its own rows."""
    made = []
    for head in dict.fromkeys(head for _, head in entering):
        members = [(first + k, example) for k, (example, h) in enumerate(entering) if h == head]
        value = source[[example for _, example in members], :, head * head_dim : (head + 1) * head_dim]
        site, rows = Site("decoder", layer, "z"), tuple(row for row, _ in members)
        made.append(Intervention(site, Replace(value), "all", head, rows))
    return made


def _arguments(run: Recording, layer: int, owners: Tensor) -> dict[str, Any]:
    """Return what a layer is called with for a batch of suffixes, each belonging to one recorded example."""

    def rows(x: Tensor) -> Tensor:
        return x if x.shape[0] == 1 else x[owners]

    given = dict(run.arguments[layer])
    size = run.length - run.start
    mask = given.get("attention_mask")
    if mask is not None:
        given["attention_mask"] = rows(mask)[..., run.start :, :]
    elif size > 1:
        hidden = run.residual[layer]
        future = torch.full((size, run.length), torch.finfo(hidden.dtype).min, dtype=hidden.dtype, device=hidden.device)
        given["attention_mask"] = future.triu(run.start + 1)[None, None]
    if given.get("position_embeddings") is not None:
        given["position_embeddings"] = tuple(rows(x)[..., run.start :, :] for x in given["position_embeddings"])
    if given.get("position_ids") is not None:
        given["position_ids"] = rows(given["position_ids"])[..., run.start :]
    given["past_key_values"] = _Prefix(run.keys[layer][owners], run.values[layer][owners])
    return given
