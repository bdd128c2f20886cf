"""What can be read from activations: linear probes at every layer and head, with the controls that make them believable.

A store is enough: nothing here imports a model.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probes.fit import fit_grid
    from probes.grid import Cell, ProbeGrid
    from probes.inputs import probeable
    from probes.solver import LogisticFit, fit_logistic

__all__ = ["Cell", "LogisticFit", "ProbeGrid", "fit_grid", "fit_logistic", "probeable"]

_HOME = {
    "Cell": "grid",
    "LogisticFit": "solver",
    "ProbeGrid": "grid",
    "fit_grid": "fit",
    "fit_logistic": "solver",
    "probeable": "inputs",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        msg = f"module 'probes' has no attribute '{name}'"
        raise AttributeError(msg)
    return getattr(import_module(f"probes.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
