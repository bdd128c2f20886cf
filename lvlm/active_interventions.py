"""Interventions that are active on a model, observers, and hooks of unknown effect.

Activations are the model's own only if nothing changes them during the forward pass. Every change of ours is registered here
while it is active, so that provenance names it. A forward hook that is neither registered nor marked as an observer may have any
effect, so it is reported by its qualified name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import nn
from torch.nn.modules import module as torch_module

_Function = TypeVar("_Function", bound=Callable[..., Any])
_OBSERVES, _REGISTERED = "_groundscope_observes", "_groundscope_registered"
_LIBRARIES = ("transformers", "nnsight", "accelerate", "torch")
"""Packages whose hooks collect outputs, move tensors between devices or are part of a model's definition."""
_CHECKERS = ("jaxtyping", "beartype", "typeguard")
"""Packages whose decorators wrap a ``forward`` where it is defined."""


@dataclass(frozen=True, eq=False)
class ActiveIntervention:
    """One intervention that is active on a model.

    Examples
    --------
    >>> from lvlm.active_interventions import ActiveIntervention
    >>> ActiveIntervention("steering vector", "add at L3.H5", lambda: "5f2a").record()
    {'kind': 'steering vector', 'name': 'add at L3.H5', 'digest': '5f2a'}
    """

    kind: str
    """Kind of intervention: ``steering vector``, ``intervention``, ``attention knockout``, ..."""
    name: str
    """Description in one line."""
    identify: Callable[[], str | None]
    """Computes `digest`; called at most once, when the digest is needed."""
    late: bool = False
    """Whether it certainly changes nothing before the last token of a prompt; see `lvlm.prefix_groups`."""

    @cached_property
    def digest(self) -> str | None:
        """Digest of everything that determines the effect: equal digests, equal effects. None if it contains code."""
        return self.identify()

    def record(self) -> dict[str, str | None]:
        """Return kind, name and digest, for provenance."""
        return {"kind": self.kind, "name": self.name, "digest": self.digest}


_ACTIVE: WeakKeyDictionary[nn.Module, list[ActiveIntervention]] = WeakKeyDictionary()


class Registration:
    """An intervention's entry in the list of a module's active interventions; `remove` ends it."""

    def __init__(self, module: nn.Module, intervention: ActiveIntervention) -> None:
        self._active = _ACTIVE.setdefault(module, [])
        self._intervention = intervention
        self._active.append(intervention)

    def remove(self) -> None:
        """Remove the entry; further calls have no effect."""
        self._active[:] = [item for item in self._active if item is not self._intervention]


def active_interventions(module: nn.Module) -> tuple[ActiveIntervention, ...]:
    """Return the interventions that are registered for a module, in the order in which they were applied."""
    return tuple(_ACTIVE.get(module, ()))


def mark_observer(hook: _Function) -> _Function:
    """Mark a hook as an observer: it changes nothing and returns None. Usable as a decorator.

    Examples
    --------
    >>> import torch
    >>> from lvlm.active_interventions import mark_observer, unregistered_hooks
    >>> layer, shapes = torch.nn.Linear(2, 2).eval(), []
    >>> handle = layer.register_forward_hook(mark_observer(lambda module, args, output: shapes.append(output.shape)))
    >>> unregistered_hooks(layer)
    ()
    """
    return _set_mark(hook, _OBSERVES)


def mark_intervention(hook: _Function) -> _Function:
    """Mark a hook as part of an intervention that has a `Registration`. Usable as a decorator."""
    return _set_mark(hook, _REGISTERED)


def copy_mark(hook: _Function, source: Callable[..., Any]) -> _Function:
    """Give a hook the marks of another function."""
    for mark in (_OBSERVES, _REGISTERED):
        if getattr(source, mark, False):
            _set_mark(hook, mark)
    return hook


def unregistered_hooks(module: nn.Module) -> tuple[str, ...]:
    """Return every forward hook in a module's tree whose effect is unknown, as ``path: qualified name (kind)``.

    Excluded are observers, hooks of registered interventions, and hooks of transformers, nnsight, accelerate and torch. A
    replaced ``forward``, of a module or of its class, counts as a hook, and so does training mode.
    """
    has_interventions = bool(_ACTIVE.get(module))
    descriptions: list[str] = []

    def describe(path: str, hooks: Mapping[Any, Any], kind: str) -> None:
        descriptions.extend(
            f"{path or type(module).__name__}: {_name(hook)} ({kind})"
            for hook in hooks.values()
            if not _is_harmless(hook, has_interventions=has_interventions)
        )

    classes: dict[type[nn.Module], str] = {}
    for path, inner in module.named_modules():
        classes.setdefault(type(inner), path)
        describe(path, inner._forward_pre_hooks, "forward pre-hook")
        describe(path, inner._forward_hooks, "forward hook")
        replacement = _replaced_forward(inner)
        if replacement is not None and _source_module(replacement) != type(inner).__module__:
            describe(path, {0: replacement}, "replaced forward")
    for cls, path in classes.items():
        if (patch := _replaced_class_forward(cls)) is not None:
            describe(path, {0: patch}, "replaced forward of the class")
    if module.training:
        descriptions.append(f"{type(module).__name__}: training mode (dropout is random; call eval())")
    describe("all modules", torch_module._global_forward_pre_hooks, "global forward pre-hook")
    describe("all modules", torch_module._global_forward_hooks, "global forward hook")
    return tuple(descriptions)


@contextmanager
def without_marked_hooks(module: nn.Module) -> Iterator[None]:
    """Suspend observers and hooks of interventions in a module's tree while the context is open, to measure the module alone."""
    tables = [table for inner in module.modules() for table in (inner._forward_pre_hooks, inner._forward_hooks)]
    suspended = [(table, dict(table)) for table in tables if any(map(_is_marked, table.values()))]
    for table, hooks in suspended:
        for key, hook in hooks.items():
            if _is_marked(hook):
                del table[key]
    try:
        yield
    finally:
        for table, hooks in suspended:
            table.clear()
            table.update(hooks)  # in their order


def intervention_record(module: nn.Module) -> dict[str, Any]:
    """Return a module's ``interventions`` and unregistered ``hooks`` as plain values; each key only if there are some."""
    interventions = [item.record() for item in active_interventions(module)]
    hooks = list(unregistered_hooks(module))
    return {**({"interventions": interventions} if interventions else {}), **({"hooks": hooks} if hooks else {})}


def unidentified_changes(module: nn.Module) -> tuple[str, ...]:
    """Return the names of unregistered hooks, and of active interventions without a digest."""
    opaque = (f"{item.kind} {item.name}" for item in active_interventions(module) if item.digest is None)
    return (*unregistered_hooks(module), *opaque)


def _is_marked(hook: Any) -> bool:
    return getattr(hook, _OBSERVES, False) or getattr(hook, _REGISTERED, False)


def _is_harmless(hook: Any, *, has_interventions: bool) -> bool:
    if getattr(hook, _OBSERVES, False) or (has_interventions and getattr(hook, _REGISTERED, False)):
        return True
    return _package(_source_module(hook)) in _LIBRARIES


def _source_module(function: Any) -> str:
    """Return the module that contains a function's code, even if `functools.wraps` copied the name of another function."""
    while True:
        inner = getattr(function, "func", None) or getattr(function, "__func__", None)  # partial, bound method
        if inner is None:
            break
        function = inner
    module = getattr(function, "__globals__", {}).get("__name__") or getattr(function, "__module__", None)
    return str(module or type(function).__module__)


def _package(module: str) -> str:
    return module.partition(".")[0]


def _replaced_class_forward(cls: type[nn.Module]) -> Any:
    """Return the ``forward`` of a class if another package replaced it, else None."""
    owner = next((c for c in cls.__mro__ if "forward" in vars(c)), None)
    forward = None if owner is None else vars(owner)["forward"]
    if forward is None or _package(_source_module(forward)) in {_package(owner.__module__), *_CHECKERS}:
        return None
    return forward


def _replaced_forward(module: nn.Module) -> Any:
    """Return the ``forward`` that was set on a module object; None if it uses its class's."""
    replacement = vars(module).get("forward")
    if not _from_nnsight(replacement):
        return replacement
    # nnsight's controller calls the previous forward: the class's, or through a closure the module's own.
    original = getattr(getattr(replacement, "state", None), "original", None)
    if _from_nnsight(original):
        original = next((cell.cell_contents for cell in getattr(original, "__closure__", None) or ()), None)
    return None if original is getattr(type(module), "forward", None) else original


def _from_nnsight(function: Any) -> bool:
    sources = (type(function).__module__, getattr(function, "__module__", None))
    return any(_package(str(source)) == "nnsight" for source in sources)


def _name(hook: Any) -> str:
    module = getattr(hook, "__module__", None) or type(hook).__module__
    return f"{module}.{getattr(hook, '__qualname__', type(hook).__qualname__)}"


def _set_mark(hook: _Function, mark: str) -> _Function:
    setattr(getattr(hook, "__func__", hook), mark, True)
    return hook
