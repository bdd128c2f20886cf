"""A user's own table: every layout, every kind of label against truth written by hand, and every way it can be wrong."""

from __future__ import annotations

import base64
import builtins
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

from concepts import AnnotatedObject, BytesImage, ConceptDataset, FileImage, loaders
from concepts.annotated_object import Box
from groundscope.core.errors import ConfigError, DataError

ROWS: list[dict[str, Any]] = [
    {"image": "a.png", "question": "Is there a dog in the image?", "answer": "Yes", "hallucinated": "no", "place": "street"},
    {"image": "sub/b.png", "question": "Is there a cat in the image?", "answer": "no", "hallucinated": "YES", "size": "2"},
    {"image": "", "question": "Is Oslo in Norway?", "answer": "yes", "place": "room", "size": ".5", "object:cup": "1"},
    {"image": "a.png", "question": "What is this?", "answer": "a mug", "aliases": "cup|a cup", "object:cup": "0"},
]  # fmt: skip
"""Rows with every kind of label; an absent cell is empty."""
LABELS = [
    {"object:named": True, "object:dog": True, "hallucinated": False, "place:street": True, "place:room": False},
    {"object:named": False, "object:cat": False, "hallucinated": True, "size": 2.0},
    {"object:named": True, "place:street": False, "place:room": True, "size": 0.5, "object:cup": True},
    {"object:cup": False},
]
"""Their labels, written by hand."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    for name, color in (("a.png", "red"), ("sub/b.png", "blue")):
        Image.new("RGB", (8, 6), color).save(tmp_path / name)
    return tmp_path


def write(folder: Path, rows: list[dict[str, Any]], suffix: str = ".csv") -> Path:
    path = folder / f"mine{suffix}"
    frame = pd.DataFrame(rows)
    if suffix in {".csv", ".tsv"}:
        frame.to_csv(path, index=False, sep="\t" if suffix == ".tsv" else ",")
    elif suffix == ".parquet":
        frame.to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_each_kind_of_file_gives_the_same_examples(folder: Path, suffix: str) -> None:
    data = loaders.table(write(folder, ROWS, suffix))
    assert [dict(e.labels) for e in data] == LABELS
    assert [e.answer for e in data] == ["yes", "no", "yes", "a mug"]
    assert [len(e.images) for e in data] == [1, 1, 0, 1]
    assert [e.group for e in data] == ["a.png", "sub/b.png", "no image: Is Oslo in Norway?", "a.png"]
    assert [e.id for e in data] == ["1", "2", "3", "4"]
    assert [e.kind for e in data] == ["existence", "existence", "question", "question"]
    assert [e.candidates for e in data] == [("yes", "no")] * 3 + [()]
    assert data[3].aliases == ("cup", "a cup")
    assert data.provenance["labels"] == {
        "hallucinated": 2, "place:room": 2, "place:street": 2, "size": 2, "object:cup": 2,
    }  # fmt: skip
    assert data.digest == loaders.table(write(folder, ROWS, ".csv")).digest


def test_a_frame_gives_the_examples_of_its_file(folder: Path) -> None:
    frame = pd.DataFrame(ROWS)
    assert ConceptDataset.from_frame(frame, folder).digest == loaders.table(write(folder, ROWS)).digest
    paths = frame.assign(image=[folder / name if name else None for name in frame["image"]])
    assert [
        dict(e.labels) for e in ConceptDataset.from_frame(paths)
    ] == LABELS  # without a folder, paths are used unchanged
    picture = pd.DataFrame({"image": [Image.new("RGB", (3, 2), "green")], "question": ["What is this?"]})
    assert ConceptDataset.from_frame(picture)[0].image.load().getpixel((0, 0)) == (0, 128, 0)


def test_fields_are_read_from_their_columns(folder: Path) -> None:
    objects = [{"noun": "dog", "box": [1, 2, 5, 6], "attributes": {"color": "red"}}, {"noun": "cat", "id": "c"}]
    row = {
        "id": "q", "image": "a.png", "question": "What color is the dog?", "answer": "red", "candidates": "red|blue",
        "group": "g", "split": "hard", "level": "attribute", "kind": "what_color", "prefix": "The dog is",
        "boxes": json.dumps(objects), "subject": "dog", "prior_answer": "brown",
    }  # fmt: skip
    for suffix in (".csv", ".jsonl"):
        e = loaders.table(write(folder, [row], suffix))[0]
        assert (e.id, e.group, e.split, e.level, e.kind, e.prefix) == (
            "q", "g", "hard", "attribute", "what_color", "The dog is",
        )  # fmt: skip
        assert (e.candidates, e.prior_answer, e.subject) == (("red", "blue"), "brown", "o1")
        assert e.objects == (
            AnnotatedObject("o1", "dog", Box(1, 2, 5, 6), {"color": "red"}),
            AnnotatedObject("c", "cat", None),
        )


def test_images_are_files_bytes_or_base64(folder: Path) -> None:
    content = (folder / "a.png").read_bytes()
    base = {"question": "What is this?"}
    cells = [content, {"bytes": content, "path": None}, {"bytes": None, "path": "a.png"}]
    data = [loaders.table(write(folder, [{"image": c, **base}], ".parquet"))[0].image for c in cells]
    Image.effect_noise((30, 30), 50).save(folder / "long.png")  # its base64 is longer than any file name
    long = (folder / "long.png").read_bytes()
    data.append(loaders.table(write(folder, [{"image": base64.b64encode(long).decode(), **base}], ".tsv"))[0].image)
    expected = [content, content, content, long]
    assert [type(i) for i in data] == [BytesImage, BytesImage, FileImage, BytesImage]
    assert [i.digest for i in data] == [BytesImage(c).digest for c in expected]  # pyright: ignore[reportAttributeAccessIssue]


def test_several_images(folder: Path) -> None:
    first = loaders.table(write(folder, [{"images": "a.png|sub/b.png", "question": "Same?"}]))[0]
    second = loaders.table(write(folder, [{"images": ["a.png", "sub/b.png"], "question": "Same?"}], ".jsonl"))[0]
    assert [i.identity for i in first.images] == [i.identity for i in second.images]
    assert len(first.images) == 2
    assert first.group == "a.png"


def test_numbers_are_classes_only_if_named(folder: Path) -> None:
    rows = [{"image": "a.png", "question": "?", "grade": grade} for grade in (1, 2, 3)]
    assert [e.labels["grade"] for e in loaders.table(write(folder, rows))] == [1.0, 2.0, 3.0]
    classes = loaders.table(write(folder, rows), classes="grade")
    assert dict(classes[1].labels) == {"grade:1": False, "grade:2": True, "grade:3": False}
    assert "grade" not in str(dict(loaders.table(write(folder, rows), ignore=["grade"])[0].labels))


BAD: list[tuple[list[dict[str, Any]], str]] = [
    ([{"x": "yes"}, {"x": ""}, {"x": "0.5"}],
     r"mine.csv: line 4: column 'x' holds '0.5', but line 2 holds 'yes'; a label column holds only yes and no, only"),
    ([{"x": "3"}, {"x": "large"}], r"mine.csv: line 3: column 'x' holds 'large', but line 2 holds '3'"),
    ([{"object:dog": "maybe"}], r"mine.csv: line 2: column 'object:dog' holds 'maybe'; a label column concept:value holds yes"),
    ([{"x": "inf"}], r"mine.csv: line 2: column 'x' holds 'inf'; a number must be finite"),
    ([{"object:": "yes"}], r"'object:' is not a concept"),
    ([{"correct": "yes"}], r"mine.csv: column 'correct' has the name of a column that stores write"),
    ([{"scene": "in", "scene:in": "yes"}], r"two label columns define the concept 'scene:in'"),
    ([{"id": "a"}, {"id": "a"}], r"mine.csv: line 3: column 'id' holds 'a', as line 2 does; ids must be unique"),
    ([{"image": "none.png"}], r"mine.csv: line 2: field 'image': image '.*none.png' does not exist"),
    ([{"image": "../a.png"}], r"mine.csv: line 2: field 'image': image path '../a.png' leaves the image folder"),
    ([{"image": "a.png", "images": "a.png"}], r"mine.csv: line 2: columns 'image' and 'images' both hold images"),
    ([{"answer": "red", "candidates": "blue|green"}], r"line 2: column 'candidates' must hold at least two .* 'red'"),
    ([{"level": "thing"}], r"mine.csv: line 2: column 'level' holds 'thing'; choose from object, attribute, relation"),
    ([{"boxes": "dog"}], r"mine.csv: line 2: column 'boxes' must hold a list of"),
    ([{"image": "a.png", "boxes": '[{"noun": "dog", "box": [0, 0, 50, 5]}]'}],
     r"line 2: column 'boxes', dog: the box 0, 0, 50, 5 extends beyond its image of 8 x 6 pixels"),
    ([{"image": "a.png", "boxes": '[{"noun": "dog", "box": [3, 0, 3, 5]}]'}], r"line 2: column 'boxes', dog: object 'o1' has"),
    ([{"boxes": '[{"noun": "dog", "box": [0, 0, 5, 5]}]'}], r"line 2: column 'boxes', dog: a box needs an image"),
    ([{"subject": "dog"}], r"line 2: column 'subject' holds 'dog', which is no id or noun in column 'boxes'"),
    ([{"question": ""}], r"mine.csv: line 2: field 'question' must hold text"),
    ([{"x": f"text {i}"} for i in range(101)], r"column 'x' holds 101 different texts, .* ignore=\['x'\]"),
]  # fmt: skip
"""Rows and the message that refuses them."""


@pytest.mark.parametrize(("rows", "message"), BAD)
def test_bad_tables_are_refused(folder: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        loaders.table(write(folder, [{"question": "What?", **row} for row in rows]))
    assert len(str(error.value).splitlines()) == 1


def test_bad_options_and_files_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(folder, ROWS)
    with pytest.raises(ConfigError, match="classes: unknown label column 'placce'; choose from hallucinated, place, "):
        loaders.table(path, classes=["placce"])
    with pytest.raises(ConfigError, match="ignore: unknown column 'y'; choose from image"):
        loaders.table(path, ignore=["y"])
    with pytest.raises(DataError, match=r"mine.csv: the table has no rows"):
        loaders.table(_empty(folder))
    (folder / "damaged.parquet").write_bytes(b"PAR1 not a table")
    with pytest.raises(DataError, match=r"damaged.parquet: the Parquet file cannot be read"):
        loaders.table(folder / "damaged.parquet")
    with pytest.raises(DataError, match=r"none.parquet' cannot be read"):
        loaders.table(folder / "none.parquet")
    with pytest.raises(DataError, match="frame: row 7: column 'x' holds 'b', but row 5 holds 1"):
        ConceptDataset.from_frame(pd.DataFrame({"question": ["?", "?"], "x": [1, "b"]}, index=[5, 7]))
    with pytest.raises(ConfigError, match="loader 'pope' needs the folder of the images"):
        loaders.load("pope", path)
    imported = builtins.__import__

    def without_pyarrow(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "pyarrow":
            raise ImportError(name)
        return imported(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    with pytest.raises(
        DataError, match=r"Parquet files need the package pyarrow; pip install 'groundscope\[parquet\]', or save"
    ):
        loaders.table(folder / "damaged.parquet")


def _empty(folder: Path) -> Path:
    path = folder / "mine.csv"
    path.write_text("image,question\n")
    return path
