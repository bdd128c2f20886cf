"""One primitive: change the tensor at a site, at chosen positions, while a context is open.

Patching, ablation and steering are all an `Intervention` with another change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from concepts.errors import PatchError, SiteError
from lvlm.model import Lvlm
from lvlm.sites import Site

Change = Callable[[Tensor], Tensor]
"""What the chosen part of a tensor becomes: ``[..., d]`` -> ``[..., d]``."""
Rule = Literal["all", "last", "image", "suffix"]
RULES: tuple[Rule, ...] = ("all", "last", "image", "suffix")


@dataclass(frozen=True, eq=False)
class Replace:
    """x becomes `value`: a patch, or with a mean over other runs a mean ablation."""

    value: Tensor
    """Anything that broadcasts to ``[rows, positions, d]``."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return what ``[..., d]`` becomes."""
        return self.value.to(x).expand_as(x)


@dataclass(frozen=True, eq=False)
class Add:
    """x becomes ``x + value``."""

    value: Tensor
    """``[d]``, or anything that broadcasts to ``[rows, positions, d]``."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return what ``[..., d]`` becomes."""
        return x + self.value.to(x)


@dataclass(frozen=True)
class Zero:
    """x becomes 0."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return what ``[..., d]`` becomes."""
        return torch.zeros_like(x)


@dataclass(frozen=True, eq=False)
class Amplify:
    """x becomes ``x + factor * (x - mean) reads^T writes``: what sets this input apart from the mean, made larger.

    Without `reads` that is ``mean + (1 + factor) (x - mean)``; a factor of -1 leaves nothing but the mean. With
    `reads` only the deviation within the subspace spanned by its rows counts: a factor of -1 removes it.
    """

    mean: Tensor
    """``[d]``: what the site holds where there is nothing to see, or the middle between the classes."""
    factor: float
    reads: Tensor | None = None
    """Orthonormal rows ``[k, d]``."""
    writes: Tensor | None = None
    """``[k, d]``: where the deviation goes; `reads` itself by default, other rows for a control of the same size."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return what ``[..., d]`` becomes."""
        deviation = x - self.mean.to(x)
        if self.reads is not None:
            writes = self.reads if self.writes is None else self.writes
            deviation = deviation @ self.reads.to(x).T @ writes.to(x)
        elif self.writes is not None:
            deviation = deviation @ self.writes.to(x)
        return x + self.factor * deviation


@dataclass(frozen=True, eq=False)
class Intervention:
    """A change of the tensor at one site.

    Parameters
    ----------
    site
        Where; ``decoder.L3.z``, ``decoder.L3.resid_post``, …
    change
        What becomes of the chosen part: `Replace`, `Add`, `Zero`, `Amplify`, or any function of ``[..., d]``.
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
        a tuple of whole numbers, or a LongTensor ``[rows, n]`` with the positions of each row
            counted from 0 in the prompt; they are in no step of cached generation.
    head
        One head of ``z``, counted from 0; None for the whole width.
    rows
        Rows of the batch; None for all.
    """

    site: Site
    change: Change
    positions: Rule | tuple[int, ...] | Tensor = "last"
    head: int | None = None
    rows: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.positions, str) and self.positions not in RULES:
            msg = f"positions '{self.positions}': choose {', '.join(RULES)}, or give positions counted from 0"
            raise PatchError(msg)
        if not isinstance(self.positions, str) and min(_numbers(self.positions), default=0) < 0:
            msg = f"positions {self.positions} at '{self.site}': they count from 0; for the last token say 'last'"
            raise PatchError(msg)
        if isinstance(self.positions, str) and self.positions in ("image", "suffix") and self.site.stack != "decoder":
            msg = f"positions '{self.positions}' at '{self.site}' mean nothing: only the decoder has text around the image"
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
    places = {site: model.locate(site) for site in by_site}
    seen = _Tokens(model)
    with ExitStack() as hooks:
        if any(isinstance(i.positions, str) and i.positions in ("image", "suffix") for i in interventions):
            hooks.callback(model.hf.register_forward_pre_hook(seen.look, with_kwargs=True).remove)
        for site, items in by_site.items():

            def change(x: Tensor, site: Site = site, items: list[tuple[Intervention, slice]] = items) -> Tensor:
                if x.dim() != 3:
                    msg = (
                        f"site '{site}' holds {list(x.shape)}, not [rows, positions, width]: it cannot be intervened on"
                    )
                    raise PatchError(msg)
                x = x.clone()
                for item, columns in items:
                    where = _chosen(item, columns, x, seen)
                    if where is not None:
                        x[where] = item.change(x[where])
                return x

            hooks.callback(places[site].edit(change).remove)
        yield


def width(model: Lvlm, site: Site) -> int:
    """Return the width of a site's tensor; raises `SiteError` for a site that the model lacks."""
    place = model.locate(site)
    if site.component == "pattern":
        msg = f"site '{site}' cannot be read where it could still be changed: change 'z', or 'v', of the same layer"
        raise SiteError(msg)
    if site.component in ("q", "k", "v") and isinstance(place.module, nn.Linear):
        return place.module.out_features
    if site.stack == "projector":
        return model.width
    projection = model.output_projection(site.stack, site.layer, cross=site.cross)
    return projection.in_features if site.component == "z" else projection.out_features


class _Tokens:
    """Which tokens of the forward at hand are the image's."""

    def __init__(self, model: Lvlm) -> None:
        self._image = model.processor.tokenizer.convert_tokens_to_ids(model.processor.image_token)
        self._ids: Tensor | None = None

    def look(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._ids = kwargs.get("input_ids", args[0] if args else None)

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
        if positions in ("image", "suffix"):
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
