"""MME, AMBER and answer files made elsewhere, against examples worked by hand from the papers' definitions."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import f1_score, precision_score, recall_score

from behavior import BehaviorResult, amber, answer, chair, load_answers, mme, taxonomy
from behavior.pope import questions_about, score_files, score_result, write_questions
from behavior.result import Answer, Cost
from concepts import loaders, scenes
from concepts.scenes.icons import NOUNS
from concepts.scenes.scene import TEST, generator, sample_scene
from groundscope.core.errors import ConfigError, DataError
from lvlm import Lvlm, load_lvlm, wrap_lvlm
from lvlm.answer_keys import answer_key
from lvlm.tiny.architecture import build_model, build_processor


def row(
    number: int, kind: str, truth: str, prediction: str | None, level: str = "object", group: str | None = None
) -> Answer:
    return Answer(
        id=str(number), group=group or f"{number // 2}", split="neutral", level=level, kind=kind, question="?",
        answer=truth, candidates=("yes", "no"), given=prediction, correct=prediction == truth,
    )  # fmt: skip


def result(rows: list[Answer]) -> BehaviorResult:
    return BehaviorResult(tuple(rows), Cost(None, None, len(rows)))


def lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


# ---- MME ---------------------------------------------------------------------------------------------------------------


def test_mme_by_hand() -> None:
    """Three images: both right; one right; one right and one unreadable. acc = 4/6, acc+ = 1/3, score = 100."""
    answers = [("yes", "yes"), ("no", "no"), ("yes", "yes"), ("no", "yes"), ("yes", None), ("no", "no")]
    rows = [row(i, "existence", a, s) for i, (a, s) in enumerate(answers)]
    rows += [row(10 + i, "position", a, s, "relation") for i, (a, s) in enumerate([("yes", "yes"), ("no", "no")])]
    scores = mme.score(result(rows))
    existence = scores.subtasks["existence"]
    assert existence.accuracy.value == pytest.approx(4 / 6)
    assert existence.accuracy_plus.value == pytest.approx(1 / 3)
    assert existence.score.value == pytest.approx(100 * (4 / 6 + 1 / 3))
    assert existence.score.low < existence.score.value < existence.score.high
    assert (existence.n, existence.unparsed) == (6, 1)
    assert scores.perception == pytest.approx(300)
    assert scores.cognition == 0
    assert scores.levels == {"object": pytest.approx(100), "relation": pytest.approx(200)}
    assert scores.frame()["subtask"].tolist() == ["existence", "position"]


def test_mme_answer_files(tmp_path: Path) -> None:
    (tmp_path / "color.txt").write_text("a.png\tIs it red?\tYes\tYes, it is.\na.png\tIs it blue?\tNo\tIt is red\n")
    (tmp_path / "code_reasoning.txt").write_text("b.png\tIs it 1?\tYes\tno\nb.png\tIs it 2?\tNo\tNO\n")
    scores = mme.score_files(tmp_path)
    # "It is red" has neither yes nor no within its first four characters.
    assert scores.subtasks["color"].score.value == pytest.approx(50)
    assert scores.subtasks["color"].unparsed == 1
    assert (scores.perception, scores.cognition) == (pytest.approx(50), pytest.approx(50))
    assert scores.levels == {"attribute": pytest.approx(50)}
    (tmp_path / "count.txt").write_text("a.png\tOne?\tyes\tyes\n")
    with pytest.raises(DataError, match=r"subtask 'count', image 'a\.png': 1 question, but MME asks two"):
        mme.score_files(tmp_path)
    (tmp_path / "count.txt").write_text("a.png\tOne?\tyes\n")
    with pytest.raises(DataError, match=r"count\.txt: line 1: 3 tab-separated columns"):
        mme.score_files(tmp_path)
    with pytest.raises(DataError, match="kind 'smell', which is not a subtask"):
        mme.score(result([row(0, "smell", "yes", "yes")]))
    with pytest.raises(ConfigError, match="unknown parser"):
        mme.score_files(tmp_path, parser="x")


@settings(max_examples=20)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_mme_keeps_its_definition(images: list[tuple[bool, bool]]) -> None:
    rows = [row(2 * i + j, "count", a, a if images[i][j] else "yes" if a == "no" else "no")
            for i in range(len(images)) for j, a in enumerate(("yes", "no"))]  # fmt: skip
    scores = mme.score(result(rows)).subtasks["count"]
    accuracy = sum(a + b for a, b in images) / (2 * len(images))
    plus = sum(a and b for a, b in images) / len(images)
    assert scores.score.value == pytest.approx(100 * (accuracy + plus))
    assert 0 <= scores.score.low <= scores.score.value + 1e-9
    assert scores.score.value <= scores.score.high + 1e-9 <= 200 + 1e-6


# ---- AMBER -------------------------------------------------------------------------------------------------------------


def test_amber_by_hand() -> None:
    """No is positive. 3 denied rightly, 1 denied wrongly, 1 claimed wrongly, 2 claimed rightly, 1 neither (truly no)."""
    answers = [("no", "no")] * 3 + [("yes", "no"), ("no", "yes"), ("yes", "yes"), ("yes", "yes"), ("no", None)]
    rows = [row(i, "existence", a, s) for i, (a, s) in enumerate(answers)]
    rows.append(row(8, "state", "no", "no", "attribute"))
    scores = amber.score(result(rows), variant="exact").parts
    assert list(scores) == ["all", "existence", "attribute", "state"]
    existence = scores["existence"]
    assert existence.accuracy.value == pytest.approx(5 / 8)
    assert existence.precision.value == pytest.approx(3 / 4)
    assert existence.recall.value == pytest.approx(3 / 5)
    assert existence.f1.value == pytest.approx(2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5))
    assert existence.unparsed == 1
    assert scores["all"].n == 9
    assert scores["state"].recall.value == 1


@settings(max_examples=20)
@given(st.lists(st.tuples(st.sampled_from(["yes", "no"]), st.sampled_from(["yes", "no"])), min_size=1, max_size=30))
def test_amber_is_scikit_learns_with_no_as_positive(pairs: list[tuple[str, str]]) -> None:
    answers = result([row(i, "relation", a, s, "relation") for i, (a, s) in enumerate(pairs)])
    scores = amber.score(answers, variant="exact").parts["all"]
    truth, predicted = [a for a, _ in pairs], [s for _, s in pairs]
    for name, metric in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
        expected = metric(truth, predicted, pos_label="no", zero_division=math.nan)
        assert getattr(scores, name).value == pytest.approx(expected, nan_ok=True)


def test_amber_response_files(tmp_path: Path) -> None:
    annotations = tmp_path / "annotations.json"
    annotations.write_text(json.dumps([
        {"id": 1, "type": "generative", "truth": ["dog"], "hallu": ["cat"]},
        {"id": 2, "type": "discriminative-hallucination", "truth": "no"},
        {"id": 3, "type": "discriminative-attribute-state", "truth": "yes"},
        {"id": 4, "type": "relation", "truth": "no"},
    ]))  # fmt: skip
    responses = tmp_path / "responses.json"
    responses.write_text(json.dumps([{"id": 2, "response": "No"}, {"id": 3, "response": "yes"}, {"id": 4, "response": "Yes"},
                                     {"id": 1, "response": "A dog."}]))  # fmt: skip
    scores = amber.score_files(annotations, responses).parts
    # The release counts "yes" in small letters as neither.
    assert (scores["all"].n, scores["all"].unparsed) == (3, 1)
    assert scores["all"].accuracy.value == pytest.approx(0.333)
    strict = amber.score_files(annotations, responses, parser="strict", variant="exact").parts["all"]
    assert strict.accuracy.value == pytest.approx(2 / 3)
    queries = tmp_path / "queries.json"
    queries.write_text(json.dumps([{"id": i, "image": "one.jpg", "query": "?"} for i in range(1, 5)]))
    with_images = amber.score_files(annotations, responses, queries).parts["all"].accuracy
    assert with_images.high - with_images.low > scores["all"].accuracy.high - scores["all"].accuracy.low
    responses.write_text(json.dumps([{"id": 9, "response": "No"}]))
    with pytest.raises(DataError, match="id '9' matches no question"):
        amber.score_files(annotations, responses)
    responses.write_text(json.dumps([{"id": 1, "response": "A dog."}]))
    with pytest.raises(DataError, match="no answers to yes-no questions"):
        amber.score_files(annotations, responses)


# ---- answers made elsewhere --------------------------------------------------------------------------------------------


@pytest.fixture
def pope(tmp_path: Path) -> Path:
    """Write four POPE questions about two images."""
    for name in "ab":
        Image.new("RGB", (2, 2)).save(tmp_path / f"{name}.png")
    nouns = [("a", "dog", "yes"), ("a", "cat", "no"), ("b", "car", "yes"), ("b", "bus", "no")]
    return lines(tmp_path / "pope_random.json", *(
        {"question_id": i, "image": f"{image}.png", "text": f"Is there a {noun} in the image?", "label": label}
        for i, (image, noun, label) in enumerate(nouns, 1)
    ))  # fmt: skip


@pytest.mark.parametrize("field", ["answer", "text", "response", "output"])
@pytest.mark.parametrize("names", ["question_id", "id", None])
def test_pope_answer_files_need_no_model(pope: Path, tmp_path: Path, field: str, names: str | None) -> None:
    texts = ["Yes", "Yes, there is.", "No", "no"]
    records = [{field: text, **({names: i} if names else {})} for i, text in enumerate(texts, 1)]
    path = lines(tmp_path / "answers.jsonl", *(records if names is None else records[::-1]))
    scores = score_files(pope, path)
    assert (scores.accuracy.value, scores.precision.value, scores.recall.value) == (0.5, 0.5, 0.5)
    assert scores.yes_ratio.value == 0.5
    answers = load_answers(loaders.pope(pope, tmp_path), path, parser="pope_release")
    assert score_result(answers) == scores
    assert [a.text for a in answers.answers] == texts
    assert answers.cost.seconds_per_answer is None
    assert answers.cost.forwards_per_answer is None
    answers.save(tmp_path / "saved.json")
    assert BehaviorResult.load(tmp_path / "saved.json") == answers


def test_costs_of_answers_are_reported(pope: Path, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", *({"id": f"random/{i}", "answer": "yes", "seconds": 0.5} for i in range(1, 5)))
    assert load_answers(loaders.pope(pope, tmp_path), path).cost == Cost(2.0, None, 4)


def test_answers_that_are_neither_are_counted(pope: Path, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", *({"answer": text} for text in ("yes", "oui", "", "nein")))
    answers = load_answers(loaders.pope(pope, tmp_path), path)
    assert answers.unparsed == 3
    assert score_files(pope, path, parser="strict").unparsed == 3
    assert answers.rate("accuracy").value == 0.25


BAD: dict[str, tuple[list[Any], str]] = {
    "nothing": ([], "the file contains no answers"),
    "twice": (
        [{"id": 1, "answer": "a"}, {"id": "1", "answer": "b"}],
        "line 2: id '1' was already answered, at .*line 1",
    ),
    "some without": ([{"id": 1, "answer": "a"}, {"answer": "b"}], "line 2: some answers have an id and some have none"),
    "no text": (
        [{"id": 1}],
        "line 1: no field 'answer' or 'text' or 'response' or 'output' or .*'caption'; it has 'id'",
    ),
    "no words": ([{"id": 1, "answer": None}], "must hold text, not None"),
    "unknown": ([{"id": 7, "answer": "a"}], "line 1: id '7' matches no question; ids are"),
    "missing": ([{"id": 1, "answer": "a"}], r"no answer to question '.*2' \(3 of 4 have none\)"),
    "too few": ([{"answer": "a"}], "1 answer without ids for 4 questions"),
    "both names": ([{"id": 1, "answer": "a"}, {"id": "random/1", "answer": "b"}], "already answered|matches no"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_answer_files_are_refused_with_their_place(pope: Path, tmp_path: Path, case: str) -> None:
    records, words = BAD[case]
    path = lines(tmp_path / "answers.jsonl", *records)
    with pytest.raises(DataError, match=words):
        load_answers(loaders.pope(pope, tmp_path), path)
    with pytest.raises(DataError, match=words):
        score_files(pope, path)


# ---- POPE of any annotated data ----------------------------------------------------------------------------------------


def test_pope_is_built_from_any_annotation(tmp_path: Path) -> None:
    document: dict[str, Any] = {"images": [], "annotations": [],
                            "categories": [{"id": i, "name": f"noun{i}"} for i in range(9)]}  # fmt: skip
    for i in range(12):
        Image.new("RGB", (2, 2)).save(tmp_path / f"{i}.png")
        document["images"].append({"id": i, "file_name": f"{i}.png"})
        document["annotations"] += [
            {"id": 10 * i + j, "image_id": i, "category_id": (i + j * j) % 9, "bbox": [0, 0, 1, 1]} for j in range(4)
        ]
    (tmp_path / "instances.json").write_text(json.dumps(document))
    data = loaders.coco(tmp_path / "instances.json", tmp_path)
    questions = questions_about(data, seed=3)
    assert {e.split for e in questions} == {"random", "popular", "adversarial"}
    for e in questions:
        assert (e.question.split()[3] in {o.noun for o in e.objects}) == (e.answer == "yes")
        assert (e.named_object() is not None) == (e.answer == "yes")
    part = questions.where(split="popular")
    records = [
        {"question_id": e.id.split("/")[1], "image": e.group, "text": e.question, "label": e.answer} for e in part
    ]
    write_questions(tmp_path / "x_popular.json", records)
    loaded = loaders.pope(tmp_path / "x_popular.json", tmp_path)
    assert [(e.id, e.question, e.answer, e.labels) for e in loaded] == [
        (e.id, e.question, e.answer, e.labels) for e in part
    ]
    subset = questions_about(scenes.dataset(60, 0), n_images=20)
    assert len({e.group for e in subset}) == 20
    assert {e.kind for e in subset} == {"existence"}


GQA = {
    str(i): {"width": 8, "height": 8, "objects": {
        str(j): {"name": f"noun{(i + j * j) % 7}", "x": 0, "y": 0, "w": 2, "h": 2, "attributes": [], "relations": []}
        for j in range(3)
    }}
    for i in range(8)
}  # fmt: skip
GENOME = [
    {"image_id": i, "objects": [
        {"object_id": 10 * i + j, "x": 0, "y": 0, "w": 2, "h": 2, "names": [f"noun{(i + j * j) % 7}"]} for j in range(3)
    ]}
    for i in range(8)
]  # fmt: skip
NOWHERE = {side: [[], [], []] for side in ("left", "right", "front", "behind")}
_SHAPES, _SIZES = ("cube", "sphere", "cylinder"), ("large", "small")
CLEVR = {
    "scenes": [
        {"image_filename": f"{i}.png", "image_index": i, "relationships": NOWHERE, "objects": [
            {"shape": _SHAPES[(i + j) % 3 if j < 2 else i % 3], "color": "red", "size": _SIZES[j % 2], "material": "metal",
             "3d_coords": [0, 0, 0], "pixel_coords": [2 + j, 3, 9]}
            for j in range(3)
        ]}
        for i in range(8)
    ]
}  # fmt: skip


@pytest.mark.parametrize(
    ("loader", "document", "per_image"),
    [(loaders.gqa, GQA, 3), (loaders.visual_genome, GENOME, 3), (loaders.clevr, CLEVR, 1)],
    ids=["gqa", "visual genome", "clevr"],
)
def test_pope_is_built_from_other_annotations(tmp_path: Path, loader: Any, document: Any, per_image: int) -> None:
    for i in range(8):
        for suffix in ("png", "jpg"):
            Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.{suffix}")
    (tmp_path / "annotations.json").write_text(json.dumps(document))
    data = loader(tmp_path / "annotations.json", tmp_path)
    questions = questions_about(data, per_image=per_image, seed=1)
    nouns = {e.group: {o.noun for o in e.objects} for e in data}
    assert {e.split for e in questions} == {"random", "popular", "adversarial"}
    for split in ("random", "popular", "adversarial"):
        part = questions.where(split=split)
        assert sum(e.answer == "yes" for e in part) == sum(e.answer == "no" for e in part) == per_image * len(nouns)
    for e in questions:
        noun = e.question.removeprefix("Is there ").split(" ", 1)[1].removesuffix(" in the image?")
        assert (noun in nouns[e.group]) == (e.answer == "yes")


# ---- from annotations to answers ---------------------------------------------------------------------------------------


@cache
def lettered() -> Lvlm:
    """A random model that knows two letters."""
    network, processor = build_model(4), build_processor()
    processor.tokenizer.add_tokens(["A", "B"])
    network.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    return wrap_lvlm(network, processor, validate=False)


def test_a_model_answers_what_the_loaders_ask(tmp_path: Path) -> None:
    """Icon scenes as files, annotated like COCO: the embedded model tells what is there."""
    model = load_lvlm("tiny-unbiased")
    document: dict[str, Any] = {"images": [], "annotations": [],
                            "categories": [{"id": i, "name": noun} for i, noun in enumerate(NOUNS)]}  # fmt: skip
    captions: list[Any] = []
    for i in range(12):
        scene = sample_scene(generator(TEST, 77, i), f"s{i}", count=3)
        scene.load().save(tmp_path / f"{i}.png")
        document["images"].append({"id": i, "file_name": f"{i}.png"})
        for thing in scene.objects:
            b = thing.require_box()
            box = [b.x0, b.y0, b.x1 - b.x0, b.y1 - b.y0]
            number = len(document["annotations"])
            document["annotations"].append(
                {"id": number, "image_id": i, "category_id": NOUNS.index(thing.noun), "bbox": box}
            )
        first, other = scene.objects[0], next(n for n in NOUNS if scene.get(n) is None)
        captions.append({"image_path": f"{i}.png", "caption_options": [f"a {first.noun}", f"a {other}"]})
    (tmp_path / "instances.json").write_text(json.dumps(document))
    data = loaders.coco(tmp_path / "instances.json", tmp_path)
    result = answer(model, data, progress=False)
    assert result.rate("accuracy").value > 0.85
    sorted_out = taxonomy.tabulate(result)
    assert sorted_out.get("object", "existence").frequency.value == pytest.approx(1 - result.rate("accuracy").value)
    assert sorted_out.cost.seconds_per_answer is not None
    scores = chair(
        {e.id: " and ".join(o.noun for o in e.objects) for e in data}, {e.id: [o.noun for o in e.objects] for e in data}
    )
    assert scores.chair_s.value == 0
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    statements = loaders.whatsup(tmp_path / "captions.json", tmp_path)
    assert all(answer_key(model, e).candidates == ("yes", "no") for e in statements)
    assert len(answer(model, statements, progress=False)) == 24
    # By letter: the model is given both captions, and answers with the letter of one.
    by_letter = loaders.whatsup(tmp_path / "captions.json", tmp_path, form="choice")
    chosen = answer(lettered(), by_letter, progress=False)
    assert [a.candidates for a in chosen.answers] == [("A", "B")] * 12
    for reply, example in zip(chosen.answers, by_letter, strict=True):
        logits = lettered().logits(lettered().encode(example).inputs)[0]
        ids = [lettered().processor.tokenizer(x, add_special_tokens=False)["input_ids"][0] for x in ("A", "B")]
        assert reply.given == ("A", "B")[int(logits[ids].argmax())]
        assert reply.correct == (reply.given == example.answer)
