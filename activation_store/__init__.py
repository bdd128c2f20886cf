"""What was seen inside the model: activations on disk, written by a tracer, read with numpy and h5py alone.

Nothing heavy is imported before it is used: ``ActivationStore`` needs no torch, only ``trace`` needs a model.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from activation_store.direction import Direction
    from activation_store.format.ragged import Ragged
    from activation_store.format.schema import ArrayInfo, Schema
    from activation_store.merging import merge, repack
    from activation_store.reading.integrity import Report, verify
    from activation_store.reading.store import ActivationStore
    from activation_store.tracing.tracer import trace
    from activation_store.writing.writer import StoreWriter

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
    "ActivationStore": "activation_store.reading.store",
    "ArrayInfo": "activation_store.format.schema",
    "Direction": "activation_store.direction",
    "Ragged": "activation_store.format.ragged",
    "Report": "activation_store.reading.integrity",
    "Schema": "activation_store.format.schema",
    "StoreWriter": "activation_store.writing.writer",
    "merge": "activation_store.merging",
    "repack": "activation_store.merging",
    "trace": "activation_store.tracing.tracer",
    "verify": "activation_store.reading.integrity",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOME:
        msg = f"module 'activation_store' has no attribute '{name}'"
        raise AttributeError(msg)
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
