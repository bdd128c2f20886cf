"""Export a method that changes weights (Nullu) to files that other code loads.

====================  ============================================================
========================================= function              consumer
contents ====================  ============================================================
========================================= `subspace`            groundscope
directions, ``[rank, D]`` for each block `edited_weights`      any Hugging Face code: ``load_state_dict(…,
strict=False)``   the edited matrices, by parameter name `lora_adapter`        PEFT, vLLM, llama.cpp's LoRA converter
the change, as ``B A`` of the given rank `checkpoint`          everything that loads the model itself
the model, with edited weights ====================  ============================================================
=========================================

Formats of additions to activations cannot contain the change, because what a projection removes depends on the input:
``baked`` (biases), ``gguf`` (control vectors), ``steering_vectors``, ``vllm`` (hidden states) and ``vti``. They refuse
it by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from groundscope.core import artifacts
from groundscope.core.errors import ConfigError
from groundscope.core.files import canonical_json, explained
from mitigation.training_free.hallucination_subspace import edited, edited_layers
from mitigation.training_free.lens import at_least_float32

if TYPE_CHECKING:
    from torch import Tensor

    from lvlm.model import Lvlm
    from mitigation.training_free.methods.nullu import Nullu


def subspace(method: Nullu, path: str | Path) -> Path:
    """Write the directions as a safetensors file, which `HallucinationSubspace.load` reads.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import groundscope as gs
    >>> from mitigation.training_free import weight_export
    >>> from mitigation.training_free.hallucination_subspace import HallucinationSubspace
    >>> from mitigation.training_free.methods.nullu import Nullu
    >>> model = gs.load_lvlm("tiny")
    >>> method = Nullu.derive(gs.DerivationData(model, None, gs.scenes.dataset(60)), layers=(5,))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = weight_export.subspace(method, Path(folder) / "nullu.safetensors")
    ...     again = Nullu(subspace=HallucinationSubspace.load(path))
    >>> again.required_subspace().bases[5].shape
    (4, 192)
    """
    return method.required_subspace().save(path)


def edited_weights(method: Nullu, path: str | Path, model: Lvlm) -> Path:
    """Write the edited matrices as a safetensors file with the names of the model's parameters.

    ``model.load_state_dict(safetensors.torch.load_file(path), strict=False)`` loads it into any Hugging Face model.

    Raises
    ------
    ModelError
        For a model that the method was not derived for.
    StoreError
        If the file cannot be written.
    """
    method.check(model)
    with edited(model, method.required_subspace()) as weights:
        _write(Path(path), weights, {"groundscope": canonical_json(_card(method))})
    return Path(path)


def lora_adapter(method: Nullu, folder: str | Path, model: Lvlm) -> Path:
    """Write the change as a LoRA adapter in PEFT's layout: ``adapter_config.json`` and ``adapter_model.safetensors``.

    The change ``-V V^T W`` has the rank of V, so the adapter with ``B = -V`` and ``A = V^T W`` is exact (up to rounding
    in the type of the weights) for a model with the same weights, and for no other.

    Raises
    ------
    ConfigError
        For rank 0.
    ModelError
        For a model that the method was not derived for.
    StoreError
        If a file cannot be written.
    """
    method.check(model)
    directions = method.required_subspace()
    if not directions.rank:
        msg = "rank=0: there is no change to write"
        raise ConfigError(msg)
    names = {module: name for name, module in model.hf.named_modules()}
    tensors: dict[str, Tensor] = {}
    targets: list[str] = []
    for layer, linear in edited_layers(model, tuple(directions.bases)).items():
        weight = at_least_float32(linear.weight.detach())
        v = torch.from_numpy(directions.bases[layer].copy()).to(weight)  # [rank, D]
        targets.append(names[linear])
        prefix = f"base_model.model.{names[linear]}"
        tensors[f"{prefix}.lora_A.weight"] = (v @ weight).to(linear.weight.dtype)
        tensors[f"{prefix}.lora_B.weight"] = (-v.T).to(linear.weight.dtype)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.name,
        "r": directions.rank,
        "lora_alpha": directions.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": targets,
    }
    folder = Path(folder)
    _write(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    text = json.dumps(config, indent=2) + "\n"
    artifacts.write_bytes(folder / "adapter_config.json", text.encode(), "LoRA adapter")
    return folder


def checkpoint(method: Nullu, folder: str | Path, model: Lvlm) -> Path:
    """Write the model with edited weights, and its processor, as a folder that Hugging Face loads.

    Raises
    ------
    ModelError
        For a model that the method was not derived for.
    StoreError
        If the folder cannot be written.
    """
    method.check(model)
    folder = Path(folder)
    with (
        edited(model, method.required_subspace()),
        explained(lambda reason: f"{folder}: the checkpoint cannot be written: {reason}"),
    ):
        model.hf.save_pretrained(folder)
        if hasattr(model.processor, "save_pretrained"):
            model.processor.save_pretrained(folder)
    return folder


def _card(method: Nullu) -> dict[str, Any]:
    return {"rule": "replace each parameter by the tensor of its name", "method": method.name, **method.parameters}


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors.torch import save

    data = save({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, metadata)
    artifacts.write_bytes(path, data, "weights file")
