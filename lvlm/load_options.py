"""Options of `lvlm.load_lvlm` as arguments of transformers: number type, placement, attention, quantization, pixels."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from groundscope.core.errors import ModelError
from groundscope.core.text import nearest
from lvlm.embedded_models import EMBEDDED, folder_of
from lvlm.load_checks import check_device

DTYPES = {d: getattr(torch, d) for d in ("float32", "bfloat16", "float16", "float64")}
"""Number types of weights by name."""
AUTO = "auto"
"""The number type in which the checkpoint is stored."""
MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Ways in which accelerate distributes a model."""
BITS: Mapping[str, Mapping[str, Any]] = {
    "8bit": {"load_in_8bit": True},
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"},
}
"""Short names of settings of bitsandbytes."""
_STORED = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_HEADER = 1 << 26
"""Largest size of the header of a safetensors file, in bytes."""


def dtype_name(dtype: str | torch.dtype) -> str:
    """Return the name of a number type, ``auto`` included; raises `ModelError` for an unknown one."""
    name = str(dtype).removeprefix("torch.")
    if name != AUTO and name not in DTYPES:
        choices = (AUTO, *DTYPES)
        msg = f"unknown dtype '{name}'; choose from {', '.join(choices)}{nearest(name, choices)}"
        raise ModelError(msg)
    return name


def checkpoint_dtype(source: str | Path, config: Any = None) -> str:
    """Return the number type in which a checkpoint is stored, ``auto`` if its files do not say.

    The embedded models are stored in bfloat16 to save space and compute in float32.

    Parameters
    ----------
    source
        Name of an embedded model, folder or Hugging Face id.
    config
        Its configuration, if it is already read; by default ``config.json`` of the folder.

    Examples
    --------
    >>> from lvlm.load_options import checkpoint_dtype
    >>> checkpoint_dtype("tiny")
    'float32'
    """
    folder = folder_of(source)
    if any(folder == folder_of(name) for name in EMBEDDED):
        return "float32"
    values: Mapping[str, Any] = config.to_dict() if config is not None else _json(folder / "config.json")
    for part in (values, values.get("text_config")):
        for key in ("dtype", "torch_dtype"):
            name = str(part.get(key)).removeprefix("torch.") if isinstance(part, Mapping) else ""
            if name in DTYPES:
                return name
    return _first_stored(folder) if folder.is_dir() else AUTO


def placement(
    device: str, device_map: str | Mapping[str, Any] | None, max_memory: Mapping[Any, Any] | None, *, quantized: bool
) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` that place a model; empty if it is loaded in main memory.

    Raises
    ------
    ModelError
        If a device does not exist, two options contradict each other, or accelerate is missing where it is needed.
    """
    check_device(device)
    if device == AUTO and device_map is None:
        device_map = AUTO
    elif device_map is not None and device not in ("cpu", AUTO):
        msg = f"device='{device}' and device_map={device_map!r} both place the model; give one of them"
        raise ModelError(msg)
    if max_memory is not None and device_map is None:
        msg = "max_memory limits the parts of a distributed model; add device_map='auto'"
        raise ModelError(msg)
    if isinstance(device_map, str) and device_map not in MAPS:
        check_device(device_map)
    if isinstance(device_map, Mapping):
        for place in device_map.values():
            if place != "disk":
                check_device(f"cuda:{place}" if isinstance(place, int) else str(place))
    installed = find_spec("accelerate") is not None
    if device_map is not None and not installed:
        msg = f"device_map={device_map!r} needs the package accelerate, which is not installed; run pip install accelerate"
        raise ModelError(msg)
    if device_map is not None:
        limits = {} if max_memory is None else {"max_memory": {_gpu(k): v for k, v in max_memory.items()}}
        return {"device_map": dict(device_map) if isinstance(device_map, Mapping) else device_map, **limits}
    # Straight to the device: a copy in main memory first would take as much memory as the weights.
    return {"device_map": {"": device}} if installed and (quantized or device != "cpu") else {}


def quantization(settings: Any) -> Any:
    """Return transformers' configuration of a quantization from settings, a short name of `BITS`, or such an object.

    Raises
    ------
    ModelError
        If the name is unknown, the settings are invalid, or bitsandbytes is needed and missing.
    """
    if settings is None or hasattr(settings, "quant_method"):
        return settings
    if isinstance(settings, str):
        if settings not in BITS:
            msg = (
                f"unknown quantization_config '{settings}'; choose from {', '.join(BITS)}{nearest(settings, BITS)}, or give "
                "the settings of a method of transformers"
            )
            raise ModelError(msg)
        settings = BITS[settings]
    if not isinstance(settings, Mapping):
        msg = f"quantization_config is a {type(settings).__name__}; give settings, or one of {', '.join(BITS)}"
        raise ModelError(msg)
    from transformers.quantizers.auto import AutoQuantizationConfig

    try:
        config = AutoQuantizationConfig.from_dict(dict(settings))
    except (ValueError, TypeError, ImportError, AttributeError) as error:
        text = str(error).strip().splitlines()
        msg = f"quantization_config={dict(settings)}: {text[0] if text else type(error).__name__}"
        raise ModelError(msg) from error
    if "bitsandbytes" in str(config.quant_method).lower().replace("_", "") and find_spec("bitsandbytes") is None:
        msg = (
            "quantization_config needs the package bitsandbytes, which is not installed; run pip install bitsandbytes, or load "
            "the model in its own dtype"
        )
        raise ModelError(msg)
    return config


def check_attention(name: str | None) -> None:
    """Raise `ModelError` for an attention implementation that transformers does not know."""
    if name is None or "/" in name:  # with a slash: a kernel from the Hub
        return
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    choices = sorted(
        {"eager", "sdpa", *(k for k in ALL_ATTENTION_FUNCTIONS.valid_keys() if "groundscope" not in k and "|" not in k)}
    )
    if name not in choices:
        msg = f"unknown attn_implementation '{name}'; choose from {', '.join(choices)}{nearest(name, choices)}"
        raise ModelError(msg)


def limit_pixels(processor: Any, view: str, name: str, low: int | None, high: int | None) -> None:
    """Set the smallest and largest number of pixels to which an image is resized.

    Parameters
    ----------
    processor
        Its image processor is changed.
    view
        The family's `FamilySpec.view`.
    name
        Name of the model in errors.
    low, high
        Numbers of pixels of an image; None leaves the model's own setting.

    Raises
    ------
    ModelError
        If the family resizes images otherwise, or a number is not positive or the smallest exceeds the largest.
    """
    if low is None and high is None:
        return
    pictures = processor.image_processor
    size = getattr(pictures, "size", None)
    own_low, own_high = _side(size, "shortest_edge"), _side(size, "longest_edge")
    if view != "packed" or own_low is None or own_high is None:
        msg = (
            f"min_pixels and max_pixels: {type(pictures).__name__} of {name} does not scale images by their number of pixels; "
            "they are for families that read images at their own resolution (Qwen-VL, GLM-4V)"
        )
        raise ModelError(msg)
    least, most = int(own_low if low is None else low), int(own_high if high is None else high)
    if not 0 < least <= most:
        msg = f"min_pixels={least} and max_pixels={most}: both must be above 0, and the first at most the second"
        raise ModelError(msg)
    pictures.size = {"shortest_edge": least, "longest_edge": most}
    for field, value in (("min_pixels", least), ("max_pixels", most)):
        if hasattr(pictures, field):
            setattr(pictures, field, value)


def _side(size: Any, name: str) -> Any:
    return size.get(name) if isinstance(size, Mapping) else getattr(size, name, None)


def _gpu(key: Any) -> Any:
    """Return the number of a GPU as a number: a file of options has it as text."""
    return int(key) if isinstance(key, str) and key.isdecimal() else key


def _json(path: Path) -> Mapping[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, Mapping) else {}


def _first_stored(folder: Path) -> str:
    """Return the number type of the first floating tensor in a folder's safetensors files; ``auto`` without such a tensor."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length)) if length <= _HEADER else {}
        except (OSError, ValueError, struct.error, RecursionError):
            continue
        for name, tensor in header.items():
            if name != "__metadata__" and tensor.get("dtype") in _STORED:
                return _STORED[tensor["dtype"]]
    return AUTO
