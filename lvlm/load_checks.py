"""What a checkpoint must bring: every weight of its model, on a device that exists, of sizes that can be."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from groundscope.core.errors import ModelError

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
"""By model type, patterns of tensors that released checkpoints carry and their models have no use for: what used to be a
stored buffer, heads of a tower that only pretraining used. Those under the empty name hold for every family."""
_SHOWN = 3
_MOST_LAYERS = 2048
_MOST_SIDE = 1 << 14


def check_loading(model: nn.Module, info: Mapping[str, Iterable[Any]], name: str) -> tuple[str, ...]:
    """Check what transformers reports of a loading; return the tensors of the checkpoint that the model does not use.

    Parameters
    ----------
    model
        The model that was loaded.
    info
        Its ``output_loading_info``.
    name
        What to call the model in errors.

    Returns
    -------
    tuple of str
        Sorted names of unused tensors, without `LEFTOVERS` of the family.

    Raises
    ------
    ModelError
        Where weights are missing, which transformers would draw at random: names them. Weights tied to one that was
        loaded are not missing.
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
    needed = _listed([_both_names(model, tensors, key) for key in (missing or wrong)[:_SHOWN]], len(missing or wrong))
    if missing and parameters <= {*missing}:
        msg = (
            f"model '{name}': no name of its checkpoint matches a weight of {type(model).__name__}: the model needs "
            f"{needed}, the checkpoint has {_listed(unused) or 'no tensors'}; rename the tensors or load the "
            "model that they belong to"
        )
        raise ModelError(msg)
    if missing or wrong:
        also = f"; the checkpoint also has tensors without use: {_listed(unused)}" if unused else ""
        what = "lacks weights of" if missing else "has weights of another shape than"
        msg = (
            f"model '{name}': its checkpoint {what} {type(model).__name__}: {needed}{also}; "
            "they would be drawn at random, so get the whole checkpoint"
        )
        raise ModelError(msg)
    return tuple(unused)


def check_device(device: str) -> None:
    """Raise `ModelError` for a device that torch does not know or this machine lacks; names those that it has."""
    if device == "auto":
        return
    available = devices()
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        wanted = None
    there = wanted is not None and (str(wanted) in available or (wanted.type in available and wanted.index is None))
    if wanted is None or not (there or str(wanted) == "cpu:0"):
        msg = f"device '{device}': this machine has {', '.join(available)}; choose one of them, or 'auto'"
        raise ModelError(msg)


def devices() -> tuple[str, ...]:
    """Return the devices that torch can use on this machine: ``cpu``, ``cuda``, ``cuda:0``, ..."""
    found = ["cpu"]
    for kind in ("cuda", "mps", "xpu", "npu"):
        backend: Any = torch.backends.mps if kind == "mps" else getattr(torch, kind, None)
        if backend is None or not backend.is_available():
            continue
        count = 1 if kind == "mps" else int(backend.device_count())
        found += [kind, *(f"{kind}:{n}" for n in range(count))]
    return tuple(found)


def check_sizes(config: Any, name: str) -> None:
    """Raise `ModelError` for a configuration whose number of layers no model has: building it would not end."""

    def walk(values: Mapping[str, Any], path: str) -> None:
        for key, value in values.items():
            where = f"{path}{key}"
            if isinstance(value, Mapping):
                walk(value, f"{where}.")
            elif (
                re.search(r"(^|_)(layers|depths?|blocks)$", str(key))
                and isinstance(value, int)
                and value > _MOST_LAYERS
            ):
                msg = f"model '{name}': config.json has {where}={value}; at most {_MOST_LAYERS} layers are built"
                raise ModelError(msg)

    walk(config.to_dict(), "")


def check_pixels(processor: Any, name: str) -> None:
    """Raise `ModelError` where an image processor would enlarge every image beyond `_MOST_SIDE` pixels a side."""
    pictures = getattr(processor, "image_processor", None)
    settings = pictures.to_dict() if pictures is not None and hasattr(pictures, "to_dict") else {}
    for field in ("size", "crop_size"):
        value = settings.get(field)
        sides = dict(value) if isinstance(value, Mapping) else {}
        if {"shortest_edge", "longest_edge"} <= {*sides}:
            continue  # numbers of pixels in some families
        for side, length in sides.items():
            if isinstance(length, int) and length > _MOST_SIDE:
                msg = (
                    f"the image processor of {name} has {field}.{side}={length}: every image would be enlarged to it; at most "
                    f"{_MOST_SIDE} is accepted"
                )
                raise ModelError(msg)


def unwrapped(model: Any) -> Any:
    """Return the model inside ``DataParallel``, ``DistributedDataParallel`` and ``torch.compile``; any other as given."""
    while True:
        inner = getattr(model, "_orig_mod", None)  # torch.compile
        if inner is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _both_names(model: nn.Module, tensors: Mapping[str, torch.Tensor], key: str) -> str:
    """Return the name of a weight, followed by its name in checkpoint files where transformers renames it on loading."""
    try:
        from transformers.core_model_loading import revert_weight_conversion

        shell = torch.empty(tensors[key].shape, device="meta")
        stored = next(iter(revert_weight_conversion(model, {key: shell})))  # type: ignore[arg-type]
    except (ImportError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, StopIteration):  # not public
        stored = key
    return key if stored == key else f"{key} ('{stored}' in its files)"


def _listed(names: list[str], count: int | None = None) -> str:
    count = len(names) if count is None else count
    more = f" and {count - _SHOWN} more" if count > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
