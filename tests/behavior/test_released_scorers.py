"""Scorers of releases, each rule written out by hand here: figures are the released ones, slips included."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from behavior import amber, judge_files, mme
from behavior.judge_files import Item
from behavior.parsing import PARSERS
from behavior.pope import score
from concepts import loaders
from groundscope.core.errors import ConfigError, DataError

# ---- POPE, VLMEvalKit: the rule of a text -----------------------------------------------------------------------------


def pope_by_hand(text: str) -> str:
    """RUCAIBox/POPE, commit 3df3ba1."""
    if text.find(".") != -1:
        text = text.split(".")[0]
    text = text.replace(",", "")
    words = text.split(" ")
    return "no" if "No" in words or "not" in words or "no" in words else "yes"


def vlmevalkit_by_hand(text: str) -> str | None:
    """open-compass/VLMEvalKit, commit e8e78f0; a word with a digit is neither yes nor no, so its dots are left."""
    text = text.lower()
    out = text
    digits = any(text[i] == "," and text[i - 1].isdigit() and text[i + 1].isdigit() for i in range(1, len(text) - 1))
    for mark in [
        ";",
        "/",
        "[",
        "]",
        '"',
        "{",
        "}",
        "(",
        ")",
        "=",
        "+",
        "\\",
        "_",
        "-",
        ">",
        "<",
        "@",
        "`",
        ",",
        "?",
        "!",
    ]:
        out = out.replace(mark, "" if mark + " " in text or " " + mark in text or digits else " ")
    cleaned, deleted = "", 0
    for i, c in enumerate(out):
        near_digit = out[i - 1 : i].isdigit() or out[i + 1 : i + 2].isdigit()
        if c == "." and not near_digit and deleted < 32:
            deleted += 1
        else:
            cleaned += c
    words = cleaned.split()
    if "yes" in words:
        return None if "no" in words else "yes"
    return "no" if "no" in words else None


def test_rules_of_a_text_are_those_of_the_releases() -> None:
    chance = random.Random(0)
    pieces = [
        "yes",
        "Yes",
        "no",
        "No",
        "NO",
        "not",
        "know",
        "1",
        " ",
        " ",
        ".",
        ",",
        "!",
        "**",
        "\n",
        "-",
        "a",
        "?",
        "'",
    ]
    for _ in range(4000):
        text = "".join(chance.choice(pieces) for _ in range(chance.randint(0, 9)))
        assert PARSERS["pope_release"](text) == pope_by_hand(text)
        assert PARSERS["vlmevalkit"](text) == vlmevalkit_by_hand(text)
        start = text.lower()[:4]
        assert PARSERS["mme"](text) == ("yes" if "yes" in start else "no" if "no" in start else None)
        assert PARSERS["amber_release"](text) == {"Yes": "yes", "No": "no"}.get(text)
        # Where it says anything, the plain rule says what the release says.
        assert PARSERS["yes_no"](text) in {None, pope_by_hand(text)}
    assert PARSERS["vlmevalkit"]("." * 33 + " yes.") is None
    assert PARSERS["vlmevalkit"]("." * 31 + " yes.") == "yes"


@pytest.mark.parametrize("seed", range(3))
def test_pope_by_lmms_eval(seed: int) -> None:
    """Neither yes nor no is wrong, and otherwise left out; the share of yes is that of the truth (lmms-eval 0.7.2)."""
    chance = random.Random(seed)
    labels = [chance.choice(["yes", "no"]) for _ in range(60)]
    texts = [chance.choice(["Yes", " no ", "NO", "yes", "Yes.", "perhaps"]) for _ in labels]
    predicted = [t.lower().strip() for t in texts]
    hits = sum(s == t == "yes" for s, t in zip(predicted, labels, strict=True))
    false = sum((s, t) == ("yes", "no") for s, t in zip(predicted, labels, strict=True))
    missed = sum((s, t) == ("no", "yes") for s, t in zip(predicted, labels, strict=True))
    precision, recall = hits / (hits + false), hits / (hits + missed)
    scores = score(texts, labels, parser="lmms_eval")
    assert scores.accuracy.value == pytest.approx(sum(s == t for s, t in zip(predicted, labels, strict=True)) / 60)
    assert scores.precision.value == pytest.approx(precision)
    assert scores.recall.value == pytest.approx(recall)
    assert scores.f1.value == pytest.approx(2 * precision * recall / (precision + recall))
    assert scores.yes_ratio.value == pytest.approx(labels.count("yes") / 60)
    assert scores.unparsed == sum(s not in {"yes", "no"} for s in predicted)


# ---- AMBER -------------------------------------------------------------------------------------------------------------

TYPES = {
    "discriminative-hallucination": ("all", "existence"),
    "discriminative-attribute-state": ("all", "attribute", "state"),
    "discriminative-attribute-number": ("all", "attribute", "number"),
    "discriminative-attribute-action": ("all", "attribute", "action"),
    "discriminative-relation": ("all", "relation"),
    "relation": ("all", "relation"),
}


def amber_by_hand(annotations: list[dict[str, Any]], responses: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Count as junyangwang0410/AMBER does (commit 534babf): all counters of a denominator start at .001."""
    truths = {a["id"]: a for a in annotations}
    figures = {}
    for part in ("all", "existence", "attribute", "relation", "state", "number", "action"):
        start = 0.001 * (3 if part == "attribute" else 1)
        n, right, no, no_right, said_no = start, 0, start, 0, start
        for r in responses:
            a = truths[r["id"]]
            if part not in TYPES[a["type"]]:
                continue
            n += 1
            no += a["truth"] == "no"
            said_no += r["response"] == "No"
            right += (a["truth"], r["response"]) in {("yes", "Yes"), ("no", "No")}
            no_right += (a["truth"], r["response"]) == ("no", "No")
        accuracy, precision, recall = (round(100 * x, 1) for x in (right / n, no_right / said_no, no_right / no))
        p, r = precision / 100, recall / 100
        harmonic = round(2 * p * r / (p + r + (0.001 if part == "existence" else 0.0001)) * 100, 1)
        figures[part] = [accuracy, precision, recall, harmonic]
    return figures


@pytest.mark.parametrize("seed", range(5))
def test_amber_prints_what_the_release_prints(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    kinds = list(TYPES)
    records = [{"id": i, "type": chance.choice(kinds), "truth": chance.choice(["yes", "no"])} for i in range(1, 120)]
    replies = [{"id": a["id"], "response": chance.choice(["Yes", "No", "No", "yes", "No."])} for a in records]
    expected = amber_by_hand(records, replies)
    chance.shuffle(records)
    chance.shuffle(replies)
    annotations, responses = tmp_path / "annotations.json", tmp_path / "responses.json"
    annotations.write_text(json.dumps(records))
    responses.write_text(json.dumps(replies))
    parts = amber.score_files(annotations, responses).parts
    assert set(parts) == set(expected)
    for part, scores in parts.items():
        printed = [round(100 * getattr(scores, f).value, 1) for f in ("accuracy", "precision", "recall", "f1")]
        assert printed == expected[part]
        for name in ("accuracy", "precision", "recall", "f1"):
            figure = getattr(scores, name)
            assert figure.low <= figure.value <= figure.high


def test_amber_existence_rounds_first_and_adds_more(tmp_path: Path) -> None:
    records = [{"id": i, "type": "discriminative-hallucination", "truth": "no"} for i in range(1, 11)]
    replies = [{"id": i, "response": "No" if i <= 3 else "Yes"} for i in range(1, 11)]
    annotations, responses = tmp_path / "annotations.json", tmp_path / "responses.json"
    annotations.write_text(json.dumps(records))
    responses.write_text(json.dumps(replies))
    parts = amber.score_files(annotations, responses).parts
    assert {k: round(100 * v.f1.value, 1) for k, v in parts.items()} == {"existence": 46.1, "all": 46.2}
    exact = amber.score_files(annotations, responses, variant="exact").parts
    assert exact["existence"].f1.value == pytest.approx(2 * 0.3 / 1.3)
    with pytest.raises(ConfigError, match="unknown variant 'x'; choose from release, exact"):
        amber.score_files(annotations, responses, variant="x")


def test_amber_annotations_belong_to_the_id_that_they_name(tmp_path: Path) -> None:
    full = [{"id": i, "type": "discriminative-hallucination", "truth": "yes" if i <= 3 else "no"} for i in range(1, 7)]
    replies = [{"id": i, "response": "Yes" if i <= 3 else "No"} for i in range(1, 7)]
    Image.new("RGB", (2, 2)).save(tmp_path / "a.jpg")
    queries = tmp_path / "queries.json"
    queries.write_text(json.dumps([{"id": i, "image": "a.jpg", "query": "?"} for i in (5, 2)]))
    annotations, responses = tmp_path / "annotations.json", tmp_path / "responses.json"
    responses.write_text(json.dumps(replies))
    unnamed = [{k: v for k, v in a.items() if k != "id"} for a in full]
    for records in (full, full[::-1], full[3:] + full[:3], unnamed):
        annotations.write_text(json.dumps(records))
        assert amber.score_files(annotations, responses).parts["all"].accuracy.value == 1.0
        assert [(e.id, e.answer) for e in loaders.amber(queries, tmp_path, annotations)] == [("5", "no"), ("2", "yes")]
    for records, words in (
        ([*full, full[0]], r"record 7: field 'id': 1 was already used, at .* record 1"),
        ([full[0], unnamed[1]], "record 2: only some annotations have a field 'id'"),
    ):
        annotations.write_text(json.dumps(records))
        with pytest.raises(DataError, match=words):
            amber.score_files(annotations, responses)


# ---- MME ---------------------------------------------------------------------------------------------------------------


def mme_by_hand(text: str) -> float:
    """Score the text of one subtask's file: consecutive lines are a pair, four characters of a response are read."""
    rows = [line.split("\t") for line in text.splitlines()]
    right = []
    for _, _, truth, response in rows:
        start = response.lower()[:4]
        prediction = "yes" if "yes" in start else "no" if "no" in start else "other"
        right.append(prediction == truth.lower())
    pairs = [a and b for a, b in zip(right[::2], right[1::2], strict=True)]
    return 100 * sum(right) / len(right) + 100 * sum(pairs) / len(pairs)


@pytest.mark.parametrize("seed", range(3))
def test_mme_is_scored_as_in_the_release(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    texts = {}
    for task in ("existence", "OCR", "code_reasoning"):
        lines = []
        for i in range(20):
            for truth in ("Yes", "No"):
                response = chance.choice(
                    ["Yes", "No", "yes, it is", "  Yes", "I know", "Not really", "It is", "", "    No"]
                )
                lines.append(f"{i}.jpg\tIs it? Please answer yes or no.\t{truth}\t{response}\n")
        texts[task] = "".join(lines)
        (tmp_path / f"{task}.txt").write_text(texts[task])
    scores = mme.score_files(tmp_path)
    for task, text in texts.items():
        assert scores.subtasks[task.lower()].score.value == pytest.approx(mme_by_hand(text))
    assert scores.perception == pytest.approx(mme_by_hand(texts["existence"]) + mme_by_hand(texts["OCR"]))
    assert scores.cognition == pytest.approx(mme_by_hand(texts["code_reasoning"]))


def test_mme_leading_blanks_hide_an_answer(tmp_path: Path) -> None:
    (tmp_path / "existence.txt").write_text("a.jpg\tDog?\tYes\t  Yes\na.jpg\tCat?\tNo\t    No, there is none\n")
    scores = mme.score_files(tmp_path).subtasks["existence"]
    assert (scores.score.value, scores.unparsed) == (0.0, 2)


def test_mme_pairs_are_consecutive_lines(tmp_path: Path) -> None:
    lines = [f"{image}.jpg\t{q}?\t{a}\t{a}\n" for image in "ab" for q, a in (("Dog", "Yes"), ("Cat", "No"))]
    (tmp_path / "existence.txt").write_text("".join(lines[i] for i in (0, 2, 1, 3)))
    with pytest.raises(
        DataError, match=r"existence\.txt: line 2: image 'b\.jpg', but the previous line is about 'a\.jpg'"
    ):
        mme.score_files(tmp_path)
    # An image may have two pairs.
    (tmp_path / "existence.txt").write_text("".join(lines[:2] * 2))
    assert mme.score_files(tmp_path).subtasks["existence"].score.value == 200
    (tmp_path / "color.txt").write_text(lines[0] + lines[1])
    (tmp_path / "colour.txt").write_text(lines[0] + lines[1])
    with pytest.raises(DataError, match="are both of subtask 'color'; keep one"):
        mme.score_files(tmp_path)


def test_mme_folders_of_the_release_are_read(tmp_path: Path) -> None:
    """A folder for each subtask: questions next to the images, or images and questions in two folders."""
    for place, questions in (("existence", "existence"), ("posters/images", "posters/questions_answers_YN"),
                             ("code_reasoning", "code_reasoning"), ("eval_tool", "eval_tool")):  # fmt: skip
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / questions).mkdir(parents=True, exist_ok=True)
        for name in ("0001", "0002"):
            Image.new("RGB", (2, 2)).save(tmp_path / place / f"{name}.{'png' if place == 'existence' else 'jpg'}")
            (tmp_path / questions / f"{name}.txt").write_text(f"Is it {name}?\tYes\nIs it another?\tNo\n")
    data = loaders.mme(tmp_path, tmp_path)
    assert [(e.id, e.group, e.answer) for e in data] == [
        ("existence/1", "existence/0001.png", "yes"), ("existence/2", "existence/0001.png", "no"),
        ("existence/3", "existence/0002.png", "yes"), ("existence/4", "existence/0002.png", "no"),
        ("posters/1", "posters/images/0001.jpg", "yes"), ("posters/2", "posters/images/0001.jpg", "no"),
        ("posters/3", "posters/images/0002.jpg", "yes"), ("posters/4", "posters/images/0002.jpg", "no"),
    ]  # fmt: skip
    assert data[0].question == "Is it 0001?"
    assert data.provenance["left_out"]["questions of cognition"] == 4  # pyright: ignore[reportIndexIssue]
    # The lists of the evaluation tool name images without their folder.
    tool = tmp_path / "Your_Results"
    tool.mkdir()
    (tool / "posters.txt").write_text("0001.jpg\tIs it?\tYes\n0001.jpg\tIs it not?\tNo\n")
    assert {e.group for e in loaders.mme(tool, tmp_path)} == {"posters/images/0001.jpg"}
    (tmp_path / "posters" / "questions_answers_YN" / "0001.txt").write_text("Is it?\n")
    with pytest.raises(DataError, match=r"0001\.txt: line 1: 1 tab-separated column,"):
        loaders.mme(tmp_path, tmp_path)


# ---- judged ------------------------------------------------------------------------------------------------------------

ITEMS = [Item(str(i), "q", " two  words ", "b", "c", "kind", f"{i}.jpg") for i in range(4)]


def judge(tmp_path: Path, benchmark: str, *verdicts: dict[str, Any], **options: Any) -> judge_files.JudgedResult:
    judge_files.write_requests(tmp_path / "requests.jsonl", benchmark, ITEMS[: len(verdicts)])
    path = tmp_path / "verdicts.jsonl"
    path.write_text("".join(json.dumps({"id": str(i), **v}) + "\n" for i, v in enumerate(verdicts)))
    return judge_files.read_verdicts(path, tmp_path / "requests.jsonl", **options)


def test_mmhal_counts_what_cannot_be_read_as_0(tmp_path: Path) -> None:
    replies = ("Rating: 6, very informative", "RATING: 3 or rating: 4", "rating:  5", "Analysis. rating: 2")
    ratings = []
    for reply in replies:  # the rule of the release (commit 830a083)
        scores = [s for s in range(7) if f"rating: {s}" in reply.lower()]
        ratings.append(scores[0] if len(scores) == 1 else 0)
    assert ratings == [6, 0, 0, 2]
    judged = judge(tmp_path, "mmhal", *({"reply": r} for r in replies))
    assert judged.figures["score"].value == pytest.approx(sum(ratings) / 4)
    assert judged.figures["hallucination_rate"].value == pytest.approx(sum(r < 3 for r in ratings) / 4)
    assert judged.unjudged == 2
    nulls = judge(tmp_path, "mmhal", {"rating": 6}, {"verdict": None}, {"verdict": None}, {"rating": 2})
    assert nulls == judged
    better = judge(tmp_path, "mmhal", *({"reply": r} for r in replies), variant="judged_only")
    assert (better.figures["score"].value, better.unjudged) == (4, 2)
    with pytest.raises(DataError, match="line 1: the verdict may be field 'reply' or field 'rating'"):
        judge(tmp_path, "mmhal", {"reply": "rating: 1", "rating": 2})
    with pytest.raises(DataError, match="line 1: field 'reply' must hold text"):
        judge(tmp_path, "mmhal", {"reply": None})
    with pytest.raises(ConfigError, match="unknown variant 'x'; choose from release, judged_only"):
        judge(tmp_path, "mmhal", {"rating": 1}, variant="x")


def test_llava_bench_reads_a_verdict_of_0(tmp_path: Path) -> None:
    zero = judge(tmp_path, "llava_bench", {"reference_rating": 0.0, "rating": 9.0})
    assert zero.unjudged == 0
    assert math.isnan(zero.figures["relative_score"].value)
    both = judge(tmp_path, "llava_bench", {"reference_rating": 0, "rating": 9}, {"reference_rating": 8, "rating": 3})
    assert both.figures["relative_score"].value == pytest.approx(100 * 12 / 8)
    with pytest.raises(DataError, match="field 'rating' is 11, but must be from 0 to 10"):
        judge(tmp_path, "llava_bench", {"reference_rating": 8, "rating": 11})


def test_cceval_counts_words_between_single_spaces(tmp_path: Path) -> None:
    counts = {"mentioned": 1, "hallucinated": 0, "objects": 1, "covered": 1}
    scores = judge(tmp_path, "cceval", counts)
    assert scores.figures["words_per_caption"].value == len(ITEMS[0].answer.split(" ")) == 5
    assert scores.figures["coverage"].value == 1
    short = judge(tmp_path, "cceval", {"mentioned": 1, "hallucinated": 0})  # coverage is optional
    assert set(scores.figures) - set(short.figures) == {"coverage"}
    with pytest.raises(DataError, match="line 2: only some verdicts have the field 'covered'"):
        judge(tmp_path, "cceval", counts, {"mentioned": 1, "hallucinated": 0})


def test_the_same_request_twice_is_refused(tmp_path: Path) -> None:
    judge(tmp_path, "mmhal", {"rating": 1})
    requests = tmp_path / "requests.jsonl"
    requests.write_text(requests.read_text() * 2)
    with pytest.raises(DataError, match="line 2: field 'id': an earlier request already has id '0'"):
        judge_files.read_verdicts(tmp_path / "verdicts.jsonl", requests)
