"""What is done to a model at the moment: registered interventions, our observers, and hooks that nobody registered.

Values that are read from a model are the model's own only where nothing changes what flows through it. Whatever changes it
registers itself here while it is active, so that provenance names it; a forward hook that is neither registered nor marked
as an observer may change anything, and is reported by its qualified name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
class Applied:
    """One change that is active on a model."""

    kind: str
    """What sort of change: ``steering vector``, ``intervention``, ``attention knockout``, ..."""
    name: str
    """What it is, in one line."""
    identify: Callable[[], str | None]
    """Gives a digest of everything that decides on what the change does; None where that is not known."""

    @cached_property
    def digest(self) -> str | None:
        """Digest of the change; equal digests, equal changes. None where it holds code whose effect cannot be known."""
        return self.identify()

    def record(self) -> dict[str, str | None]:
        """Return the change as plain values, for provenance."""
        return {"kind": self.kind, "name": self.name, "digest": self.digest}


_ACTIVE: WeakKeyDictionary[nn.Module, list[Applied]] = WeakKeyDictionary()


class Registration:
    """An active change; `remove` ends it."""

    def __init__(self, module: nn.Module, applied: Applied) -> None:
        self._active = _ACTIVE.setdefault(module, [])
        self._applied = applied
        self._active.append(applied)

    def remove(self) -> None:
        """End the registration; may be repeated."""
        self._active[:] = [one for one in self._active if one is not self._applied]


def active(module: nn.Module) -> tuple[Applied, ...]:
    """Return the changes that are registered for a module, in the order in which they were applied."""
    return tuple(_ACTIVE.get(module, ()))


def mark_observer(hook: _Function) -> _Function:
    """Mark a hook as one that only looks: it changes nothing and returns None. Usable as a decorator.

    Examples
    --------
    >>> from lvlm.active_interventions import mark_observer, unregistered_hooks
    >>> import torch
    >>> layer, shapes = torch.nn.Linear(2, 2).eval(), []
    >>> handle = layer.register_forward_hook(mark_observer(lambda module, args, output: shapes.append(output.shape)))
    >>> unregistered_hooks(layer)
    ()
    """
    return _mark(hook, _OBSERVES)


def registered(hook: _Function) -> _Function:
    """Mark a hook as part of a change that is registered with `Registration`."""
    return _mark(hook, _REGISTERED)


def copy_mark(hook: _Function, other: Callable[..., Any]) -> _Function:
    """Mark a hook as what another function is marked as, if anything."""
    for mark in (_OBSERVES, _REGISTERED):
        if getattr(other, mark, False):
            _mark(hook, mark)
    return hook


def unregistered_hooks(module: nn.Module) -> tuple[str, ...]:
    """Return every forward hook in a module's tree that nobody registered, as ``path: qualified name (kind)``.

    Observers, hooks of registered changes, and hooks of transformers, nnsight, accelerate and torch are left out. A
    ``forward`` that was replaced on a module or on its class is a hook too, and so is a model in training mode.
    """
    changed = bool(_ACTIVE.get(module))
    found: list[str] = []

    def look(path: str, hooks: Mapping[Any, Any], kind: str) -> None:
        found.extend(
            f"{path or type(module).__name__}: {_name(hook)} ({kind})"
            for hook in hooks.values()
            if not _accounted(hook, changed=changed)
        )

    classes: dict[type[nn.Module], str] = {}
    for path, inner in module.named_modules():
        classes.setdefault(type(inner), path)
        look(path, inner._forward_pre_hooks, "forward pre-hook")
        look(path, inner._forward_hooks, "forward hook")
        own = _own_forward(inner)
        if own is not None and _origin(own) != type(inner).__module__:
            look(path, {0: own}, "replaced forward")
    for kind, path in classes.items():
        if (patch := _class_patch(kind)) is not None:
            look(path, {0: patch}, "replaced forward of the class")
    if module.training:
        found.append(f"{type(module).__name__}: training mode (dropout is random; call eval())")
    look("all modules", torch_module._global_forward_pre_hooks, "global forward pre-hook")
    look("all modules", torch_module._global_forward_hooks, "global forward hook")
    return tuple(found)


def record(module: nn.Module) -> dict[str, Any]:
    """Return what is done to a module as plain values: ``interventions`` and ``hooks``, each only where there are some."""
    changes = [one.record() for one in active(module)]
    hooks = list(unregistered_hooks(module))
    return {**({"interventions": changes} if changes else {}), **({"hooks": hooks} if hooks else {})}


def unknown(module: nn.Module) -> tuple[str, ...]:
    """Return what is done to a module and cannot be identified: unregistered hooks, changes without a digest."""
    opaque = (f"{one.kind} {one.name}" for one in active(module) if one.digest is None)
    return (*unregistered_hooks(module), *opaque)


def _accounted(hook: Any, *, changed: bool) -> bool:
    if getattr(hook, _OBSERVES, False) or (changed and getattr(hook, _REGISTERED, False)):
        return True
    return _package(_origin(hook)) in _LIBRARIES


def _origin(function: Any) -> str:
    """Return the module whose code a function runs, also where `functools.wraps` gave it the name of another."""
    while True:
        inner = getattr(function, "func", None) or getattr(function, "__func__", None)  # partial, bound method
        if inner is None:
            break
        function = inner
    where = getattr(function, "__globals__", {}).get("__name__") or getattr(function, "__module__", None)
    return str(where or type(function).__module__)


def _package(module: str) -> str:
    return module.partition(".")[0]


def _class_patch(kind: type[nn.Module]) -> Any:
    """Return the ``forward`` of a class where code of another package was put in its place, else None."""
    owner = next((c for c in kind.__mro__ if "forward" in vars(c)), None)
    forward = None if owner is None else vars(owner)["forward"]
    if forward is None or _package(_origin(forward)) in {_package(owner.__module__), *_CHECKERS}:
        return None
    return forward


def _own_forward(module: nn.Module) -> Any:
    """Return the ``forward`` that was set on a module itself; None where its class has it."""
    own = vars(module).get("forward")
    if not _from_nnsight(own):
        return own
    # nnsight's controller runs the forward that it found: the class's, or through a closure the module's own.
    found = getattr(getattr(own, "state", None), "original", None)
    if _from_nnsight(found):
        found = next((cell.cell_contents for cell in getattr(found, "__closure__", None) or ()), None)
    return None if found is getattr(type(module), "forward", None) else found


def _from_nnsight(function: Any) -> bool:
    sources = (type(function).__module__, getattr(function, "__module__", None))
    return any(str(source).partition(".")[0] == "nnsight" for source in sources)


def _name(hook: Any) -> str:
    where = getattr(hook, "__module__", None) or type(hook).__module__
    return f"{where}.{getattr(hook, '__qualname__', type(hook).__qualname__)}"


def _mark(hook: _Function, mark: str) -> _Function:
    setattr(getattr(hook, "__func__", hook), mark, True)
    return hook
