"""POPE question files: every layout that is about, and every way they can be wrong."""

from __future__ import annotations

import hashlib
import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from concepts import loaders
from concepts.reading import json_stream, text_files
from groundscope.core.errors import ConfigError, DataError

LINES: list[dict[str, Any]] = [
    {"question_id": 1, "image": "a.png", "text": "Is there an apple in the image?", "label": "yes"},
    {"question_id": 2, "image": "a.png", "text": "Is there a hot dog in the image?", "label": "no"},
    {"question_id": 3, "image": "sub/b.png", "text": "Is there an orange in the imange?", "label": "No"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.png"):
        Image.new("RGB", (4, 4), "red").save(images / name)
    return images


def write(folder: Path, content: str | bytes, name: str = "coco_pope_random.json") -> Path:
    path = folder.parent / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(*values: dict[str, Any]) -> str:
    return "".join(json.dumps(v) + "\n" for v in values)


def test_json_lines(folder: Path) -> None:
    path = write(folder, lines(*LINES) + "\n\n")
    data = loaders.pope(path, folder)
    assert [e.id for e in data] == ["random/1", "random/2", "random/3"]
    first, second, third = data.examples
    assert (first.question, first.answer, first.candidates) == ("Is there an apple in the image?", "yes", ("yes", "no"))
    assert (first.level, first.kind, first.split, first.group) == ("object", "existence", "random", "a.png")
    assert first.labels == {"object:named": True, "object:apple": True}
    assert second.labels == {"object:named": False, "object:hot dog": False}
    assert third.labels == {"object:named": False, "object:orange": False}
    assert (third.answer, third.group) == ("no", "sub/b.png")
    assert third.question == LINES[2]["text"]
    assert first.image is second.image
    assert first.image.load().size == (4, 4)
    assert data.provenance["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert data.provenance["kept"] == 3
    assert data.provenance["left_out"] == {"questions beyond the limit": 0, "labels of nouns, for another wording": 0}


def test_every_layout_gives_the_same(folder: Path) -> None:
    mirror = [{"question_id": str(v["question_id"]), "question": v["text"], "answer": v["label"]} for v in LINES]
    mirror = [{**m, "image": v["image"], "category": "x"} for m, v in zip(mirror, LINES, strict=True)]
    expected = loaders.pope(write(folder, lines(*LINES)), folder)
    for content in (
        json.dumps(LINES),
        "\n  " + json.dumps(LINES, indent=2),
        "\ufeff" + lines(*LINES),
        "\ufeff" + json.dumps(LINES),
        lines(*LINES).replace("\n", "\r\n"),
        lines(*LINES).rstrip("\n"),
        lines(*mirror),
        json.dumps(mirror),
    ):
        loaded = loaders.pope(write(folder, content), folder)
        assert loaded.digest == expected.digest


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("coco_pope_popular.json", "popular"),
        ("GQA_POPE_Adversarial.jsonl", "adversarial"),
        ("questions.json", "neutral"),
        ("random_and_popular.json", "neutral"),
    ],
)
def test_the_split_is_in_the_name(folder: Path, name: str, split: str) -> None:
    data = loaders.pope(write(folder, lines(*LINES), name), folder)
    assert {e.split for e in data} == {split}
    assert data[0].id == f"{split}/1"


def test_splits_can_be_joined(folder: Path) -> None:
    from concepts import ConceptDataset

    parts = [loaders.pope(write(folder, lines(*LINES), f"{s}.json"), folder) for s in ("random", "popular")]
    assert len(ConceptDataset("both", tuple(e for part in parts for e in part))) == 6


def test_one_image_is_one_group_however_its_path_is_written(folder: Path) -> None:
    data = loaders.pope(
        write(folder, lines(*LINES[:2], {**LINES[0], "question_id": 9, "image": "sub/../a.png"})), folder
    )
    assert {e.group for e in data} == {"a.png"}


def test_a_limit_keeps_the_first_and_counts_the_rest(folder: Path) -> None:
    data = loaders.pope(write(folder, lines(*LINES, {"question_id": 4})), folder, limit=2)
    assert [e.id for e in data] == ["random/1", "random/2"]
    assert data.provenance["left_out"]["questions beyond the limit"] == 2  # pyright: ignore[reportIndexIssue]
    with pytest.raises(ConfigError, match="limit=0"):
        loaders.pope(write(folder, lines(*LINES)), folder, limit=0)


def test_another_wording_or_language_is_kept_without_a_noun(folder: Path) -> None:
    odd = {**LINES[0], "text": "Gibt es einen Apfel im Bild?"}
    data = loaders.pope(write(folder, lines(odd, LINES[1])), folder)
    assert data[0].labels == {"object:named": True}
    assert data.provenance["left_out"]["labels of nouns, for another wording"] == 1  # pyright: ignore[reportIndexIssue]


BAD: dict[str, tuple[str | bytes, str]] = {
    "broken line": (lines(LINES[0]) + '{"question_id": 2, "image"\n', r"random\.json: line 2: invalid JSON at column"),
    "cut file": (
        lines(*LINES)[:-20],
        r"line 3: invalid JSON at column \d+: .*; the file ends in this line, so it may be truncated$",
    ),
    "cut array": (
        json.dumps(LINES, indent=1)[:-20],
        r"random\.json: record 3: invalid JSON at byte \d+: the file ends in",
    ),
    "not UTF-8": (lines(LINES[0]).encode() + b'{"text": "\xff"}\n', r"line 2: not UTF-8 at byte 11"),
    "no object": (lines(LINES[0]) + "17\n", r"line 2: expected a JSON object with fields, found 17"),
    "no object in array": (json.dumps([LINES[0], "x"]), r"record 2: expected a JSON object with fields, found \"x\""),
    "number of thousands of digits": ('{"question_id": ' + "9" * 5000 + "}\n", r"line 1: invalid JSON"),
    "thousands of brackets": ("[" * 100_000, r"random\.json: record 1: invalid JSON at byte 2"),
    "no question_id": (
        lines({"image": "a.png", "text": "?"}),
        r"line 1: no field 'question_id'; it has 'image', 'text'",
    ),
    "no label": (lines({**LINES[0], "label": ""}), r"line 1: field 'label' or 'answer' must hold text, not \"\""),
    "missing label": (lines(LINES[0], {"question_id": 2, "image": "a.png", "text": "Is?"}), "line 2: no field 'label'"),
    "missing text": (
        lines({"question_id": 2, "image": "a.png", "label": "no"}),
        "line 1: no field 'text' or 'question'",
    ),
    "missing image": (lines({"question_id": 2, "text": "Is?", "label": "no"}), "line 1: no field 'image'"),
    "image is no name": (lines({**LINES[0], "image": 5}), "line 1: field 'image' must hold text, not 5"),
    "id is no name": (
        lines({**LINES[0], "question_id": True}),
        "line 1: field 'question_id' must hold text, not true",
    ),
    "label": (
        lines(LINES[0], {**LINES[1], "label": "maybe"}),
        "line 2: field 'label' is 'maybe', neither 'yes' nor 'no'",
    ),
    "label in mirror": (
        lines({"question_id": 1, "question": "Is?", "answer": "si", "image": "a.png"}),
        "line 1: field 'answer' is 'si'",
    ),
    "label is boolean": (
        lines({**LINES[0], "label": True}),
        "line 1: field 'label' or 'answer' must hold text, not true",
    ),
    "duplicate": (
        lines(*LINES, {**LINES[0], "question_id": "1"}),
        r"line 4: question_id '1' was already used, .*line 1",
    ),
    "leaves folder": (lines({**LINES[0], "image": "../x.png"}), "line 1: field 'image': image path .* leaves"),
    "absolute": (lines({**LINES[0], "image": "/etc/passwd"}), "line 1: field 'image': image path .* must be relative"),
    "no image": (
        lines(*LINES, {**LINES[0], "question_id": 4, "image": "c.png"}),
        "line 4: field 'image': .*does not exist",
    ),
    "nothing": ("\n \n", "the file contains no questions"),
    "empty array": ("[]", "the file contains no questions"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_with_their_place(folder: Path, case: str) -> None:
    content, words = BAD[case]
    with pytest.raises(DataError, match=words) as caught:
        loaders.pope(write(folder, content), folder)
    assert "coco_pope_random.json" in str(caught.value)


def test_an_unreadable_image_is_named_with_its_line(folder: Path) -> None:
    (folder / "sub" / "b.png").write_text("no image")
    with pytest.raises(DataError, match=r"line 3: field 'image': .*b\.png' cannot be read"):
        loaders.pope(write(folder, lines(*LINES)), folder)


def test_files_that_are_not_there(folder: Path) -> None:
    with pytest.raises(DataError, match=re.escape("none.json' cannot be read")):
        loaders.pope(folder / "none.json", folder)
    with pytest.raises(DataError, match=r"image folder .* does not exist"):
        loaders.pope(write(folder, lines(*LINES)), folder / "none")


def test_sizes_are_checked_before_memory_is_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="line 1 is longer than"):
        loaders.pope(write(folder, '{"question_id": "' + "x" * text_files.LONGEST_LINE), folder)
    monkeypatch.setattr(json_stream, "LARGEST_RECORD", 100)
    monkeypatch.setattr(json_stream, "_WINDOW", 50)
    with pytest.raises(DataError, match=r"record 2: .* more than 100 characters in one record"):
        loaders.pope(write(folder, json.dumps([LINES[0], {**LINES[1], "x": "y" * 500}])), folder)


def test_lines_are_read_one_at_a_time(folder: Path) -> None:
    padded = [{**LINES[0], "question_id": i, "extra": "x" * 5000} for i in range(2000)]
    path = write(folder, lines(*padded))
    tracemalloc.start()
    data = loaders.pope(path, folder, limit=1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert data.provenance["left_out"]["questions beyond the limit"] == 1999  # pyright: ignore[reportIndexIssue]
    assert peak < 2_000_000 < path.stat().st_size


def test_the_table_names_the_loader_and_the_name_is_the_function() -> None:
    import concepts.loaders.pope  # the module of the same name must not hide the function

    assert loaders.pope is loaders.LOADERS["pope"]
    assert callable(loaders.pope)
    assert concepts.loaders.pope is loaders.pope
