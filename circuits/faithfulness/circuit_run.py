"""Run a model with a circuit of edges: nodes read the clean run along the circuit's edges, else the corrupt run.

Each reader of the residual stream gets its own stream: that of the corrupt run, plus the changes of the outputs of the
nodes with an edge to it. These outputs are computed from the nodes' own streams, so edges removed in earlier layers count
as well (Hanna et al. 2024, arXiv 2403.17806, section 2; equal to path patching along all edges outside the circuit
jointly). The layers' own modules run with changed inputs, so nothing is estimated.

A head contributes ``z_h W_O^h`` and an equal part of the bias to its layer's output; where a norm follows, both are
multiplied by the norm's scale in the current run, so that contributions sum to the output.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from circuits.attribution.attention_nodes import AttentionRecord, expose_attention
from circuits.attribution.gradients import Metric
from circuits.attribution.residual_stream import Form, Written, written_by
from circuits.interventions.hooks import edit
from circuits.results.graph import Shape
from lvlm.access.hook_point import first_name
from lvlm.access.weights import columns, quantized, weight
from lvlm.family.specification import resolve
from lvlm.model import Lvlm
from lvlm.sites import Site


@dataclass(frozen=True, eq=False)
class Ends:
    """Both runs of P pairs: the inputs of the clean run, and the node outputs of the corrupt run."""

    inputs: Mapping[str, Tensor]
    corrupt: Written
    embeddings: Tensor
    """Difference of the first layer's input, clean minus corrupt, ``[P, T, D]``."""
    more: Mapping[int, Tensor]
    """Difference of the values that the model adds after a layer, clean minus corrupt, ``[P, T, D]``."""


def ends_of(model: Lvlm, inputs: Mapping[str, Tensor], clean: Written, corrupt: Written) -> Ends:
    """Return both ends from the node outputs of both runs; `inputs` are those of the clean run."""
    zeros = torch.zeros_like(corrupt.embeddings)
    layers = {*clean.added, *corrupt.added}
    more = {i: clean.added.get(i, zeros) - corrupt.added.get(i, zeros) for i in layers}
    return Ends(inputs, corrupt, clean.embeddings - corrupt.embeddings, more)


@dataclass(frozen=True, eq=False)
class HeadContributions:
    """Contributions of a layer's heads to the stream, in factored form: sums over any heads are computed on demand.

    Storing each head's contribution at every token would take heads x tokens x width numbers per layer.
    """

    projection: nn.Linear
    z: Tensor
    """Input of the output projection, ``[P, T, H * d]``."""
    even: Tensor
    """Each head's equal part of the remainder (a bias), ``[P, T, D]``."""
    scale: Tensor | None
    """Factor of a norm or gate after the projection, ``[P, T, D]``; None without norm and gate."""
    count: int
    """Number of heads."""

    @classmethod
    def of_run(cls, model: Lvlm, layer: int, z: Tensor, attention: Tensor) -> HeadContributions:
        """Return the contributions of a layer's heads in one run.

        Parameters
        ----------
        model, layer
            The model and the layer's index.
        z
            Input of the output projection, ``[P, T, H * d]``.
        attention
            Output of the projection, ``[P, T, D]``.
        """
        place = model.place("decoder", layer, "attn_out")
        scale = None
        if place.gate is not None or model.spec.decoder.attention_out:
            scale = torch.where(attention == 0, 0, written_by(model, layer, attention) / attention)
        return cls._of(model.output_projection("decoder", layer), z, attention, scale, model.n_heads)

    @classmethod
    def moved(
        cls, model: Lvlm, layer: int, now: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor]
    ) -> list[HeadContributions]:
        """Return terms whose sum is the change of heads between two runs, each run as `z` and `attention`."""
        place = model.place("decoder", layer, "attn_out")
        if place.gate is None and not model.spec.decoder.attention_out:  # linear: one term is enough
            z, attention = (a.to(_dtype(a)) - b.to(_dtype(b)) for a, b in zip(now, before, strict=True))
            return [cls._of(model.output_projection("decoder", layer), z, attention, None, model.n_heads)]
        return [cls.of_run(model, layer, *now), cls.of_run(model, layer, *before).negative()]

    @classmethod
    def _of(
        cls, projection: nn.Linear, z: Tensor, attention: Tensor, scale: Tensor | None, count: int
    ) -> HeadContributions:
        z = z.to(_dtype(z))
        empty = cls(projection, z, torch.zeros_like(attention[..., :1], dtype=z.dtype), None, count)
        heads_sum = empty.sum_of(np.arange(count))
        return replace(empty, even=(attention - heads_sum) / count, scale=scale)

    def negative(self) -> HeadContributions:
        """Return the contributions with the opposite sign."""
        return replace(self, z=-self.z, even=-self.even)

    def sum_of(self, heads: np.ndarray) -> Tensor:
        """Return the sum of the contributions of some heads, by index, ``[P, T, D]``."""
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
    model: Lvlm, forms: tuple[Form, ...], shape: Shape, ends: Ends, mask: np.ndarray, metric: Metric
) -> Tensor:
    """Return the metric ``[P]`` with the edges in `mask` only, bool ``[n_sources, n_targets]``."""
    circuit_run = _CircuitRun(model, forms, shape, ends, mask)
    with ExitStack() as hooks:
        circuit_run.attention = hooks.enter_context(expose_attention(model, change=circuit_run.attend))
        circuit_run.watch(hooks)
        return metric(model.forward(ends.inputs)[:, -1])


class _CircuitRun:
    """State of one forward pass."""

    attention: Any

    def __init__(self, model: Lvlm, forms: tuple[Form, ...], shape: Shape, ends: Ends, mask: np.ndarray) -> None:
        self.model, self.forms, self.shape, self.ends, self.mask = model, forms, shape, ends, mask
        path = model.spec.decoder.attention
        self.modules = [resolve(layer, path, model.spec) for layer in model.layers("decoder")]
        self.called: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.z: dict[int, Tensor] = {}
        self.probing = False
        # Changes of node outputs relative to the corrupt run, for nodes computed so far.
        self.heads: dict[int, list[HeadContributions]] = {}
        self.mlps: dict[int, Tensor] = {}
        self._before = 0, torch.zeros_like(ends.embeddings, dtype=_dtype(ends.embeddings))

    def watch(self, hooks: ExitStack) -> None:
        """Register hooks at the inputs and outputs of nodes."""
        model, spec = self.model, self.model.spec.decoder
        for i, layer in enumerate(model.layers("decoder")):

            def before(_module: nn.Module, args: Any, kwargs: Any, i: int = i) -> None:
                if not self.probing:
                    self.called[i] = args, kwargs

            def keep(x: Tensor, i: int = i) -> None:
                if not self.probing:
                    self.z[i] = x

            def after(_module: nn.Module, _args: Any, out: Any, i: int = i) -> None:
                if not self.probing:
                    whole = out[0] if isinstance(out, tuple) else out
                    there = self.ends.corrupt.heads[i], self.ends.corrupt.attention[i]
                    self.heads[i] = HeadContributions.moved(model, i, (self.z.pop(i), whole), there)
                    # The layer's attention is done: free its queries, keys, values and inputs.
                    self.attention.records.pop(i, None)
                    self.called.pop(i, None)

            def route_input(_module: nn.Module, args: Any, kwargs: Any, i: int = i) -> Any:
                key = None if args else first_name(kwargs)
                original = args[0] if key is None else kwargs[key]
                x = self.stream(i, self.shape.before_mlp(i), self.mask[:, self.shape.columns(i).stop - 1])
                norm = self.forms[i].norm if self.forms[i].shared else None
                new = (norm(x.to(original.dtype)) if norm is not None else x.to(original.dtype)).reshape(original.shape)
                return ((new, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: new})

            def wrote(x: Tensor, i: int = i) -> None:
                self.mlps[i] = x - self.ends.corrupt.mlps[i]

            hooks.callback(self.modules[i].register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(model.place("decoder", i, "z").watch(keep).remove)
            hooks.callback(self.modules[i].register_forward_hook(after).remove)
            reader = resolve(layer, spec.mlp if self.forms[i].shared else spec.mid_norm, model.spec)
            hooks.callback(reader.register_forward_pre_hook(route_input, with_kwargs=True).remove)
            hooks.callback(model.place("decoder", i, "mlp_out").watch(wrote).remove)
        last = model.n_layers - 1

        def leave(x: Tensor) -> Tensor:
            return self.stream(model.n_layers, self.shape.n_sources, self.mask[:, -1]).to(x.dtype).reshape(x.shape)

        hooks.callback(edit(model, Site("decoder", last, "resid_post"), leave).remove)

    def stream(self, layer: int, before: int, incoming: np.ndarray) -> Tensor:
        """Return the stream of a reader in a layer, ``[P, T, D]``, from its incoming edges, bool ``[n_sources]``."""
        x = self._corrupt(before)
        if incoming[0]:
            x = x + self.ends.embeddings
        for i in range(self.model.n_layers):
            first = self.shape.before_attention(i)
            if first >= before:
                break
            heads = np.flatnonzero(incoming[first : first + self.model.n_heads])
            for part in self.heads[i] if len(heads) else ():
                x = x + part.sum_of(heads)
            mlp = first + self.model.n_heads
            if mlp < before and incoming[mlp]:
                x = x + self.mlps[i]
        earlier = [i for i in range(layer) if i in self.ends.corrupt.added or i in self.ends.more]
        x = x + sum(self.ends.corrupt.added[i] for i in earlier if i in self.ends.corrupt.added)
        return x + sum(self.ends.more[i] for i in earlier if i in self.ends.more) if incoming[0] else x

    def _corrupt(self, before: int) -> Tensor:
        """Return the sum of the first `before` nodes' outputs in the corrupt run, ``[P, T, D]``; `before` must not decrease."""
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

    def attend(self, layer: int, record: AttentionRecord) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return queries, keys and values of heads, each computed from the head's own stream."""
        if self.probing:
            return None
        before, heads = self.shape.before_attention(layer), self.model.n_heads
        columns = self.mask[:before, self.shape.columns(layer)][:, : 3 * heads]
        streams, of = np.unique(columns, axis=1, return_inverse=True)
        inputs = tuple(torch.empty_like(x) for x in (record.query, record.key, record.value))
        for number in range(streams.shape[1]):
            stream_record = self._attention_of(layer, self.stream(layer, before, streams[:, number]))
            for reader in np.flatnonzero(of.ravel() == number):
                letter, head = divmod(int(reader), heads)
                inputs[letter][:, head] = (stream_record.query, stream_record.key, stream_record.value)[letter][:, head]
        return inputs[0], inputs[1], inputs[2]

    def _attention_of(self, layer: int, x: Tensor) -> AttentionRecord:
        """Return the attention record of a layer for a given stream."""
        args, kwargs = self.called[layer]
        key = None if args else first_name(kwargs)
        original = args[0] if key is None else kwargs[key]
        norm = self.forms[layer].norm
        x = x.to(original.dtype)
        new = (x if norm is None else norm(x)).reshape(original.shape)
        self.probing = True
        try:
            if key is None:
                self.modules[layer](new, *args[1:], **kwargs)
            else:
                self.modules[layer](**{**kwargs, key: new})
        finally:
            self.probing = False
        return self.attention.records[layer]


def _dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.element_size() < 4 else x.dtype
