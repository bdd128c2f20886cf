"""HA-DPO's ``pope_data.json``: a list of ``image_id, question, answer, correct, chosen`` and ``reject`` or ``rejected``.

======================  ============  =====================================================
variant                 key           rows that the released code trains on
======================  ============  =====================================================
`llava` (the default)   ``reject``    those with ``"correct": false``
`minigpt4`              ``reject``    all; it does not read ``correct``
`instructblip`          ``rejected``  those with ``"correct": false``
======================  ============  =====================================================

Read in opendatalab/HA-DPO, commit abdc44b: ``ha_dpo/models/llava-v1_5/train_dpo.py``, ``minigpt4/dpo_dataset.py``,
``instructblip/dpo_dataset.py``. All written rows have ``"correct": false``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from concepts.reading.json_stream import stream_list
from concepts.reading.record import abbreviate
from groundscope.core.errors import DataError
from mitigation.preference.data import PreferenceData
from mitigation.preference.formats.files import build, checked_pair, require_one_image, write_json
from mitigation.preference.formats.ha_dpo_images import IndexedImages, check_variant, image_id, write_index
from mitigation.preference.pair import PreferencePair

FILE = "pope_data.json"
_KEYS = {"llava": "reject", "minigpt4": "reject", "instructblip": "rejected"}


def write(data: PreferenceData, folder: Path, variant: str = "llava") -> Path:
    """Write one list of all pairs, each about one image, and the images with their index."""
    check_variant(variant)
    require_one_image(data, "ha_dpo_pope")
    ids = write_index(data, folder)
    rows = [
        {
            "image_id": ids[pair.images[0].identity],
            "question": pair.prompt,
            "answer": pair.rejected,
            "correct": False,
            "chosen": pair.chosen,
            _KEYS[variant]: pair.rejected,
        }
        for pair in data
    ]
    return write_json(folder / FILE, rows)


def read(file: Path, images: Path, variant: str = "llava") -> PreferenceData:
    """Read the rows that the released code of a model trains on; others are counted in the provenance."""
    check_variant(variant)
    indexed, right = IndexedImages(images), Counter[str]()
    pairs = list(_pairs(file, indexed, variant, right))
    return build("ha_dpo_pope", file, indexed.folder, pairs, rows_with_correct_true=right["rows"])


def _pairs(file: Path, indexed: IndexedImages, variant: str, right: Counter[str]) -> Iterator[PreferencePair]:
    key = _KEYS[variant]
    other = "rejected" if key == "reject" else "reject"
    for number, record in enumerate(stream_list(file), 1):
        if key not in record.values and other in record.values:
            forms = ", ".join(f"variant='{v}'" for v, k in _KEYS.items() if k == other)
            msg = f"{record.where}: it has '{other}' and not '{key}', the form of other models of HA-DPO: read it with {forms}"
            raise DataError(msg)
        if key in record.values and other in record.values:
            msg = f"{record.where}: it has both 'reject' and 'rejected', so it can be read in two ways; remove one"
            raise DataError(msg)
        if variant != "minigpt4":
            correct = record.field("correct")
            if not isinstance(correct, bool):
                msg = f"{record.where}: field 'correct' must be true or false, not {abbreviate(correct)}"
                raise DataError(msg)
            if correct:
                right["rows"] += 1
                continue
        image = indexed.find(image_id(record), record.where)
        answers = record.text("chosen"), record.text(key)
        yield checked_pair(record.where, str(number), (image,), record.text("question"), *answers, "file")
