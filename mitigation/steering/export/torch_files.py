"""Write tensor files in torch's format, for consumers that accept no other format."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from groundscope.core import artifacts
from groundscope.core.files import canonical_json


def write_pt(path: Path, content: object, card: Mapping[str, Any], kind: str) -> None:
    """Write tensors, numbers and strings for ``torch.load(path, weights_only=True)``, and the metadata as a JSON file.

    The file is a pickle internally. groundscope never reads such files; the content loads with ``weights_only=True``, so
    consumers do not need to trust it.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)  # noqa: TID251  # the consumer's own format, tensors only
    artifacts.write_bytes(path, buffer.getvalue(), kind)
    write_card(path, card, kind)


def write_card(path: Path, card: Mapping[str, Any], kind: str) -> None:
    """Write the metadata of a file to ``NAME.json`` in the same folder."""
    card_path = path.with_name(f"{path.name}.json")
    artifacts.write_bytes(card_path, f"{canonical_json(card)}\n".encode(), kind)
