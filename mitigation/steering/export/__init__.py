"""Export steering vectors to files that other code loads: one function per format, by name in `FORMATS`.

`iti` and `ict` write the activations from which those papers' code derives its own vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from mitigation.steering.export import baked as _baked
from mitigation.steering.export import gguf as _gguf
from mitigation.steering.export import steering_vectors as _steering_vectors
from mitigation.steering.export import vllm as _vllm
from mitigation.steering.export import vti as _vti
from mitigation.steering.export.capabilities import EVERYTHING, Ability
from mitigation.steering.export.ict import ict
from mitigation.steering.export.iti import iti
from mitigation.steering.native_format import safetensors
from mitigation.steering.vector import SteeringVector

__all__ = [
    "EXPORTS",
    "FORMATS",
    "Format",
    "baked",
    "formats_for",
    "gguf",
    "ict",
    "iti",
    "safetensors",
    "steering_vectors",
    "vllm",
    "vti",
]


@dataclass(frozen=True)
class Format:
    """An export format: its writer, and the vectors that it can represent."""

    write: Callable[..., Any]
    """``(vector, path, model, …) -> path``."""
    ability: Ability


baked, gguf, steering_vectors, vllm, vti = (
    _baked.baked,
    _gguf.gguf,
    _steering_vectors.steering_vectors,
    _vllm.vllm,
    _vti.vti,
)

FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "safetensors": Format(safetensors, EVERYTHING),
        "baked": Format(baked, _baked.ABILITY),
        "gguf": Format(gguf, _gguf.ABILITY),
        "steering_vectors": Format(steering_vectors, _steering_vectors.ABILITY),
        "vllm": Format(vllm, _vllm.ABILITY),
        "vti": Format(vti, _vti.ABILITY),
    }
)
"""All formats by name."""

EXPORTS: Mapping[str, Callable[..., Any]] = MappingProxyType({name: form.write for name, form in FORMATS.items()})
"""Format name to its writer: ``(vector, path, …) -> path``."""


def formats_for(vector: SteeringVector) -> tuple[str, ...]:
    """Return the names of the formats that can represent a vector without conversion."""
    return tuple(name for name, form in FORMATS.items() if not form.ability.obstacles(vector))
