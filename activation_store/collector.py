"""What one forward has to give: sites in the order in which it reaches them, and how tokens become one vector."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from activation_store.layout import ArrayInfo, Dtype, Schema
from concepts.errors import SiteError
from lvlm.model import Encoding, Lvlm, Place
from lvlm.sites import LAYER_COMPONENTS, Component, Site, Stack, TokenSelection
from lvlm.tokens import TokenMap

_EVERY_LAYER = re.compile(rf"^(?:(vision|decoder)\.)?({'|'.join(LAYER_COMPONENTS)})$")


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
    wanted = [Site(stack, n, component) for (stack, component), layers in families.items() for n in layers]
    shapes = _rehearse(model, encoding, [Read(site, model.locate(site)) for site in wanted])
    arrays = []
    for (stack, component), layers in families.items():
        width = _width(model, {n: shapes[Site(stack, n, component)] for n in layers}, stack, component)
        _check_tokens(encoding.tokens, shapes[Site(stack, layers[0], component)][1], stack, component)
        heads = _heads(model, stack, component, width)
        arrays += [
            ArrayInfo(stack, component, str(selection), len(layers), width, heads, layers)
            for selection in selections[stack]
        ]
    reads = tuple(Read(site, model.locate(site)) for site in shapes)
    return Plan(reads, Schema(tuple(arrays), cast("Dtype", dtype)), selections, skipped)


def reducer(positions: Sequence[tuple[int, ...]], selection: TokenSelection, device: torch.device) -> Reducer:
    """Return what turns a tensor ``[B, T, D]`` into the selected vectors ``[B, D]``, on its own device.

    A single token is copied as it is; a mean is taken in float32 whatever the tensor's dtype. A row whose selection is
    empty becomes NaN.

    Parameters
    ----------
    positions
        For each row the positions selected in it.
    selection
        Whether they are averaged.
    device
        Where the tensors will be.
    """
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


Reducer = Callable[[Tensor], Tensor]
"""Takes ``[B, T, D]``, gives ``[B, D]``."""


def _families(model: Lvlm, sites: Sequence[str]) -> dict[tuple[Stack, Component], tuple[int, ...]]:
    """Return the layers asked for by stack and component."""
    names = [sites] if isinstance(sites, str) else list(sites)
    if not names:
        msg = f"no site to trace: name components of the decoder ({', '.join(LAYER_COMPONENTS)}), 'vision.z', …"
        raise SiteError(msg)
    found: dict[tuple[Stack, Component], set[int]] = {}
    for name in names:
        for site in _expand(model, name):
            model.locate(site)  # raises where the model lacks it
            found.setdefault((site.stack, site.component), set()).add(site.layer)
    return {family: tuple(sorted(layers)) for family, layers in found.items()}


def _expand(model: Lvlm, name: str) -> list[Site]:
    match = _EVERY_LAYER.match(name)
    if match:
        stack = cast("Stack", match[1] or "decoder")
        count = model.n_layers if stack == "decoder" else model.n_vision_layers
        return [Site(stack, n, cast("Component", match[2])) for n in range(count)]
    try:
        return [Site.parse(name)]
    except SiteError as error:
        msg = (
            f"'{name}' is not a site: write a component of the decoder ({', '.join(LAYER_COMPONENTS)}), of a named "
            f"stack ('vision.z'), 'projector.out', or a single layer ('decoder.L3.z'; decoder 0-{model.n_layers - 1}, "
            f"vision 0-{model.n_vision_layers - 1})"
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
                if stack == "decoder":
                    raise  # what the decoder does not have, nothing has
                refused = error
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
        shapes[site] = tuple(x.shape)

    handles = [read.place.watch(lambda x, site=read.site: note(site, x)) for read in reads]
    try:
        model.logits(model.collate([encoding]))
    finally:
        for handle in handles:
            handle.remove()
    missing = [str(read.site) for read in reads if read.site not in shapes]
    if missing:
        msg = f"site '{missing[0]}' is in {model.name}, but its forward does not reach it; leave it out"
        raise SiteError(msg)
    return shapes


def _width(model: Lvlm, shapes: Mapping[int, tuple[int, ...]], stack: Stack, component: Component) -> int:
    name = f"{stack}.{component}"
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


def _check_tokens(example: TokenMap, length: int, stack: Stack, component: Component) -> None:
    """Raise `SiteError` unless a stack's sequence is as long as the token map says."""
    image = example.positions(TokenSelection("image", "mean"), stack)
    expected = example.length if stack == "decoder" else max(image, default=-1) + 1
    if length != expected:
        msg = f"the sequence of '{stack}.{component}' has {length} tokens, the token map says {expected}"
        raise SiteError(msg)


def _heads(model: Lvlm, stack: Stack, component: Component, width: int) -> int | None:
    if stack == "projector" or component not in {"z", "q", "k", "v"}:
        return None
    heads = model.n_heads if stack == "decoder" else model.n_vision_heads
    if component in {"k", "v"}:  # several query heads may share one of these
        heads = width // (model.output_projection(stack, 0).in_features // heads)
    return heads if heads and width % heads == 0 else None
