"""CSR and POVID: one JSON list of ``id, image, conversations, rejected_conversations``.

Both conversations have a human turn, with the placeholder ``<image>`` on its own line before the question, and a turn of ``gpt``.
``image`` is relative to the option ``--image_folder`` of their code, here the folder of the file
(YiyangZhou/POVID ``llava/train/train_dpo.py``, YiyangZhou/CSR ``inference_csr/construct.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from concepts.reading.image_folder import ImageFolder
from concepts.reading.json_stream import stream_list
from concepts.reading.record import Record, abbreviate
from groundscope.core.errors import DataError
from mitigation.preference.data import PreferenceData
from mitigation.preference.formats.files import (
    PLACEHOLDER,
    build,
    checked_pair,
    require_one_image,
    write_images,
    write_json,
)
from mitigation.preference.pair import PreferencePair

FILE = "preferences.json"


def write(data: PreferenceData, folder: Path) -> Path:
    """Write one list of all pairs, each about one image."""
    require_one_image(data, "csr")
    names = write_images(data, folder)
    rows = []
    for pair in data:
        human = {"from": "human", "value": f"{PLACEHOLDER}\n{pair.prompt}"}
        rows.append(
            {
                "id": pair.id,
                "image": names[pair.images[0].identity],
                "conversations": [human, {"from": "gpt", "value": pair.chosen}],
                "rejected_conversations": [human, {"from": "gpt", "value": pair.rejected}],
            }
        )
    return write_json(folder / FILE, rows)


def read(file: Path, images: Path) -> PreferenceData:
    """Read a file; ids may be whole numbers."""
    folder = ImageFolder(images)
    return build("csr", file, folder, _pairs(file, folder))


def _pairs(file: Path, folder: ImageFolder) -> Iterator[PreferencePair]:
    for record in stream_list(file):
        image = folder.find(record.text("image"), record.where)
        prompt, chosen = _turns(record, "conversations")
        other, rejected = _turns(record, "rejected_conversations")
        if prompt != other:
            msg = f"{record.where}: the two conversations ask different questions, '{prompt[:40]}' and '{other[:40]}'"
            raise DataError(msg)
        yield checked_pair(record.where, record.identifier("id"), (image,), prompt, chosen, rejected, "file")


def _turns(record: Record, name: str) -> tuple[str, str]:
    """Return question and answer of a conversation."""
    turns = list(record.records(name))
    speakers = [turn.field("from") for turn in turns]
    if speakers != ["human", "gpt"]:
        msg = (
            f"{record.where}: field '{name}' must hold one turn of 'human' and one of 'gpt', not {abbreviate(speakers)}"
        )
        raise DataError(msg)
    question = turns[0].text("value")
    inner = question.strip().removeprefix(PLACEHOLDER)
    inner = inner.removesuffix(PLACEHOLDER) if inner == question.strip() else inner
    if PLACEHOLDER in inner or inner == question.strip():
        msg = f"{turns[0].where}: field 'value' must have '{PLACEHOLDER}' once, at its start or end, not {abbreviate(question)}"
        raise DataError(msg)
    return inner.strip(), turns[1].text("value")
