"""Hook points: the module input or output at which a site is read and written, and its conversion to the site's value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from groundscope.core.errors import ModelError
from lvlm.active_interventions import copy_mark, mark_observer


@dataclass
class LayerCall:
    """Arguments of a layer in the current forward pass."""

    shape: tuple[int, ...] = ()
    """Shape of its hidden states."""
    rows: Tensor | None = None
    """Mask of rows that multiplies the output of its MLP, broadcast to the hidden states."""


@dataclass(frozen=True)
class HookHandles:
    """Several hooks that are removed together."""

    hooks: tuple[Any, ...]

    def remove(self) -> None:
        """Remove all hooks."""
        for hook in self.hooks:
            hook.remove()


@dataclass(frozen=True)
class HookPoint:
    """The input or output of a module at which a site is read and written.

    In most families this tensor is the site's value. In others the optional fields describe the conversion: a gate scales
    it, a projection returns queries, keys and values together, or a layer flattens its tokens.

    Examples
    --------
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> point = model.locate("decoder.L2.z")
    >>> type(point.module).__name__, point.side
    ('Linear', 'input')
    """

    module: nn.Module
    side: Literal["input", "output"]
    element: int = 0
    """Index of the output's element, if the output is a tuple."""
    third: int | None = None
    """Index of the third of the last axis, for fused projections; None for the full axis."""
    gate: nn.Parameter | None = None
    """Factor of the output before it is added to the residual stream."""
    tanh: bool = False
    """Whether the factor is the gate's hyperbolic tangent."""
    layer: nn.Module | None = None
    """Layer whose arguments are recorded, because it flattens its tokens or masks rows."""
    row_mask: str = ""
    """Name of the layer's argument that masks rows of its MLP."""
    layout: str = ""
    """Layout of the layer's hidden states; see `lvlm.family.specification.StackSpec.layout`."""
    window: int = 0
    """Side length, in tokens, of the attention windows by which tokens are ordered; 0 for the usual order."""
    heads: int = 0
    """Number of heads if a fused projection returns queries, keys and values head by head; 0 otherwise."""

    @property
    def plain(self) -> bool:
        """Whether the module's tensor is the site's value, without conversion."""
        return self.layer is None and self.gate is None and self.third is None and not self.layout

    def call(self) -> tuple[LayerCall, HookHandles]:
        """Return a record of the layer's arguments, updated by every forward pass until the handles are removed."""
        record = LayerCall()
        if self.layer is None:
            return record, HookHandles(())

        @mark_observer
        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs[first_name(kwargs)]
            record.shape = tuple(hidden.shape)
            mask = kwargs.get(self.row_mask) if self.row_mask else None
            record.rows = None if mask is None else mask[:, 0]

        return record, HookHandles((self.layer.register_forward_pre_hook(before, with_kwargs=True),))

    def value(self, raw: Any, call: LayerCall) -> Tensor:
        """Return the site's value from the module's input or output."""
        x = self._by_token(self._tensor(raw), call)
        if self.third is not None:
            return x.unflatten(-1, (self.heads or 1, 3, -1))[..., self.third, :].flatten(-2)
        scale = self._scale(call)
        return x if scale is None else x * scale

    def replace_value(self, raw: Any, new: Tensor, call: LayerCall) -> Any:
        """Return the module's input or output for which the site's value is `new`; unchanged where a gate is zero."""
        original = self._tensor(raw)
        x = self._by_token(original, call)
        if self.third is not None:
            parts = x.unflatten(-1, (self.heads or 1, 3, -1)).clone()
            parts[..., self.third, :] = new.unflatten(-1, (self.heads or 1, -1))
            new = parts.flatten(-3)
        else:
            scale = self._scale(call)
            if scale is not None:
                nonzero = scale != 0
                new = torch.where(nonzero, new / torch.where(nonzero, scale, torch.ones_like(scale)), x)
        value = self._in_layout(new, original, call)
        if isinstance(raw, tuple):
            return (*raw[: self.element], value, *raw[self.element + 1 :])
        return value

    def watch(self, read: Callable[[Tensor], object]) -> HookHandles:
        """Call `read` with the site's tensor in every forward pass."""

        def observe(x: Tensor) -> None:
            read(x)

        return self.edit(mark_observer(observe))

    def edit(self, change: Callable[[Tensor], Tensor | None]) -> HookHandles:
        """Replace the site's tensor by the result of `change` in every forward pass; None leaves it unchanged.

        The hook gets the marks of `change`; see `lvlm.active_interventions`.
        """
        call, context = self.call()
        if self.side == "input":

            def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                name = None if args else first_name(kwargs)
                raw = args[0] if name is None else kwargs[name]
                changed = change(self.value(raw, call))
                if changed is None:
                    return None
                new = self.replace_value(raw, changed, call)
                return ((new, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: new})

            pre_hook = copy_mark(before, change)
            return HookHandles((*context.hooks, self.module.register_forward_pre_hook(pre_hook, with_kwargs=True)))

        def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
            if self.element and (
                not isinstance(output, tuple) or output[self.element : self.element + 1] in ((), (None,))
            ):
                return None  # this attention implementation returns no weights
            new = change(self.value(output, call))
            return None if new is None else self.replace_value(output, new, call)

        return HookHandles((*context.hooks, self.module.register_forward_hook(copy_mark(after, change))))

    def _tensor(self, raw: Any) -> Tensor:
        # Layers return a tensor in most families and releases of transformers, a tuple in others.
        if isinstance(raw, tuple):
            raw = raw[self.element] if len(raw) > self.element else None
        if not isinstance(raw, Tensor):
            msg = f"element {self.element} of the output of {type(self.module).__name__} is not a tensor"
            raise ModelError(msg)
        return raw

    def _by_token(self, x: Tensor, call: LayerCall) -> Tensor:
        """Return a tensor as ``[B, T, D]``, from the layout of the module."""
        if self.layout == "picture":
            if self.window:
                rows, columns = call.shape[2:]
                return _join_windows(x, rows, columns, self.window)[:, :rows, :columns].flatten(1, 2)
            return x.flatten(2).transpose(1, 2) if x.dim() == 4 else x
        if call.shape and x.dim() < len(call.shape):
            x = x.reshape(*call.shape[:-1], x.shape[-1])
        return x.transpose(0, 1) if self.layout else x

    def _in_layout(self, new: Tensor, original: Tensor, call: LayerCall) -> Tensor:
        """Return ``[B, T, D]`` in the layout of the module's original tensor."""
        if self.layout == "picture" and self.window:
            rows, columns = call.shape[2:]
            whole = _join_windows(original, rows, columns, self.window).clone()  # keeps the padding of windows
            whole[:, :rows, :columns] = new.unflatten(1, (rows, columns))
            return _split_windows(whole, self.window).reshape(original.shape)
        if self.layout == "picture":
            return new.transpose(1, 2).reshape(original.shape) if original.dim() == 4 else new
        return (new.transpose(0, 1) if self.layout else new).reshape(original.shape)

    def _scale(self, call: LayerCall) -> Tensor | None:
        scale = None if self.gate is None else (self.gate.tanh() if self.tanh else self.gate)
        if call.rows is not None:
            scale = call.rows if scale is None else scale * call.rows
        return scale


def _join_windows(x: Tensor, rows: int, columns: int, side: int) -> Tensor:
    """Join windows ``[B * windows, side * side, D]`` to ``[B, rows, columns, D]``, with the padding of incomplete windows."""
    high, wide = -(-rows // side), -(-columns // side)
    by_window = x.reshape(-1, high, wide, side, side, x.shape[-1])
    return by_window.transpose(2, 3).reshape(-1, high * side, wide * side, x.shape[-1])


def _split_windows(x: Tensor, side: int) -> Tensor:
    """Split ``[B, rows, columns, D]`` into windows ``[B, high, wide, side, side, D]``."""
    return x.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)


def first_name(kwargs: dict[str, Any]) -> str:
    """Return the name of the keyword argument with a module's hidden states."""
    return next((name for name in ("hidden_states", "hidden_state") if name in kwargs), next(iter(kwargs)))
