"""Interventions: change the tensor at a site, at selected positions, while a context is open.

Patching, ablation and steering are all an `Intervention` with a different change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from circuits.interventions.decoder_tokens import DecoderTokens
from circuits.interventions.hooks import edit
from circuits.interventions.options import RULES
from circuits.interventions.transforms import Add, Amplify, Change, Project, Replace, Zero
from groundscope.core.errors import ModelError, PatchError, SiteError
from groundscope.core.text import format_count
from lvlm.active_interventions import ActiveIntervention, mark_intervention
from lvlm.image_tokens import check_image_in_sequence
from lvlm.intervention_digest import digest_of
from lvlm.model import Lvlm
from lvlm.site_width import site_width
from lvlm.sites import Site
from lvlm.token_selection import TokenSelection

__all__ = [
    "RULES",
    "Add",
    "Amplify",
    "Change",
    "Gate",
    "Intervention",
    "Project",
    "Replace",
    "Zero",
    "intervened",
    "width",
]

_AROUND_IMAGE = ("image:all", "suffix+generated", "suffix:all")
_OUTSIDE_DECODER = ("all", "last", "last+generated")
_REACHED = ("resid_pre", "q", "k", "v", "pattern", "z", "attn_out", "resid_mid", "mlp_out", "resid_post")


@dataclass(frozen=True, eq=False)
class Gate:
    """A linear probe that decides per token whether a change applies: where ``weights . x + bias > 0``.

    Examples
    --------
    >>> import torch
    >>> from circuits import Gate
    >>> from lvlm import Site
    >>> Gate(Site.parse("decoder.L2.resid_post"), torch.tensor([1.0, 0.0]), bias=-0.5).bias
    -0.5
    """

    site: Site
    """Decoder site of the probe; a forward pass must reach it no later than the changed site."""
    weights: Tensor
    """``[d]``."""
    bias: float
    head: int | None = None
    """Head of ``z`` that the probe reads; None for the full width."""


@dataclass(frozen=True, eq=False)
class Intervention:
    """A change of the tensor at one site.

    Parameters
    ----------
    site
        Site to change; ``decoder.L3.z``, ``decoder.L3.resid_post``, …
    change
        Change of the selected part: `Replace`, `Add`, `Zero`, `Amplify`, `Project`, or any function of ``[..., d]``.
    positions
        Tokens to change. A rule selects the same tokens whether an answer is generated with a cache, without one, or
        after a chunked prefill:

        ``all``
            every token;
        ``last``
            the last token of the prompt;
        ``last+generated``
            the last token of the prompt, and every generated token;
        ``image:all``
            the image tokens, as in `lvlm.token_map.TokenMap.image`;
        ``suffix:all``
            every prompt token after the image; every prompt token if the sequence has no image;
        ``suffix+generated``
            as ``suffix:all``, and every generated token;
        ``generated:all``
            every generated token;
        a tuple of integers, or a LongTensor ``[rows, n]`` with the positions of each row
            counted from 0 in the prompt.
    head
        One head of ``z``, counted from 0; None for the full width.
    rows
        Rows of the batch; None for all.
    gate
        Apply the change only at tokens where this probe is positive.
    decay
        Factor, in (0, 1], that multiplies the strength of the change with every generated token.

    Examples
    --------
    >>> from circuits import Intervention, Zero
    >>> from lvlm import Site
    >>> Intervention(Site.parse("decoder.L3.z"), Zero(), positions="image:all", head=2).positions
    'image:all'
    """

    site: Site
    change: Change
    positions: str | tuple[int, ...] | Tensor = "last+generated"
    head: int | None = None
    rows: tuple[int, ...] | None = None
    gate: Gate | None = None
    decay: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.positions, str):
            TokenSelection.parse(self.positions, allowed=RULES)
        if not isinstance(self.positions, str) and min(_flat_positions(self.positions), default=0) < 0:
            msg = f"positions {self.positions} at '{self.site}' must not be negative; for the last token use 'last'"
            raise PatchError(msg)
        if not _in_decoder(self.site) and isinstance(self.positions, str) and self.positions not in _OUTSIDE_DECODER:
            msg = (
                f"positions '{self.positions}' at '{self.site}' are for the decoder only; use 'all', 'last' or numbers"
            )
            raise SiteError(msg)
        if not 0 < self.decay <= 1 or (self.decay < 1 and not hasattr(self.change, "scaled")):
            msg = (
                f"decay={self.decay} of {type(self.change).__name__}: it must be above 0 and at most 1; a change without a "
                "strength cannot decay, so its decay is 1"
            )
            raise PatchError(msg)
        if self.gate is not None and (
            self.gate.site.stack != "decoder" or _order_of(self.gate.site) > _order_of(self.site)
        ):
            msg = (
                f"a gate at '{self.gate.site}' cannot control a change at '{self.site}': choose a decoder site that a "
                f"forward pass reaches no later"
            )
            raise SiteError(msg)


@contextmanager
def intervened(
    model: Lvlm, interventions: Sequence[Intervention], *, kind: str = "intervention", name: str = ""
) -> Iterator[None]:
    """Change activations of a model while the context is open; changes at one site apply in order.

    Afterwards, also after an error, all hooks are removed and the model is bitwise unchanged. Without interventions no
    hook is registered. Contexts nest: an inner context receives the values that an outer one changed. While the context is
    open, `Lvlm.interventions` lists the change, so that the provenance of traces and answers names it.

    Parameters
    ----------
    model
        The model.
    interventions
        Changes, in order.
    kind, name
        Kind and name of the change in `Lvlm.interventions`; the name defaults to its sites.

    Raises
    ------
    SiteError
        If the model has no such site or head; raised before any hook is registered.
    PatchError
        If a change does not fit the width of its site or is not finite; during a forward pass, if its batch lacks the
        positions or rows.
    ModelError
        For positions ``image:all`` if the decoder's sequence has no image; during a forward pass, if the roles of its tokens
        are unknown (`circuits.interventions.decoder_tokens`).

    Examples
    --------
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> inputs = model.encode(gs.scenes.dataset(n_images=10, seed=0)[0]).inputs
    >>> plain = model.logits(inputs)
    >>> with gs.intervened(model, [gs.Intervention(gs.Site.parse("decoder.L3.z"), gs.Zero(), "last")]):
    ...     ablated = model.logits(inputs)
    >>> bool((plain == ablated).all()), bool((plain == model.logits(inputs)).all())
    (False, True)
    """
    by_site: dict[Site, list[tuple[Intervention, slice]]] = {}
    for item in (placed(model, item) for item in interventions):
        by_site.setdefault(item.site, []).append((item, columns_of(model, item)))
    every = [item for items in by_site.values() for item, _ in items]
    gates = {item.gate: columns_of(model, _gate_intervention(item.gate)) for item in every if item.gate is not None}
    places = {site: model.locate(site) for site in (*by_site, *(gate.site for gate in gates))}
    tokens, gate_masks = DecoderTokens(model), {}
    with ExitStack() as hooks:
        if interventions:
            name = name or ", ".join(dict.fromkeys(_place_name(item) for item in interventions))
            late = all(_is_late(item) for item in every)
            applied = ActiveIntervention(kind, name, lambda: digest_of(list(interventions)), late)
            hooks.callback(model.register(applied).remove)
        if any(_needs_tokens(item) for item in every):
            hooks.enter_context(tokens.watched())
        for gate, columns in gates.items():  # before the changes: a probe reads the unchanged value

            def evaluate(x: Tensor, gate: Gate = gate, columns: slice = columns) -> None:
                gate_masks[gate] = x[..., columns] @ gate.weights.to(x) + gate.bias > 0  # [rows, positions]

            hooks.callback(places[gate.site].watch(evaluate).remove)
        for site, items in by_site.items():
            merged = _merged(model, items, width(model, site))

            @mark_intervention
            def change(x: Tensor, site: Site = site, items: list[tuple[Intervention, slice]] = merged) -> Tensor:
                if x.dim() != 3:
                    msg = f"site '{site}' has shape {list(x.shape)}, but interventions need [rows, positions, width]"
                    raise PatchError(msg)
                if len(items) == 1 and _is_everything(*items[0], x, tokens):
                    return _decayed(items[0][0], x, None, tokens)(x)
                x = x.clone()
                for item, columns in items:
                    where = _index_of(item, columns, x, tokens)
                    if where is None:
                        continue
                    new = _decayed(item, x, where, tokens)(x[where])
                    if item.gate is not None:
                        new = torch.where(gate_masks[item.gate][where[:-1]][..., None], new, x[where])
                    x[where] = new
                return x

            hooks.callback(edit(model, site, change).remove)
        yield


def _place_name(item: Intervention) -> str:
    return str(item.site) if item.head is None else f"{item.site} of head {item.head}"


def placed(model: Lvlm, item: Intervention) -> Intervention:
    """Return an intervention at the model's actual site: in a layer with cross-attention only, heads belong to that.

    Raises
    ------
    ModelError
        For positions ``image:all`` if the decoder's sequence has no image tokens.
    """
    if item.positions == "image:all":
        check_image_in_sequence(model, f"positions 'image:all' at '{item.site}'")
    gate = item.gate
    if gate is not None and gate.head is not None:
        gate = replace(gate, site=head_site(model, gate.site))
    site = item.site if item.head is None else head_site(model, item.site)
    return item if site == item.site and gate is item.gate else replace(item, site=site, gate=gate)


def head_site(model: Lvlm, site: Site) -> Site:
    """Return the site of a layer's heads ``z``: its cross-attention if it has no other attention."""
    if (site.stack, site.component) != ("decoder", "z") or not 0 <= site.layer < model.n_layers:
        return site
    return model.head_site(site.layer) if not site.cross else site


def _in_decoder(site: Site) -> bool:
    """Whether a site has a vector for each decoder token; keys and values of cross-attention do not."""
    return site.stack == "decoder" and not (site.cross and site.component in ("k", "v"))


def _needs_tokens(item: Intervention) -> bool:
    """Whether an intervention needs to know which tokens a forward pass of the decoder contains."""
    return _in_decoder(item.site) and (item.decay < 1 or not isinstance(item.positions, str) or item.positions != "all")


def _is_late(item: Intervention) -> bool:
    """Whether a change acts on the last token of prompts and on generated tokens only."""
    late = isinstance(item.positions, str) and item.positions in ("last", "last+generated", "generated:all")
    return late and _in_decoder(item.site) and not item.site.cross and item.rows is None


def _order_of(site: Site) -> tuple[int, int]:
    """Return the order in which a forward pass reaches decoder sites."""
    return (site.layer, _REACHED.index(site.component)) if site.component in _REACHED else (-1, 0)


def _gate_intervention(gate: Gate) -> Intervention:
    """Return a gate as an intervention, so that the same checks apply."""
    return Intervention(gate.site, Replace(gate.weights), "all", gate.head)


def _merged(model: Lvlm, items: list[tuple[Intervention, slice]], full: int) -> list[tuple[Intervention, slice]]:
    """Merge consecutive additions at the same tokens into one, instead of one per head."""
    merged: list[tuple[Intervention, slice]] = []
    for item, columns in items:
        if isinstance(item.change, Add) and item.change.norm == "free" and item.change.value.dim() == 1:
            value = torch.zeros(full)
            value[columns] = item.change.value.detach().float().cpu()
            last = merged[-1][0] if merged else None
            if (
                last is not None
                and isinstance(last.change, Add)
                and last.head is None
                and last.change.norm == "free"
                and last.change.value.dim() == 1
                and isinstance(item.positions, str)
                and (last.positions, last.rows, last.gate, last.decay)
                == (item.positions, item.rows, item.gate, item.decay)
            ):
                value = value + last.change.value.float().cpu()
                merged.pop()
            if isinstance(item.positions, str):
                ready = value.to(model.device, model.dtype)
                merged.append((replace(item, change=Add(ready), head=None), slice(0, full)))
                continue
        merged.append((item, columns))
    return merged


def _decayed(item: Intervention, x: Tensor, where: tuple[Any, ...] | None, tokens: DecoderTokens) -> Change:
    """Return the change of ``x[where]`` (None: all of x), with decay per generated token."""
    change: Any = item.change
    if item.decay == 1 or not _in_decoder(item.site):
        return change
    steps = tokens.steps(x.shape[1])
    if len(set(steps)) == 1:
        return change if not steps[0] else change.scaled(item.decay ** steps[0])
    factor = (item.decay ** torch.tensor(steps, device=x.device, dtype=torch.float32))[None, :, None]
    factor = factor.expand(x.shape[0], -1, 1)  # one factor per token
    return change.scaled(factor if where is None else factor[(*where[:-1], slice(None))])


def _is_everything(item: Intervention, columns: slice, x: Tensor, tokens: DecoderTokens) -> bool:
    """Whether an intervention changes a full tensor, so that no copy is needed."""
    if item.rows is not None or item.gate is not None or columns != slice(0, x.shape[-1]):
        return False
    if not isinstance(item.positions, str) or item.positions in (*_AROUND_IMAGE, "last"):
        return False
    return item.positions == "all" or (_in_decoder(item.site) and tokens.start(item.positions, x.shape[1]) == 0)


def width(model: Lvlm, site: Site) -> int:
    """Return the width of a site's tensor; raise `SiteError` if the model has no such site."""
    if site.component == "pattern":
        msg = f"site '{site}' cannot be changed; change 'z' or 'v' of the same layer"
        raise SiteError(msg)
    return site_width(model, site)


def columns_of(model: Lvlm, item: Intervention) -> slice:
    """Return the columns that an intervention changes; check that they exist and that its change fits."""
    full = width(model, item.site)
    columns = slice(0, full)
    if item.head is not None:
        heads = model.n_heads if item.site.stack == "decoder" else model.n_vision_heads
        if item.site.component != "z" or not 0 <= item.head < heads:
            msg = f"head {item.head} at site '{item.site}': a head needs component 'z', and {model.name} has heads 0-{heads - 1}"
            raise SiteError(msg)
        columns = slice(item.head * (full // heads), (item.head + 1) * (full // heads))
    for name in ("value", "mean", "reads", "writes"):
        value = getattr(item.change, name, None)
        if not isinstance(value, Tensor):
            continue
        if value.dim() and value.shape[-1] not in (1, columns.stop - columns.start):
            msg = f"{name} {list(value.shape)} does not fit '{item.site}': its last axis must be {columns.stop - columns.start}"
            raise PatchError(msg)
        if not bool(torch.isfinite(value).all()):
            msg = f"{name} for '{item.site}' has NaN or infinite entries"
            raise PatchError(msg)
    return columns


def _index_of(item: Intervention, columns: slice, x: Tensor, tokens: DecoderTokens) -> tuple[Any, ...] | None:
    """Return the index that an intervention changes in ``[rows, positions, width]``; None for no change."""
    rows, positions, count = item.rows, item.positions, x.shape[1]
    if rows is not None and max(rows, default=0) >= x.shape[0]:
        msg = f"row {max(rows)} at '{item.site}' is out of range: the batch has rows 0-{x.shape[0] - 1}"
        raise PatchError(msg)
    if isinstance(positions, str) and positions in _AROUND_IMAGE:
        mask = tokens.mask(positions, x, item.site)
        if rows is not None:
            only = torch.zeros_like(mask)
            only[list(rows)] = True
            mask = mask & only
        return mask, columns
    if isinstance(positions, str):
        members = slice(None) if rows is None else list(rows)
        if not _in_decoder(item.site):
            return members, slice(0 if positions == "all" else count - 1, None), columns
        if positions == "last":
            last = tokens.last(count)
            return None if last is None else (members, slice(last, last + 1), columns)
        start = tokens.start(positions, count)
        return None if start >= count else (members, slice(start, None), columns)
    at = torch.as_tensor(positions, device=x.device)
    past, prompt = (tokens.past(), tokens.prompt(count)) if _in_decoder(item.site) else (0, count)
    if past >= prompt:
        return None  # generated tokens only
    if at.numel() and int(at.max()) >= prompt:
        msg = f"position {int(at.max())} at '{item.site}' is out of range: the sequence has positions 0-{prompt - 1}"
        raise PatchError(msg)
    here = (at >= past) & (at < past + count)
    if not bool(here.any()):
        return None
    if not bool(here.all()):
        msg = (
            f"positions {positions} at '{item.site}': the prompt is read in chunks, and this chunk has tokens "
            f"{past}-{past + count - 1} only; generate without prefill_chunk_size"
        )
        raise ModelError(msg)
    at = at - past
    n_rows = x.shape[0] if rows is None else len(rows)
    index = torch.arange(n_rows, device=x.device) if rows is None else torch.tensor(rows, device=x.device)
    if at.dim() == 2 and at.shape[0] != n_rows:
        msg = f"positions {list(at.shape)} at '{item.site}' are for {format_count(at.shape[0], 'row')}, but {n_rows} are changed"
        raise PatchError(msg)
    return index[:, None], at if at.dim() == 2 else at[None], columns


def _flat_positions(positions: tuple[int, ...] | Tensor) -> list[int]:
    return positions.flatten().tolist() if isinstance(positions, Tensor) else list(positions)
