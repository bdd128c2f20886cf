"""Export steering vectors to files that other code loads: one module and one entry of `exports` per format.

===================  ======================================================  ===============================
format               consumer                                                places
===================  ======================================================  ===============================
`safetensors`        groundscope                                             all
`baked`              any Hugging Face code, through `apply_bias`             heads, layers, MLP outputs
`gguf`               llama.cpp                                               layers
`steering_vectors`   the package steering-vectors                            layers; heads with convert=True
`vllm`               vLLM through hotwire-vllm                               layers
`vti`                VTI's code                                              MLP outputs
===================  ======================================================  ===============================

`formats_for` lists the formats for a vector; `residual_conversion.to_residual` converts heads and MLP
outputs to the residual stream. `iti_activations` and `ict_activations` write the activations from which those papers' code
derives its own vectors.
"""

from __future__ import annotations

from groundscope.core.registry import Registry
from mitigation.steering.export import baked as _baked
from mitigation.steering.export import gguf as _gguf
from mitigation.steering.export import steering_vectors as _steering_vectors
from mitigation.steering.export import vllm as _vllm
from mitigation.steering.export import vti as _vti
from mitigation.steering.export.capability import EVERYTHING, Capability, Export, require
from mitigation.steering.export.ict_activations import ict_activations
from mitigation.steering.export.iti_activations import iti_activations
from mitigation.steering.export.safetensors import safetensors
from mitigation.steering.vector import SteeringVector

__all__ = [
    "Capability",
    "Export",
    "baked",
    "exports",
    "formats_for",
    "gguf",
    "ict_activations",
    "iti_activations",
    "require",
    "safetensors",
    "steering_vectors",
    "vllm",
    "vti",
]

baked, gguf, steering_vectors, vllm, vti = (
    _baked.baked,
    _gguf.gguf,
    _steering_vectors.steering_vectors,
    _vllm.vllm,
    _vti.vti,
)


def _problem(entry: Export) -> str | None:
    """Return why an entry cannot be registered."""
    if not isinstance(entry, Export) or not callable(entry.write):
        return "it must be a mitigation.export.Export with a function that writes a file"
    return None


exports: Registry[Export] = Registry(
    "export format",
    {
        "safetensors": Export(safetensors, EVERYTHING, ".safetensors"),
        "baked": Export(baked, _baked.CAPABILITY, ".safetensors"),
        "gguf": Export(gguf, _gguf.CAPABILITY, ".gguf"),
        "steering_vectors": Export(steering_vectors, _steering_vectors.CAPABILITY),
        "vllm": Export(vllm, _vllm.CAPABILITY),
        "vti": Export(vti, _vti.CAPABILITY),
    },
    group="groundscope.exports",
    check=_problem,
)
"""Formats by name; add one with ``exports.register(name, Export(write, capability))`` or an entry point."""


def formats_for(vector: SteeringVector) -> tuple[str, ...]:
    """Return the names of the formats that can represent a vector without conversion.

    Examples
    --------
    >>> import numpy as np
    >>> from mitigation import AddChange, SteeringVector, export
    >>> vector = SteeringVector({2: AddChange(np.eye(8)[0])}, "all", 1.0, "m", "c")
    >>> export.formats_for(vector)
    ('safetensors', 'baked', 'gguf', 'steering_vectors', 'vllm')
    """
    return tuple(name for name, form in exports.usable().items() if not form.capability.obstacles(vector))
