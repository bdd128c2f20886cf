"""A model run with some of its edges alone: every node reads the clean run along these and the corrupt run along all others.

Each reader of the residual stream is given a stream of its own: that of the corrupt run, plus what the nodes it is still
told of now write more than they did there. What they write is what *they* then make of their own readings, so that what is cut
off further down counts as well (Hanna et al. 2024, arXiv 2403.17806, section 2; the same as path patching along all edges
outside at once). The layers' own modules run; only what they are given is changed, so nothing is estimated.

A head's share of what its layer writes is ``z_h W_O^h`` and an equal part of a bias; where a norm follows, times what that
norm multiplies by in the run at hand, so that shares add up to what is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from circuits.attribution.attention_nodes import Opened, opened
from circuits.attribution.gradients import Metric
from circuits.attribution.residual_stream import Form, Written, written_by
from circuits.interventions.hooks import edit
from circuits.results.graph import Shape
from lvlm.access.places import first_name
from lvlm.family.specification import resolve
from lvlm.model import Lvlm
from lvlm.sites import Site


@dataclass(frozen=True, eq=False)
class Ends:
    """Both runs of P pairs: the inputs of the clean one, and what every node writes in the corrupt one."""

    inputs: Mapping[str, Tensor]
    corrupt: Tensor
    """``[n_sources, P, T, D]``."""
    added: Mapping[int, Tensor]
    """What the model itself adds to the corrupt stream after a layer, ``[P, T, D]``."""
    embeddings: Tensor
    """How what the first layer is given differs, clean less corrupt, ``[P, T, D]``."""
    more: Mapping[int, Tensor]
    """How what the model adds after a layer differs."""


def ends_of(model: Lvlm, shape: Shape, inputs: Mapping[str, Tensor], clean: Written, corrupt: Written) -> Ends:
    """Return both ends from what nodes write in both runs; `inputs` are the clean run's."""
    nodes = torch.empty(shape.n_sources, *corrupt.embeddings.shape, dtype=_dtype(corrupt.embeddings)).to(
        corrupt.embeddings.device
    )
    nodes[0] = corrupt.embeddings
    for i in range(model.n_layers):
        first = shape.before_attention(i)
        nodes[first : first + model.n_heads] = shares_of(model, i, corrupt.heads[i], corrupt.attention[i])
        nodes[first + model.n_heads] = corrupt.mlps[i]
    nothing = torch.zeros_like(corrupt.embeddings)
    layers = {*clean.added, *corrupt.added}
    more = {i: clean.added.get(i, nothing) - corrupt.added.get(i, nothing) for i in layers}
    return Ends(inputs, nodes, corrupt.added, clean.embeddings - corrupt.embeddings, more)


def shares_of(model: Lvlm, layer: int, z: Tensor, attention: Tensor) -> Tensor:
    """Return each head's share of what a layer adds to the stream, ``[H, P, T, D]``; they add up to it.

    Parameters
    ----------
    model, layer
        Which.
    z
        Input of the output projection, ``[P, T, H * d]``.
    attention
        What the projection made of it, ``[P, T, D]``.
    """
    by_head = model.output_projection("decoder", layer).weight.detach().unflatten(1, (model.n_heads, -1))  # [D, H, d]
    x = z.unflatten(-1, (model.n_heads, -1))
    parts = torch.einsum("pthd,whd->hptw", x.to(_dtype(x)), by_head.to(_dtype(x)))
    parts += (attention - parts.sum(0)) / model.n_heads
    place = model.place("decoder", layer, "attn_out")
    if place.gate is None and not model.spec.decoder.attention_out:
        return parts
    written = written_by(model, layer, attention)
    return parts * torch.where(attention == 0, 0, written / attention)


@torch.no_grad()
def run_circuit(
    model: Lvlm, forms: tuple[Form, ...], shape: Shape, ends: Ends, kept: np.ndarray, metric: Metric
) -> Tensor:
    """Return the metric ``[P]`` with the edges `kept` alone, bool ``[n_sources, n_targets]``."""
    one = _CircuitRun(model, forms, shape, ends, kept)
    with ExitStack() as hooks:
        one.attention = hooks.enter_context(opened(model, change=one.attend))
        one.watch(hooks)
        return metric(model.forward(ends.inputs)[:, -1])


class _CircuitRun:
    """What is known while a forward is under way."""

    attention: Any

    def __init__(self, model: Lvlm, forms: tuple[Form, ...], shape: Shape, ends: Ends, kept: np.ndarray) -> None:
        self.model, self.forms, self.shape, self.ends, self.kept = model, forms, shape, ends, kept
        path = model.spec.decoder.attention
        self.modules = [resolve(layer, path, model.spec) for layer in model.layers("decoder")]
        self.called: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.z: dict[int, Tensor] = {}
        self.asking = False
        # What each node writes more than in the corrupt run; 0 for those that have not written yet.
        self.moved = torch.zeros_like(ends.corrupt)
        self.moved[0] = ends.embeddings

    def watch(self, hooks: ExitStack) -> None:
        """Put hooks where nodes read and write."""
        model, spec = self.model, self.model.spec.decoder
        for i, layer in enumerate(model.layers("decoder")):

            def before(_module: nn.Module, args: Any, kwargs: Any, i: int = i) -> None:
                if not self.asking:
                    self.called[i] = args, kwargs

            def keep(x: Tensor, i: int = i) -> None:
                if not self.asking:
                    self.z[i] = x

            def after(_module: nn.Module, _args: Any, out: Any, i: int = i) -> None:
                if not self.asking:
                    first = self.shape.before_attention(i)
                    at = slice(first, first + model.n_heads)
                    whole = out[0] if isinstance(out, tuple) else out
                    self.moved[at] = shares_of(model, i, self.z[i], whole) - self.ends.corrupt[at]

            def told(_module: nn.Module, args: Any, kwargs: Any, i: int = i) -> Any:
                key = None if args else first_name(kwargs)
                given = args[0] if key is None else kwargs[key]
                x = self.stream(i, self.shape.before_mlp(i), self.kept[:, self.shape.columns(i).stop - 1])
                norm = self.forms[i].norm if self.forms[i].shared else None
                new = (norm(x.to(given.dtype)) if norm is not None else x.to(given.dtype)).reshape(given.shape)
                return ((new, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: new})

            def wrote(x: Tensor, i: int = i) -> None:
                at = self.shape.before_attention(i) + model.n_heads
                self.moved[at] = x - self.ends.corrupt[at]

            hooks.callback(self.modules[i].register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(model.place("decoder", i, "z").watch(keep).remove)
            hooks.callback(self.modules[i].register_forward_hook(after).remove)
            reader = resolve(layer, spec.mlp if self.forms[i].shared else spec.mid_norm, model.spec)
            hooks.callback(reader.register_forward_pre_hook(told, with_kwargs=True).remove)
            hooks.callback(model.place("decoder", i, "mlp_out").watch(wrote).remove)
        last = model.n_layers - 1

        def leave(x: Tensor) -> Tensor:
            return self.stream(model.n_layers, self.shape.n_sources, self.kept[:, -1]).to(x.dtype).reshape(x.shape)

        hooks.callback(edit(model, Site("decoder", last, "resid_post"), leave).remove)

    def stream(self, layer: int, before: int, told: np.ndarray) -> Tensor:
        """Return what a reader of a layer is given, ``[P, T, D]``: of the nodes before it those that it is told of."""
        of = torch.as_tensor(np.flatnonzero(told[:before]), device=self.moved.device)
        x = self.ends.corrupt[:before].sum(0) + self.moved[of].sum(0)
        earlier = range(layer)
        x = x + sum(self.ends.added[i] for i in earlier if i in self.ends.added)
        return x + sum(self.ends.more[i] for i in earlier if i in self.ends.more) if told[0] else x

    def attend(self, layer: int, given: Opened) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return queries, keys and values of heads that each read a stream of their own."""
        if self.asking:
            return None
        before, heads = self.shape.before_attention(layer), self.model.n_heads
        columns = self.kept[:before, self.shape.columns(layer)][:, : 3 * heads]
        streams, of = np.unique(columns, axis=1, return_inverse=True)
        found = tuple(torch.empty_like(x) for x in (given.query, given.key, given.value))
        for number in range(streams.shape[1]):
            seen = self._ask(layer, self.stream(layer, before, streams[:, number]))
            for reader in np.flatnonzero(of.ravel() == number):
                letter, head = divmod(int(reader), heads)
                found[letter][:, head] = (seen.query, seen.key, seen.value)[letter][:, head]
        return found[0], found[1], found[2]

    def _ask(self, layer: int, x: Tensor) -> Opened:
        """Return what a layer's attention makes of a stream."""
        args, kwargs = self.called[layer]
        key = None if args else first_name(kwargs)
        given = args[0] if key is None else kwargs[key]
        norm = self.forms[layer].norm
        x = x.to(given.dtype)
        new = (x if norm is None else norm(x)).reshape(given.shape)
        self.asking = True
        try:
            if key is None:
                self.modules[layer](new, *args[1:], **kwargs)
            else:
                self.modules[layer](**{**kwargs, key: new})
        finally:
            self.asking = False
        return self.attention.seen[layer]


def _dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.element_size() < 4 else x.dtype
