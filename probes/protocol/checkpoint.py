"""Checkpoints of a grid by layer, to continue a killed run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from groundscope.core.errors import ProbeError, StoreError
from groundscope.core.files import write_whole
from groundscope.core.tensor_files import encode_tensors, read_tensors
from groundscope.core.user_files import read_json

_CARD = "checkpoint.json"
STORED_NAMES = {"C": "penalty"}
"""Names of arrays in the files of checkpoints and grids, where they differ from the names of fields."""


def digest(values: np.ndarray) -> str:
    """Return the SHA-256 of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


@dataclass(frozen=True)
class Checkpoint:
    """A folder with ``checkpoint.json`` (the options) and ``layer-<number>.safetensors``; None saves nothing."""

    folder: Path | None
    key: str

    @classmethod
    def at(cls, folder: str | Path | None, options: Mapping[str, Any]) -> Self:
        """Open or create a checkpoint.

        Raises
        ------
        ProbeError
            If the folder holds a checkpoint of other options; the message names the first that differs.
        """
        text = json.dumps(dict(options), sort_keys=True, indent=1)
        key = hashlib.sha256(text.encode()).hexdigest()
        if folder is None:
            return cls(None, key)
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        card = path / _CARD
        if card.exists():
            try:
                saved = read_json(card, error=ProbeError)
            except OSError as error:
                msg = f"{card}: cannot be read: {error.strerror or error}"
                raise ProbeError(msg) from error
            if not isinstance(saved, dict):
                msg = f"{card} is not the card of a checkpoint; remove the folder to start again"
                raise ProbeError(msg)
            current = json.loads(text)
            changed = [k for k in sorted(current.keys() | saved.keys()) if saved.get(k) != current.get(k)]
            if changed:
                first = changed[0]
                msg = (
                    f"{path} is the checkpoint of another run: '{first}' was {saved.get(first)!r} and is now "
                    f"{current.get(first)!r}; use another folder, or remove this one"
                )
                raise ProbeError(msg)
        else:
            write_whole(card, text.encode())
        return cls(path, key)

    def save(self, layer: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Save a layer's arrays."""
        if self.folder is not None:
            write_whole(
                self.folder / f"layer-{layer}.safetensors",
                encode_tensors(
                    {STORED_NAMES.get(name, name): array for name, array in arrays.items()}, {"key": self.key}
                ),
            )

    def load(self, layer: int) -> dict[str, np.ndarray] | None:
        """Return a layer's arrays, or None if it is not finished; a damaged layer counts as not finished.

        Raises
        ------
        ProbeError
            If the system cannot read it (too many open files, no permission): that is not damage.
        """
        path = None if self.folder is None else self.folder / f"layer-{layer}.safetensors"
        if path is None or not path.exists():
            return None
        try:
            arrays, header = read_tensors(path, error=StoreError)
        except StoreError:
            return None
        except OSError as error:
            msg = f"{path}: cannot be read: {error.strerror or error}"
            raise ProbeError(msg) from error
        names = {stored: name for name, stored in STORED_NAMES.items()}
        return (
            {names.get(name, name): array for name, array in arrays.items()} if header.get("key") == self.key else None
        )
