"""Every stored field of every format, replaced by a value of another type: refused with file and record, never otherwise."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from behavior import BehaviorResult, amber, judge_files, mme
from behavior.answer_files import read_answers
from behavior.pope import score_files
from behavior.result import Answer, Cost
from concepts import loaders
from groundscope.core.errors import DataError

VALUES: tuple[tuple[Any, ...], ...] = (
    (None,),
    (7.5, 10**400, True, -(2**60)),
    ("", "a text", "\ud800", "x\0y", "../x"),
    ([], ["a"], [None]),
    ({}, {"a": 1}),
)
"""Kinds of values that a field is replaced by; of each kind, the fields take one after the other."""
IDS = {"id", "question_id", "image_id", "imageId", "object_id", "object"}
"""Fields that may hold a text or a whole number."""
NULLABLE = {"given", "correct", "margin", "prior_answer", "text", "seconds", "forwards"}
"""Fields of saved answers that may hold nothing."""


@dataclass(frozen=True)
class Format:
    """One format: its files, and what reads them."""

    read: Callable[[Path, dict[str, Path]], Any]
    files: dict[str, Any]
    """Name to content; a list of records whose name ends in ``.jsonl`` is written a record a line."""
    free: tuple[str, ...] = ()
    """Fields that may hold other types too, or that are ignored."""


QUESTION = {"question_id": 1, "image": "a.png", "text": "Is there a dog in the image?", "label": "yes"}
OTHER = {"question_id": 2, "image": "a.png", "text": "Is there a cat in the image?", "label": "no"}
HF = {
    "question_id": "1",
    "question": "Is there a dog in the image?",
    "answer": "yes",
    "image_source": "a",
    "category": "random",
}
COCO = {
    "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "1.jpg"}],
    "annotations": [
        {"id": 10, "image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4]},
        {"id": 11, "image_id": 2, "category_id": 4, "bbox": [1, 2, 3, 4]},
    ],
    "categories": [{"id": 3, "name": "car"}, {"id": 4, "name": "dog"}],
}
GQA = {
    "1": {"width": 8, "height": 8, "objects": {
        "7": {"name": "apple", "x": 0, "y": 1, "w": 2, "h": 3, "attributes": ["green"],
              "relations": [{"name": "to the left of", "object": "8"}]},
        "8": {"name": "cup", "x": 4, "y": 4, "w": 2, "h": 2, "attributes": [], "relations": []},
    }},
    "2": {"width": 8, "height": 8, "objects": {
        "9": {"name": "tree", "x": 4, "y": 4, "w": 2, "h": 2, "attributes": [], "relations": []},
    }},
}  # fmt: skip
OWN = {"q": {"imageId": "1", "question": "Is it?", "answer": "yes", "types": {"semantic": "attr"},
             "annotations": {"question": {"2": "7"}}}}  # fmt: skip
VG = {
    "objects.json": [{"image_id": 1, "objects": [
        {"object_id": 1, "x": 0, "y": 1, "w": 2, "h": 3, "names": ["apple"]},
        {"object_id": 2, "x": 4, "y": 4, "w": 2, "h": 2, "names": ["cup"]},
    ]}, {"image_id": 2, "objects": [{"object_id": 3, "x": 4, "y": 4, "w": 2, "h": 2, "names": ["tree"]}]}],
    "attributes.json": [{"image_id": 1, "attributes": [{"object_id": 1, "attributes": ["green"]}]}],
    "relationships.json": [{"image_id": 1, "relationships": [
        {"predicate": "left of", "subject": {"object_id": 1}, "object": {"object_id": 2}}]}],
    "regions.json": [{"id": 1, "regions": [{"phrase": "an apple"}]}],
}  # fmt: skip
NOWHERE = {side: [[], []] for side in ("left", "right", "front", "behind")}
CLEVR = {"scenes": [{"image_filename": "a.png", "relationships": NOWHERE, "objects": [
    {"color": c, "shape": "cube", "size": "small", "material": "metal", "pixel_coords": [1, 2, 9.0]} for c in ("red", "blue")
]}]}  # fmt: skip
ARO = {"image_path": "a.png", "bbox_x": 1, "bbox_y": 1, "bbox_w": 4, "bbox_h": 3, "true_caption": "a on b",
       "false_caption": "b on a"}  # fmt: skip
AMBER_QUERIES = [{"id": 1, "image": "a.png", "query": "?"}, {"id": 2, "image": "a.png", "query": "?"}]
AMBER_TRUTHS = [
    {"id": 1, "type": "discriminative-hallucination", "truth": "no"},
    {"id": 2, "type": "generative", "truth": ["dog"]},
]
AMBER_SAID = [{"id": 1, "response": "No"}, {"id": 2, "response": "A dog."}]
LMMS = {
    "doc": {"question_id": "1", "question": "Is there a dog in the image?", "category": "random"},
    "filtered_resps": ["No"],
}


def saved_answers() -> dict[str, Any]:
    rows = [Answer("1", "g", "s", "object", "existence", "?", "yes", ("yes", "no"), "yes", True, 0.5, (0.5, 0.1), "no", "Yes"),
            Answer("2", "g", "s", "object", "caption", "?", "A dog.", (), None, None)]  # fmt: skip
    from dataclasses import asdict

    head = {"format": "groundscope.behavior", "version": 1, "cost": asdict(Cost(1.5, 3, 2)), "provenance": {"a": 1}}
    return json.loads(json.dumps({**head, "answers": [asdict(row) for row in rows]}))


def requests(benchmark: str) -> list[dict[str, Any]]:
    text = {"question": "q", "answer": "a", "reference": "r", "image_content": "c", "kind": "k", "group": "g"}
    return [{"id": str(i), "benchmark": benchmark, **text} for i in range(2)]


FORMATS: dict[str, Format] = {
    "pope": Format(lambda f, p: loaders.pope(p["q.json"], f), {"q.json": [QUESTION, OTHER]}),
    "pope lines": Format(lambda f, p: loaders.pope(p["q.jsonl"], f), {"q.jsonl": [QUESTION, OTHER]}),
    "pope hf": Format(lambda f, p: loaders.pope(p["q.json"], f), {"q.json": [HF]}, ("category",)),
    "pope labels": Format(
        lambda f, p: loaders.pope(p["q.json"], f, p["l_random.json"]),
        {"q.json": [{**QUESTION, "category": "random"}], "l_random.json": [QUESTION, OTHER]},
        ("category", "label", "question_id"),
    ),
    "coco": Format(
        lambda f, p: loaders.coco(p["i.json"], f, p["c.json"]),
        {"i.json": COCO, "c.json": {"annotations": [{"image_id": 1, "caption": "A car."}]}},
    ),
    "gqa": Format(lambda f, p: loaders.gqa(p["g.json"], f), {"g.json": GQA}, ("width", "height")),
    "gqa own": Format(
        lambda f, p: loaders.gqa(p["g.json"], f, p["q.json"]), {"g.json": GQA, "q.json": OWN},
        ("width", "height", "annotations", "question"),
    ),
    "visual_genome": Format(
        lambda f, p: loaders.visual_genome(
            p["objects.json"], f, p["attributes.json"], p["relationships.json"], p["regions.json"]
        ),
        VG, ("predicate",),
    ),
    "clevr": Format(lambda f, p: loaders.clevr(p["s.json"], f), {"s.json": CLEVR}),
    "vsr": Format(
        lambda f, p: loaders.vsr(p["v.jsonl"], f),
        {"v.jsonl": [{"image": "a.png", "caption": "A on b.", "label": 1, "relation": "on"}]},
    ),
    "whatsup": Format(
        lambda f, p: loaders.whatsup(p["w.json"], f), {"w.json": [{"image_path": "a.png", "caption_options": ["a", "b"]}]}
    ),
    "whatsup ids": Format(lambda f, p: loaders.whatsup(p["vg_qa.json"], f), {"vg_qa.json": [[1, "a", "b"]]}),
    "aro": Format(lambda f, p: loaders.aro(p["a.json"], f), {"a.json": [{**ARO, "relation_name": "on"}]}),
    "aro attributes": Format(lambda f, p: loaders.aro(p["a.json"], f), {"a.json": [{**ARO, "attributes": ["x", "y"]}]}),
    "sugarcrepe": Format(
        lambda f, p: loaders.sugarcrepe(p["swap_att.json"], f),
        {"swap_att.json": {"0": {"filename": "a.png", "caption": "a b", "negative_caption": "b a"}}},
    ),
    "amber": Format(
        lambda f, p: loaders.amber(p["q.json"], f, p["t.json"]), {"q.json": AMBER_QUERIES, "t.json": AMBER_TRUTHS}
    ),
    "amber scored": Format(
        lambda f, p: amber.score_files(p["t.json"], p["r.json"], p["q.json"]),
        {"t.json": AMBER_TRUTHS, "r.json": AMBER_SAID, "q.json": AMBER_QUERIES}, ("query",),
    ),
    "answers": Format(
        lambda f, p: score_files(p["q.jsonl"], p["a.jsonl"]),
        {"q.jsonl": [QUESTION, OTHER],
         "a.jsonl": [{"question_id": q["question_id"], "prompt": q["text"], "text": "No", "seconds": 1.5}
                     for q in (QUESTION, OTHER)]},
        ("prompt",),
    ),
    "answers of lmms-eval": Format(lambda f, p: read_answers(p["a.jsonl"]), {"a.jsonl": [LMMS]}, ("question", "category")),
    "requests": Format(
        lambda f, p: judge_files.read_verdicts(p["v.jsonl"], p["r.jsonl"]),
        {"r.jsonl": requests("llava_bench"), "v.jsonl": [{"id": str(i), "rating": 7, "reference_rating": 8} for i in range(2)]},
    ),
    "replies": Format(
        lambda f, p: judge_files.read_verdicts(p["v.jsonl"], p["r.jsonl"]),
        {"r.jsonl": requests("mmhal"), "v.jsonl": [{"id": str(i), "reply": "rating: 3"} for i in range(2)]},
    ),
    "saved answers": Format(lambda f, p: BehaviorResult.load(p["b.json"]), {"b.json": saved_answers()}, ("a",)),
}  # fmt: skip


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every value inside, records and lists included."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*at, key)
        yield from places(inner, (*at, key))


def replaced(document: Any, at: tuple[Any, ...], value: Any) -> Any:
    document = copy.deepcopy(document)
    inner = document
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = value
    return document


def write(path: Path, document: Any) -> None:
    if path.suffix == ".jsonl" and isinstance(document, list):
        path.write_text("".join(json.dumps(record) + "\n" for record in document))
    else:
        path.write_text(json.dumps(document))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a.png", "1.jpg", "2.jpg", "a.jpg"):
        Image.new("RGB", (8, 8), "red").save(images / name)
    return images


def may_hold(name: str, key: Any, old: Any, new: Any) -> bool:
    """Say whether a field may hold a value: one of the type that was there, or what the format says."""

    def kind(value: Any) -> str:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return "number"
        return type(value).__name__

    if kind(old) == kind(new) or (key in IDS and kind(new) in {"str", "number"} and not isinstance(new, float)):
        return True
    if name == "saved answers" and key in NULLABLE:
        kinds = {"given": "str", "correct": "bool", "prior_answer": "str", "text": "str"}
        return new is None or kind(new) == kinds.get(key, "number")
    if name == "visual_genome" and key == "attributes":
        return new is None
    return key == "relations" and isinstance(new, list | dict)


@pytest.mark.parametrize("name", FORMATS)
def test_a_field_of_another_type_is_refused_with_its_place(folder: Path, name: str) -> None:
    form = FORMATS[name]
    paths = {file: folder.parent / file for file in form.files}
    for file, document in form.files.items():
        write(paths[file], document)
    assert form.read(folder, paths) is not None
    silent = []
    for file, document in form.files.items():
        for number, at in enumerate(places(document)):
            old = document
            for key in at:
                old = old[key]
            for value in (kind[number % len(kind)] for kind in VALUES):
                write(paths[file], replaced(document, at, value))
                try:
                    form.read(folder, paths)
                except DataError as error:
                    words = str(error)
                    assert any(file in words for file in form.files), (file, at, value, words)
                    words.encode()  # can be printed
                else:
                    free = any(key in form.free for key in at)
                    if not free and not may_hold(name, at[-1], old, value):
                        silent.append((file, at, value))
        write(paths[file], document)
    assert silent == []


NO_WORDS = ("", " ")
NO_PATH = ("", " ", "../x", "/x", "\0")
NO_TRUTH = ("", " ", "maybe", "1")
TABLES: dict[str, tuple[str, Callable[[Path, Path], Any], list[list[str]], list[tuple[str, ...]]]] = {
    "pope": (
        "POPE.tsv", lambda f, p: loaders.pope(p, f),
        [["index", "question", "answer", "category"], ["1", "Is there a dog in the image?", "yes", "random"]],
        [NO_PATH, NO_WORDS, NO_TRUTH, ()],
    ),
    "answers": (
        "a.tsv", lambda f, p: read_answers(p),
        [["index", "question", "prediction"], ["1", "Is there a dog?", "Yes"]], [NO_WORDS, (), ()],
    ),
    "mme": (
        "existence.txt", lambda f, p: loaders.mme(p, f),
        [["a.png", "Is it?", "Yes"], ["a.png", "Is it not?", "No"]], [NO_PATH, NO_WORDS, NO_TRUTH],
    ),
    "mme scored": (
        "existence.txt", lambda f, p: mme.score_files(p),
        [["a.png", "?", "Yes", "No"], ["a.png", "!", "No", "No"]], [NO_WORDS, NO_WORDS, NO_TRUTH, ()],
    ),
}  # fmt: skip
"""Name to file name, what reads it, its rows, and for each column the cells that it may not hold."""


@pytest.mark.parametrize("name", TABLES)
def test_a_cell_that_its_column_may_not_hold_is_refused_with_its_line(folder: Path, name: str) -> None:
    file, read, rows, refused = TABLES[name]
    path = folder.parent / file

    def put_rows(changed: list[list[str]]) -> None:
        path.write_text("".join("\t".join(row) + "\n" for row in changed))

    put_rows(rows)
    assert read(folder, path)
    for line in range(rows[0][0] == "index", len(rows)):
        where = rf"{file}: line {line + 1}: "
        for column, cells in enumerate(refused):
            for cell in cells:
                put_rows(replaced(rows, (line, column), cell))
                with pytest.raises(DataError, match=where):
                    read(folder, path)
        put_rows(replaced(rows, (line,), rows[line][:-1]))
        with pytest.raises(DataError, match=where):
            read(folder, path)
        put_rows(replaced(rows, (line,), [*rows[line], "x", "y"]))
        with pytest.raises(DataError, match=where):
            read(folder, path)
