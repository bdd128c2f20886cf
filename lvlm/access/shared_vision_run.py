"""A picture that several rows of a batch show goes through the vision tower once.

Benchmarks ask several questions about each image, and a tower sees each picture by itself: what it gives for one row is what
it gives for every row with that picture. So the tower is given each picture once, and what comes out is laid out for all rows
again before anything else sees it. Nothing but the tower knows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lvlm.active_interventions import mark_observer

if TYPE_CHECKING:
    from lvlm.model import Lvlm


class _Unfit(Exception):
    """Something that is not as many equal parts as there are rows."""


def tower_of(model: Lvlm) -> nn.Module | None:
    """Return the largest module that holds the vision layers and no decoder layer; None where there is none."""
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
def each_picture_once(model: Lvlm, images: Sequence[str]) -> Iterator[None]:
    """Let forwards of a batch run the vision tower once for each different image.

    Where that cannot be done exactly, forwards are as they always are: for a family whose view does not take pictures
    apart (`lvlm.encoding.registry.View.apart`), where something reads or changes the tower from within, and where what
    the tower is given or gives is not as many equal parts as there are rows, equal for equal images.

    Parameters
    ----------
    model
        The model.
    images
        For each row what is equal for equal images (`ImageSource.identity`).
    """
    rows = {image: row for row, image in reversed(list(enumerate(images)))}  # image -> its first row
    if len(rows) == len(images) or not model.view.apart or model.tower is None or _watched(model.tower):
        yield
        return
    tower, first = model.tower, sorted(rows.values())
    back = [first.index(rows[image]) for image in images]
    whole: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    @mark_observer
    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        whole.clear()
        if not torch.is_grad_enabled():
            try:
                few = _mapped((args, kwargs), lambda x: _chosen(x, len(images), first, back))
            except _Unfit:
                return None
            whole.append((args, kwargs))
            return few
        return None

    @mark_observer  # what the tower gives for each row is the same
    def after(module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any) -> Any:
        if not whole:
            return None
        args, kwargs = whole.pop()
        try:
            return _mapped(output, lambda x: _rows(_parts(x, len(first)), back))
        except _Unfit:
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


def _watched(tower: nn.Module) -> bool:
    """Whether hooks are on a tower: they may count rows. Those that transformers collects outputs with do not."""
    held = (h for m in tower.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks) for h in hooks.values())
    return any(not str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in held)


def _chosen(x: Tensor, count: int, first: list[int], back: list[int]) -> Tensor:
    """Return the parts of some rows, after a look at whether they are those of all rows."""
    parts = _parts(x, count)
    few = parts[first]
    if not torch.equal(few[back], parts):
        raise _Unfit
    return few.flatten(0, 1)


def _rows(parts: Tensor, back: list[int]) -> Tensor:
    return parts[back].flatten(0, 1)


def _parts(x: Tensor, count: int) -> Tensor:
    """Divide a tensor's first axis into so many equal parts."""
    if not x.dim() or not x.shape[0] or x.shape[0] % count:
        raise _Unfit
    return x.unflatten(0, (count, -1))


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change every tensor in what a module is given or gives; raises `_Unfit` where there may be some that are not seen."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):  # outputs of transformers among them, which are copied with their attributes
        made = copy.copy(value)
        for name, item in value.items():
            made[name] = _mapped(item, change)
        return made
    if type(value) in (tuple, list):
        return type(value)(_mapped(item, change) for item in value)
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return value
    raise _Unfit
