"""HA-DPO's ``desc_data.json``: for each image a list of chosen and a list of rejected descriptions, without prompts.

One object ``{image_id: {"chosen": […], "rejected": […]}}`` for LLaVA, one list of ``image_id, chosen, rejected`` for MiniGPT-4
and InstructBLIP. The released code draws one chosen and one rejected description of each image, so that every chosen description
is preferred to every rejected one, and one of `PROMPTS`; for the latter two models it removes line breaks without a space.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from concepts.reading.json_stream import stream
from concepts.reading.record import Record
from groundscope.core.errors import DataError
from mitigation.preference.data import PreferenceData
from mitigation.preference.formats.files import build, checked_pair, require_one_image, write_json
from mitigation.preference.formats.ha_dpo_images import (
    IndexedImages,
    as_id,
    check_variant,
    image_id,
    write_index,
)
from mitigation.preference.pair import PreferencePair

FILE = "desc_data.json"
PROMPTS = (
    "Describe this image in detail.",
    "Take a look at this image and describe what you notice.",
    "Please provide a detailed description of the picture.",
    "Could you describe the contents of this image for me?",
)
"""The prompts of the released code."""


def write(data: PreferenceData, folder: Path, variant: str = "llava") -> Path:
    """Write the descriptions of each image, and the images with their index.

    Raises
    ------
    DataError
        For a pair with another prompt than `PROMPTS`, which the file could not say, and for a description of an image that is
        chosen in one pair and rejected in another.
    """
    check_variant(variant)
    require_one_image(data, "ha_dpo_descriptions")
    other = next((pair for pair in data if pair.prompt not in PROMPTS), None)
    if other is not None:
        msg = (
            f"preference '{other.id}' asks '{other.prompt[:60]}', but {FILE} has no prompts, and HA-DPO's code asks "
            f"'{PROMPTS[0]}' and the like; write it as 'ha_dpo_pope'"
        )
        raise DataError(msg)
    ids = write_index(data, folder)
    rows: dict[int, dict[str, list[str]]] = {}
    for pair in data:
        row = rows.setdefault(ids[pair.images[0].identity], {"chosen": [], "rejected": []})
        for name, text in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            if text not in row[name]:
                row[name].append(text)
        if set(row["chosen"]) & set(row["rejected"]):
            msg = f"preference '{pair.id}': a description of its image is chosen in one pair and rejected in another"
            raise DataError(msg)
    if variant == "llava":
        return write_json(folder / FILE, {str(number): row for number, row in rows.items()})
    return write_json(folder / FILE, [{"image_id": number, **row} for number, row in rows.items()])


def read(file: Path, images: Path) -> PreferenceData:
    """Read a file in either layout, with the first of `PROMPTS` as the prompt.

    Each chosen description of an image makes a pair with each rejected one.
    """
    indexed = IndexedImages(images)
    return build("ha_dpo_descriptions", file, indexed.folder, _pairs(file, indexed))


def _pairs(file: Path, indexed: IndexedImages) -> Iterator[PreferencePair]:
    for entry in stream(file, whole=True):
        record = entry.record()
        number = image_id(record) if entry.key is None else as_id(entry.key, record.where)
        image = indexed.find(number, record.where)
        yield from (
            checked_pair(record.where, f"{number}:{i}:{j}", (image,), PROMPTS[0], chosen, rejected, "file")
            for i, chosen in enumerate(_texts(record, "chosen"))
            for j, rejected in enumerate(_texts(record, "rejected"))
        )


def _texts(record: Record, name: str) -> tuple[str, ...]:
    values = record.texts(name)
    if not values:
        msg = f"{record.where}: field '{name}' is an empty list; give at least one description"
        raise DataError(msg)
    return values
