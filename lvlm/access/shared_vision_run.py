"""Run the vision tower once for each different image of a batch.

Benchmarks ask several questions about each image, and a tower processes images independently, so its output for an image is the
same in every row. The tower receives each different image once, and its output is repeated for all rows before any other module
receives it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lvlm.active_interventions import mark_observer
from lvlm.interfaces import Model


class _NotSeparable(Exception):
    """A value does not consist of as many equal parts as there are rows."""


def vision_tower(model: Model) -> nn.Module | None:
    """Return the largest module that contains the vision layers and no decoder layer; None if there is no such module."""
    layers = model.layers("vision")
    if not layers:
        return None
    decoder = set(model.layers("decoder"))
    names = {module: name for name, module in model.hf.named_modules()}
    parts = names[layers[0]].split(".")
    for end in range(1, len(parts)):
        module = model.hf.get_submodule(".".join(parts[:end]))
        if decoder.isdisjoint(module.modules()):
            return module
    return None


@contextmanager
def share_vision_runs(model: Model, images: Sequence[str]) -> Iterator[None]:
    """Run the vision tower once for each different image in forward passes of a batch, while the context is open.

    Forward passes are not changed where sharing would not be exact: for a family whose images are not separable
    (`lvlm.interfaces.ImageEncoding.separable`), if hooks read or change the tower, and if the tower's inputs or outputs do not
    consist of as many equal parts as there are rows, with equal parts for equal images.

    Parameters
    ----------
    model
        The model.
    images
        A key for each row that is equal for equal images (`ImageSource.identity`).
    """
    first_row = {image: row for row, image in reversed(list(enumerate(images)))}
    tower = model.tower
    if len(first_row) == len(images) or not model.image_encoding.separable or tower is None or _has_hooks(tower):
        yield
        return
    first = sorted(first_row.values())
    repeat = [first.index(first_row[image]) for image in images]
    full_inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    @mark_observer
    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        full_inputs.clear()
        if not torch.is_grad_enabled():
            try:
                reduced = _map_tensors((args, kwargs), lambda x: _select_rows(x, len(images), first, repeat))
            except _NotSeparable:
                return None
            full_inputs.append((args, kwargs))
            return reduced
        return None

    @mark_observer  # the output for each row is unchanged
    def after(module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any) -> Any:
        if not full_inputs:
            return None
        args, kwargs = full_inputs.pop()
        try:
            return _map_tensors(output, lambda x: _split(x, len(first))[repeat].flatten(0, 1))
        except _NotSeparable:
            return module.forward(*args, **kwargs)

    hooks = (
        tower.register_forward_pre_hook(before, with_kwargs=True),
        tower.register_forward_hook(after, with_kwargs=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _has_hooks(tower: nn.Module) -> bool:
    """Whether a tower has hooks that may depend on the number of rows; those with which transformers collects outputs do not."""
    hooks = (h for m in tower.modules() for table in (m._forward_hooks, m._forward_pre_hooks) for h in table.values())
    return any(not str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks)


def _select_rows(x: Tensor, count: int, first: list[int], repeat: list[int]) -> Tensor:
    """Return the parts of the first row of each image; raise `_NotSeparable` if repeating them does not restore all rows."""
    parts = _split(x, count)
    selected = parts[first]
    if not torch.equal(selected[repeat], parts):
        raise _NotSeparable
    return selected.flatten(0, 1)


def _split(x: Tensor, count: int) -> Tensor:
    """Split the first axis into `count` equal parts."""
    if not x.dim() or not x.shape[0] or x.shape[0] % count:
        raise _NotSeparable
    return x.unflatten(0, (count, -1))


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor in nested containers; raise `_NotSeparable` for objects that may contain tensors."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):  # also outputs of transformers, which are copied with their attributes
        result = copy.copy(value)
        for name, item in value.items():
            result[name] = _map_tensors(item, change)
        return result
    if type(value) in (tuple, list):
        return type(value)(_map_tensors(item, change) for item in value)
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return value
    raise _NotSeparable
