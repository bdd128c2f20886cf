"""What one forward has to give: sites in the order in which it reaches them, and which tokens of them are kept."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from activation_store.format.schema import ArrayInfo, Dtype, Schema
from groundscope.core.errors import SiteError
from lvlm.access.site_width import site_width
from lvlm.model import Encoding, Lvlm, Place
from lvlm.sites import CROSS_COMPONENTS, LAYER_COMPONENTS, ROLES, SINGLE, Component, Site, Stack, TokenSelection
from lvlm.token_map import TokenMap

_EVERY_LAYER = re.compile(rf"^(?:(vision|decoder)\.)?(cross\.)?({'|'.join(LAYER_COMPONENTS)})$")
CHUNK_BATCHES = 8
"""Examples are encoded, sorted by length and put back in order in chunks of this many batches: what bounds memory."""
CHUNK_BYTES = 256 << 20
"""What a chunk holds of arrays that keep every token, about and at most, unless one batch is more already."""
FIXED_BYTES = 512 << 20
"""What a chunk holds of arrays of one vector an example and layer, at most, unless one batch is more already."""
Family = tuple[Stack, str]
"""Sites that make one array: a stack and a component, ``cross.z`` for cross-attention."""


@dataclass(frozen=True)
class Read:
    """One tensor that a forward passes by."""

    site: Site
    place: Place


@dataclass(frozen=True)
class Plan:
    """What is read in each forward and what is kept of it."""

    reads: tuple[Read, ...]
    """In the order in which the forward reaches them."""
    schema: Schema
    selections: Mapping[Stack, tuple[TokenSelection, ...]]
    """Token selections by stack."""
    skipped: tuple[str, ...]
    """In words, which selection was left out of which stack."""
    roles: tuple[str, ...]
    """Roles that the decoder's tokens have, in the order of `lvlm.sites.ROLES`."""


def make_plan(model: Lvlm, encoding: Encoding, sites: Sequence[str], tokens: Sequence[str], dtype: str) -> Plan:
    """Find what was asked for in the model, with one forward of one example.

    The forward tells what no table has to: the order in which the sites are reached, and how wide they are.

    Parameters
    ----------
    model
        The model under study.
    encoding
        Any encoded example.
    sites, tokens, dtype
        As in `activation_store.trace`.

    Raises
    ------
    SiteError
        Where the model lacks a site, a token selection means nothing in any stack, or a site cannot be kept as one
        vector for each layer.
    StoreError
        For a dtype that cannot be stored.
    """
    families = _families(model, sites)
    stacks: list[Stack] = list(dict.fromkeys(stack for stack, _ in families))
    selections, skipped = _selections(encoding.tokens, tokens, stacks)
    families = {family: layers for family, layers in families.items() if selections[family[0]]}
    wanted = [site_of(family, n) for family, layers in families.items() for n in layers]
    shapes = _rehearse(model, encoding, [Read(site, model.locate(site)) for site in wanted])
    arrays = []
    for family, layers in families.items():
        stack, component = family
        width = _width(model, {n: shapes[site_of(family, n)] for n in layers}, f"{stack}.{component}")
        _check_tokens(encoding.tokens, shapes[site_of(family, layers[0])][1], stack, component)
        heads = _heads(model, stack, component, layers[0], width)
        arrays += [
            ArrayInfo(stack, component, str(s), len(layers), width, heads, layers, ragged=s.reduction == "all")
            for s in selections[stack]
        ]
    reads = tuple(Read(site, model.locate(site)) for site in shapes)
    return Plan(reads, Schema(tuple(arrays), cast("Dtype", dtype)), selections, skipped, _roles(encoding.tokens))


def outline_plan(model: Lvlm, encoding: Encoding, sites: Sequence[str], tokens: Sequence[str], dtype: str) -> Plan:
    """Return the plan of a trace without a forward and without weights: its arrays, and no `reads`.

    Parameters
    ----------
    model
        The model under study, or its outline (`lvlm.loading.outline_lvlm`).
    encoding, sites, tokens, dtype
        As in `make_plan`.

    Raises
    ------
    SiteError
        Where the model lacks a site, or a token selection means nothing in any stack.
    """
    families = _families(model, sites)
    stacks: list[Stack] = list(dict.fromkeys(stack for stack, _ in families))
    selections, skipped = _selections(encoding.tokens, tokens, stacks)
    arrays = []
    for family, layers in families.items():
        stack, component = family
        site = site_of(family, layers[0])
        if site.component == "pattern":
            lattices = encoding.tokens.sequence
            keys = encoding.tokens.length if stack == "decoder" else lattices.get(stack, 0)
            width = keys * (model.n_heads if stack == "decoder" else model.n_vision_heads)
        else:
            width = site_width(model, site)
        heads = _heads(model, stack, component, layers[0], width)
        arrays += [
            ArrayInfo(stack, component, str(s), len(layers), width, heads, layers, ragged=s.reduction == "all")
            for s in selections[stack]
        ]
    return Plan((), Schema(tuple(arrays), cast("Dtype", dtype)), selections, skipped, _roles(encoding.tokens))


def chunk_batches(plan: Plan, example: TokenMap, batch_size: int) -> int:
    """Return of how many batches a chunk is, as long as a run lasts: `CHUNK_BATCHES`, fewer where they hold too much.

    Chunks decide who shares a forward, so the answer depends on nothing but the plan, its example and the batch size.
    """
    ragged = fixed = 0
    for array in plan.schema.arrays:
        if array.ragged:
            tokens = len(example.positions(TokenSelection.parse(array.tokens), cast("Stack", array.stack)))
            ragged += max(1, tokens) * array.n_layers * array.width * 4
        else:
            fixed += array.n_layers * array.width * 4
    within = (CHUNK_BYTES // max(1, ragged * batch_size), FIXED_BYTES // max(1, fixed * batch_size))
    return max(1, min(CHUNK_BATCHES, *within))


def site_of(family: Family, layer: int) -> Site:
    """Return one layer's site of a family of them."""
    stack, component = family
    return Site(stack, layer, cast("Component", component.removeprefix("cross.")), cross=component.startswith("cross."))


def by_example(x: Tensor, examples: int, site: Site) -> Tensor:
    """Return a site's tensor as ``[B, T, D]``, each example's tokens in one row.

    Towers see images or tiles side by side, or all patches in one sequence; a pattern ``[B, H, Q, K]`` becomes a vector
    of all heads' weights for each query.
    """
    if site.component == "pattern" and x.dim() == 4:
        return x.permute(0, 2, 1, 3).flatten(2)
    if x.dim() == 3 and x.shape[0] == examples:
        return x
    if x.dim() < 2 or x[..., 0].numel() % examples:
        msg = f"site '{site}' has shape {list(x.shape)}, which does not divide into {examples} examples"
        raise SiteError(msg)
    return x.reshape(examples, -1, x.shape[-1])


def reducer(positions: Sequence[tuple[int, ...]], selection: TokenSelection, device: torch.device) -> Reducer:
    """Return what turns a tensor ``[B, T, D]`` into the selected vectors ``[B, D]``, on its own device.

    A single token is copied as it is; a mean is taken in float32 whatever the tensor's dtype. A row whose selection is
    empty becomes NaN. Where all tokens are kept they come as ``[S, D]``, those of one row after those of the other.

    Parameters
    ----------
    positions
        For each row the positions selected in it.
    selection
        Whether they are averaged, or all kept.
    device
        Where the tensors will be.
    """
    if selection.reduction == "all":
        return _every(positions, device)
    first = positions[0]
    same = all(p == first for p in positions) and first == tuple(range(first[0], first[-1] + 1) if first else ())
    if same and first and selection.reduction is None:
        # A copy: a view would keep the whole activation alive until the forward ends.
        return lambda x: x[:, first[0]].clone()
    if same and first:
        return lambda x: x[:, first[0] : first[-1] + 1].mean(1, dtype=torch.float32)
    longest = max(1, *(len(p) for p in positions))
    index = torch.tensor([[*p, *[0] * (longest - len(p))] for p in positions], device=device)  # [B, M]
    count = torch.tensor([len(p) for p in positions], device=device)
    inside = torch.arange(longest, device=device) < count[:, None]  # [B, M]
    rows = torch.arange(len(positions), device=device)[:, None]

    def mean(x: Tensor) -> Tensor:
        picked = x[rows.to(x.device), index.to(x.device)].float()  # [B, M, D]
        # Rows shorter than the longest are filled up with position 0, which must not count, not even as 0 * infinity.
        total = picked.masked_fill(~inside.to(x.device)[..., None], 0.0).sum(1)
        return total / count.to(x.device)[:, None]  # 0 / 0 where nothing is selected: NaN

    return mean


def _every(positions: Sequence[tuple[int, ...]], device: torch.device) -> Reducer:
    row = torch.tensor([i for i, some in enumerate(positions) for _ in some], device=device, dtype=torch.long)
    column = torch.tensor([p for some in positions for p in some], device=device, dtype=torch.long)
    # Indexing copies: a view would keep the whole activation alive until the forward ends.
    return lambda x: x[row.to(x.device), column.to(x.device)]


Reducer = Callable[[Tensor], Tensor]
"""Takes ``[B, T, D]``, gives ``[B, D]``, or ``[S, D]`` where all tokens are kept."""


def of_layers(parts: dict[int, Tensor], info: ArrayInfo) -> Tensor:
    """Return what was kept of each layer as one tensor ``[B, L, D]``; of a ragged array float32 ``[S, L, D]`` on the CPU.

    Every token of every layer is much: there each layer leaves its device, and `parts`, on its own.
    """
    if not info.ragged:
        first = parts[info.layers[0]]
        return torch.stack([parts[layer].to(first.device) for layer in info.layers], dim=1)
    out = torch.empty((len(parts[info.layers[0]]), info.n_layers, info.width), dtype=torch.float32)
    for i, layer in enumerate(info.layers):
        out[:, i] = parts.pop(layer)
    return out


def offsets_of(maps: Sequence[TokenMap], info: ArrayInfo) -> np.ndarray:
    """Return where the tokens of each row begin in a ragged array, int64 ``[B+1]``."""
    selection = TokenSelection.parse(info.tokens)
    lengths = [len(m.positions(selection, cast("Stack", info.stack))) for m in maps]
    return np.cumsum([0, *lengths], dtype=np.int64)


def _roles(example: TokenMap) -> tuple[str, ...]:
    return tuple(role for role in ROLES if _has(example, role))


def _has(example: TokenMap, role: str) -> bool:
    selection = TokenSelection(role, None if role in SINGLE else "mean")
    try:
        example.positions(selection)
    except SiteError:
        return False
    return True


def _families(model: Lvlm, sites: Sequence[str]) -> dict[Family, tuple[int, ...]]:
    """Return the layers asked for by stack and component."""
    names = [sites] if isinstance(sites, str) else list(sites)
    if not names:
        msg = f"no site to trace: name components of the decoder ({', '.join(LAYER_COMPONENTS)}), 'vision.z', …"
        raise SiteError(msg)
    found: dict[Family, set[int]] = {}
    for name in names:
        for site in _expand(model, name):
            model.locate(site)  # raises where the model lacks it
            component = f"cross.{site.component}" if site.cross else site.component
            found.setdefault((site.stack, component), set()).add(site.layer)
    return {family: tuple(sorted(layers)) for family, layers in found.items()}


def _expand(model: Lvlm, name: str) -> list[Site]:
    match = _EVERY_LAYER.match(name)
    if match:
        stack, cross = cast("Stack", match[1] or "decoder"), bool(match[2])
        component = cast("Component", match[3])
        layers = range(model.n_layers if stack == "decoder" else model.n_vision_layers)
        if component in CROSS_COMPONENTS:  # a layer may have the one attention, the other, or both
            layers = [n for n in layers if model.attends(stack, n, cross=cross)] or layers
        # A stack or an attention that the model has not at all is named by its first layer's error.
        return [Site(stack, n, component, cross=cross) for n in layers or [0]]
    try:
        return [Site.parse(name)]
    except SiteError as error:
        msg = (
            f"'{name}' is not a site: write a component of the decoder ({', '.join(LAYER_COMPONENTS)}), of a named "
            f"stack ('vision.z'), of cross-attention ('cross.z'), 'projector.out', or a single layer ('decoder.L3.z'; "
            f"decoder 0-{model.n_layers - 1}, vision 0-{model.n_vision_layers - 1})"
        )
        raise SiteError(msg) from error


def _selections(
    example: TokenMap, tokens: Sequence[str], stacks: Sequence[Stack]
) -> tuple[dict[Stack, tuple[TokenSelection, ...]], tuple[str, ...]]:
    """Return the selections that mean something in each stack, and in words those that do not."""
    names = dict.fromkeys([tokens] if isinstance(tokens, str) else tokens)
    if not names:
        msg = "no token selection to trace: name 'last', 'image:mean', 'object:mean'"
        raise SiteError(msg)
    found: dict[Stack, tuple[TokenSelection, ...]] = dict.fromkeys(stacks, ())
    skipped = []
    for selection in map(TokenSelection.parse, names):
        refused: SiteError | None = None
        for stack in stacks:
            try:
                example.positions(selection, stack)
            except SiteError as error:
                if refused is None or stack == "decoder":
                    refused = error  # what the decoder says of it says most
                skipped.append(f"'{selection}' means nothing in the {stack} and is left out there")
            else:
                found[stack] = (*found[stack], selection)
        if refused and not any(selection in kept for kept in found.values()):
            raise refused
    for stack, kept in found.items():
        if not kept:
            msg = (
                f"sites of the {stack} are asked for, but none of {', '.join(map(repr, names))} means anything there; "
                f"add 'image:mean' or 'object:mean'"
            )
            raise SiteError(msg)
    return found, tuple(skipped)


@torch.no_grad()
def _rehearse(model: Lvlm, encoding: Encoding, reads: Sequence[Read]) -> dict[Site, tuple[int, ...]]:
    """Run one forward; return the shapes of the sites in the order in which it reached them."""
    shapes: dict[Site, tuple[int, ...]] = {}

    def note(site: Site, x: Tensor) -> None:
        if site in shapes:
            msg = f"site '{site}' is reached more than once in a forward of {model.name}: it has no one value to keep"
            raise SiteError(msg)
        shapes[site] = tuple(by_example(x, 1, site).shape)

    handles = [read.place.watch(lambda x, site=read.site: note(site, x)) for read in reads]
    try:
        with model.eager() if any(read.site.component == "pattern" for read in reads) else nullcontext():
            model.logits(model.collate([encoding]))
    finally:
        for handle in handles:
            handle.remove()
    missing = [str(read.site) for read in reads if read.site not in shapes]
    if missing:
        msg = f"site '{missing[0]}' is in {model.name}, but its forward does not reach it; leave it out"
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
        msg = f"the layers of '{name}' differ in width ({sorted(widths)}): trace those of one width into one store"
        raise SiteError(msg)
    return widths.pop()


def _check_tokens(example: TokenMap, length: int, stack: Stack, component: str) -> None:
    """Raise `SiteError` unless a stack's sequence is as long as the token map says."""
    expected = example.length if stack == "decoder" else example.sequence.get(stack, length)
    if length != expected:
        msg = f"the sequence of '{stack}.{component}' has {length} tokens, the token map says {expected}"
        raise SiteError(msg)


def _heads(model: Lvlm, stack: Stack, component: str, layer: int, width: int) -> int | None:
    kind = component.removeprefix("cross.")
    if stack == "projector" or kind not in {"z", "q", "k", "v", "pattern"}:
        return None
    heads = model.n_heads if stack == "decoder" else model.n_vision_heads
    if kind in {"k", "v"}:  # several query heads may share one of these
        cross = component.startswith("cross.")
        heads = width // (model.output_projection(stack, layer, cross=cross).in_features // heads)
    return heads if heads and width % heads == 0 else None
