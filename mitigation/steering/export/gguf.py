"""Write a control vector for llama.cpp and other readers of its format (repeng, EasySteer)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from groundscope.core.errors import ConfigError
from groundscope.core.files import canonical_json, explained, whole
from mitigation.steering.export.capability import Capability, metadata_of, require
from mitigation.steering.export.residual_conversion import to_residual
from mitigation.steering.vector import SteeringVector

if TYPE_CHECKING:
    from lvlm.model import Lvlm

ARCHITECTURE = "controlvector"
CAPABILITY = Capability("llama.cpp", "output of block k, at every token", ("residual",), first_layer=1)
"""llama.cpp's loader refuses ``direction.0``, so the output of the first block cannot be steered."""


def _package() -> Any:
    """Return the module `gguf`; raises `ConfigError` if it is not installed."""
    try:
        import gguf as package
    except ImportError as error:
        msg = "the format gguf needs the package gguf: pip install gguf"
        raise ConfigError(msg) from error
    return package


def gguf(
    vector: SteeringVector,
    path: str | Path,
    model: Lvlm | None = None,
    *,
    strength: float | None = None,
    convert: bool = False,
) -> Path:
    """Write a GGUF control vector: ``direction.{k}`` float32 ``[D]`` for every layer k, for use with scale 1.

    llama.cpp adds ``direction.{k}`` to the output of block k, counted from 0, at every token (`llama_adapter_cvec`);
    names follow repeng: ``general.architecture`` is ``controlvector``, with ``controlvector.model_hint`` and
    ``controlvector.layer_count``. The metadata are the string ``groundscope.card``.

    Parameters
    ----------
    vector
        Additive vector at residual streams from layer 1 on, with positions ``all``.
    path
        Path of the file.
    model
        The model that the vector was derived for; required for a conversion, otherwise used only for the hint.
    strength
        Strength in units of sigma; by default the vector's.
    convert
        Convert heads and MLP outputs to the residual stream (`mitigation.steering.export.residual_conversion.to_residual`); the
        metadata record it.

    Raises
    ------
    ConfigError
        If the format cannot represent the vector, or for a conversion without the model.
    ModelError
        For a model that the vector was not derived for.
    StoreError
        If the file cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from pathlib import Path
    >>> from mitigation import AddChange, SteeringVector, export
    >>> from mitigation.steering.export.gguf import check
    >>> vector = SteeringVector({2: AddChange(np.eye(4)[0], sigma=3.0)}, "all", 1.0, "m", "c")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = export.gguf(vector, Path(folder) / "vector.gguf")
    ...     {layer: direction.tolist() for layer, direction in check(path).items()}
    {2: [3.0, 0.0, 0.0, 0.0]}
    """
    library = _package()
    vector = convert_to_residual(vector, model) if convert else vector
    require(vector, "gguf", CAPABILITY, convertible=not convert)
    if model is not None:
        vector.check(model)
    s = vector.scaled(vector.strength if strength is None else strength).strength
    path = Path(path)
    with explained(lambda reason: f"{path}: the control vector cannot be written: {reason}"), whole(path) as part:
        writer = library.GGUFWriter(part, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", vector.model if model is None else model.spec.model_type)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(vector.layers))
        writer.add_string("groundscope.card", canonical_json(metadata_of(vector, "gguf", s)))
        for layer, addition in vector.displacements(s).items():
            writer.add_tensor(f"direction.{layer}", addition.astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


def check(path: str | Path) -> dict[int, np.ndarray]:
    """Read a control vector by llama.cpp's rules, ``common_control_vector_load``: layer to direction, float32 ``[D]``.

    Raises
    ------
    ConfigError
        For a file that llama.cpp refuses: a direction without a layer or of layer 0, another type than F32, more than one
        axis, unequal lengths, or no directions.
    """
    library = _package()

    directions: dict[int, np.ndarray] = {}
    problems = []
    for tensor in library.GGUFReader(path).tensors:
        name, _, number = tensor.name.partition(".")
        layer = int(number) if number.isdecimal() else 0
        if name != "direction" or layer < 1:
            problems.append(f"'{tensor.name}' does not name a layer >= 1")
        elif tensor.tensor_type != library.GGMLQuantizationType.F32 or len(tensor.shape) != 1:
            problems.append(f"'{tensor.name}' is {tensor.tensor_type.name} {list(tensor.shape)}, not F32 with one axis")
        else:
            directions[layer] = np.array(tensor.data)
    if len({len(x) for x in directions.values()}) != 1:
        problems.append(f"directions have lengths {sorted({len(x) for x in directions.values()})}")
    if problems:
        msg = f"{path} is not a control vector for llama.cpp: {'; '.join(problems)}"
        raise ConfigError(msg)
    return directions


def convert_to_residual(vector: SteeringVector, model: Lvlm | None) -> SteeringVector:
    """Return a vector converted to the residual stream; raises `ConfigError` without the model."""
    if model is None:
        msg = f"{vector}: a conversion needs the model's output projections; pass model="
        raise ConfigError(msg)
    return to_residual(vector, model)


def card_in(path: str | Path) -> dict[str, object]:
    """Return the metadata that `gguf` wrote into a file."""
    library = _package()

    field = library.GGUFReader(path).get_field("groundscope.card")
    return {} if field is None else json.loads(field.contents())
