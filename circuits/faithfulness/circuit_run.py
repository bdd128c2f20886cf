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
from dataclasses import dataclass, replace
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
from lvlm.access.weights import columns, quantized, weight
from lvlm.family.specification import resolve
from lvlm.model import Lvlm
from lvlm.sites import Site


@dataclass(frozen=True, eq=False)
class Ends:
    """Both runs of P pairs: the inputs of the clean one, and what nodes write in the corrupt one."""

    inputs: Mapping[str, Tensor]
    corrupt: Written
    embeddings: Tensor
    """How what the first layer is given differs, clean less corrupt, ``[P, T, D]``."""
    more: Mapping[int, Tensor]
    """How what the model adds after a layer differs."""


def ends_of(model: Lvlm, inputs: Mapping[str, Tensor], clean: Written, corrupt: Written) -> Ends:
    """Return both ends from what nodes write in both runs; `inputs` are the clean run's."""
    nothing = torch.zeros_like(corrupt.embeddings)
    layers = {*clean.added, *corrupt.added}
    more = {i: clean.added.get(i, nothing) - corrupt.added.get(i, nothing) for i in layers}
    return Ends(inputs, corrupt, clean.embeddings - corrupt.embeddings, more)


@dataclass(frozen=True, eq=False)
class Heads:
    """What each head of a layer adds to the stream, in the form of what makes it: sums of any heads are computed on demand.

    Every head's share of every layer at every token would be heads x tokens x width numbers a layer.
    """

    projection: nn.Linear
    z: Tensor
    """Input of the output projection, ``[P, T, H * d]``."""
    even: Tensor
    """What each head has of that which no head makes (a bias), ``[P, T, D]``."""
    scale: Tensor | None
    """What a norm or gate after the projection multiplies by, ``[P, T, D]``; None for nothing."""
    count: int
    """Number of heads."""

    @classmethod
    def of_run(cls, model: Lvlm, layer: int, z: Tensor, attention: Tensor) -> Heads:
        """Take a layer's heads in one run.

        Parameters
        ----------
        model, layer
            Which.
        z
            Input of the output projection, ``[P, T, H * d]``.
        attention
            What the projection made of it, ``[P, T, D]``.
        """
        place = model.place("decoder", layer, "attn_out")
        scale = None
        if place.gate is not None or model.spec.decoder.attention_out:
            scale = torch.where(attention == 0, 0, written_by(model, layer, attention) / attention)
        return cls._of(model.output_projection("decoder", layer), z, attention, scale, model.n_heads)

    @classmethod
    def moved(cls, model: Lvlm, layer: int, now: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor]) -> list[Heads]:
        """Return what adds up to how heads' shares differ between two runs, given as `z` and `attention` of each."""
        place = model.place("decoder", layer, "attn_out")
        if place.gate is None and not model.spec.decoder.attention_out:  # shares are linear: their difference is one
            z, attention = (a.to(_dtype(a)) - b.to(_dtype(b)) for a, b in zip(now, before, strict=True))
            return [cls._of(model.output_projection("decoder", layer), z, attention, None, model.n_heads)]
        return [cls.of_run(model, layer, *now), cls.of_run(model, layer, *before).negative()]

    @classmethod
    def _of(cls, projection: nn.Linear, z: Tensor, attention: Tensor, scale: Tensor | None, count: int) -> Heads:
        z = z.to(_dtype(z))
        empty = cls(projection, z, torch.zeros_like(attention[..., :1], dtype=z.dtype), None, count)
        made = empty.sum_of(np.arange(count))
        return replace(empty, even=(attention - made) / count, scale=scale)

    def negative(self) -> Heads:
        """Return the same with the sign turned."""
        return replace(self, z=-self.z, even=-self.even)

    def sum_of(self, heads: np.ndarray) -> Tensor:
        """Return what some heads, by number, add together, ``[P, T, D]``."""
        width = self.z.shape[-1] // self.count
        if len(heads) == self.count:
            z, matrix = self.z, columns(self.projection, slice(0, self.z.shape[-1]), self.z)
        else:
            at = torch.as_tensor(heads[:, None] * width + np.arange(width), device=self.z.device).flatten()
            z = self.z[..., at]
            stored = None if quantized(self.projection) else weight(self.projection)
            whole = columns(self.projection, slice(0, self.z.shape[-1]), self.z) if stored is None else stored
            matrix = whole[:, at.to(whole.device)].to(z)
        total = z @ matrix.detach().T + len(heads) * self.even
        return total if self.scale is None else total * self.scale


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
        # What nodes that have written write more than in the corrupt run.
        self.heads: dict[int, list[Heads]] = {}
        self.mlps: dict[int, Tensor] = {}
        self._before = 0, torch.zeros_like(ends.embeddings, dtype=_dtype(ends.embeddings))

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
                    whole = out[0] if isinstance(out, tuple) else out
                    there = self.ends.corrupt.heads[i], self.ends.corrupt.attention[i]
                    self.heads[i] = Heads.moved(model, i, (self.z.pop(i), whole), there)
                    # The layer's attention is over: its queries, keys, values and inputs are not needed again.
                    self.attention.seen.pop(i, None)
                    self.called.pop(i, None)

            def told(_module: nn.Module, args: Any, kwargs: Any, i: int = i) -> Any:
                key = None if args else first_name(kwargs)
                given = args[0] if key is None else kwargs[key]
                x = self.stream(i, self.shape.before_mlp(i), self.kept[:, self.shape.columns(i).stop - 1])
                norm = self.forms[i].norm if self.forms[i].shared else None
                new = (norm(x.to(given.dtype)) if norm is not None else x.to(given.dtype)).reshape(given.shape)
                return ((new, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: new})

            def wrote(x: Tensor, i: int = i) -> None:
                self.mlps[i] = x - self.ends.corrupt.mlps[i]

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
        x = self._corrupt(before)
        if told[0]:
            x = x + self.ends.embeddings
        for i in range(self.model.n_layers):
            first = self.shape.before_attention(i)
            if first >= before:
                break
            heads = np.flatnonzero(told[first : first + self.model.n_heads])
            for part in self.heads[i] if len(heads) else ():
                x = x + part.sum_of(heads)
            mlp = first + self.model.n_heads
            if mlp < before and told[mlp]:
                x = x + self.mlps[i]
        earlier = [i for i in range(layer) if i in self.ends.corrupt.added or i in self.ends.more]
        x = x + sum(self.ends.corrupt.added[i] for i in earlier if i in self.ends.corrupt.added)
        return x + sum(self.ends.more[i] for i in earlier if i in self.ends.more) if told[0] else x

    def _corrupt(self, before: int) -> Tensor:
        """Return what the first so many nodes write together in the corrupt run, ``[P, T, D]``; `before` never falls."""
        done, total = self._before
        written = self.ends.corrupt
        if done == 0 < before:
            total = total + written.embeddings
        for i in range(self.model.n_layers):
            first = self.shape.before_attention(i)
            mlp = first + self.model.n_heads
            if done <= first < before:
                total = total + written_by(self.model, i, written.attention[i])
            if done <= mlp < before:
                total = total + written.mlps[i]
        self._before = before, total
        return total

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
