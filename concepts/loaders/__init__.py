"""People's own questions and annotations as `ConceptDataset`.

A loader has the name of its module, so the functions are bound here at once: bound on first use, ``loaders.pope`` would
become the module for whoever imported that first. The modules are light.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from concepts.loaders.pope import pope
from concepts.schema import ConceptDataset

__all__ = ["LOADERS", "pope"]

LOADERS: Mapping[str, Callable[..., ConceptDataset]] = MappingProxyType({"pope": pope})
"""Name of a format to its loader."""
