"""Where a site is read and written: the input or the output of a module, and what makes it the site's own value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from groundscope.core.errors import ModelError
from lvlm.active_interventions import copy_mark, mark_observer


@dataclass
class Call:
    """What a layer was called with in the forward that is under way."""

    shape: tuple[int, ...] = ()
    """Shape of the hidden states it was given."""
    rows: Tensor | None = None
    """The mask of rows that its MLP is multiplied with, broadcast to the hidden states."""


@dataclass(frozen=True)
class Handles:
    """Several hooks that are removed as one."""

    hooks: tuple[Any, ...]

    def remove(self) -> None:
        """Take all of them off."""
        for hook in self.hooks:
            hook.remove()


@dataclass(frozen=True)
class Place:
    """Where a site is read and written: the input or the output of a module.

    In most families that tensor is the site's value. Where it is not, the fields below say what lies between: a gate
    that scales it, a projection that holds queries, keys and values side by side, a layer that flattens its tokens.
    """

    module: nn.Module
    side: Literal["input", "output"]
    element: int = 0
    """Which element of the output, where it is a tuple."""
    third: int | None = None
    """Which third of the last axis; None for all of it."""
    gate: nn.Parameter | None = None
    """What the layer multiplies the output with before adding it to the residual stream."""
    tanh: bool = False
    """Whether the gate's hyperbolic tangent is meant."""
    layer: nn.Module | None = None
    """The layer whose call has to be known: it flattens its tokens, or masks rows."""
    row_mask: str = ""
    """The layer's argument that masks rows of its MLP."""
    layout: str = ""
    """How the layer's hidden states lie, as `lvlm.family.specification.StackSpec.layout` has it."""
    window: int = 0
    """Tokens along a side of the windows in which tokens stand here; 0 where they stand as they are."""
    heads: int = 0
    """Heads that each have a third, where a projection holds queries, keys and values head by head; 0 where it does not."""

    @property
    def plain(self) -> bool:
        """Whether the module's tensor is the value as it is."""
        return self.layer is None and self.gate is None and self.third is None and not self.layout

    def call(self) -> tuple[Call, Handles]:
        """Return a record of the layer's call, filled by every forward until the handles are removed."""
        seen = Call()
        if self.layer is None:
            return seen, Handles(())

        @mark_observer
        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs[first_name(kwargs)]
            seen.shape = tuple(hidden.shape)
            mask = kwargs.get(self.row_mask) if self.row_mask else None
            seen.rows = None if mask is None else mask[:, 0]

        return seen, Handles((self.layer.register_forward_pre_hook(before, with_kwargs=True),))

    def value(self, raw: Any, call: Call) -> Tensor:
        """Return the site's value from what the module was given or gave."""
        x = self._by_token(self._tensor(raw), call)
        if self.third is not None:
            return x.unflatten(-1, (self.heads or 1, 3, -1))[..., self.third, :].flatten(-2)
        scale = self._scale(call)
        return x if scale is None else x * scale

    def replaced(self, raw: Any, new: Tensor, call: Call) -> Any:
        """Return what the module would have to give for the site to be `new`; where a gate is closed nothing can be."""
        given = self._tensor(raw)
        x = self._by_token(given, call)
        if self.third is not None:
            parts = x.unflatten(-1, (self.heads or 1, 3, -1)).clone()
            parts[..., self.third, :] = new.unflatten(-1, (self.heads or 1, -1))
            new = parts.flatten(-3)
        else:
            scale = self._scale(call)
            if scale is not None:
                open_ = scale != 0
                new = torch.where(open_, new / torch.where(open_, scale, torch.ones_like(scale)), x)
        value = self._as_given(new, given, call)
        if isinstance(raw, tuple):
            return (*raw[: self.element], value, *raw[self.element + 1 :])
        return value

    def watch(self, see: Callable[[Tensor], object]) -> Handles:
        """Call `see` with the site's tensor on every forward."""

        def look(x: Tensor) -> None:
            see(x)

        return self.edit(mark_observer(look))

    def edit(self, change: Callable[[Tensor], Tensor | None]) -> Handles:
        """Replace the site's tensor by what `change` returns (None leaves it) on every forward.

        The hook gets the marks of `change`; see `lvlm.active_interventions`.
        """
        seen, context = self.call()
        if self.side == "input":

            def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                name = None if args else first_name(kwargs)
                raw = args[0] if name is None else kwargs[name]
                changed = change(self.value(raw, seen))
                if changed is None:
                    return None
                new = self.replaced(raw, changed, seen)
                return ((new, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: new})

            pre_hook = copy_mark(before, change)
            return Handles((*context.hooks, self.module.register_forward_pre_hook(pre_hook, with_kwargs=True)))

        def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
            if self.element and (
                not isinstance(output, tuple) or output[self.element : self.element + 1] in ((), (None,))
            ):
                return None  # attention that does not hand out its weights
            new = change(self.value(output, seen))
            return None if new is None else self.replaced(output, new, seen)

        return Handles((*context.hooks, self.module.register_forward_hook(copy_mark(after, change))))

    def _tensor(self, raw: Any) -> Tensor:
        # Layers return a bare tensor in most families and releases, a tuple in others.
        if isinstance(raw, tuple):
            raw = raw[self.element] if len(raw) > self.element else None
        if not isinstance(raw, Tensor):
            msg = f"{type(self.module).__name__} gives no tensor as element {self.element} of its output"
            raise ModelError(msg)
        return raw

    def _by_token(self, x: Tensor, call: Call) -> Tensor:
        """Return a tensor as ``[B, T, D]`` where the module has its examples, tokens and width in another order."""
        if self.layout == "picture":
            if self.window:
                rows, columns = call.shape[2:]
                return _joined(x, rows, columns, self.window)[:, :rows, :columns].flatten(1, 2)
            return x.flatten(2).transpose(1, 2) if x.dim() == 4 else x
        if call.shape and x.dim() < len(call.shape):
            x = x.reshape(*call.shape[:-1], x.shape[-1])
        return x.transpose(0, 1) if self.layout else x

    def _as_given(self, new: Tensor, given: Tensor, call: Call) -> Tensor:
        """Return ``[B, T, D]`` in the order of what the module was given or gave."""
        if self.layout == "picture" and self.window:
            rows, columns = call.shape[2:]
            whole = _joined(given, rows, columns, self.window).clone()  # what fills windows up beyond the picture stays
            whole[:, :rows, :columns] = new.unflatten(1, (rows, columns))
            return _cut(whole, self.window).reshape(given.shape)
        if self.layout == "picture":
            return new.transpose(1, 2).reshape(given.shape) if given.dim() == 4 else new
        return (new.transpose(0, 1) if self.layout else new).reshape(given.shape)

    def _scale(self, call: Call) -> Tensor | None:
        scale = None if self.gate is None else (self.gate.tanh() if self.tanh else self.gate)
        if call.rows is not None:
            scale = call.rows if scale is None else scale * call.rows
        return scale


def _joined(x: Tensor, rows: int, columns: int, side: int) -> Tensor:
    """Put windows ``[B * windows, side * side, D]`` together as ``[B, rows, columns, D]``, filled up to whole windows."""
    high, wide = -(-rows // side), -(-columns // side)
    by_window = x.reshape(-1, high, wide, side, side, x.shape[-1])
    return by_window.transpose(2, 3).reshape(-1, high * side, wide * side, x.shape[-1])


def _cut(x: Tensor, side: int) -> Tensor:
    """Cut ``[B, rows, columns, D]`` into windows ``[B, high, wide, side, side, D]``."""
    return x.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)


def first_name(kwargs: dict[str, Any]) -> str:
    """Return the keyword under which a module was given its hidden states."""
    return next((name for name in ("hidden_states", "hidden_state") if name in kwargs), next(iter(kwargs)))
