"""Outputs of every decoder node to the residual stream, and gradients of the metric at every node's inputs.

A head reads the stream three times, for its queries, keys and values, and each is a separate input here, before the
layer's norm: as with TransformerLens' split inputs (``use_split_qkv_input``, keys and values ungrouped), which the
released code of EAP-IG uses (Hanna et al. 2024, arXiv 2403.17806). The model is not split for this: the gradient at a
head's queries is multiplied by the head's slice of the projection and by the norm's derivative at that point.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from circuits.attribution.attention_nodes import AttentionRecord, expose_attention
from circuits.attribution.gradients import Metric
from circuits.interventions.hooks import edit
from groundscope.core.errors import ModelError
from lvlm.access.hook_point import HookPoint, LayerCall, first_name
from lvlm.access.weights import matrix_of
from lvlm.family.specification import TOLERANCE, find, resolve
from lvlm.model import Lvlm
from lvlm.sites import Site


@dataclass(frozen=True, eq=False)
class Form:
    """How one layer reads the residual stream."""

    norm: nn.Module | None
    """Norm between the stream and the attention; None if there is no norm."""
    parallel: bool
    """Whether the MLP reads the same stream as the attention, without the attention's output."""
    shared: bool
    """Whether the MLP reads through the attention's norm."""


@dataclass(frozen=True, eq=False)
class Written:
    """Outputs of nodes in one run, by layer; P examples of T tokens."""

    embeddings: Tensor
    """``[P, T, D]``."""
    added: Mapping[int, Tensor]
    """Values that the model adds to the stream after a layer, ``[P, T, D]``; empty for most families."""
    heads: tuple[Tensor, ...]
    """``[P, T, H * d]``, the input of the output projection."""
    attention: tuple[Tensor, ...]
    """Output of the projection, before any norm, ``[P, T, D]``."""
    mlps: tuple[Tensor, ...]
    """``[P, T, D]``."""
    metric: Tensor
    """``[P]``."""


@dataclass(frozen=True, eq=False)
class Reading:
    """Gradients of the metric at the inputs of one layer."""

    entering: Tensor
    """The stream before the attention's norm (a value, not a gradient), ``[P, T, D]``."""
    heads: Mapping[str, Tensor]
    """Gradients at each head's queries and its copies of keys and values, before positional encoding,
    ``[P, T, H, d]`` by letter."""
    normed: Tensor
    """Gradient at the attention's input, over all heads and letters, ``[P, T, D]``."""
    mlp: Tensor
    """Gradient at the stream before the MLP's norm, ``[P, T, D]``; after the norm if it is shared with the attention."""


@dataclass(frozen=True, eq=False)
class Run:
    """One run, with gradients if requested."""

    written: Written
    readings: tuple[Reading, ...]
    final: Tensor | None
    """Gradient at the stream after the last layer, ``[P, T, D]``."""


def run(
    model: Lvlm,
    inputs: Mapping[str, Tensor],
    metric: Metric,
    forms: tuple[Form, ...] = (),
    *,
    embeddings: Tensor | None = None,
    added: Mapping[int, Tensor] | None = None,
) -> Run:
    """Run examples once and record the outputs of nodes; with `forms`, also differentiate the metric by their inputs.

    Parameters
    ----------
    model
        A model that passes `circuits.attribution.attention_nodes.check_exposable`.
    inputs
        Inputs of P examples.
    metric
        Differentiated function of the logits.
    forms
        How each layer reads the stream, from `forms_of`; if empty, nothing is differentiated.
    embeddings
        Replacement for the input of the first layer.
    added
        Values to add to the stream after some layers.

    Raises
    ------
    ModelError
        If gradients do not reach a layer's queries, keys and values, or their sum is not its attention's input gradient.
    """
    nodes = _RecordedNodes(model, bool(forms))
    with torch.set_grad_enabled(bool(forms)), ExitStack() as hooks:
        attention = hooks.enter_context(expose_attention(model))
        nodes.watch(hooks, forms, embeddings, added or {})
        score = metric(model.forward(inputs)[:, -1])
        if len(attention.records) != model.n_layers:
            missing = next(i for i in range(model.n_layers) if i not in attention.records)
            msg = (
                f"{model.name}: layer {missing} does not call its attention through transformers' ALL_ATTENTION_FUNCTIONS, so "
                "its queries, keys and values cannot be separated; use attribution.heads, attribution.nodes or "
                "circuits.patch_paths"
            )
            raise ModelError(msg)
        readings, final = _readings(model, nodes, forms, attention.records, score) if forms else ((), None)
    return Run(nodes.written(score.detach()), readings, final)


@torch.no_grad()
def forms_of(model: Lvlm, forward: Callable[[], Run]) -> tuple[tuple[Form, ...], Run]:
    """Determine how each layer reads the stream during `forward`, and return that and the result of `forward`.

    Raises
    ------
    ModelError
        If there is anything but one norm between the stream and a layer's attention, or a layer's attention output is
        not reproduced from its parts.
    """
    spec = model.spec.decoder
    calls: list[list[tuple[nn.Module, Tensor, Tensor]]] = [[] for _ in range(model.n_layers)]
    values: dict[tuple[str, int], Tensor] = {}
    with ExitStack() as hooks:
        for i, layer in enumerate(model.layers("decoder")):
            attention = resolve(layer, spec.attention, model.spec)
            inner = {id(m) for part in (attention, find(layer, spec.mlp)) if part for m in part.modules()}

            def through(module: nn.Module, args: Any, kwargs: Any, out: Any, i: int = i) -> None:
                x = args[0] if args else kwargs.get(first_name(kwargs)) if kwargs else None
                if isinstance(x, Tensor) and isinstance(out, Tensor):
                    calls[i].append((module, x, out))

            def attends(_m: nn.Module, args: Any, kwargs: Any, out: Any, i: int = i) -> None:
                values["attention", i] = args[0] if args else kwargs[first_name(kwargs)]
                values["raw", i] = out[0] if isinstance(out, tuple) else out

            for module in layer.modules():
                if module is not layer and id(module) not in inner:
                    hooks.callback(module.register_forward_hook(through, with_kwargs=True).remove)
            hooks.callback(attention.register_forward_hook(attends, with_kwargs=True).remove)

            def entered(_m: nn.Module, args: Any, kwargs: Any, _out: Any, i: int = i) -> None:
                values["resid_pre", i] = args[0] if args else kwargs[first_name(kwargs)]

            hooks.callback(layer.register_forward_hook(entered, with_kwargs=True).remove)
            place = model.place("decoder", i, "attn_out")
            hooks.callback(place.watch(lambda x, i=i: values.update({("attn_out", i): x})).remove)
            middle = resolve(layer, spec.mid_norm, model.spec)

            def between(_module: nn.Module, args: Any, i: int = i) -> None:
                values["middle", i] = args[0]

            hooks.callback(middle.register_forward_pre_hook(between).remove)
        result = forward()
    forms = []
    for i, layer in enumerate(model.layers("decoder")):
        x, read = values["resid_pre", i], values["attention", i]
        norm = next((m for m, before, after in calls[i] if after is read and before is x), None)
        if norm is None and read is not x:
            msg = f"{model.name}: layer {i} does not read the residual stream through one norm, so its edges cannot be scored"
            raise ModelError(msg)
        _compare(
            model, f"the attention output of layer {i}", written_by(model, i, values["raw", i]), values["attn_out", i]
        )
        middle = values["middle", i].reshape(x.shape)
        shared = norm is not None and resolve(layer, spec.mid_norm, model.spec) is norm
        forms.append(Form(norm, torch.equal(middle, x), shared))
    return tuple(forms), result


def written_by(model: Lvlm, layer: int, attention: Tensor) -> Tensor:
    """Return a layer's contribution to the stream from its output projection: apply its post-norm, gate or scale."""
    place = model.place("decoder", layer, "attn_out")
    own = place.module is resolve(model.layers("decoder")[layer], model.spec.decoder.attention, model.spec)
    return place.value(attention if own else place.module(attention), LayerCall())


def weights_of(model: Lvlm, layer: int) -> dict[str, Tensor]:
    """Return the slice of each query head in the projections of queries, keys and values, ``[H, d, D]`` each."""
    return {c: _by_head(model, model.place("decoder", layer, c)) for c in "qkv"}


def _by_head(model: Lvlm, place: HookPoint) -> Tensor:
    module = place.module
    if not isinstance(module, nn.Linear):
        msg = (
            f"{model.name}: the projection of queries, keys or values is a {type(module).__name__}; edges need nn.Linear, "
            "to take one slice per head; use attribution.heads, attribution.nodes or circuits.patch_paths"
        )
        raise ModelError(msg)
    matrix = matrix_of(module, torch.empty(0, dtype=model.dtype, device=model.device))
    by_row = place.value(matrix.T[None], LayerCall())[0].T  # [KV * d, D]
    width = model.head_dim
    shared = by_row.unflatten(0, (-1, width))
    return shared.repeat_interleave(model.n_heads // len(shared), dim=0)


class _RecordedNodes:
    """Values that hooks record in one forward pass."""

    def __init__(self, model: Lvlm, differentiate: bool) -> None:
        self.model, self.differentiate = model, differentiate
        self.at: dict[tuple[str, int], Tensor] = {}

    def watch(
        self, hooks: ExitStack, forms: tuple[Form, ...], embeddings: Tensor | None, added: Mapping[int, Tensor]
    ) -> None:
        """Register hooks at the outputs and inputs of nodes."""
        model, spec = self.model, self.model.spec.decoder
        count = len(find(model.hf.config, model.spec.added_after) or ()) if model.spec.added_after else 0

        def enter(x: Tensor) -> Tensor:
            start = (x if embeddings is None else embeddings).detach().clone()
            self.at["embeddings", 0] = start.requires_grad_(self.differentiate)
            return self.at["embeddings", 0]

        hooks.callback(model.place("decoder", 0, "resid_pre").edit(enter).remove)
        for i, layer in enumerate(model.layers("decoder")):
            if i and i - 1 in added:
                hooks.callback(model.place("decoder", i, "resid_pre").edit(lambda x, i=i: x + added[i - 1]).remove)
            if 0 < i <= count:
                hooks.callback(model.place("decoder", i, "resid_pre").watch(self._keep("pre", i)).remove)
            if i < count:
                hooks.callback(model.place("decoder", i, "resid_post").watch(self._keep("post", i)).remove)
            attention = resolve(layer, spec.attention, model.spec)
            hooks.callback(attention.register_forward_hook(self._output("attention", i)).remove)
            for name in ("z", "mlp_out"):
                hooks.callback(model.place("decoder", i, name).watch(self._keep(name, i)).remove)
            if not forms:
                continue
            hooks.callback(attention.register_forward_pre_hook(self._alias("normed", i), with_kwargs=True).remove)
            if (norm := forms[i].norm) is not None:
                hooks.callback(norm.register_forward_pre_hook(self._input("entering", i)).remove)
            reader = spec.mlp if forms[i].shared else spec.mid_norm
            middle = resolve(layer, reader, model.spec)
            hooks.callback(middle.register_forward_pre_hook(self._alias("mlp", i), with_kwargs=True).remove)
            for c in "qkv":
                module = model.place("decoder", i, c).module
                hooks.callback(module.register_forward_hook(self._output(c, i)).remove)
        last = model.n_layers - 1

        def leave(x: Tensor) -> Tensor:
            self.at["final", last] = x.view_as(x)
            return self.at["final", last]

        hooks.callback(edit(model, Site("decoder", last, "resid_post"), leave).remove)

    def written(self, metric: Tensor) -> Written:
        """Return what the embeddings, each head, attention and MLP add to the residual stream."""
        layers = range(self.model.n_layers)
        extra = {i: self.at["pre", i + 1] - self.at["post", i] for i in layers if ("post", i) in self.at}
        values = {name: tuple(self.at[name, i].detach() for i in layers) for name in ("z", "attention", "mlp_out")}
        added = {i: x.detach() for i, x in extra.items() if bool((x != 0).any())}
        return Written(
            self.at["embeddings", 0].detach(), added, values["z"], values["attention"], values["mlp_out"], metric
        )

    def _keep(self, name: str, layer: int) -> Any:
        def keep(x: Tensor) -> None:
            self.at[name, layer] = x

        return keep

    def _output(self, name: str, layer: int) -> Any:
        def after(_module: nn.Module, _args: Any, out: Any) -> None:
            self.at[name, layer] = out[0] if isinstance(out, tuple) else out

        return after

    def _input(self, name: str, layer: int) -> Any:
        def before(_module: nn.Module, args: Any) -> None:
            self.at[name, layer] = args[0]

        return before

    def _alias(self, name: str, layer: int) -> Any:
        """Return a hook that passes a module an alias of its input, so that other readers of it do not add to the gradient."""

        def before(_module: nn.Module, args: Any, kwargs: Any) -> Any:
            key = None if args else first_name(kwargs)
            x = args[0] if key is None else kwargs[key]
            self.at[name, layer] = x.view_as(x)
            new = self.at[name, layer]
            return ((new, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: new})

        return before


def _readings(
    model: Lvlm,
    recorded: _RecordedNodes,
    forms: tuple[Form, ...],
    attention: Mapping[int, AttentionRecord],
    score: Tensor,
) -> tuple[tuple[Reading, ...], Tensor]:
    layers, last = range(model.n_layers), model.n_layers - 1
    nodes: dict[tuple[str, int], Tensor] = {("final", last): recorded.at["final", last]}
    for i in layers:
        nodes |= {(name, i): recorded.at[name, i] for name in ("normed", "mlp", *"qkv")}
        if attention[i].groups > 1:
            nodes |= {("key", i): attention[i].key, ("value", i): attention[i].value}
    try:
        grouped = any(record.groups > 1 for record in attention.values())
        gradients = torch.autograd.grad(score.sum(), list(nodes.values()), retain_graph=grouped, materialize_grads=True)
    except RuntimeError as error:
        msg = f"{model.name}: no gradient reaches its decoder: {error}"
        raise ModelError(msg) from error
    slope = dict(zip(nodes, gradients, strict=True))
    readings = []
    for i in layers:
        heads = {
            c: model.place("decoder", i, c).value(slope[c, i], LayerCall()).unflatten(-1, (model.n_heads, -1))
            for c in ("q" if attention[i].groups > 1 else "qkv")
        }
        if attention[i].groups > 1:
            for c, name, shared in (("k", "key", attention[i].shared_key), ("v", "value", attention[i].shared_value)):
                heads[c] = _own(model, model.place("decoder", i, c), recorded.at[c, i], shared, slope[name, i])
        entering = recorded.at["normed" if forms[i].norm is None else "entering", i].detach()
        readings.append(Reading(entering, heads, slope["normed", i], slope["mlp", i].reshape(entering.shape)))
    return tuple(readings), slope["final", last]


def _own(model: Lvlm, place: HookPoint, raw: Tensor, shared: Tensor, slope: Tensor) -> Tensor:
    """Return gradients at the projection's outputs ``[P, T, H, d]`` from gradients at each head's copy ``[P, H, T, d]``."""
    groups = model.n_heads // shared.shape[1]
    back = []
    for member in range(groups):  # one head of each group at a time: heads of a group share the tensor
        (gradient,) = torch.autograd.grad(shared, raw, slope[:, member::groups], retain_graph=True)
        back.append(place.value(gradient, LayerCall()).unflatten(-1, (shared.shape[1], -1)))
    return torch.stack(back, dim=3).flatten(2, 3)


def check_split(model: Lvlm, readings: Sequence[Reading], weights: Sequence[Mapping[str, Tensor]]) -> None:
    """Raise `ModelError` if the gradients of heads do not sum to the gradient at their attention's input.

    This happens if another module reads the input, or if queries or keys combine several heads.
    """
    for i, (reading, parts) in enumerate(zip(readings, weights, strict=True)):
        total = sum(torch.einsum("pthd,hdw->ptw", slope, parts[c]) for c, slope in reading.heads.items())
        _compare(model, f"the attention input of layer {i}", torch.as_tensor(total), reading.normed)


def _compare(model: Lvlm, what: str, total: Tensor, whole: Tensor) -> None:
    error = float((total - whole).abs().max()) / max(float(whole.abs().max()), 1e-30)
    if not error <= 20 * TOLERANCE[model.dtype]:
        msg = f"{model.name}: {what} is not the sum of its heads' parts (relative error {error:.1e}), so edges cannot be scored"
        raise ModelError(msg)
