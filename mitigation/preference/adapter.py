"""A trained LoRA adapter: a folder in the format of PEFT, and tuned copies of the model."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from groundscope.core import artifacts
from groundscope.core.errors import ModelError, StoreError
from groundscope.core.short_repr import short_repr
from groundscope.core.tensor_files import encode_tensors, read_tensors
from groundscope.core.user_files import read_json
from lvlm.model import Lvlm
from mitigation.preference.lora import linear_layers

WEIGHTS, CONFIG, RECORD = "adapter_model.safetensors", "adapter_config.json", "groundscope.json"
"""Files of an adapter's folder: the first two are PEFT's."""
FORMAT, VERSION = "groundscope.adapter", 1
_PREFIX = "base_model.model."
"""Beginning of the names of tensors in PEFT's files."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """Low-rank matrices added to linear layers of a model: ``W + (alpha / r) B A``.

    Examples
    --------
    The identity adapter of one layer:

    >>> import numpy as np
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> path = "model.language_model.layers.5.self_attn.o_proj"
    >>> about = (model.name, model.config_hash, model.weights_hash)
    >>> adapter = gs.Adapter({path: np.ones((2, 192), np.float32)}, {path: np.zeros((192, 2), np.float32)}, 4.0, *about)
    >>> adapter.rank, adapter.merged(model).weights_hash == model.weights_hash
    (2, True)
    """

    down: Mapping[str, np.ndarray]
    """A of each linear layer by its path in the model, float32 ``[r, in]``."""
    up: Mapping[str, np.ndarray]
    """B, float32 ``[out, r]``."""
    alpha: float
    model: str
    """Name of the model that was tuned."""
    config_hash: str
    weights_hash: str
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Options, digests of the preferences and of their parts, and the history of the training."""

    __repr__ = short_repr

    def __post_init__(self) -> None:
        for name in ("down", "up", "provenance"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
        artifacts.freeze(self)
        shapes = {path: (a.shape, self.up[path].shape) for path, a in self.down.items() if path in self.up}
        fits = [len(a) == len(b) == 2 and a[0] == b[1] == self.rank for a, b in shapes.values()]
        if not fits or len(shapes) != len(self.up) or len(shapes) != len(self.down) or not all(fits):
            msg = (
                "an adapter needs one matrix [r, in] in down and one [out, r] in up for each linear layer, with equal r; give "
                "both matrices of each layer"
            )
            raise ModelError(msg)

    @property
    def rank(self) -> int:
        """r, the rank of every addition."""
        return len(next(iter(self.down.values()), ()))

    def merged(self, model: Lvlm) -> Lvlm:
        """Return a copy of the model with the additions in its weights; all other weights are shared with the model.

        Parameters
        ----------
        model
            The model that was tuned; it does not change.

        Raises
        ------
        ModelError
            For another model, or weights that are not in memory.
        """
        layers = linear_layers(model)
        missing = next((path for path in self.down if path not in layers), None)
        if missing is not None or model.config_hash != self.config_hash or not model.has_weights(self.weights_hash):
            what = (
                f"it has no linear layer '{missing}'" if missing is not None else "its configuration or weights differ"
            )
            msg = f"the adapter is for {self.model}, and {model.name} is another model: {what}; load the model that was tuned"
            raise ModelError(msg)
        if any(layers[path].weight.is_meta for path in self.down):
            msg = f"weights of {model.name} are offloaded and cannot be changed; load it without device_map"
            raise ModelError(msg)
        adapted = {id(layers[path].weight) for path in self.down}
        shared: dict[int, Any] = {id(p): p for p in model.hf.parameters() if id(p) not in adapted}
        network = copy.deepcopy(model.hf, shared)
        with torch.no_grad():
            for path in self.down:
                weight = network.get_submodule(path).weight
                change = self.alpha / self.rank * self.up[path].astype(np.float64) @ self.down[path].astype(np.float64)
                weight += torch.from_numpy(change).to(weight)
        return Lvlm(network, model.processor, model.spec, f"{model.name}, tuned")

    def save_merged(self, model: Lvlm, folder: Path | str) -> Path:
        """Write the tuned model with its processor as a folder that `load_lvlm` and transformers load.

        Raises
        ------
        ModelError
            As `merged`, and if the folder has files already.
        """
        root = Path(folder)
        if root.is_dir() and any(root.iterdir()):
            msg = f"'{root}' has files already; choose another folder for the tuned model"
            raise ModelError(msg)
        tuned = self.merged(model)
        tuned.hf.save_pretrained(root)
        tuned.processor.save_pretrained(root)
        return root

    def save(self, folder: Path | str) -> Path:
        """Write the folder: PEFT's two files, which `peft.PeftModel.from_pretrained` loads, and a record with digests."""
        root = Path(folder)
        tensors = {f"{_PREFIX}{path}.lora_A.weight": a for path, a in self.down.items()}
        tensors |= {f"{_PREFIX}{path}.lora_B.weight": b for path, b in self.up.items()}
        config = {
            "peft_type": "LORA",
            "base_model_name_or_path": self.model,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": list(self.down),
            "inference_mode": True,
        }
        record = {
            "model": self.model,
            "config_hash": self.config_hash,
            "weights_hash": self.weights_hash,
            "alpha": self.alpha,
            "provenance": dict(self.provenance),
        }
        artifacts.write_bytes(root / WEIGHTS, encode_tensors(tensors, {"format": "pt"}), "adapter")
        artifacts.write_bytes(root / CONFIG, (json.dumps(config, indent=1) + "\n").encode(), "adapter")
        document = artifacts.sign_document(FORMAT, VERSION, record)
        artifacts.write_bytes(root / RECORD, (json.dumps(document, indent=1) + "\n").encode(), "adapter")
        return root

    @classmethod
    def load(cls, folder: Path | str) -> Adapter:
        """Read a folder that `save` wrote; raises `StoreError` if a file is missing or damaged."""
        root = Path(folder)
        record = artifacts.read_document(root / RECORD, FORMAT, "adapter", VERSION, advice="tune again")
        with artifacts.reading_result(root / WEIGHTS, "adapter"):
            tensors, _ = read_tensors(root / WEIGHTS, error=StoreError)
            config = read_json(root / CONFIG, error=StoreError)
        parts: dict[str, dict[str, np.ndarray]] = {"lora_A": {}, "lora_B": {}}
        for name, tensor in tensors.items():
            path, _, kind = name.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
            if kind not in parts:
                msg = f"{root / WEIGHTS} is damaged: '{name}' is not a matrix of an adapter; copy the file again, or tune again"
                raise StoreError(msg)
            parts[kind][path] = tensor
        if not isinstance(config, dict) or config.get("lora_alpha") != record["alpha"]:
            msg = (
                f"{root / CONFIG} is damaged: its alpha is not that of the record; copy the files again, or tune again"
            )
            raise StoreError(msg)
        about = (record["alpha"], record["model"], record["config_hash"], record["weights_hash"], record["provenance"])
        try:
            return cls(parts["lora_A"], parts["lora_B"], *about)
        except ModelError as error:
            msg = f"{root / WEIGHTS} is damaged: {error}; copy the file again, or tune again"
            raise StoreError(msg) from error
