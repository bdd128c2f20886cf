"""Answer files in several formats, parsers by tables of hand-made answers, requests and verdicts, and refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from behavior.benchmarks import (
    BENCHMARKS,
    TASKS,
    gavie,
    hallusion,
    lvlm_ehub,
    mmvp,
    r_bench,
    reefknot,
    score_files,
    write_requests,
)
from behavior.benchmarks.answer_formats import ANSWER_FORMATS
from behavior.benchmarks.cceval import read_list
from behavior.benchmarks.crpe import is_right
from behavior.benchmarks.llava_bench import read_ratings
from behavior.benchmarks.mmhal import read_rating
from behavior.benchmarks.naturalbench import read_choice
from behavior.parsing import PARSERS
from groundscope.core.errors import ConfigError, DataError, GroundscopeError

ANSWERS = (
    "Yes", "no", "NO.", "Yes, but no", "", "I cannot answer that.", "Sí", "是的", "**Yes**", '{"answer": "no"}', "`No`", "I know",
    "It has eyes", "The answer is (b)", "A", "a dog", "Not sure, maybe yes",
)  # fmt: skip
OPTIONS = {"a": "Open", "b": "Closed"}


def test_yes_no_parsers_by_hand() -> None:
    rows = {
        # Yes no NO. both "" cannot Sí 是的 **Yes** JSON `No` know eyes (b) A "a dog" hedge
        "pope_release": "y n y n y y y y y y y y y y y y y",
        "yes_no": "y n o n o o o o y o o o o o o o y",
        "mme": "y n n y o o o o o o n o o o o o n",
        "amber_release": "y o o o o o o o o o o o o o o o o",
        "lmms_eval": "y n o o o o o o o o o o o o o o o",
        "strict": "y n n o o o o o o o o o o o o o o",
        "vlmevalkit": "y n n o o o o o o n n o o o o o y",
    }
    for name, row in rows.items():
        parsed = [{"yes": "y", "no": "n", None: "o"}[PARSERS[name](text)] for text in ANSWERS]
        assert " ".join(parsed) == row, name


def test_parsers_of_benchmarks_by_hand() -> None:
    assert [reefknot.read_yes(t) for t in ("It has eyes", "", "Sí", "**YES**")] == ["yes", "no", "no", "yes"]
    assert [reefknot.read_no(t) for t in ("I know", "", "N0", '{"a": "no"}')] == ["no", "yes", "yes", "no"]
    words = ("Yes or no", "no, yes", "", "None", "`Yes`", "Non")
    assert [read_choice(t) for t in words] == [1, 0, -1, -1, 1, -1]
    assert [read_choice(t, "choice") for t in ("B", "(a)", "a B", "It is a dog", "AB", "Answer: B.")] == [
        0,
        1,
        1,
        1,
        -1,
        0,
    ]
    options = ["(a)", "a", "A.", "b) closed", "Open", "It is not open but closed", "**(b)**", "Option B", "neither", "",
               '{"answer": "(a)"}', "a door"]  # fmt: skip
    parsed = [mmvp.read_option(t, OPTIONS) for t in options]
    assert parsed == ["a", "a", "a", "b", "a", None, "b", "b", None, None, "a", None]
    assert [is_right("A. the man", t) for t in ("A", "B", "", "nan", "the man", "THE MAN", "A cat", "no")] == [
        True, False, False, False, True, True, True, False,
    ]  # fmt: skip
    assert is_right("A", "") and is_right("A", "no idea") and not is_right("A", "b")  # noqa: PT018 - one rule
    assert [read_rating(t) for t in ("Rating: 3", "rating:3", "", "Rating: 3 / rating: 3", "评分: 3", "RATING: 7")] == [
        3, None, None, 3, None, None,
    ]  # fmt: skip
    assert read_ratings("8 9") == (8.0, 9.0)
    assert read_ratings("8  9") == read_ratings("") == read_ratings("8") == read_ratings("8 good") == (-1.0, -1.0)
    assert [hallusion.read_check(t) for t in ("Correct", "incorrect", "not correct", "unclear", "", "正确")] == list(
        "101222"
    )
    assert read_list("['a', b]\n[c]") == ["a", "b"]
    assert read_list("[\na]") == []
    assert gavie.read_ratings("Accuracy:\nscore of the answer1: 11\nRelevancy:\nscore of the answer1: 3") is None
    assert gavie.read_ratings("") is None
    right = [
        ("Yes.", "yes"),
        ("yes and no", "no"),
        ("nope", "no"),
        ("NO!", "no"),
        ("**No**", "no"),
        ("", "yes"),
        ("No,", "no"),
    ]
    assert [bool(lvlm_ehub.normalize(label) in lvlm_ehub.normalize(t).split()) for t, label in right] == [
        True, True, False, True, False, False, True,
    ]  # fmt: skip


# ---- formats of answer files ------------------------------------------------------------------------------------------


def write(path: Path, rows: Any, *, lines: bool = True) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) if lines else json.dumps(rows), encoding="utf-8")
    return path


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    rows = [
        {"question_id": i, "image": f"{i}.jpg", "text": f"Is {i} on it?", "label": ["yes", "no"][i % 2]}
        for i in range(4)
    ]
    return write(tmp_path / "image-level_filterd.json", rows, lines=False)


FORMATS: dict[str, list[dict[str, Any]]] = {
    "release": [{"question_id": i, "text": "Yes."} for i in range(4)],
    "lmms_eval": [{"doc_id": 9, "doc": {"question_id": i, "text": f"Is {i} on it?"}, "filtered_resps": ["Yes."]}
                  for i in range(4)],
    "lmms_eval of several": [{"doc": {"question_id": i}, "resps": [["Yes."]]} for i in range(4)],
    "vlmevalkit": [{"index": i, "question": f"Is {i} on it?", "answer": "no", "prediction": "Yes."} for i in range(4)],
    "plain": [{"id": i, "response": "Yes."} for i in range(4)],
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_formats_of_answer_files(tmp_path: Path, questions: Path, name: str) -> None:
    score = score_files("r_bench", write(tmp_path / "a.jsonl", FORMATS[name]), files={"questions": questions})
    assert score.figures["accuracy"].value == 0.5
    assert score.figures["yes_ratio"].value == 1.0
    assert score.missing == 0
    assert list(score.frame().columns) == ["part", "figure", "value", "low", "high", "n"]


def test_a_table_of_vlmevalkit(tmp_path: Path, questions: Path) -> None:
    table = tmp_path / "result.tsv"
    rows = [
        "index\tquestion\tprediction\textracted\tscore",
        *(f"{i}\tIs {i} on it?\t{'' if i else 'No'}\tNo\t1" for i in range(4)),
    ]
    table.write_text("\n".join(rows) + "\n")
    score = score_files("r_bench", table, files={"questions": questions})
    assert [a.text for a in score.answers.answers] == ["No", "nan", "nan", "nan"]


def test_a_file_that_fits_two_formats_is_refused(tmp_path: Path, questions: Path) -> None:
    rows = [{"question_id": 0, "text": "Yes.", "index": 0, "prediction": "No."}]
    file = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"'release' \(id 0, answer 'Yes\.'\) or 'vlmevalkit' \(id 0, answer 'No\.'\)"):
        score_files("r_bench", file, files={"questions": questions})
    score = score_files("r_bench", file, files={"questions": questions}, format="vlmevalkit")
    assert (score.missing, score.answers.answers[0].text) == (3, "No.")
    named = score_files("r_bench", file, files={"questions": questions}, answer_field="prediction", id_field="index")
    assert named.answers == replace(score.answers, provenance=named.answers.provenance)


REFUSED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "other question": ([{"question_id": 9, "text": "Yes."}], "id '9' matches no question of this benchmark"),
    "answered twice": ([{"question_id": 1, "text": "Yes."}] * 2, "question '1' was already answered, at .*line 1"),
    "other wording": ([{"question_id": 1, "prompt": "Is it red?", "text": "Yes."}], "the question of id '1' is 'Is it red"),
    "the question file": ([{"question_id": 1, "image": "1.jpg", "text": "Is 1 on it?", "label": "no"}], "no answer format fits"),
    "no answer": ([{"question_id": 1, "reply": "Yes."}], "no answer format fits"),
    "not text": ([{"question_id": 1, "text": 3}], "the answer must be text, not 3"),
    "some ids": ([{"question_id": 1, "text": "Yes."}, {"prompt": "Is 2 on it?", "text": "Yes."}], "only some answers have an id"),
    "place alone": ([{"prompt": f"Is {i} on it?", "text": "Yes."} for i in range(4)], "neither an id nor its image"),
    "too few by place": ([{"prompt": "Is 0 on it?", "image": "0.jpg", "text": "Yes."}], "1 answer without ids for 4 questions"),
    "other image": ([{"prompt": f"Is {i} on it?", "image": "9.jpg", "text": ""} for i in range(4)], "the image is '9.jpg' here"),
    "other order": ([{"prompt": f"Is {3 - i} on it?", "image": f"{i}.jpg", "text": ""} for i in range(4)],
                    "the question is 'Is 3"),
    "nothing": ([], "contains no answers"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_answers_are_refused(tmp_path: Path, questions: Path, name: str) -> None:
    rows, message = REFUSED[name]
    with pytest.raises(DataError, match=message):
        score_files("r_bench", write(tmp_path / "a.jsonl", rows), files={"questions": questions})


def test_answers_by_place_with_image_and_text(tmp_path: Path, questions: Path) -> None:
    rows = [{"prompt": f"Is {i} on it?\nAnswer shortly.", "image": f"folder/{i}.jpg", "text": "No."} for i in range(4)]
    assert (
        score_files("r_bench", write(tmp_path / "a.jsonl", rows), files={"questions": questions})
        .figures["accuracy"]
        .value
        == 0.5
    )


def test_the_last_of_several_answers_counts_on_request(tmp_path: Path, questions: Path) -> None:
    rows = [{"question_id": 0, "text": "No."}, {"question_id": 1, "text": "No."}, {"question_id": 0, "text": "Yes."}]
    score = score_files(
        "r_bench", write(tmp_path / "a.jsonl", rows), files={"questions": questions}, variant="last_answer"
    )
    assert [a.text for a in score.answers.answers] == ["Yes.", "No."]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"files": {}}, "R-Bench needs the file 'questions'"),
        ({"files": {"question": "x"}}, "no file 'question'; its files are: questions, subsets; did you mean questions"),
        ({"files": {"questions": "nowhere.json"}}, "file 'nowhere.json' does not exist"),
        ({"variant": "releas"}, "unknown variant 'releas'; choose from release, last_answer; did you mean release"),
        ({"format": "lmms"}, "unknown answer format 'lmms'"),
        ({"functions": {"similar": max}}, "does not use a function 'similar'"),
        ({"verdicts": "v.jsonl"}, "R-Bench has no judge"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, questions: Path, options: dict[str, Any], message: str) -> None:
    file = write(tmp_path / "a.jsonl", FORMATS["release"])
    with pytest.raises(GroundscopeError, match=message):
        score_files("r_bench", file, **({"files": {"questions": questions}} | options))


def test_unknown_benchmarks_and_files_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown benchmark 'rbench'; .*did you mean r_bench"):
        score_files("rbench", tmp_path)
    with pytest.raises(DataError, match="answer file 'nowhere' does not exist"):
        score_files("reefknot", "nowhere")
    with pytest.raises(ConfigError, match="NaturalBench has no judge; benchmarks with a judge are hallusion"):
        write_requests("naturalbench", tmp_path / "x", tmp_path)
    paths = {n: tmp_path / f"{n}.json" for n in ("annotations", "relation", "safe_words")}
    write(paths["annotations"], [{"id": 1, "type": "generative", "truth": ["a"], "hallu": ["b"]}], lines=False)
    write(paths["relation"], {"a": [], "b": []}, lines=False)
    paths["safe_words"].write_text("")
    responses = write(tmp_path / "r.json", [{"id": 1, "response": "a"}], lines=False)
    with pytest.raises(ConfigError, match="needs the function 'similar'"):
        score_files("amber_generative", responses, files=paths)


def test_lists_of_ids_of_r_bench(tmp_path: Path, questions: Path) -> None:
    file = write(tmp_path / "a.jsonl", FORMATS["release"])
    for k in range(1, 5):
        write(tmp_path / f"ids_{k}.json", [0, 1], lines=False)
    files = {"questions": questions, "subsets": tmp_path / "ids_1.json"}
    with pytest.raises(DataError, match=r"ids_5.json: list 5 of the five lists of ids is missing"):
        score_files("r_bench", file, files=files)
    write(tmp_path / "ids_5.json", [7], lines=False)
    with pytest.raises(DataError, match="id '7' is not in the question file"):
        score_files("r_bench", file, files=files)
    assert r_bench.instance_question("Is the cat on the mat, cat?", "cat", "mat", "mask") == (
        "Is the cat in red mask on the mat in green mask, cat in red mask?"
    )


# ---- judges --------------------------------------------------------------------------------------------------------------


def test_requests_can_be_answered_and_read_back(tmp_path: Path) -> None:
    rows = [
        {"category": "VS", "subcategory": "map", "visual_input": str(min(f, 2)), "set_id": "0", "figure_id": str(f),
         "question_id": "0", "question": "Is it?", "gt_answer": "1", "gt_answer_details": "It is.",
         "filename": f"{f}.png" if f else None, "model_prediction": text}
        for f, text in enumerate(["I do not know.", "Yes.", "No."])
    ]  # fmt: skip
    answers = write(tmp_path / "result.json", rows, lines=False)
    requests = tmp_path / "out" / "requests.json"
    assert write_requests("hallusion", requests, answers) == 3
    assert json.loads(requests.read_text()) == rows
    with pytest.raises(
        DataError, match=r"variant 'release' needs a verdict file; .* or variant='own', which needs none"
    ):
        score_files("hallusion", answers)
    checks = [
        r | {"reply": reply, "same_reply": "same"}
        for r, reply in zip(rows, ["unclear", "correct", "incorrect"], strict=True)
    ]
    score = score_files("hallusion", answers, verdicts=write(tmp_path / "v.json", checks, lines=False))
    assert [a.correct for a in score.answers.answers] == [True, True, False]
    assert score.figures["LH"].value == 0.0
    assert score.figures["VI"].value == 1.0
    with pytest.raises(DataError, match=r"no verdict on 'VS_map_0_2_0' \(1 of 3 answers have none\)"):
        score_files("hallusion", answers, verdicts=write(tmp_path / "v.json", checks[:2], lines=False))
    with pytest.raises(DataError, match="was already judged"):
        score_files("hallusion", answers, verdicts=write(tmp_path / "v.json", [*checks, checks[0]], lines=False))
    bad = [r | {"gpt4v_output_gpt_check": "yes"} for r in rows]
    with pytest.raises(DataError, match="the check must be 0, 1 or 2"):
        score_files("hallusion", answers, verdicts=write(tmp_path / "v.json", bad, lines=False))


def test_verdicts_without_ids_need_a_request(tmp_path: Path) -> None:
    captions = [{"image": "1.jpg", "reference caption": ["A cat."], "output": "A cat."}]
    answers = write(tmp_path / "a.jsonl", captions)
    verdicts = write(tmp_path / "v.jsonl", [{"reply": "yes"}])
    with pytest.raises(DataError, match="the verdicts have no ids; pass by_place=True"):
        score_files("haelm", answers, verdicts=verdicts)
    assert score_files("haelm", answers, verdicts=verdicts, by_place=True).figures["hallucination_rate"].value == 0.0
    with pytest.raises(DataError, match="2 verdicts without ids for 1 answer"):
        score_files("haelm", answers, verdicts=write(tmp_path / "v.jsonl", [{"reply": "yes"}] * 2), by_place=True)


@pytest.mark.parametrize("name", [n for n, b in BENCHMARKS.items() if b.judge is not None])
def test_judged_benchmarks_write_requests(tmp_path: Path, name: str) -> None:
    answers, files = judged_answers(tmp_path, name)
    path = tmp_path / "requests" / "file.json"
    assert write_requests(name, path, answers, files=files) == 1
    assert "It is a cat on a mat." in path.read_text(encoding="utf-8")


def judged_answers(folder: Path, name: str) -> tuple[Path, dict[str, Path]]:
    """Return an answer file with one answer to a judged benchmark, and the other files."""
    text = "It is a cat on a mat."
    rows: dict[str, list[dict[str, Any]]] = {
        "hallusion": [{"category": "VD", "subcategory": "math", "visual_input": "1", "set_id": "0", "figure_id": "0",
                       "question_id": "0", "question": "Is it?", "gt_answer": "1", "model_prediction": text}],
        "mmvp": [{"question_id": 1, "prompt": "Is it? (a) Cat (b) Dog", "answer": "(a)", "response": text}],
        "reefknot": [{"image_id": "1", "query_prompt": "Which?", "label": "on", "type": "VQA", "response": text}],
        "object_halbench": [{"image_id": 1, "question": "Describe it.", "answer": text}],
        "mmhal": [{"question": "What?", "gt_answer": "A cat.", "image_id": "1", "model_answer": text}],
        "llava_bench": [{"question_id": 0, "prompt": "What?", "text": text}],
        "gavie": [{"id": "1/0", "answer": text}],
        "cceval": [{"image_id": "1", "text": text}],
        "haelm": [{"image": "1.jpg", "reference caption": ["A cat."], "output": text}],
    }  # fmt: skip
    others: dict[str, dict[str, Any]] = {
        "object_halbench": {"questions": [{"image_id": 1, "question": "Describe it."}]},
        "llava_bench": {"questions": [{"question_id": 0, "image": "1.jpg", "text": "What?", "category": "conv"}]},
        "gavie": {
            "questions": [{"image_id": "1", "question": "Describe it."}],
            "regions": {"1": [{"caption": "a cat", "bbox": [1, 2, 3, 4]}]},
        },
        "cceval": {"questions": {"1": {"gt_objs": ["cat"]}}},
    }
    files = {
        role: write(folder / f"{role}.json", content, lines=False) for role, content in others.get(name, {}).items()
    }
    return write(folder / "answers.json", rows[name], lines=False), files


# ---- the table ---------------------------------------------------------------------------------------------------------


def test_every_entry_is_whole() -> None:
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.title, name
        assert set(benchmark.tasks) <= set(TASKS), name
        assert set(benchmark.levels) <= {"object", "attribute", "relation"}, name
        assert set(benchmark.optional) <= set(benchmark.files), name
        assert set(benchmark.unjudged) <= set(benchmark.variants), name
    with pytest.raises(ConfigError, match=r"it must be a behavior\.benchmarks\.Benchmark"):
        BENCHMARKS.register("other", object())  # pyright: ignore[reportArgumentType]


def test_a_user_s_format_and_benchmark(tmp_path: Path, questions: Path) -> None:
    from behavior.benchmarks import AnswerLayout, Reading
    from concepts.reading.record import Record

    def mine(record: Record, _: AnswerLayout) -> Reading | None:
        return Reading(str(record.values["nr"]), record.values["said"]) if "nr" in record.values else None

    ANSWER_FORMATS.register("mine", mine)
    BENCHMARKS.register("mine", replace(BENCHMARKS["r_bench"], title="Mine"))
    try:
        file = write(tmp_path / "a.jsonl", [{"nr": i, "said": "No."} for i in range(4)])
        assert score_files("mine", file, files={"questions": questions}).figures["accuracy"].value == 0.5
    finally:
        ANSWER_FORMATS.unregister("mine")
        BENCHMARKS.unregister("mine")
