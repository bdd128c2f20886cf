"""The state of a training after an epoch, as one safetensors file without pickle."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groundscope.core import artifacts
from groundscope.core.errors import ConfigError, StoreError
from groundscope.core.paths import is_file
from groundscope.core.result_fields import building, check_fields
from mitigation.preference.lora import LowRank
from mitigation.preference.trainer import Epoch, Trainer

FILE = "state.safetensors"
KIND, VERSION = "training_state", 1


def save(path: Path, trainer: Trainer, key: str) -> None:
    """Write matrices, moments of the optimizer, references and the history."""
    tensors: dict[str, Tensor] = {"references.0": trainer.references[0], "references.1": trainer.references[1]}
    for name, weight in _weights(trainer):
        moments = trainer.optimizer.state[weight]
        tensors[f"now.{name}"] = weight.detach()
        tensors[f"first.{name}"], tensors[f"second.{name}"] = moments["exp_avg"], moments["exp_avg_sq"]
        tensors["steps"] = torch.as_tensor(moments["step"], dtype=torch.float32).reshape(1)
    for path_of_layer, part in trainer.best.items():
        tensors[f"best.{path_of_layer}.down"], tensors[f"best.{path_of_layer}.up"] = part.down, part.up
    history = [asdict(epoch) for epoch in trainer.history]
    card = {"key": key, "best_epoch": trainer.best_epoch, "history": history}
    artifacts.write(path, KIND, VERSION, {n: t.cpu().numpy() for n, t in tensors.items()}, card)


def restore(path: Path, trainer: Trainer, key: str) -> bool:
    """Continue a training from its file; return False without one.

    Raises
    ------
    ConfigError
        If the file is of a training with another model, other data or other options.
    StoreError
        If the file is damaged.
    """
    if not is_file(path):
        return False
    tensors, card = artifacts.read(path, KIND, VERSION)
    if card.get("key") != key:
        msg = f"'{path.parent}' has the state of a training with another model, other data or options; choose another folder"
        raise ConfigError(msg)
    with building(f"{path} is a damaged state of a training", StoreError):
        loaded = {name: torch.from_numpy(array) for name, array in tensors.items()}
        trainer.references = (loaded["references.0"], loaded["references.1"])
        with torch.no_grad():
            for name, weight in _weights(trainer):
                weight.copy_(loaded[f"now.{name}"])
                trainer.optimizer.state[weight] = {
                    "step": loaded["steps"][0].clone(),
                    "exp_avg": loaded[f"first.{name}"].to(weight),
                    "exp_avg_sq": loaded[f"second.{name}"].to(weight),
                }
        trainer.best = {p: LowRank(loaded[f"best.{p}.down"], loaded[f"best.{p}.up"]) for p in trainer.matrices}
        trainer.best_epoch = int(card["best_epoch"])
        rows: list[dict[str, Any]] = [check_fields(row, Epoch, "history") for row in card["history"]]
        trainer.history = [Epoch(**row) for row in rows]
    return True


def _weights(trainer: Trainer) -> list[tuple[str, Tensor]]:
    return [
        (f"{path}.{side}", getattr(part, side)) for path, part in trainer.matrices.items() for side in ("down", "up")
    ]
