"""One primitive: change the tensor at a site, at chosen positions, while a context is open.

Patching, ablation and steering are all an `Intervention` with another change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from circuits.interventions.hooks import edit
from circuits.interventions.options import RULES, Rule
from circuits.interventions.transforms import Add, Amplify, Change, Project, Replace, Zero
from groundscope.core.errors import PatchError, SiteError
from lvlm.access.site_width import site_width
from lvlm.model import Lvlm
from lvlm.sites import Site

__all__ = [
    "RULES",
    "Add",
    "Amplify",
    "Change",
    "Gate",
    "Intervention",
    "Project",
    "Replace",
    "Rule",
    "Zero",
    "intervened",
    "width",
]

_AROUND_IMAGE = ("image", "suffix", "question")
_REACHED = ("resid_pre", "q", "k", "v", "pattern", "z", "attn_out", "resid_mid", "mlp_out", "resid_post")


@dataclass(frozen=True, eq=False)
class Gate:
    """A linear probe that decides, token by token, whether a change happens there: where ``weights . x + bias > 0``."""

    site: Site
    """A decoder site that is reached before, or with, what the gate holds back."""
    weights: Tensor
    """``[d]``."""
    bias: float
    head: int | None = None
    """The head of ``z`` the probe reads; None for the whole width."""


@dataclass(frozen=True, eq=False)
class Intervention:
    """A change of the tensor at one site.

    Parameters
    ----------
    site
        Where; ``decoder.L3.z``, ``decoder.L3.resid_post``, …
    change
        What becomes of the chosen part: `Replace`, `Add`, `Zero`, `Amplify`, `Project`, or any function of ``[..., d]``.
    positions
        At which tokens, decided anew in every forward:

        ``all``
            every token;
        ``last``
            the last one: the last of the prompt, then, in cached generation, every new one;
        ``image``
            the image's tokens; none in a step of cached generation;
        ``suffix``
            every token after the image; in a step of cached generation the new one;
        ``question``
            every token of the prompt after the image; none in a step of cached generation;
        ``generated``
            every token that cached generation has added; none of the prompt;
        a tuple of whole numbers, or a LongTensor ``[rows, n]`` with the positions of each row
            counted from 0 in the prompt; they are in no step of cached generation.
    head
        One head of ``z``, counted from 0; None for the whole width.
    rows
        Rows of the batch; None for all.
    gate
        Let the change happen only at tokens where this probe is positive.
    decay
        Factor, in (0, 1], by which the change gets weaker with every step of cached generation.
    """

    site: Site
    change: Change
    positions: Rule | tuple[int, ...] | Tensor = "last"
    head: int | None = None
    rows: tuple[int, ...] | None = None
    gate: Gate | None = None
    decay: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.positions, str) and self.positions not in RULES:
            msg = f"positions '{self.positions}': choose {', '.join(RULES)}, or give positions counted from 0"
            raise PatchError(msg)
        if not isinstance(self.positions, str) and min(_numbers(self.positions), default=0) < 0:
            msg = f"positions {self.positions} at '{self.site}': they count from 0; for the last token say 'last'"
            raise PatchError(msg)
        if self.site.stack != "decoder" and _needs_steps(self):
            msg = f"positions '{self.positions}' at '{self.site}' mean nothing: only the decoder has text around the image"
            raise SiteError(msg)
        if not 0 < self.decay <= 1 or (self.decay < 1 and not hasattr(self.change, "scaled")):
            msg = f"decay={self.decay} of {type(self.change).__name__}: it must be in (0, 1], and 1 for what has no strength"
            raise PatchError(msg)
        if self.gate is not None and (self.gate.site.stack != "decoder" or _when(self.gate.site) > _when(self.site)):
            msg = (
                f"a gate at '{self.gate.site}' cannot hold back what happens at '{self.site}': choose a decoder site that is "
                f"reached no later"
            )
            raise SiteError(msg)


@contextmanager
def intervened(model: Lvlm, interventions: Sequence[Intervention]) -> Iterator[None]:
    """Change what flows through a model while the context is open; what happens at one site happens in order.

    Afterwards, after an error too, every hook is gone and the model is bit for bit what it was. With nothing to do
    nothing is hooked. Contexts nest: an inner one sees what an outer one made of a site.

    Raises
    ------
    SiteError
        For a site or head that the model lacks, before anything is hooked.
    PatchError
        For a change of another width than its site or that is not finite; during a forward, for positions or rows
        that its batch does not have.
    """
    by_site: dict[Site, list[tuple[Intervention, slice]]] = {}
    for item in interventions:
        by_site.setdefault(item.site, []).append((item, columns_of(model, item)))
    gates = {item.gate: columns_of(model, _watched(item.gate)) for item in interventions if item.gate is not None}
    places = {site: model.locate(site) for site in (*by_site, *(gate.site for gate in gates))}
    seen = _Tokens(model)
    with ExitStack() as hooks:
        if any(i.decay < 1 or _needs_steps(i) for i in interventions):
            hooks.callback(model.hf.register_forward_pre_hook(seen.look, with_kwargs=True).remove)
        for gate, columns in gates.items():  # before the changes: a probe reads what the model itself has there

            def judge(x: Tensor, gate: Gate = gate, columns: slice = columns) -> None:
                seen.open[gate] = x[..., columns] @ gate.weights.to(x) + gate.bias > 0  # [rows, positions]

            hooks.callback(places[gate.site].watch(judge).remove)
        for site, items in by_site.items():
            merged = _merged(model, items, width(model, site))

            def change(x: Tensor, site: Site = site, items: list[tuple[Intervention, slice]] = merged) -> Tensor:
                if x.dim() != 3:
                    msg = (
                        f"site '{site}' holds {list(x.shape)}, not [rows, positions, width]: it cannot be intervened on"
                    )
                    raise PatchError(msg)
                if len(items) == 1 and _is_everything(*items[0], x):
                    return _happening(items[0][0], seen)(x)
                x = x.clone()
                for item, columns in items:
                    where = _chosen(item, columns, x, seen)
                    if where is None:
                        continue
                    new = _happening(item, seen)(x[where])
                    if item.gate is not None:
                        new = torch.where(seen.open[item.gate][where[:-1]][..., None], new, x[where])
                    x[where] = new
                return x

            hooks.callback(edit(model, site, change).remove)
        yield


def _needs_steps(item: Intervention) -> bool:
    """Whether positions are told by the prompt's tokens, or by the steps of generation."""
    return isinstance(item.positions, str) and item.positions in (*_AROUND_IMAGE, "generated")


def _when(site: Site) -> tuple[int, int]:
    """Return when a forward reaches a decoder site."""
    return (site.layer, _REACHED.index(site.component)) if site.component in _REACHED else (-1, 0)


def _watched(gate: Gate) -> Intervention:
    """Return a gate as a change of nothing, to be checked like one."""
    return Intervention(gate.site, Replace(gate.weights), "all", gate.head)


def _merged(model: Lvlm, items: list[tuple[Intervention, slice]], full: int) -> list[tuple[Intervention, slice]]:
    """Add up additions that follow each other at the same tokens: one hook's work instead of one a head."""
    made: list[tuple[Intervention, slice]] = []
    for item, columns in items:
        if isinstance(item.change, Add) and item.change.norm == "free" and item.change.value.dim() == 1:
            value = torch.zeros(full)
            value[columns] = item.change.value.detach().float().cpu()
            last = made[-1][0] if made else None
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
                made.pop()
            if isinstance(item.positions, str):
                ready = value.to(model.device, model.dtype)
                made.append((replace(item, change=Add(ready), head=None), slice(0, full)))
                continue
        made.append((item, columns))
    return made


def _happening(item: Intervention, seen: _Tokens) -> Change:
    """Return the change at this step of generation."""
    change: Any = item.change
    return change if item.decay == 1 or not seen.step else change.scaled(item.decay**seen.step)


def _is_everything(item: Intervention, columns: slice, x: Tensor) -> bool:
    """Whether an intervention changes all of a tensor, so that nothing need be kept of it."""
    if item.rows is not None or item.gate is not None or columns != slice(0, x.shape[-1]):
        return False
    return item.positions == "all" or (item.positions == "last" and x.shape[1] == 1)


def width(model: Lvlm, site: Site) -> int:
    """Return the width of a site's tensor; raises `SiteError` for a site that the model lacks."""
    if site.component == "pattern":
        msg = f"site '{site}' cannot be read where it could still be changed: change 'z', or 'v', of the same layer"
        raise SiteError(msg)
    return site_width(model, site)


class _Tokens:
    """Which tokens the forward at hand holds, how many steps of generation came before it, and which gates are open."""

    def __init__(self, model: Lvlm) -> None:
        self._image = model.processor.tokenizer.convert_tokens_to_ids(model.processor.image_token)
        self._ids: Tensor | None = None
        self.step = 0
        self.open: dict[Gate, Tensor] = {}

    def look(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._ids = kwargs.get("input_ids", args[0] if args else None)
        cache = kwargs.get("past_key_values")
        # A forward onto an empty cache, or without one, reads the prompt; what fills the cache further is generated.
        self.step = self.step + 1 if cache is not None and cache.get_seq_length() else 0

    def mask(self, rule: str, x: Tensor, site: Site) -> Tensor:
        """Return the tokens that a rule means, bool ``[rows, positions]``."""
        if self._ids is None or self._ids.shape != x.shape[:2]:
            msg = f"positions '{rule}' at '{site}' need input_ids [rows, positions] given to the model's own forward"
            raise PatchError(msg)
        image = self._ids == self._image
        return image if rule == "image" else image.flip(1).cumsum(1).flip(1) == 0


def columns_of(model: Lvlm, item: Intervention) -> slice:
    """Return the columns an intervention touches, after checking that they exist and that its change fits them."""
    full = width(model, item.site)
    columns = slice(0, full)
    if item.head is not None:
        heads = model.n_heads if item.site.stack == "decoder" else model.n_vision_heads
        if item.site.component != "z" or not 0 <= item.head < heads:
            msg = f"head {item.head} at site '{item.site}': heads are in 'z', and {model.name} has heads 0-{heads - 1} there"
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


def _chosen(item: Intervention, columns: slice, x: Tensor, seen: _Tokens) -> tuple[Any, ...] | None:
    """Return the index of what an intervention changes in ``[rows, positions, width]``; None where nothing."""
    rows, positions = item.rows, item.positions
    if rows is not None and max(rows, default=0) >= x.shape[0]:
        msg = f"row {max(rows)} at '{item.site}': the batch has rows 0-{x.shape[0] - 1}"
        raise PatchError(msg)
    if isinstance(positions, str):
        if (positions == "question" and seen.step) or (positions == "generated" and not seen.step):
            return None
        if positions in _AROUND_IMAGE:
            mask = seen.mask(positions, x, item.site)
            if rows is not None:
                only = torch.zeros_like(mask)
                only[list(rows)] = True
                mask = mask & only
            return mask, columns
        which = slice(-1, None) if positions == "last" else slice(None)
        return slice(None) if rows is None else list(rows), which, columns
    if x.shape[1] == 1:
        return None  # a step of cached generation: the prompt's positions were in the first forward
    if max(_numbers(positions), default=0) >= x.shape[1]:
        msg = f"position {max(_numbers(positions))} at '{item.site}': the sequence has positions 0-{x.shape[1] - 1}"
        raise PatchError(msg)
    count = x.shape[0] if rows is None else len(rows)
    index = torch.arange(count, device=x.device) if rows is None else torch.tensor(rows, device=x.device)
    at = torch.as_tensor(positions, device=x.device)
    if at.dim() == 2 and at.shape[0] != count:
        msg = f"positions {list(at.shape)} at '{item.site}' are for {at.shape[0]} rows, but {count} are changed"
        raise PatchError(msg)
    return index[:, None], at if at.dim() == 2 else at[None], columns


def _numbers(positions: tuple[int, ...] | Tensor) -> list[int]:
    return positions.flatten().tolist() if isinstance(positions, Tensor) else list(positions)
