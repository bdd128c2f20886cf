"""People's own questions and annotations as `ConceptDataset`.

A loader has the name of its module, so the functions are bound here at once: bound on first use, ``loaders.pope`` would
become the module for whoever imported that first. The modules are light.

Every loader reads a file of any size a record at a time, names file, record and field in its errors, counts in the
provenance what it left out, and looks at every image's header before it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from concepts.loaders.amber import amber
from concepts.loaders.aro import aro
from concepts.loaders.clevr import clevr
from concepts.loaders.coco import coco
from concepts.loaders.gqa import gqa
from concepts.loaders.mme import mme
from concepts.loaders.pope import pope
from concepts.loaders.sugarcrepe import sugarcrepe
from concepts.loaders.visual_genome import visual_genome
from concepts.loaders.vsr import vsr
from concepts.loaders.whatsup import whatsup
from concepts.schema import ConceptDataset

__all__ = [
    "LOADERS",
    "amber",
    "aro",
    "clevr",
    "coco",
    "gqa",
    "mme",
    "pope",
    "sugarcrepe",
    "visual_genome",
    "vsr",
    "whatsup",
]

LOADERS: Mapping[str, Callable[..., ConceptDataset]] = MappingProxyType(
    {
        "amber": amber,
        "aro": aro,
        "clevr": clevr,
        "coco": coco,
        "gqa": gqa,
        "mme": mme,
        "pope": pope,
        "sugarcrepe": sugarcrepe,
        "visual_genome": visual_genome,
        "vsr": vsr,
        "whatsup": whatsup,
    }
)
"""Name of a format to its loader; each takes a file and the folder of its images first."""
