"""What every node of a decoder writes to the residual stream, and how the answer changes with what every node reads.

A head reads the stream three times, for its queries, its keys and its values, and each is a place of its own here, in
front of the layer's norm: as with TransformerLens' split inputs (``use_split_qkv_input``, keys and values ungrouped),
on which the released code of EAP-IG rests (Hanna et al. 2024, arXiv 2403.17806). No such places are made: the gradient
that arrives at a head's queries is taken back through its part of the projection, and through the norm, both linear
at the point where gradients are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from circuits.attribution.attention_nodes import Opened, opened
from circuits.attribution.gradients import Metric
from circuits.interventions.hooks import edit
from groundscope.core.errors import ModelError
from lvlm.access.places import Call, Place, first_name
from lvlm.family.specification import TOLERANCE, find, resolve
from lvlm.model import Lvlm
from lvlm.sites import Site


@dataclass(frozen=True, eq=False)
class Form:
    """How one layer reads the stream."""

    norm: nn.Module | None
    """What stands between the stream and the attention; None for nothing."""
    parallel: bool
    """Whether the MLP reads what the attention reads, and not what the attention wrote."""
    shared: bool
    """Whether it does so through the same norm."""


@dataclass(frozen=True, eq=False)
class Written:
    """What nodes wrote in one run, by layer; P examples of T tokens."""

    embeddings: Tensor
    """``[P, T, D]``."""
    added: Mapping[int, Tensor]
    """What the model itself adds to the stream after a layer, ``[P, T, D]``; in most families nothing."""
    heads: tuple[Tensor, ...]
    """``[P, T, H * d]``, the input of the output projection."""
    attention: tuple[Tensor, ...]
    """What the projection made of it, before any norm, ``[P, T, D]``."""
    mlps: tuple[Tensor, ...]
    """``[P, T, D]``."""
    metric: Tensor
    """``[P]``."""


@dataclass(frozen=True, eq=False)
class Reading:
    """How the metric changes with what one layer reads, at the point where gradients were taken."""

    entering: Tensor
    """The stream in front of the attention's norm, ``[P, T, D]``."""
    heads: Mapping[str, Tensor]
    """By each head's queries, and by its own copies of keys and values, before positions are applied, ``[P, T, H, d]``
    by letter."""
    normed: Tensor
    """By what the attention is given, all heads and letters together, ``[P, T, D]``."""
    mlp: Tensor
    """By the stream in front of the MLP's norm, ``[P, T, D]``; where it shares the attention's, behind that."""


@dataclass(frozen=True, eq=False)
class Run:
    """One run, and where gradients were asked for also what they are."""

    written: Written
    readings: tuple[Reading, ...]
    final: Tensor | None
    """By the stream after the last layer, ``[P, T, D]``."""


def run(
    model: Lvlm,
    inputs: Mapping[str, Tensor],
    metric: Metric,
    forms: tuple[Form, ...] = (),
    *,
    embeddings: Tensor | None = None,
    added: Mapping[int, Tensor] | None = None,
) -> Run:
    """Run examples once and see what nodes write; with `forms`, also differentiate the metric by what nodes read.

    Parameters
    ----------
    model
        One that `circuits.attribution.attention_nodes.check_opened` does not refuse.
    inputs
        Of P examples.
    metric
        What is differentiated.
    forms
        How each layer reads, from `forms_of`; without them nothing is differentiated.
    embeddings
        Put in the place of what the first layer is given.
    added
        Added to the stream after some layers.

    Raises
    ------
    ModelError
        Where gradients do not reach a layer's queries, keys and values, or they do not make up what its attention reads.
    """
    seen = _Seen(model, bool(forms))
    with torch.set_grad_enabled(bool(forms)), ExitStack() as hooks:
        attention = hooks.enter_context(opened(model))
        seen.watch(hooks, forms, embeddings, added or {})
        score = metric(model.forward(inputs)[:, -1])
        if len(attention.seen) != model.n_layers:
            missing = next(i for i in range(model.n_layers) if i not in attention.seen)
            msg = (
                f"{model.name}: layer {missing} does not attend through transformers' table of attention functions, so "
                "that its queries, keys and values cannot be told apart"
            )
            raise ModelError(msg)
        readings, final = _readings(model, seen, forms, attention.seen, score) if forms else ((), None)
    return Run(seen.written(score.detach()), readings, final)


@torch.no_grad()
def forms_of(model: Lvlm, forward: Callable[[], Run]) -> tuple[tuple[Form, ...], Run]:
    """Find out how each layer reads the stream while a forward runs, and return what that forward returns.

    Raises
    ------
    ModelError
        Where something other than one norm stands between the stream and a layer's attention, or what a layer's
        attention adds is not what its parts make of it.
    """
    spec = model.spec.decoder
    passed: list[list[tuple[nn.Module, Tensor, Tensor]]] = [[] for _ in range(model.n_layers)]
    given: dict[tuple[str, int], Tensor] = {}
    with ExitStack() as hooks:
        for i, layer in enumerate(model.layers("decoder")):
            attention = resolve(layer, spec.attention, model.spec)
            inner = {id(m) for part in (attention, find(layer, spec.mlp)) if part for m in part.modules()}

            def through(module: nn.Module, args: Any, kwargs: Any, out: Any, i: int = i) -> None:
                x = args[0] if args else kwargs.get(first_name(kwargs)) if kwargs else None
                if isinstance(x, Tensor) and isinstance(out, Tensor):
                    passed[i].append((module, x, out))

            def attends(_m: nn.Module, args: Any, kwargs: Any, out: Any, i: int = i) -> None:
                given["attention", i] = args[0] if args else kwargs[first_name(kwargs)]
                given["raw", i] = out[0] if isinstance(out, tuple) else out

            for module in layer.modules():
                if module is not layer and id(module) not in inner:
                    hooks.callback(module.register_forward_hook(through, with_kwargs=True).remove)
            hooks.callback(attention.register_forward_hook(attends, with_kwargs=True).remove)

            def entered(_m: nn.Module, args: Any, kwargs: Any, _out: Any, i: int = i) -> None:
                given["resid_pre", i] = args[0] if args else kwargs[first_name(kwargs)]

            hooks.callback(layer.register_forward_hook(entered, with_kwargs=True).remove)
            place = model.place("decoder", i, "attn_out")
            hooks.callback(place.watch(lambda x, i=i: given.update({("attn_out", i): x})).remove)
            middle = resolve(layer, spec.mid_norm, model.spec)

            def between(_module: nn.Module, args: Any, i: int = i) -> None:
                given["middle", i] = args[0]

            hooks.callback(middle.register_forward_pre_hook(between).remove)
        result = forward()
    found = []
    for i, layer in enumerate(model.layers("decoder")):
        x, read = given["resid_pre", i], given["attention", i]
        norm = next((m for m, before, after in passed[i] if after is read and before is x), None)
        if norm is None and read is not x:
            msg = f"{model.name}: layer {i} does not read the residual stream through one norm; edges cannot be scored"
            raise ModelError(msg)
        _compare(model, f"what layer {i}'s attention adds", written_by(model, i, given["raw", i]), given["attn_out", i])
        middle = given["middle", i].reshape(x.shape)
        shared = norm is not None and resolve(layer, spec.mid_norm, model.spec) is norm
        found.append(Form(norm, torch.equal(middle, x), shared))
    return tuple(found), result


def written_by(model: Lvlm, layer: int, attention: Tensor) -> Tensor:
    """Return what a layer adds to the stream of what its output projection gives: its post-norm, gate or scale."""
    place = model.place("decoder", layer, "attn_out")
    own = place.module is resolve(model.layers("decoder")[layer], model.spec.decoder.attention, model.spec)
    return place.value(attention if own else place.module(attention), Call())


def weights_of(model: Lvlm, layer: int) -> dict[str, Tensor]:
    """Return the part of each query head in the projections of queries, keys and values, ``[H, d, D]`` each."""
    return {c: _by_head(model, model.place("decoder", layer, c)) for c in "qkv"}


def _by_head(model: Lvlm, place: Place) -> Tensor:
    module = place.module
    if not isinstance(module, nn.Linear):
        msg = f"{model.name}: {type(module).__name__} is no linear layer, so that a head has no part of it"
        raise ModelError(msg)
    by_row = place.value(module.weight.detach().T[None], Call())[0].T  # [KV * d, D]
    width = model.head_dim
    shared = by_row.unflatten(0, (-1, width))
    return shared.repeat_interleave(model.n_heads // len(shared), dim=0)


class _Seen:
    """What hooks keep of one forward."""

    def __init__(self, model: Lvlm, differentiate: bool) -> None:
        self.model, self.differentiate = model, differentiate
        self.at: dict[tuple[str, int], Tensor] = {}

    def watch(
        self, hooks: ExitStack, forms: tuple[Form, ...], embeddings: Tensor | None, added: Mapping[int, Tensor]
    ) -> None:
        """Put hooks where nodes write, and where they read."""
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
        """Return what nodes wrote."""
        layers = range(self.model.n_layers)
        extra = {i: self.at["pre", i + 1] - self.at["post", i] for i in layers if ("post", i) in self.at}
        found = {name: tuple(self.at[name, i].detach() for i in layers) for name in ("z", "attention", "mlp_out")}
        added = {i: x.detach() for i, x in extra.items() if bool((x != 0).any())}
        return Written(
            self.at["embeddings", 0].detach(), added, found["z"], found["attention"], found["mlp_out"], metric
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
        """Return a hook that gives a module its input as a node of its own, so that what else reads it does not count."""

        def before(_module: nn.Module, args: Any, kwargs: Any) -> Any:
            key = None if args else first_name(kwargs)
            x = args[0] if key is None else kwargs[key]
            self.at[name, layer] = x.view_as(x)
            new = self.at[name, layer]
            return ((new, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: new})

        return before


def _readings(
    model: Lvlm, seen: _Seen, forms: tuple[Form, ...], attention: Mapping[int, Opened], score: Tensor
) -> tuple[tuple[Reading, ...], Tensor]:
    layers, last = range(model.n_layers), model.n_layers - 1
    nodes: dict[tuple[str, int], Tensor] = {("final", last): seen.at["final", last]}
    for i in layers:
        nodes |= {(name, i): seen.at[name, i] for name in ("normed", "mlp", *"qkv")}
        if attention[i].groups > 1:
            nodes |= {("key", i): attention[i].key, ("value", i): attention[i].value}
    try:
        grouped = any(one.groups > 1 for one in attention.values())
        found = torch.autograd.grad(score.sum(), list(nodes.values()), retain_graph=grouped, materialize_grads=True)
    except RuntimeError as error:
        msg = f"{model.name}: no gradient reaches its decoder: {error}"
        raise ModelError(msg) from error
    slope = dict(zip(nodes, found, strict=True))
    readings = []
    for i in layers:
        heads = {
            c: model.place("decoder", i, c).value(slope[c, i], Call()).unflatten(-1, (model.n_heads, -1))
            for c in ("q" if attention[i].groups > 1 else "qkv")
        }
        if attention[i].groups > 1:
            for c, name, shared in (("k", "key", attention[i].shared_key), ("v", "value", attention[i].shared_value)):
                heads[c] = _own(model, model.place("decoder", i, c), seen.at[c, i], shared, slope[name, i])
        entering = seen.at["normed" if forms[i].norm is None else "entering", i].detach()
        readings.append(Reading(entering, heads, slope["normed", i], slope["mlp", i].reshape(entering.shape)))
    return tuple(readings), slope["final", last]


def _own(model: Lvlm, place: Place, raw: Tensor, shared: Tensor, slope: Tensor) -> Tensor:
    """Take gradients at each head's copy ``[P, H, T, d]`` back to where keys or values come out, ``[P, T, H, d]``."""
    groups = model.n_heads // shared.shape[1]
    back = []
    for member in range(groups):  # one head of each group at a time: what they share tells them apart no more
        (found,) = torch.autograd.grad(shared, raw, slope[:, member::groups], retain_graph=True)
        back.append(place.value(found, Call()).unflatten(-1, (shared.shape[1], -1)))
    return torch.stack(back, dim=3).flatten(2, 3)


def check_split(model: Lvlm, readings: Sequence[Reading], weights: Sequence[Mapping[str, Tensor]]) -> None:
    """Raise `ModelError` where what heads read does not make up what their attention reads.

    So it is where something other than these projections reads, or where queries or keys are made of several heads'.
    """
    for i, (reading, parts) in enumerate(zip(readings, weights, strict=True)):
        made = sum(torch.einsum("pthd,hdw->ptw", slope, parts[c]) for c, slope in reading.heads.items())
        _compare(model, f"what layer {i}'s attention reads", torch.as_tensor(made), reading.normed)


def _compare(model: Lvlm, what: str, made: Tensor, whole: Tensor) -> None:
    error = float((made - whole).abs().max()) / max(float(whole.abs().max()), 1e-30)
    if not error <= 20 * TOLERANCE[model.dtype]:
        msg = f"{model.name}: {what} is not the sum of its heads' parts (by {error:.1e} of the largest): edges cannot be scored"
        raise ModelError(msg)
