"""A table of image pairs: two images under one question, with different true answers."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from concepts.concept import Level
from concepts.question import YES_NO
from concepts.reading.assembly import build_dataset, check_counts
from concepts.reading.image_folder import ImageFolder
from concepts.reading.record import Record, is_text
from concepts.reading.records import read_records
from concepts.schema import ConceptDataset, Example
from groundscope.core.errors import DataError
from groundscope.core.text import format_count, nearest

LEVEL_OF_KIND: dict[str, Level] = {
    "object": "object", "color": "attribute", "attribute": "attribute", "relation": "relation", "action": "relation",
}  # fmt: skip
"""Kind of a pair to the level of its question."""


def pairs(file: Path | str, images: Path | str, *, equal_size: bool = True, limit: int | None = None) -> ConceptDataset:
    r"""Load image pairs from a table: edited, generated or selected images.

    Parameters
    ----------
    file
        Table (``.csv``, ``.tsv``) or JSON lines, with ``clean_image``, ``corrupt_image``, ``question``, ``clean_answer``,
        ``corrupt_answer``, ``kind`` (a key of `LEVEL_OF_KIND`) and ``change`` (in words); optional ``id``, ``group`` (the source
        of both images; by default the clean image) and ``candidates`` (all possible answers, a list, in a table separated by
        ``|``; by default yes and no, or the two answers).
    images
        Folder of the images.
    equal_size
        Whether to require that both images of a pair have the same size, because images of different sizes can have different
        numbers of tokens; False for images that `concepts.counterfactuals.on_canvas` makes equal afterwards.
    limit
        Maximum number of pairs; the first ones are used.

    Returns
    -------
    ConceptDataset
        Two examples for each pair. `concepts.counterfactuals.pairs` with the method ``given`` returns the pairs.

    Raises
    ------
    DataError
        Names the file, record and field: for a missing field, an unknown kind, equal answers, an answer that is not a
        candidate, or an image that is missing or unreadable; and for pairs of different sizes, with their number.
    ConfigError
        For a limit below 1.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> import groundscope as gs
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name, color in (("a.png", "red"), ("b.png", "blue")):
    ...     Image.new("RGB", (8, 8), color).save(folder / name)
    >>> header = "clean_image,corrupt_image,question,clean_answer,corrupt_answer,kind,change"
    >>> row = "a.png,b.png,Is the wall red?,yes,no,color,wall: red -> blue"
    >>> _ = (folder / "pairs.csv").write_text(f"{header}\n{row}\n")
    >>> data = gs.loaders.pairs(folder / "pairs.csv", folder)
    >>> gs.counterfactuals.pairs(data, "color")[0].change
    'wall: red -> blue'
    """
    check_counts(limit=limit)
    path, folder = Path(file), ImageFolder(Path(images))
    records = read_records(path)
    examples = [e for number, record in enumerate(islice(records, limit), 1) for e in _examples(record, number, folder)]
    left_out = {"pairs beyond the limit": sum(1 for _ in records)}
    data = build_dataset("pairs", [path], folder, examples, left_out)
    if equal_size:
        _check_sizes(path, data)
    return data


def _examples(record: Record, number: int, folder: ImageFolder) -> Iterator[Example]:
    kind = record.text("kind")
    if kind not in LEVEL_OF_KIND:
        choices = f"{', '.join(LEVEL_OF_KIND)}{nearest(kind, LEVEL_OF_KIND)}"
        msg = f"{record.where}: field 'kind' is '{kind[:40]}'; choose from {choices}"
        raise DataError(msg)
    answers = record.text("clean_answer"), record.text("corrupt_answer")
    if answers[0] == answers[1]:
        msg = (
            f"{record.where}: fields 'clean_answer' and 'corrupt_answer' are both '{answers[0][:40]}'; they must differ"
        )
        raise DataError(msg)
    candidates = _candidates(record, answers)
    name = str(record.values.get("id") or number)
    clean = folder.find(record.text("clean_image"), record.where, "clean_image")
    corrupt = folder.find(record.text("corrupt_image"), record.where, "corrupt_image")
    change = record.text("change")
    for image, answer, suffix in ((clean, answers[0], ""), (corrupt, answers[1], f"|{change}")):
        yield Example(
            id=f"{name}{suffix}", image=image, question=record.text("question"), answer=answer, candidates=candidates,
            level=LEVEL_OF_KIND[kind], kind=kind, split="neutral", group=str(record.values.get("group") or clean.name),
            labels={f"{LEVEL_OF_KIND[kind]}:named": answer == "yes"} if candidates == YES_NO else {},
        )  # fmt: skip


def _candidates(record: Record, answers: tuple[str, str]) -> tuple[str, ...]:
    value: Any = record.values.get("candidates")
    if value is None:
        return YES_NO if set(answers) == set(YES_NO) else answers
    words = tuple(word.strip() for word in value.split("|")) if isinstance(value, str) else record.texts("candidates")
    if (
        not all(is_text(word) and word for word in words)
        or len(set(words)) < len(words)
        or not set(answers) <= set(words)
    ):
        msg = f"{record.where}: field 'candidates' must contain different answers, including '{answers[0]}' and '{answers[1]}'"
        raise DataError(msg)
    return words


def _check_sizes(path: Path, data: ConceptDataset) -> None:
    """Raise `DataError` if the two images of any pair have different sizes: they can have different numbers of tokens."""
    unequal = []
    for clean, corrupt in zip(data.examples[::2], data.examples[1::2], strict=True):
        sizes = [e.image.header.upright_size for e in (clean, corrupt)]  # pyright: ignore[reportAttributeAccessIssue]
        if sizes[0] != sizes[1]:
            unequal.append(f"'{clean.id}' ({sizes[0][0]} x {sizes[0][1]} and {sizes[1][0]} x {sizes[1][1]} pixels)")
    if unequal:
        more = f" and {len(unequal) - 3} more" if len(unequal) > 3 else ""
        msg = (
            f"{path}: two images of different sizes in {len(unequal)} of {format_count(len(data) // 2, 'pair')}: "
            f"{', '.join(unequal[:3])}{more}; save both with one size, or put all images on one canvas with data.canvas=WxH"
        )
        raise DataError(msg)
