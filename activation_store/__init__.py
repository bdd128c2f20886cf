"""What was seen inside the model: activations on disk, written by a tracer, read with numpy and h5py alone.

Nothing heavy is imported before it is used: ``ActivationStore`` needs no torch, only ``trace`` needs a model.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from activation_store.direction import Direction
    from activation_store.integrity import Report, verify
    from activation_store.layout import ArrayInfo, Schema
    from activation_store.ragged import Ragged
    from activation_store.rewrite import merge, repack
    from activation_store.store import ActivationStore
    from activation_store.tracer import trace
    from activation_store.writer import StoreWriter

__all__ = [
    "ActivationStore",
    "ArrayInfo",
    "Direction",
    "Ragged",
    "Report",
    "Schema",
    "StoreWriter",
    "merge",
    "repack",
    "trace",
    "verify",
]

_HOME = {
    "ActivationStore": "store",
    "ArrayInfo": "layout",
    "Direction": "direction",
    "Ragged": "ragged",
    "Report": "integrity",
    "Schema": "layout",
    "StoreWriter": "writer",
    "merge": "rewrite",
    "repack": "rewrite",
    "trace": "tracer",
    "verify": "integrity",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        msg = f"module 'activation_store' has no attribute '{name}'"
        raise AttributeError(msg)
    return getattr(import_module(f"activation_store.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
