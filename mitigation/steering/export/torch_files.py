"""Tensor files in the layout that torch reads, for consumers that take no other."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from groundscope.core import artifacts
from groundscope.core.files import canonical_json


def write_pt(path: Path, content: object, card: Mapping[str, Any], kind: str) -> None:
    """Write tensors, numbers and strings for ``torch.load(path, weights_only=True)``, and the card beside as JSON.

    The file is a pickle underneath. We read none of them ourselves; what we put in loads with weights only, so that
    consumers need not trust it either.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)  # noqa: TID251  # the consumer's own format, tensors only
    artifacts.write_bytes(path, buffer.getvalue(), kind)
    write_card(path, card, kind)


def write_card(path: Path, card: Mapping[str, Any], kind: str) -> None:
    """Write the card beside a file, ``NAME.json``."""
    beside = path.with_name(f"{path.name}.json")
    artifacts.write_bytes(beside, f"{canonical_json(card)}\n".encode(), kind)
