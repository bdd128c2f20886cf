"""The plan of a trace: sites in the order in which a forward pass reaches them, and the tokens to store of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from torch import Tensor

from activation_store.format.schema import ArrayInfo, Dtype, Schema
from activation_store.tracing.reductions import Reduction
from groundscope.core.errors import SiteError
from groundscope.core.text import format_count
from lvlm.model import Encoding, HookPoint, Lvlm
from lvlm.site_width import site_width
from lvlm.sites import LAYER_COMPONENTS, Component, Site, Stack
from lvlm.token_map import TokenMap
from lvlm.token_selection import READABLE, SINGLE, STORED_ROLES, TokenSelection

CHUNK_BATCHES = 8
"""Batches per chunk: examples are encoded, sorted by length and reordered one chunk at a time, which bounds memory."""
CHUNK_BYTES = 256 << 20
"""Approximate limit on a chunk's ragged arrays, in bytes; a chunk has at least one batch."""
FIXED_BYTES = 512 << 20
"""Limit on a chunk's arrays with one vector per example and layer, in bytes; a chunk has at least one batch."""
Reduce = Mapping[str, Reduction | Sequence[Reduction]]
"""Reductions by token selection."""
Family = tuple[Stack, str]
"""Sites of one array: a stack and a component, ``cross.z`` for cross-attention."""


@dataclass(frozen=True)
class Read:
    """One tensor that a forward pass computes."""

    site: Site
    place: HookPoint


@dataclass(frozen=True)
class Plan:
    """The tensors to read in each forward pass, and the values to store of them."""

    reads: tuple[Read, ...]
    """In the order in which the forward pass reaches them; empty in an outline."""
    schema: Schema
    selections: Mapping[Stack, tuple[TokenSelection, ...]]
    """Token selections by stack."""
    skipped: tuple[str, ...]
    """Messages: which selection does not apply to which stack."""
    roles: tuple[str, ...]
    """Roles of the decoder's tokens, in the order of `lvlm.token_selection.STORED_ROLES`."""

    reductions: Mapping[TokenSelection, tuple[Reduction, ...]] = field(default_factory=dict)
    """Reductions by token selection."""

    def columns(self, info: ArrayInfo) -> tuple[int, ...] | None:
        """Return the columns of a site that an array holds: those of its heads; None for all."""
        if not info.heads or not info.n_heads:
            return None
        width = info.width // info.n_heads
        return tuple(head * width + column for head in info.heads for column in range(width))


def make_plan(
    model: Lvlm,
    encoding: Encoding,
    sites: Sequence[str],
    tokens: Sequence[str],
    dtype: str,
    heads: Sequence[int] | None = None,
    reduce: Reduce | None = None,
) -> Plan:
    """Locate the requested sites in the model, with one forward pass of one example.

    The forward pass determines the order in which the sites are reached, and their widths.

    Parameters
    ----------
    model
        The model under study.
    encoding
        Any encoded example.
    sites, tokens, dtype, heads, reduce
        As in `activation_store.trace`.

    Raises
    ------
    SiteError
        If the model does not have a site or head, a token selection applies to no stack, or a site does not give one vector
        per layer.
    StoreError
        If the dtype is unknown.
    """
    families = _families(model, sites)
    stacks: list[Stack] = list(dict.fromkeys(stack for stack, _ in families))
    whole, reduced = parse_tokens(tokens, reduce)
    selections, skipped = _selections(encoding.tokens, [*map(str, whole), *map(str, reduced)], stacks)
    families = {family: layers for family, layers in families.items() if selections[family[0]]}
    requested = [site_of(family, n) for family, layers in families.items() for n in layers]
    shapes = _run_probe_forward(model, encoding, [Read(site, model.locate(site)) for site in requested])
    arrays = []
    for family, layers in families.items():
        stack, component = family
        width = _width(model, {n: shapes[site_of(family, n)] for n in layers}, f"{stack}.{component}")
        _check_tokens(encoding.tokens, shapes[site_of(family, layers[0])][1], stack, component)
        arrays += _arrays(model, stack, component, layers, width, [s for s in selections[stack] if s in whole], heads)
        arrays += _reduced_arrays(family, layers, selections[stack], reduced)
    _check_heads(arrays, heads)
    _check_reductions(arrays, families, reduced)
    reads = tuple(Read(site, model.locate(site)) for site in shapes)
    schema = Schema(tuple(arrays), cast("Dtype", dtype))
    return Plan(reads, schema, selections, skipped, _roles(encoding.tokens), reduced)


def outline_plan(
    model: Lvlm,
    encoding: Encoding,
    sites: Sequence[str],
    tokens: Sequence[str],
    dtype: str,
    heads: Sequence[int] | None = None,
    reduce: Reduce | None = None,
) -> Plan:
    """Return the plan of a trace without a forward pass and without weights: its arrays, and no `reads`.

    Parameters
    ----------
    model
        The model under study, or its outline (`lvlm.loading.outline_lvlm`).
    encoding, sites, tokens, dtype, heads, reduce
        As in `make_plan`.

    Raises
    ------
    SiteError
        If the model does not have a site or head, or a token selection applies to no stack.
    """
    families = _families(model, sites)
    stacks: list[Stack] = list(dict.fromkeys(stack for stack, _ in families))
    whole, reduced = parse_tokens(tokens, reduce)
    selections, skipped = _selections(encoding.tokens, [*map(str, whole), *map(str, reduced)], stacks)
    arrays = []
    for family, layers in families.items():
        stack, component = family
        site = site_of(family, layers[0])
        if site.component == "pattern":
            lengths = encoding.tokens.sequence
            keys = encoding.tokens.length if stack == "decoder" else lengths.get(stack, 0)
            width = keys * (model.n_heads if stack == "decoder" else model.n_vision_heads)
        else:
            width = site_width(model, site)
        arrays += _arrays(model, stack, component, layers, width, [s for s in selections[stack] if s in whole], heads)
        arrays += _reduced_arrays(family, layers, selections[stack], reduced)
    _check_heads(arrays, heads)
    _check_reductions(arrays, families, reduced)
    schema = Schema(tuple(arrays), cast("Dtype", dtype))
    return Plan((), schema, selections, skipped, _roles(encoding.tokens), reduced)


HEADED = ("z", "q", "pattern")
"""Components of the decoder of which some heads can be stored: those with a slice for each query head."""


def _arrays(
    model: Lvlm,
    stack: Stack,
    component: str,
    layers: tuple[int, ...],
    width: int,
    selections: Sequence[TokenSelection],
    heads: Sequence[int] | None,
) -> list[ArrayInfo]:
    """Return the arrays of one family, restricted to the requested heads if it has a slice for each."""
    count = _heads(model, stack, component, layers[0], width)
    chosen: tuple[int, ...] = ()
    if heads is not None and count and stack == "decoder" and component.removeprefix("cross.") in HEADED:
        chosen = tuple(sorted(heads))
        wrong = [head for head in chosen if not 0 <= head < count]
        if wrong or not chosen or len(set(chosen)) < len(chosen):
            problem = f"head {wrong[0]} does not exist" if wrong else "give at least one head, and each once"
            msg = f"heads={list(heads)}: {problem}; {stack}.{component} of {model.name} has heads 0-{count - 1}"
            raise SiteError(msg)
        width, count = width // count * len(chosen), len(chosen)
    return [
        ArrayInfo(stack, component, str(s), len(layers), width, count, layers, chosen, ragged=s.ragged)
        for s in selections
    ]


def parse_tokens(
    tokens: Sequence[str], reduce: Reduce | None
) -> tuple[tuple[TokenSelection, ...], dict[TokenSelection, tuple[Reduction, ...]]]:
    """Return the token selections of which activations are stored, and the reductions of the others; raises `SiteError`."""
    names = [tokens] if isinstance(tokens, str) else list(tokens)
    whole = tuple(TokenSelection.parse(name, allowed=READABLE) for name in dict.fromkeys(names))
    reduced: dict[TokenSelection, tuple[Reduction, ...]] = {}
    for name, value in (reduce or {}).items():
        chosen = tuple(value) if isinstance(value, Sequence) else (value,)
        repeated = [r.name for r in chosen if [other.name for other in chosen].count(r.name) > 1]
        if repeated or not chosen:
            problem = (
                f"repeats '{repeated[0]}'; give each reduction another name=" if repeated else "names no reduction"
            )
            msg = f"reduce={{'{name}': …}} {problem}"
            raise SiteError(msg)
        reduced[TokenSelection.parse(name, allowed=READABLE)] = chosen
    return whole, reduced


def _reduced_arrays(
    family: Family,
    layers: tuple[int, ...],
    selections: Sequence[TokenSelection],
    reduced: Mapping[TokenSelection, tuple[Reduction, ...]],
) -> list[ArrayInfo]:
    """Return the arrays of the reductions at the layers of one family where they apply."""
    arrays = []
    for selection in selections:
        for reduction in reduced.get(selection, ()):
            at = tuple(layer for layer in layers if reduction.applies(site_of(family, layer)))
            values = tuple(reduction.values)
            if at:
                options = {"ragged": selection.ragged, "reduction": reduction.name, "values": values}
                arrays.append(ArrayInfo(*family, str(selection), len(at), len(values), None, at, **options))
    return arrays


def _check_reductions(
    arrays: Sequence[ArrayInfo],
    families: Iterable[Family],
    reduced: Mapping[TokenSelection, tuple[Reduction, ...]],
) -> None:
    """Raise `SiteError` if a reduction applies to no traced site, or nothing would be stored of a site."""
    for stack, component in families:
        if not any((a.stack, a.component) == (stack, component) for a in arrays):
            names = ", ".join(r.name for chosen in reduced.values() for r in chosen)
            msg = (
                f"nothing of '{stack}.{component}' would be stored, because the reductions ({names}) do not apply to it; add a "
                "token selection, or leave the site out"
            )
            raise SiteError(msg)
    for selection, chosen in reduced.items():
        for reduction in chosen:
            if not any((a.reduction, a.tokens) == (reduction.name, str(selection)) for a in arrays):
                msg = (
                    f"reduction '{reduction.name}' of '{selection}' applies to no traced site; add sites at which it applies, "
                    "such as 'resid_post' for the logit lens, or those of the directions"
                )
                raise SiteError(msg)


def _check_heads(arrays: Sequence[ArrayInfo], heads: Sequence[int] | None) -> None:
    """Raise `SiteError` if heads are requested of sites that have none."""
    if heads is not None and not any(a.heads for a in arrays):
        names = ", ".join(dict.fromkeys(f"{a.stack}.{a.component}" for a in arrays))
        msg = (
            f"heads={list(heads)} applies to {', '.join(HEADED)} of the decoder, but the sites are {names}; add 'z', or omit "
            "heads"
        )
        raise SiteError(msg)


def chunk_batches(plan: Plan, example: TokenMap, batch_size: int) -> int:
    """Return the number of batches per chunk, constant over a run: `CHUNK_BATCHES`, or fewer to bound memory.

    Chunks determine which examples share a forward pass, so the result depends only on the plan, its example and the batch
    size.
    """
    ragged = fixed = 0
    for array in plan.schema.arrays:
        if array.ragged:
            tokens = len(example.positions(TokenSelection.parse(array.tokens), cast("Stack", array.stack)))
            ragged += max(1, tokens) * array.n_layers * array.width * 4
        else:
            fixed += array.n_layers * array.width * 4
    limits = (CHUNK_BYTES // max(1, ragged * batch_size), FIXED_BYTES // max(1, fixed * batch_size))
    return max(1, min(CHUNK_BATCHES, *limits))


def site_of(family: Family, layer: int) -> Site:
    """Return the site of one layer of a family."""
    stack, component = family
    return Site(stack, layer, cast("Component", component.removeprefix("cross.")), cross=component.startswith("cross."))


def split_by_example(x: Tensor, examples: int, site: Site) -> Tensor:
    """Reshape a site's tensor to ``[B, T, D]``, with the tokens of one example per row.

    Vision towers process images or tiles as batch rows, or all patches in one sequence; a pattern ``[B, H, Q, K]`` becomes
    one vector of all heads' weights per query.
    """
    if site.component == "pattern" and x.dim() == 4:
        return x.permute(0, 2, 1, 3).flatten(2)
    if x.dim() == 3 and x.shape[0] == examples:
        return x
    if x.dim() < 2 or x[..., 0].numel() % examples:
        msg = f"site '{site}' has shape {list(x.shape)}, which does not divide into {format_count(examples, 'example')}"
        raise SiteError(msg)
    return x.reshape(examples, -1, x.shape[-1])


def make_reducer(positions: Sequence[tuple[int, ...]], selection: TokenSelection, device: torch.device) -> Reducer:
    """Return a function that reduces a tensor ``[B, T, D]`` to the selected vectors ``[B, D]``, on the tensor's device.

    A single token is copied unchanged; a mean is computed in float32 for any dtype. A row with an empty selection becomes
    NaN. For ``:all`` and ``mention:…`` selections the result is ``[S, D]``, the concatenated tokens of all rows.

    Parameters
    ----------
    positions
        The selected positions of each row.
    selection
        Determines the reduction: single token, mean or all tokens.
    device
        Device of the tensors.
    """
    if selection.ragged:
        return _select_tokens(positions, device)
    first = positions[0]
    same = all(p == first for p in positions) and first == tuple(range(first[0], first[-1] + 1) if first else ())
    if same and first and selection.reduction is None:
        # A copy: a view would keep the whole activation in memory until the forward pass ends.
        return lambda x: x[:, first[0]].clone()
    if same and first:
        return lambda x: x[:, first[0] : first[-1] + 1].mean(1, dtype=torch.float32)
    longest = max(1, *(len(p) for p in positions))
    index = torch.tensor([[*p, *[0] * (longest - len(p))] for p in positions], device=device)  # [B, M]
    count = torch.tensor([len(p) for p in positions], device=device)
    inside = torch.arange(longest, device=device) < count[:, None]  # [B, M]
    rows = torch.arange(len(positions), device=device)[:, None]

    def mean(x: Tensor) -> Tensor:
        selected = x[rows.to(x.device), index.to(x.device)].float()  # [B, M, D]
        # Shorter rows are padded with position 0, which must not contribute, not even as 0 * infinity.
        total = selected.masked_fill(~inside.to(x.device)[..., None], 0.0).sum(1)
        return total / count.to(x.device)[:, None]  # an empty selection gives 0 / 0 = NaN

    return mean


def _select_tokens(positions: Sequence[tuple[int, ...]], device: torch.device) -> Reducer:
    row = torch.tensor([i for i, selected in enumerate(positions) for _ in selected], device=device, dtype=torch.long)
    column = torch.tensor([p for selected in positions for p in selected], device=device, dtype=torch.long)
    # Indexing copies: a view would keep the whole activation in memory until the forward pass ends.
    return lambda x: x[row.to(x.device), column.to(x.device)]


Reducer = Callable[[Tensor], Tensor]
"""Maps ``[B, T, D]`` to ``[B, D]``, or to ``[S, D]`` for ``:all`` selections."""


def stack_layers(parts: dict[int, Tensor], info: ArrayInfo) -> Tensor:
    """Stack the selected vectors of each layer into ``[B, L, D]``; for a ragged array float32 ``[S, L, D]`` on the CPU.

    Ragged arrays are large: each layer is moved off its device, and removed from `parts`, one by one.
    """
    if not info.ragged:
        first = parts[info.layers[0]]
        return torch.stack([parts[layer].to(first.device) for layer in info.layers], dim=1)
    out = torch.empty((len(parts[info.layers[0]]), info.n_layers, info.width), dtype=torch.float32)
    for i, layer in enumerate(info.layers):
        out[:, i] = parts.pop(layer)
    return out


def token_offsets(maps: Sequence[TokenMap], info: ArrayInfo) -> np.ndarray:
    """Return the start of each row's tokens in a ragged array, int64 ``[B+1]``."""
    selection = TokenSelection.parse(info.tokens)
    lengths = [len(m.positions(selection, cast("Stack", info.stack))) for m in maps]
    return np.cumsum([0, *lengths], dtype=np.int64)


def _roles(example: TokenMap) -> tuple[str, ...]:
    return tuple(role for role in STORED_ROLES if _has(example, role))


def _has(example: TokenMap, role: str) -> bool:
    selection = TokenSelection(role, None if role in SINGLE else "mean")
    try:
        example.positions(selection)
    except SiteError:
        return False
    return True


def _families(model: Lvlm, sites: Sequence[str]) -> dict[Family, tuple[int, ...]]:
    """Return the requested layers by stack and component."""
    names = [sites] if isinstance(sites, str) else list(sites)
    if not names:
        msg = f"no site to trace; give components of the decoder ({', '.join(LAYER_COMPONENTS)}), 'vision.z', …"
        raise SiteError(msg)
    layers_of: dict[Family, set[int]] = {}
    for name in names:
        for site in model.sites(name):
            component = f"cross.{site.component}" if site.cross else site.component
            layers_of.setdefault((site.stack, component), set()).add(site.layer)
    return {family: tuple(sorted(layers)) for family, layers in layers_of.items()}


def _selections(
    example: TokenMap, tokens: Sequence[str], stacks: Sequence[Stack]
) -> tuple[dict[Stack, tuple[TokenSelection, ...]], tuple[str, ...]]:
    """Return the selections that apply to each stack, and messages about those that do not."""
    names = dict.fromkeys([tokens] if isinstance(tokens, str) else tokens)
    if not names:
        msg = "no token selection to trace; give for example 'last', 'image:mean' or 'object:mean'"
        raise SiteError(msg)
    by_stack: dict[Stack, tuple[TokenSelection, ...]] = dict.fromkeys(stacks, ())
    skipped = []
    for selection in [TokenSelection.parse(name, allowed=READABLE) for name in names]:
        failure: SiteError | None = None
        for stack in stacks:
            try:
                example.positions(selection, stack)
            except SiteError as error:
                if failure is None or stack == "decoder":
                    failure = error  # the decoder's message is the most informative
                skipped.append(f"'{selection}' does not apply to the {stack} and is skipped there")
            else:
                by_stack[stack] = (*by_stack[stack], selection)
        if failure and not any(selection in selections for selections in by_stack.values()):
            raise failure
    for stack, selections in by_stack.items():
        if not selections:
            msg = (
                f"none of the token selections {', '.join(map(repr, names))} applies to the sites of the {stack}; "
                f"add 'image:mean' or 'object:mean'"
            )
            raise SiteError(msg)
    return by_stack, tuple(skipped)


@torch.no_grad()
def _run_probe_forward(model: Lvlm, encoding: Encoding, reads: Sequence[Read]) -> dict[Site, tuple[int, ...]]:
    """Run one forward pass; return the shapes of the sites in the order in which it reached them."""
    shapes: dict[Site, tuple[int, ...]] = {}

    def record(site: Site, x: Tensor) -> None:
        if site in shapes:
            msg = f"site '{site}' is computed more than once in a forward pass of {model.name}; leave it out"
            raise SiteError(msg)
        shapes[site] = tuple(split_by_example(x, 1, site).shape)

    handles = [read.place.watch(lambda x, site=read.site: record(site, x)) for read in reads]
    try:
        with model.eager() if any(read.site.component == "pattern" for read in reads) else nullcontext():
            model.logits(model.collate([encoding]))
    finally:
        for handle in handles:
            handle.remove()
    missing = [str(read.site) for read in reads if read.site not in shapes]
    if missing:
        msg = f"site '{missing[0]}' exists in {model.name}, but its forward pass does not reach it; leave it out"
        raise SiteError(msg)
    return shapes


def _width(model: Lvlm, shapes: Mapping[int, tuple[int, ...]], name: str) -> int:
    for layer, shape in shapes.items():
        if len(shape) != 3 or shape[0] != 1:
            msg = (
                f"site '{name}' of {model.name} has shape {list(shape)} in layer {layer}, not [examples, tokens, width]"
            )
            raise SiteError(msg)
    widths = {shape[2] for shape in shapes.values()}
    if len(widths) > 1:
        msg = f"the layers of '{name}' differ in width ({sorted(widths)}); trace layers of equal width into one store"
        raise SiteError(msg)
    return widths.pop()


def _check_tokens(example: TokenMap, length: int, stack: Stack, component: str) -> None:
    """Raise `SiteError` unless the length of a stack's sequence matches the token map."""
    expected = example.length if stack == "decoder" else example.sequence.get(stack, length)
    if length != expected:
        msg = f"the sequence of '{stack}.{component}' has {length} tokens, but the token map has {expected}"
        raise SiteError(msg)


def _heads(model: Lvlm, stack: Stack, component: str, layer: int, width: int) -> int | None:
    kind = component.removeprefix("cross.")
    if stack == "projector" or kind not in {"z", "q", "k", "v", "pattern"}:
        return None
    heads = model.n_heads if stack == "decoder" else model.n_vision_heads
    if kind in {"k", "v"}:  # several query heads can share a key or value head
        cross = component.startswith("cross.")
        heads = width // (model.output_projection(stack, layer, cross=cross).in_features // heads)
    return heads if heads and width % heads == 0 else None
