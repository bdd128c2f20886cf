"""A user's own table: images, questions, answers and label columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from concepts.reading.assembly import check_counts
from concepts.reading.image_folder import ImageFolder
from concepts.reading.record import Record
from concepts.reading.records import read_records
from concepts.reading.table_examples import Pictures, make_examples
from concepts.reading.text_files import readable, sha256
from concepts.schema import ConceptDataset
from groundscope.core.errors import DataError


def table(
    file: Path | str,
    images: Path | str | None = None,
    *,
    classes: Sequence[str] | str = (),
    ignore: Sequence[str] | str = (),
    limit: int | None = None,
) -> ConceptDataset:
    r"""Load a table of your own questions and labels.

    Columns that are fields of an example; only ``question`` is required:

    ``image`` or ``images``
        Path of the image in the folder `images`; or the bytes of the file (in Parquet, or as base64 in a ``.tsv`` or
        ``.csv``). ``images`` holds several, in the order in which the question refers to them: a list, or in a text
        separated by ``|``. Empty: a question without an image.
    ``question``, ``answer``, ``candidates``, ``aliases``
        The true answer, all possible answers (a list, or separated by ``|``; by default yes and no for these answers, otherwise
        none: an open question), and other texts that count as the true answer.
    ``prefix``
        Start of the answer that is given to the model.
    ``id``, ``group``, ``split``
        By default the number of the row, its first image (without an image, the question), and ``neutral``. Rows of a group are
        never divided between training and test.
    ``level``, ``kind``
        By default ``object``, and ``existence`` for "Is there a dog in the image?", otherwise ``question``.
    ``boxes``, ``subject``
        JSON or list of ``{"noun": …, "box": [x0, y0, x1, y1]}`` in pixels of the first image, with optional ``id`` and
        ``attributes``; and the id or noun of the object in question.
    ``prior_answer``
        The most likely answer without the image.

    Every other column is a label. ``concept:value`` (``object:dog``, ``scene:indoor``) holds yes or no. A column with another
    name holds yes or no (true, false, 1, 0), texts, which are classes and become one concept ``column:text`` each, or numbers.
    An empty cell means that the row has no label.

    Parameters
    ----------
    file
        ``.csv``, ``.tsv``, ``.parquet`` (requires pyarrow), or JSON lines.
    images
        Folder of the images; by default the folder of the file.
    classes
        Columns whose numbers are names of classes.
    ignore
        Columns that are not labels.
    limit
        Maximum number of rows; the first ones are used.

    Returns
    -------
    ConceptDataset
        The provenance has the number of labeled rows for each concept.

    Raises
    ------
    DataError
        Names the file, row and column: for a label column of mixed types, a repeated id, an image that is missing or unreadable,
        a box outside its image, an answer that is not a candidate, or a cell of the wrong type. Also for a Parquet file without
        pyarrow.
    ConfigError
        For an unknown column in `classes` or `ignore`, or a limit below 1.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import groundscope as gs
    >>> folder = Path(tempfile.mkdtemp())
    >>> gs.scenes.dataset(10)[0].image.load().save(folder / "a.png")
    >>> rows = ["image,question,answer,hallucinated,place", "a.png,Is there a dog in the image?,no,yes,street"]
    >>> _ = (folder / "mine.csv").write_text("\n".join(rows))
    >>> data = gs.loaders.table(folder / "mine.csv")
    >>> data[0].labels
    {'object:named': False, 'object:dog': False, 'hallucinated': True, 'place:street': True}
    """
    check_counts(limit=limit)
    path = Path(file)
    pictures = Pictures(ImageFolder(path.parent if images is None else Path(images)))
    records = read_rows(path)
    options = {"classes": _names(classes), "ignore": _names(ignore)}
    examples, labeled = make_examples(islice(records, limit), pictures, **options)
    if not examples:
        msg = f"{path}: the table has no rows"
        raise DataError(msg)
    provenance = {
        "loader": "table",
        "files": {str(path): sha256(path)},
        "images": str(pictures.folder.path if pictures.folder else ""),
        **{name: list(value) for name, value in options.items() if value},
        "kept": len(examples),
        "left_out": {"rows beyond the limit": sum(1 for _ in records)},
        "labels": labeled,
    }
    data = ConceptDataset(path.stem, tuple(examples), provenance)
    pictures.check()
    return data


def _names(value: Sequence[str] | str) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def read_rows(path: Path) -> Iterator[Record]:
    """Yield the rows of a table with a header row, JSON lines, one JSON array, or a Parquet file.

    Raises
    ------
    DataError
        As `concepts.reading.records.read_records`; for Parquet without pyarrow, and for a damaged file.
    """
    return _read_parquet(path) if path.suffix.lower() == ".parquet" else read_records(path)


def _read_parquet(path: Path) -> Iterator[Record]:
    """Yield the rows of a Parquet file, one batch at a time; raises `DataError` without pyarrow and for a damaged file."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        msg = (
            f"{path}: Parquet files need the package pyarrow; pip install 'groundscope[parquet]', or save the table as .csv or "
            "JSON lines"
        )
        raise DataError(msg) from error
    if not path.is_file():
        msg = f"file '{path}' cannot be read: {'it is not a file' if path.exists() else 'No such file or directory'}"
        raise DataError(msg)
    number = 0
    try:
        with readable(path), parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for values in batch.to_pylist():
                    number += 1
                    yield Record(f"{path}: row {number}", values)
    except ArrowException as error:
        msg = f"{path}: the Parquet file cannot be read: {str(error).splitlines()[0]}"
        raise DataError(msg) from error
