"""VSR: true and false captions about the spatial relation of two objects (Liu et al. 2023, arXiv 2205.00363)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from concepts.reading.assembly import build_dataset, check_counts
from concepts.reading.caption_questions import CaptionedImage, truth_question
from concepts.reading.image_folder import ImageFolder
from concepts.reading.record import Record
from concepts.reading.records import read_json_records
from concepts.schema import ConceptDataset, Example
from groundscope.core.errors import DataError


def vsr(captions: Path | str, images: Path | str, *, limit: int | None = None) -> ConceptDataset:
    """Load VSR captions as yes-no questions.

    Parameters
    ----------
    captions
        JSON lines ``image, caption, label, relation``, with the label 1 or 0. Other fields are ignored.
    images
        Folder of the images.
    limit
        Maximum number of captions; the first ones are used.

    Returns
    -------
    ConceptDataset
        Relation questions; groups are images. The labels are ``relation:named`` and ``relation:<relation>``.

    Raises
    ------
    DataError
        Names the file, line and field: for invalid JSON, a field that is missing or of the wrong type, a label that is
        neither 0 nor 1, or an image that is missing, unreadable or outside the folder.
    ConfigError
        For a limit below 1.

    Examples
    --------
    >>> import json, tempfile
    >>> from pathlib import Path
    >>> import groundscope as gs
    >>> folder = Path(tempfile.mkdtemp())
    >>> gs.scenes.dataset(10)[0].image.load().save(folder / "a.png")
    >>> record = {"image": "a.png", "caption": "The cup is under the table.", "label": 0, "relation": "under"}
    >>> _ = (folder / "dev.jsonl").write_text(json.dumps(record))
    >>> data = gs.loaders.vsr(folder / "dev.jsonl", folder)
    >>> data[0].question, data[0].answer
    ('Is the statement "The cup is under the table." true of the image?', 'no')
    """
    check_counts(limit=limit)
    file, folder = Path(captions), ImageFolder(Path(images))
    records = read_json_records(file)

    def questions() -> Iterator[Example]:
        for number, record in enumerate(islice(records, limit), 1):
            truth = _label(record)
            image = folder.find(record.text("image"), record.where)
            labels = {f"relation:{record.text('relation').strip().lower()}": truth}
            subject = CaptionedImage(str(number), image, image.name, "relation", "relation", labels=labels)
            yield truth_question(subject, record.text("caption"), truth, "caption")

    examples = tuple(questions())
    left_out = {"captions beyond the limit": sum(1 for _ in records)}
    return build_dataset("vsr", [file], folder, examples, left_out)


def _label(record: Record) -> bool:
    label = record.field("label")
    if isinstance(label, bool) or label not in (0, 1):
        msg = f"{record.where}: field 'label' is {str(label)[:60]!r}, neither 0 nor 1"
        raise DataError(msg)
    return label == 1
