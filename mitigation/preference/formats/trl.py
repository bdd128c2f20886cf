"""TRL: JSON lines with ``images`` and the message lists ``prompt``, ``chosen`` and ``rejected``.

The content of a user's message is a list of parts, with one part ``{"type": "image"}`` for each image, before the text.
Read by `trl.DPOTrainer` (TRL 1.16) after ``datasets.load_dataset("json", data_files=…)`` and
``cast_column("images", datasets.List(datasets.Image()))``, in the folder of the file, because paths are relative to it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from concepts.image_source import ImageSource
from concepts.reading.image_folder import ImageFolder
from concepts.reading.record import Record, abbreviate, as_record
from concepts.reading.records import read_json_records
from groundscope.core import artifacts
from groundscope.core.errors import DataError
from mitigation.preference.data import PreferenceData
from mitigation.preference.formats.files import build, checked_pair, write_images
from mitigation.preference.pair import PreferencePair

FILE = "preferences.jsonl"


def write(data: PreferenceData, folder: Path) -> Path:
    """Write one line per pair; pairs may have no image, one or several."""
    names = write_images(data, folder)
    lines = []
    for pair in data:
        system = [] if pair.system is None else [_message("system", pair.system)]
        row = {
            "id": pair.id,
            "source": pair.source,
            "images": [names[image.identity] for image in pair.images],
            "prompt": [*system, _message("user", pair.prompt, len(pair.images))],
            "chosen": [_message("assistant", pair.chosen)],
            "rejected": [_message("assistant", pair.rejected)],
        }
        lines.append(json.dumps(row, ensure_ascii=False))
    artifacts.write_bytes(folder / FILE, "".join(f"{line}\n" for line in lines).encode(), "preference file")
    return folder / FILE


def _message(role: str, text: str, images: int = 0) -> dict[str, Any]:
    return {"role": role, "content": [*[{"type": "image"}] * images, {"type": "text", "text": text}]}


def read(file: Path, images: Path) -> PreferenceData:
    """Read a file; ``image`` may replace ``images``, and a text the message lists of chosen and rejected answers."""
    folder = ImageFolder(images)
    return build("trl", file, folder, _pairs(file, folder))


def _pairs(file: Path, folder: ImageFolder) -> Iterator[PreferencePair]:
    for number, record in enumerate(read_json_records(file), 1):
        for name in ("prompt", "chosen", "rejected"):
            record.field(name)
        if "image" in record.values and "images" in record.values:
            msg = f"{record.where}: it has both 'image' and 'images'; keep the list 'images'"
            raise DataError(msg)
        paths = [record.text("image")] if "image" in record.values else _paths(record)
        sources: list[ImageSource] = [folder.find(path, record.where, "images") for path in paths]
        system, prompt = _prompt(record, len(sources))
        answers = [_answer(record, name) for name in ("chosen", "rejected")]
        identity = record.identifier("id") if "id" in record.values else str(number)
        source = record.text("source") if "source" in record.values else "file"
        yield checked_pair(record.where, identity, tuple(sources), prompt, *answers, source, system=system)


def _paths(record: Record) -> Sequence[str]:
    return record.texts("images") if record.values.get("images") is not None else ()


def _prompt(record: Record, images: int) -> tuple[str | None, str]:
    """Return the system prompt and the user's text."""
    if isinstance(record.values["prompt"], str):
        if images:
            msg = f"{record.where}: field 'prompt' must be a list of messages with one part of type 'image' for each image"
            raise DataError(msg)
        return None, record.text("prompt")
    messages = list(record.records("prompt"))
    roles = [str(m.field("role")) for m in messages]
    if roles not in (["user"], ["system", "user"]):
        msg = f"{record.where}: field 'prompt' must hold one user message, or one system and one user message"
        raise DataError(msg)
    system = _text(messages[0], 0) if len(messages) == 2 else None
    return system, _text(messages[-1], images)


def _answer(record: Record, name: str) -> str:
    if isinstance(record.values[name], str):
        return record.text(name)
    messages = list(record.records(name))
    if [m.field("role") for m in messages] != ["assistant"]:
        msg = f"{record.where}: field '{name}' must hold one assistant message"
        raise DataError(msg)
    return _text(messages[0], 0)


def _text(message: Record, images: int) -> str:
    """Return the text of a message after checking its image parts."""
    content = message.field("content")
    if isinstance(content, str):
        return message.text("content")
    parts = [as_record(f"{message.where}, part {n}", part) for n, part in enumerate(message.list("content"), 1)]
    kinds = [part.field("type") for part in parts]
    if kinds != ["image"] * images + ["text"]:
        msg = (
            f"{message.where}: the content must have {images} image parts and then one text part, because the record has "
            f"{images} images, but it has {abbreviate(kinds)}"
        )
        raise DataError(msg)
    return parts[-1].text("text")
