"""Checks at load: every weight is in the checkpoint, the device exists, and sizes in settings files are plausible."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from groundscope.core.errors import ModelError
from groundscope.core.text import nearest

LEFTOVERS: Mapping[str, tuple[str, ...]] = {
    "": (
        r"rotary_emb\.inv_freq$",
        r"rotary_pos_emb\.inv_freq$",
        r"\.position_ids$",
        r"\.masked_bias$",
        r"\.attn\.bias$",
        r"\.num_batches_tracked$",
    ),
    "llava_onevision": (r"vision_(model|tower)\..*\.head\.",),
    "gemma3": (r"vision_(model|tower)\..*\.head\.",),
    "paligemma": (r"vision_(model|tower)\..*\.head\.",),
}
"""By model type, patterns of tensors in released checkpoints that their models do not use: former buffers, and heads of a
tower that only pretraining used. The empty name holds for every family."""
_LISTED = 3
"""Number of tensors listed in a message."""
_MAX_LAYERS = 2048
_MAX_SIDE = 1 << 14


def check_loading(model: nn.Module, info: Mapping[str, Iterable[Any]], name: str) -> tuple[str, ...]:
    """Check transformers' report on loading; return the tensors of the checkpoint that the model does not use.

    Parameters
    ----------
    model
        The model that was loaded.
    info
        Its ``output_loading_info``.
    name
        Name of the model in errors.

    Returns
    -------
    tuple of str
        Sorted names of unused tensors, without `LEFTOVERS` of the family.

    Raises
    ------
    ModelError
        If weights are missing or have another shape: transformers would initialize them at random. Weights that are tied to
        a loaded weight are not missing.
    """
    missing = sorted(set(info.get("missing_keys", ())))
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    loaded = {id(tensor) for key, tensor in tensors.items() if key not in missing}
    missing = [key for key in missing if key not in tensors or id(tensors[key]) not in loaded]
    model_type = str(getattr(getattr(model, "config", None), "model_type", ""))
    harmless = [re.compile(p) for p in (*LEFTOVERS[""], *LEFTOVERS.get(model_type, ()))]
    unused = sorted(k for k in set(info.get("unexpected_keys", ())) if not any(p.search(k) for p in harmless))
    wrong = sorted(str(key[0]) for key in info.get("mismatched_keys", ()))
    parameters = {key for key, _ in model.named_parameters()}
    needed = _list([_both_names(model, tensors, key) for key in (missing or wrong)[:_LISTED]], len(missing or wrong))
    if missing and parameters <= {*missing}:
        msg = (
            f"model '{name}': no name of its checkpoint matches a weight of {type(model).__name__}: the model needs "
            f"{needed}, the checkpoint has {_list(unused) or 'no tensors'}; rename the tensors, or load the model that they "
            "belong to"
        )
        raise ModelError(msg)
    if missing or wrong:
        also = f"; the checkpoint also has unused tensors: {_list(unused)}" if unused else ""
        problem = "lacks weights of" if missing else "has weights of another shape than"
        msg = (
            f"model '{name}': its checkpoint {problem} {type(model).__name__}: {needed}{also}; "
            "they would be initialized at random, so get the full checkpoint"
        )
        raise ModelError(msg)
    return tuple(unused)


def check_device(device: str) -> None:
    """Raise `ModelError` for a device that is unknown to torch or not available."""
    if device == "auto":
        return
    available = devices()
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        parsed = None
    names = () if parsed is None else (str(parsed), parsed.type if parsed.index is None else "")
    if not any(name in (*available, "cpu:0") for name in names):
        choices = (*available, "auto")
        msg = f"device '{device}' is not available; choose from {', '.join(choices)}{nearest(str(device), choices)}"
        raise ModelError(msg)


def devices() -> tuple[str, ...]:
    """Return the devices that torch can use: ``cpu``, ``cuda``, ``cuda:0``, ..."""
    names = ["cpu"]
    for kind in ("cuda", "mps", "xpu", "npu"):
        backend: Any = torch.backends.mps if kind == "mps" else getattr(torch, kind, None)
        if backend is None or not backend.is_available():
            continue
        count = 1 if kind == "mps" else int(backend.device_count())
        names += [kind, *(f"{kind}:{n}" for n in range(count))]
    return tuple(names)


def check_sizes(config: Any, name: str) -> None:
    """Raise `ModelError` for a configuration with more than `_MAX_LAYERS` layers, which would take too long to build."""

    def walk(values: Mapping[str, Any], path: str) -> None:
        for key, value in values.items():
            field = f"{path}{key}"
            if isinstance(value, Mapping):
                walk(value, f"{field}.")
            elif (
                re.search(r"(^|_)(layers|depths?|blocks)$", str(key)) and isinstance(value, int) and value > _MAX_LAYERS
            ):
                msg = f"model '{name}': config.json has {field}={value}; at most {_MAX_LAYERS} layers are allowed"
                raise ModelError(msg)

    walk(config.to_dict(), "")


def check_pixels(processor: Any, name: str) -> None:
    """Raise `ModelError` if an image processor would enlarge every image to more than `_MAX_SIDE` pixels per side."""
    pictures = getattr(processor, "image_processor", None)
    settings = pictures.to_dict() if pictures is not None and hasattr(pictures, "to_dict") else {}
    for field in ("size", "crop_size"):
        value = settings.get(field)
        sides = dict(value) if isinstance(value, Mapping) else {}
        if {"shortest_edge", "longest_edge"} <= {*sides}:
            continue  # in some families these are areas in pixels
        for side, length in sides.items():
            if isinstance(length, int) and length > _MAX_SIDE:
                msg = (
                    f"the image processor of {name} has {field}.{side}={length} and would enlarge every image to it; at most "
                    f"{_MAX_SIDE} is allowed"
                )
                raise ModelError(msg)


def unwrap(model: Any) -> Any:
    """Return the model inside ``DataParallel``, ``DistributedDataParallel`` and ``torch.compile``; other models unchanged."""
    while True:
        inner = getattr(model, "_orig_mod", None)  # torch.compile
        if inner is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _both_names(model: nn.Module, tensors: Mapping[str, torch.Tensor], key: str) -> str:
    """Return the name of a weight, with its name in checkpoint files if transformers renames it on loading."""
    try:
        from transformers.core_model_loading import revert_weight_conversion

        shell = torch.empty(tensors[key].shape, device="meta")
        stored = next(iter(revert_weight_conversion(model, {key: shell})))  # type: ignore[arg-type]
    except (ImportError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, StopIteration):
        # This function of transformers is not public, and differs among releases.
        stored = key
    return key if stored == key else f"{key} ('{stored}' in its files)"


def _list(names: list[str], count: int | None = None) -> str:
    count = len(names) if count is None else count
    more = f" and {count - _LISTED} more" if count > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
