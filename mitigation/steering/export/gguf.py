"""A control vector for llama.cpp, and for what reads the same file: repeng, EasySteer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from groundscope.core.errors import ConfigError
from groundscope.core.files import canonical_json, explained, whole
from mitigation.steering.export.capabilities import Ability, card_of, displacement, require
from mitigation.steering.export.convert import to_residual
from mitigation.steering.vector import SteeringVector

if TYPE_CHECKING:
    from lvlm.model import Lvlm

ARCHITECTURE = "controlvector"
ABILITY = Ability("llama.cpp", "output of block k, at every token", ("residual",), first_layer=1)
"""llama.cpp's loader refuses ``direction.0``: the output of the first block cannot be named."""


def _package() -> Any:
    """Return the module `gguf`; raises `ConfigError` where it is not installed."""
    try:
        import gguf as package
    except ImportError as error:
        msg = "the format gguf needs the package gguf: pip install 'groundscope[gguf]'"
        raise ConfigError(msg) from error
    return package


def gguf(
    vector: SteeringVector,
    path: str | Path,
    model: Lvlm | None = None,
    strength: float | None = None,
    *,
    convert: bool = False,
) -> Path:
    """Write a GGUF control vector: ``direction.{k}`` float32 ``[D]`` for every layer k, to be used with scale 1.

    llama.cpp adds ``direction.{k}`` to the output of block k, counted from 0, at every token (`llama_adapter_cvec`);
    names follow repeng: ``general.architecture`` is ``controlvector``, with ``controlvector.model_hint`` and
    ``controlvector.layer_count``. The card is the string ``groundscope.card``. Needs the package ``gguf``
    (``pip install groundscope[gguf]``).

    Parameters
    ----------
    vector
        Additive, at residual streams from layer 1 on, with positions ``all``.
    path
        Of the file.
    model
        The model it was made for; needed to convert, else used for the hint.
    strength
        In units of sigma; by default the vector's own.
    convert
        Carry heads and MLP outputs to the residual stream (`mitigation.steering.export.convert.to_residual`); the card says so.

    Raises
    ------
    ConfigError
        Where the format cannot express the vector, or a conversion is asked for without the model.
    ModelError
        For a model that the vector was not made for.
    StoreError
        Where the file cannot be written.
    """
    library = _package()
    vector = converted(vector, model) if convert else vector
    require(vector, "gguf", ABILITY, convertible=not convert)
    if model is not None:
        vector.check(model)
    s = vector.scaled(vector.strength if strength is None else strength).strength
    path = Path(path)
    with explained(lambda reason: f"{path}: the control vector cannot be written: {reason}"), whole(path) as part:
        writer = library.GGUFWriter(part, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", vector.model if model is None else model.spec.model_type)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(vector.layers))
        writer.add_string("groundscope.card", canonical_json(card_of(vector, "gguf", s)))
        for layer in vector.layers:
            writer.add_tensor(f"direction.{layer}", displacement(vector.entries[layer], s).astype(np.float32))
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
        For what llama.cpp refuses: a direction of layer 0 or of no layer, another type than F32, more than one axis,
        unequal lengths, none at all.
    """
    library = _package()

    found: dict[int, np.ndarray] = {}
    wrong = []
    for tensor in library.GGUFReader(path).tensors:
        name, _, number = tensor.name.partition(".")
        layer = int(number) if number.isdecimal() else 0
        if name != "direction" or layer < 1:
            wrong.append(f"'{tensor.name}' names no layer from 1 on")
        elif tensor.tensor_type != library.GGMLQuantizationType.F32 or len(tensor.shape) != 1:
            wrong.append(f"'{tensor.name}' is {tensor.tensor_type.name} {list(tensor.shape)}, not F32 with one axis")
        else:
            found[layer] = np.array(tensor.data)
    if len({len(x) for x in found.values()}) != 1:
        wrong.append(f"directions have lengths {sorted({len(x) for x in found.values()})}")
    if wrong:
        msg = f"{path} is no control vector for llama.cpp: {'; '.join(wrong)}"
        raise ConfigError(msg)
    return found


def converted(vector: SteeringVector, model: Lvlm | None) -> SteeringVector:
    """Return a vector carried to the residual stream; raises `ConfigError` without the model."""
    if model is None:
        msg = f"{vector}: a conversion needs the model's output projections; pass model="
        raise ConfigError(msg)
    return to_residual(vector, model)


def card_in(path: str | Path) -> dict[str, object]:
    """Return the card that `gguf` wrote into a file."""
    library = _package()

    field = library.GGUFReader(path).get_field("groundscope.card")
    return {} if field is None else json.loads(field.contents())
