"""What is finished of a grid, layer by layer, for a run that may be killed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from groundscope.core.errors import ProbeError
from groundscope.core.files import write_whole

_CARD = "checkpoint.json"


def digest(values: np.ndarray) -> str:
    """Return the SHA-256 of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


@dataclass(frozen=True)
class Checkpoint:
    """A folder with ``checkpoint.json`` (the options) and ``layer-<number>.safetensors``; None keeps nothing."""

    folder: Path | None
    key: str

    @classmethod
    def at(cls, folder: str | Path | None, options: Mapping[str, Any]) -> Self:
        """Open or begin a checkpoint.

        Raises
        ------
        ProbeError
            Where the folder holds a checkpoint of other options, naming the first that differs.
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
                there = json.loads(card.read_bytes())
            except ValueError as error:
                msg = f"{card} cannot be read: {error}; remove the folder to begin anew"
                raise ProbeError(msg) from error
            wanted = json.loads(text)
            changed = [k for k in sorted(wanted.keys() | there.keys()) if there.get(k) != wanted.get(k)]
            if changed:
                first = changed[0]
                msg = (
                    f"{path} is the checkpoint of another run: '{first}' was {there.get(first)!r} and is now "
                    f"{wanted.get(first)!r}; give another folder, or remove this one"
                )
                raise ProbeError(msg)
        else:
            write_whole(card, text.encode())
        return cls(path, key)

    def save(self, layer: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep a layer's arrays."""
        from safetensors.numpy import save

        if self.folder is not None:
            data = save({k: np.ascontiguousarray(v) for k, v in arrays.items()}, metadata={"key": self.key})
            write_whole(self.folder / f"layer-{layer}.safetensors", data)

    def load(self, layer: int) -> dict[str, np.ndarray] | None:
        """Return a layer's arrays, or None where it is not finished; one that is damaged counts as not finished."""
        from safetensors import SafetensorError, safe_open

        path = None if self.folder is None else self.folder / f"layer-{layer}.safetensors"
        if path is None or not path.exists():
            return None
        try:
            with safe_open(str(path), framework="numpy") as file:
                if (file.metadata() or {}).get("key") != self.key:
                    return None
                return {name: np.array(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError):
            return None
