"""Answer files of other tools: which field is the model's answer, and which question it belongs to."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from behavior import BehaviorResult, load_answers, mme
from behavior.answer_files import read_answers
from behavior.pope import PopeScores, score, score_files, score_result
from concepts import ConceptDataset, loaders
from groundscope.core.errors import ConfigError, DataError

SPLITS = ("random", "popular", "adversarial")
NOUNS = ("dog", "cat", "car", "bus")
LABELS = ("yes", "no", "yes", "no")
WRONG = ("No", "Yes", "No", "Yes")
"""The answers of a model that is always wrong."""


def lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def existence_question(noun: str) -> str:
    return f"Is there a {noun} in the image?"


def figures(scores: PopeScores) -> tuple[float, float, int]:
    return round(scores.accuracy.value, 4), round(scores.yes_ratio.value, 4), scores.unparsed


@pytest.fixture
def pope(tmp_path: Path) -> Path:
    """Write four POPE questions about two images."""
    for name in "ab":
        Image.new("RGB", (2, 2)).save(tmp_path / f"{name}.png")
    return lines(tmp_path / "coco_pope_random.json", *(
        {"question_id": i, "image": f"{'ab'[i // 3]}.png", "text": existence_question(noun), "label": label}
        for i, (noun, label) in enumerate(zip(NOUNS, LABELS, strict=True), 1)
    ))  # fmt: skip


# ---- two readings ------------------------------------------------------------------------------------------------------


def rows(**fields: Any) -> list[dict[str, Any]]:
    """Return a record a question; a field that is a tuple has one value a question."""
    return [
        {"question_id": i + 1, **{k: v[i] if isinstance(v, tuple) else v for k, v in fields.items()}} for i in range(4)
    ]


QUESTIONS = tuple(existence_question(noun) for noun in NOUNS)
TWO_READINGS: dict[str, tuple[list[dict[str, Any]], str, str]] = {
    "truth in 'answer'": (rows(answer=LABELS, response=WRONG), "'answer'.*'response'", "response"),
    "truth in 'answer', output": (rows(answer=LABELS, output=WRONG), "'answer'.*'output'", "output"),
    "question in 'text'": (rows(text=QUESTIONS, response=WRONG), "'text'.*'response'", "response"),
    "question and truth": (rows(text=QUESTIONS, label=LABELS, answer=WRONG), "'answer'.*'text'", "answer"),
    "a caption and an answer": (rows(caption="A dog.", answer=WRONG), "'answer'.*'caption'", "answer"),
    "a question table": (
        rows(question=QUESTIONS, answer=WRONG, image="a.png"),
        "'answer'.*may be the model's answer, or the true answer.*'image'",
        "answer",
    ),
    "a table with categories": (
        rows(question=QUESTIONS, answer=WRONG, category="x"),
        "the true answer.*'category'",
        "answer",
    ),
    "a question file": (
        rows(image="a.png", text=WRONG, label=LABELS),
        "'text'.*may be the model's answer, or the question of a question file.*'image'",
        "text",
    ),
    "an unknown field": (rows(prediction_of_mine=WRONG), "no field 'answer'", "prediction_of_mine"),
}


@pytest.mark.parametrize("case", TWO_READINGS)
def test_a_record_with_two_readings_is_refused_and_answer_field_decides(pope: Path, tmp_path: Path, case: str) -> None:
    records, words, field = TWO_READINGS[case]
    path = lines(tmp_path / "a.jsonl", *records)
    data = loaders.pope(pope, tmp_path)
    for read in (lambda: read_answers(path), lambda: score_files(pope, path), lambda: load_answers(data, path)):
        with pytest.raises(DataError, match=r"a\.jsonl: line 1: .*" + words):
            read()
    assert figures(score_files(pope, path, answer_field=field)) == (0.0, 0.5, 0)
    assert figures(score_result(load_answers(data, path, answer_field=field))) == (0.0, 0.5, 0)
    with pytest.raises(DataError, match="line 1: no field 'nothing'; it has 'question_id'"):
        score_files(pope, path, answer_field="nothing")


ONE_READING: dict[str, list[dict[str, Any]]] = {
    "LLaVA": rows(prompt=tuple(f"{q}\nAnswer the question using a single word or phrase." for q in QUESTIONS), text=WRONG),
    "LLaVA, another prompt": rows(prompt="p", text=WRONG, model_id="m"),
    "the release, by order": [{k: v for k, v in r.items() if k != "question_id"} for r in rows(question=QUESTIONS, answer=WRONG)],
    "question and answer": rows(question=QUESTIONS, answer=WRONG),
    "response": rows(question=QUESTIONS, label=LABELS, response=WRONG, image="a.png"),
    "answer next to the label": rows(label=LABELS, answer=WRONG),
}  # fmt: skip


@pytest.mark.parametrize("case", ONE_READING)
def test_a_record_with_one_reading_is_read(pope: Path, tmp_path: Path, case: str) -> None:
    path = lines(tmp_path / "a.jsonl", *ONE_READING[case])
    assert figures(score_files(pope, path)) == (0.0, 0.5, 0)


def test_all_answers_are_in_one_field(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"id": 1, "answer": "Yes"}, {"id": 2, "response": "No"})
    with pytest.raises(
        DataError, match="line 2: the answer is in field 'response', but earlier records have it in 'answer'"
    ):
        read_answers(path)


def test_ids_may_be_in_another_field(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"id": 7, "image_id": 1, "caption": "A dog."})
    with pytest.raises(
        DataError, match=r"field 'caption'.*reference of an annotation file, because the record also has 'id'"
    ):
        read_answers(path)
    (answer,) = read_answers(path, "caption", id_field="image_id")
    assert (answer.id, answer.text) == ("1", "A dog.")
    lines(path, {"image_id": 1, "caption": "A dog."}, {"image_id": 2, "caption": "A cat."})
    assert [(a.id, a.text) for a in read_answers(path)] == [("1", "A dog."), ("2", "A cat.")]


# ---- empty answers and refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", "I cannot tell.", "Sorry, as a language model I am unable to see images.", "NO", "**No**"]
)
def test_an_answer_that_is_neither_is_wrong_unless_the_release_rule_is_named(
    pope: Path, tmp_path: Path, text: str
) -> None:
    path = lines(tmp_path / "a.jsonl", *rows(answer=text))
    assert figures(score_files(pope, path)) == (0.0, 0.0, 4)
    assert figures(score_files(pope, path, parser="pope_release")) == (0.5, 1.0, 4)
    data = loaders.pope(pope, tmp_path)
    assert figures(score_result(load_answers(data, path))) == (0.0, 0.0, 4)
    assert figures(score_result(load_answers(data, path, parser="pope_release"))) == (0.5, 1.0, 4)
    assert figures(score([text] * 4, LABELS)) == (0.0, 0.0, 4)


# ---- which question ----------------------------------------------------------------------------------------------------


def test_an_answer_to_another_question_is_refused(pope: Path, tmp_path: Path) -> None:
    turned = (QUESTIONS[0], QUESTIONS[2], QUESTIONS[1], QUESTIONS[3])
    prompts = tuple(f"{q}\nAnswer the question using a single word or phrase." for q in turned)
    path = lines(tmp_path / "a.jsonl", *rows(prompt=prompts, text=WRONG))
    with pytest.raises(
        DataError,
        match=r"line 2: the question of id '2' is '.* car in .*' here, but '.* cat in .*another question file",
    ):
        score_files(pope, path)
    ordered = [{"question": q, "answer": a} for q, a in zip(turned, WRONG, strict=True)]
    with pytest.raises(DataError, match=r"line 2: the question is '.* car .*' here, but '.* cat .*in the order"):
        score_files(pope, lines(path, *ordered))


def test_answers_of_llava_join_their_own_questions(tmp_path: Path) -> None:
    """LLaVA's question file has the three splits and no labels; the release's label files have other ids and 'imange'."""
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    suffix = "\nAnswer the question using a single word or phrase."
    about = {"random": ("orange", "apple"), "popular": ("cat", "car"), "adversarial": ("dog", "bus")}
    start = {"adversarial": 1, "random": 10000001, "popular": 20000001}
    article = {"orange": "an", "apple": "an"}
    wording = {n: f"Is there {article.get(n, 'a')} {n} in the image?" for pair in about.values() for n in pair}
    questions, answers, files = [], [], []
    for split in ("adversarial", "random", "popular"):
        labels = []
        for i, (noun, label) in enumerate(zip(about[split], ("yes", "no"), strict=True)):
            number = start[split] + i
            questions.append(
                {"question_id": number, "image": "a.png", "text": wording[noun] + suffix, "category": split}
            )
            response = "Yes" if split == "popular" else label.capitalize()
            answers.append({"question_id": number, "prompt": wording[noun] + suffix, "text": response, "model_id": "m"})
            old = wording[noun].replace("image", "imange") if noun in article else wording[noun]
            labels.append({"question_id": 7 - i, "image": "a.png", "text": old, "label": label})
        files.append(lines(tmp_path / f"coco_pope_{split}.json", *labels))
    test = lines(tmp_path / "llava_pope_test.jsonl", *questions)
    path = lines(tmp_path / "answers.jsonl", *reversed(answers))
    scores = score_files(test, path, labels=files)
    assert figures(scores) == (round(5 / 6, 4), round(4 / 6, 4), 0)
    assert {split: part.accuracy.value for split, part in scores.splits.items()} == {
        "adversarial": 1.0, "random": 1.0, "popular": 0.5,
    }  # fmt: skip
    assert scores.mean_f1 == pytest.approx((1 + 1 + 2 / 3) / 3)  # popular: precision 1/2, recall 1
    data = loaders.pope(test, tmp_path, files)
    assert [(e.id, e.answer) for e in data][:3] == [
        ("adversarial/1", "yes"),
        ("adversarial/2", "no"),
        ("random/10000001", "yes"),
    ]
    assert data[2].labels == {"object:named": True, "object:orange": True}
    assert score_result(load_answers(data, path)).accuracy == scores.accuracy
    with pytest.raises(DataError, match=r"line 1: no field 'label' or 'answer'.*labels="):
        score_files(test, path)
    with pytest.raises(
        DataError,
        match=r"llava_pope_test\.jsonl: line 5: the label files have no label for image 'a\.png' and .*'popular'",
    ):
        score_files(test, path, labels=files[:2])
    lines(files[0], {"question_id": 1, "image": "a.png", "text": wording["dog"], "label": "no"},
          {"question_id": 2, "image": "a.png", "text": wording["dog"], "label": "yes"})  # fmt: skip
    with pytest.raises(DataError, match="line 2: this image and question have both labels"):
        score_files(test, path, labels=files)


def lmms(i: int, category: str, response: Any) -> dict[str, Any]:
    """Return a sample as lmms-eval logs it; ids of the table and of questions differ by one."""
    doc = {"id": str(i), "question_id": str(i + 1), "question": QUESTIONS[i], "answer": LABELS[i], "image_source": "a",
           "category": category}  # fmt: skip
    return {"doc_id": i, "doc": doc, "target": LABELS[i], "resps": [[response]], "filtered_resps": [response]}


def test_samples_of_lmms_eval(pope: Path, tmp_path: Path) -> None:
    path = lines(tmp_path / "samples_pope.jsonl", *(lmms(i, "random", WRONG[i]) for i in range(4)))
    answers = read_answers(path)
    assert [(a.id, a.text, a.split, a.question) for a in answers][:1] == [("1", "No", "random", QUESTIONS[0])]
    assert figures(score_files(pope, path)) == (0.0, 0.5, 0)
    assert figures(score_files(pope, path, answer_field="resps")) == (0.0, 0.5, 0)
    for broken, words in (
        ({**lmms(0, "random", "No"), "filtered_resps": []}, "'filtered_resps' must hold text, not"),
        ({**lmms(0, "random", "No"), "filtered_resps": [{"a": 1}]}, "'filtered_resps' must hold text, not"),
        ({**lmms(0, "random", "No"), "doc": {"question": "?"}}, "line 1, doc: no field 'question_id'"),
    ):
        with pytest.raises(DataError, match=words):
            read_answers(lines(path, broken))


def test_ids_that_each_split_uses_are_joined_by_the_category(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "a.jpg")
    records = [{"id": str(4 * k + i), "question_id": str(i + 1), "question": QUESTIONS[(i + k) % 4], "answer": LABELS[i],
                "image_source": "a", "category": split} for k, split in enumerate(SPLITS) for i in range(4)]  # fmt: skip
    table = lines(tmp_path / "hf_rows.jsonl", *records)
    data = loaders.pope(table, tmp_path)
    assert [e.id for e in data][::4] == ["random/1", "popular/1", "adversarial/1"]
    assert {e.group for e in data} == {"a.jpg"}
    with pytest.raises(DataError, match=r"'answer'.*the true answer of a question table"):
        read_answers(table)
    # Right in random, wrong in popular, half right in adversarial.
    responses = {"random": LABELS, "popular": WRONG, "adversarial": ("yes", "yes", "yes", "yes")}
    samples = [{"doc": r, "filtered_resps": [responses[r["category"]][int(r["question_id"]) - 1]]} for r in records]
    path = lines(tmp_path / "samples.jsonl", *reversed(samples))
    scores = score_files(table, path)
    assert {k: v.accuracy.value for k, v in scores.splits.items()} == {"random": 1, "popular": 0, "adversarial": 0.5}
    assert load_answers(data, path).rate("accuracy").value == scores.accuracy.value == 0.5
    by_name = [{"id": f"{r['category']}/{r['question_id']}", "answer": s["filtered_resps"][0]}
               for r, s in zip(records, samples, strict=True)]  # fmt: skip
    assert score_files(table, lines(path, *by_name)) == scores
    with pytest.raises(DataError, match="line 1: id '1' matches several questions; use ids like '<split>/<id>'"):
        score_files(table, lines(path, {"id": 1, "answer": "Yes"}))


TABLE = "index\tquestion\tanswer\tcategory\n" + "".join(
    f"{i}\t{question}\t{label.capitalize()}\t{category}\n"
    for i, (question, label, category) in enumerate(
        zip(QUESTIONS, LABELS, ("random", "random,popular", "popular", "random"), strict=True)
    )
)


def test_tables_of_vlmevalkit(tmp_path: Path) -> None:
    table = tmp_path / "POPE.tsv"
    table.write_text(TABLE)
    path = lines(
        tmp_path / "a.jsonl", *({"question_id": i, "text": t} for i, t in enumerate(("Yes", "Yes", "Yes", "No")))
    )
    scores = score_files(table, path)
    # A row of two categories counts in each, and twice over all: 3 of 5.
    assert figures(scores) == (0.6, 0.8, 0)
    assert {k: v.accuracy.value for k, v in scores.splits.items()} == {"random": pytest.approx(2 / 3), "popular": 0.5}
    for i in range(4):
        Image.new("RGB", (2, 2)).save(tmp_path / f"{i}.jpg")
    data = loaders.pope(table, tmp_path)
    assert [e.id for e in data] == ["random/0", "random/1", "popular/1", "popular/2", "random/3"]
    assert [e.answer for e in data] == ["yes", "no", "no", "yes", "no"]
    assert data[2].group == "1.jpg"
    assert load_answers(data, path).rate("accuracy").value == 0.6
    with pytest.raises(DataError, match=r"line 2: field 'answer'.*'category'"):
        read_answers(table)


def test_predictions_of_vlmevalkit_are_read_as_pandas_does(tmp_path: Path) -> None:
    table = tmp_path / "POPE.tsv"
    table.write_text(TABLE.replace("popular", "random").replace("random,random", "random"))
    heading = "index\tquestion\tanswer\tcategory\tprediction\n"
    predictions = ("None", '"Yes,\nthere ""is"""', "N/A", "no")
    results = tmp_path / "model_POPE.tsv"
    results.write_text(
        heading
        + "".join(f"{i}\t{q}\tYes\trandom\t{t}\n" for i, (q, t) in enumerate(zip(QUESTIONS, predictions, strict=True)))
    )
    assert [a.text for a in read_answers(results)] == ["nan", 'Yes,\nthere "is"', "nan", "no"]
    scores = score_files(table, results, parser="vlmevalkit")
    assert figures(scores) == (0.25, 0.25, 2)
    results.write_text(results.read_text().replace("random", "popular", 1))
    with pytest.raises(DataError, match="line 2: id '0' has category 'popular', but its question is in split 'random'"):
        score_files(table, results)
    comma = tmp_path / "model_POPE.csv"
    comma.write_text('index,prediction\n0,Yes\n1,"No, not"\n2,Yes\n3,No\n')
    assert figures(score_files(table, comma)) == (1.0, 0.5, 0)
    for text, words in (
        ("index,prediction\n0\n", "line 2: 1 cell, but the header has 2 columns"),
        ("index,prediction\n0,Yes,No\n", "line 2: 3 cells"),
        ("index,prediction,prediction\n", "line 1: column 'prediction' occurs twice"),
        ('index,prediction\n0,"Yes\n', "line 2: a quote is not closed"),
        ("index,prediction\n,Yes\n", "line 2: field 'question_id' or .* must hold text, not null"),
        ("index,prediction\n", "the file contains no answers"),
    ):
        comma.write_text(text)
        with pytest.raises(DataError, match=r"model_POPE\.csv:.* ?" + words):
            read_answers(comma)
    comma.write_bytes(b"index,prediction\n0,\xff\n")
    with pytest.raises(DataError, match="line 2: not UTF-8 at byte 3"):
        read_answers(comma)
    with pytest.raises(DataError, match=r"format '\.xlsx' are not supported; save the table as \.tsv"):
        read_answers(tmp_path / "model_POPE.xlsx")


def test_the_category_is_the_split(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.jpg")
    row = {"image": "a.jpg", "text": existence_question("dog"), "label": "no"}

    def load(*records: dict[str, Any], name: str = "pope_all.jsonl") -> ConceptDataset:
        return loaders.pope(lines(tmp_path / name, *records), tmp_path)

    other = load(*({"question_id": i, **row, "category": c} for i, c in enumerate(SPLITS)))
    assert [e.id for e in other] == ["random/0", "popular/1", "adversarial/2"]
    same = load(*({"question_id": 0, **row, "category": c} for c in SPLITS))
    assert [e.id for e in same] == ["random/0", "popular/0", "adversarial/0"]
    assert same.provenance["split"] == list(SPLITS)
    with pytest.raises(DataError, match="line 2: question_id '0' was already used"):
        load(*({"question_id": 0, **row, "category": "random"} for _ in range(2)))
    assert load({"question_id": 0, **row, "category": "animals"})[0].split == "neutral"
    with pytest.raises(DataError, match="field 'category' is 'random', but the file's name says 'popular'"):
        load({"question_id": 0, **row, "category": "random"}, name="pope_popular.json")
    with pytest.raises(DataError, match="the question may be field 'text' or field 'question'"):
        load({"question_id": 0, **row, "question": "Is there a cat in the image?"})


# ---- parsers follow the benchmark --------------------------------------------------------------------------------------


def test_answers_to_a_benchmark_are_read_by_its_rule(tmp_path: Path) -> None:
    for name in "ab":
        Image.new("RGB", (2, 2)).save(tmp_path / f"{name}.png")
    (tmp_path / "color.txt").write_text(
        "a.png\tIs it red?\tYes\na.png\tIs it blue?\tNo\nb.png\tIs it red?\tNo\nb.png\tIs it blue?\tYes\n"
    )
    data = loaders.mme(tmp_path / "color.txt", tmp_path)
    texts = ("Yes, the image is red.", "No, it is not blue", "  Yes", "yes it is")
    path = lines(tmp_path / "a.jsonl", *({"id": f"color/{i}", "answer": t} for i, t in enumerate(texts, 1)))
    answers = load_answers(data, path)
    assert answers.provenance["parser"] == "mme"
    # Three of four answers are right, and one of two pairs; the leading blanks hide the third.
    assert mme.score(answers).perception == pytest.approx(100 * (3 / 4 + 1 / 2))
    with pytest.raises(ConfigError, match="unknown parser 'x'"):
        load_answers(data, path, parser="x")


# ---- files that are not what they seem ---------------------------------------------------------------------------------

HOSTILE: dict[str, tuple[bytes, str]] = {
    "a key twice": (b'{"id": 1, "answer": "No", "answer": "Yes"}\n', "line 1: .*the key 'answer' occurs twice"),
    "a key twice in a list": (
        b'[{"id": 1, "answer": "No", "answer": "Yes"}]',
        "record 1: .*the key 'answer' occurs twice",
    ),
    "NaN": (b'{"id": 1, "answer": "No", "seconds": NaN}\n', "line 1: .*NaN is not a number in JSON"),
    "seconds of 400 digits": (
        b'{"id": 1, "answer": "No", "seconds": 1' + b"0" * 400 + b"}\n",
        r"line 1: field 'seconds' must not exceed 2\*\*53",
    ),
    "negative seconds": (b'{"id": 1, "answer": "No", "seconds": -1}\n', "line 1: field 'seconds' must be at least 0"),
    "id is a list": (b'{"id": [1], "answer": "No"}\n', "line 1: field .*'id'.* must hold text, not"),
    "id is null": (b'{"id": null, "answer": "No"}\n', "line 1: field .*'id'.* must hold text, not null"),
    "doc is a text": (b'{"id": 1, "doc": "x", "filtered_resps": ["No"]}\n', "line 1: no field 'answer'"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_answer_files_are_refused(tmp_path: Path, case: str) -> None:
    content, words = HOSTILE[case]
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.jsonl: " + words):
        read_answers(path)


def test_a_fifo_is_refused_and_does_not_block(pope: Path, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo.jsonl"
    os.mkfifo(fifo)
    data = loaders.pope(pope, tmp_path)
    for read in (
        lambda: read_answers(fifo),
        lambda: score_files(fifo, pope),
        lambda: score_files(pope, fifo),
        lambda: loaders.pope(fifo, tmp_path),
        lambda: load_answers(data, fifo),
        lambda: BehaviorResult.load(fifo),
    ):
        with pytest.raises(DataError, match="not a regular file but a FIFO"):
            read()


@pytest.mark.parametrize("other", ["pred", "model_answer", "Response", "generated_text", "outputs"])
def test_a_second_answer_under_another_tools_name_is_refused(tmp_path: Path, other: str) -> None:
    """`answer` is the truth here, and the model is always wrong."""
    path = tmp_path / "a.jsonl"
    wrong: Any = ["No"] if other == "outputs" else "No"
    path.write_text(json.dumps({"question_id": 1, "answer": "Yes", other: wrong, "model_id": "m"}), encoding="utf-8")
    with pytest.raises(DataError, match=rf"may be field 'answer'.*or field '{other}'"):
        read_answers(path)
    if other != "outputs":
        assert read_answers(path, answer_field=other)[0].text == "No"
    path.write_text(json.dumps({"question_id": 1, "text": "No", "prompt": "?", "generated": True}), encoding="utf-8")
    assert read_answers(path)[0].text == "No"
