"""Files that other code loads a steering vector from: one function a format, by name in `EXPORTS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from circuits.export.baked import baked
from circuits.export.native import safetensors

__all__ = ["EXPORTS", "baked", "safetensors"]

EXPORTS: Mapping[str, Callable[..., Any]] = MappingProxyType({"safetensors": safetensors, "baked": baked})
"""Name of a format to the function that writes it: ``(vector, path, …) -> path``."""
