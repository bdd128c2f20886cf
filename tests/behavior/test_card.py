"""The evaluation card: its numbers from its own CSV, severity and differences by hand, symptoms, files, the survey's table."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from behavior import Answer, BehaviorResult, Cost, EvaluationCard, evaluation_card
from behavior.benchmarks import score_files
from behavior.card import (
    CARD_SCHEMA,
    PROFILES,
    SURVEY_ROWS,
    card_tables,
    difference_cells,
    facts_of,
    has_form,
    hesitates,
    ranking_lines,
    rationalizes,
    read_safety,
    register_row,
    row_cells,
    survey_cells,
    symptoms,
    table_html,
)
from concepts import scenes
from groundscope.core.errors import ConfigError, DataError

LEVELS = ("object", "attribute", "relation", "")


def answers(seed: int, error: Mapping[str, float], n: int = 400) -> BehaviorResult:
    """Return answers to the same questions, wrong with a rate by level."""
    questions, chance = random.Random(0), random.Random(seed)
    rows = []
    for i in range(n):
        level, form, truth = (
            questions.choice(LEVELS),
            questions.choice(["yes/no", "choice"]),
            questions.choice(["yes", "no"]),
        )
        candidates = ("yes", "no") if form == "yes/no" else ("red", "green", "blue")
        true = truth if form == "yes/no" else "red"
        wrong = chance.random() < error[level]
        given = next(c for c in candidates if (c == true) != wrong)
        given = None if wrong and chance.random() < 0.2 else given
        about = (
            f"q{i}",
            f"image {questions.randrange(60)}",
            "neutral",
            level,
            f"kind {i % 3}",
            f"Question {i}?",
            true,
            candidates,
        )
        text = f"{given or 'perhaps'}, it {chance.choice(['is', 'might be'])}"
        rows.append(Answer(*about, given, not wrong, margin=chance.gauss(0, 2), text=text))
    return BehaviorResult(tuple(rows), Cost(4.0, 80, n))


@pytest.fixture(scope="module")
def card() -> EvaluationCard:
    low, high = dict.fromkeys(LEVELS, 0.1), {"object": 0.5, "attribute": 0.05, "relation": 0.1, "": 0.3}
    models = {"first": {"a": answers(1, low), "b": answers(2, low, 90)}, "second": {"a": answers(3, high)}}
    own = {"mine": {"kind 0": 1.0, "object": 0.5, "attribute": 0.0}}
    return evaluation_card(models, profiles={**PROFILES, **own})


def test_the_numbers_of_a_card_follow_from_its_csv(card: EvaluationCard, tmp_path: Path) -> None:
    paths = {p.name: p for p in card.save(tmp_path / "card")}
    with paths["card_answers.csv"].open(newline="") as file:
        lines = list(csv.DictReader(file))
    with paths["card.csv"].open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(card.rows)
    for row in table:
        level = "" if row["level"] == "no level" else row["level"]
        part = [
            x
            for x in lines
            if (x["model"], x["benchmark"]) == (row["model"], row["benchmark"])
            and row["level"] in ("all", x["level"] or "no level")
            and row["task"] in ("all", x["task"])
        ]
        assert int(row["n"]) == len(part) > 0, level
        wrong = [x["correct"] == "False" for x in part]
        assert float(row["frequency"]) == pytest.approx(sum(wrong) / len(part), abs=1e-12)
        assert int(row["unparsed"]) == sum(x["unparsed"] == "True" for x in part)
        for name, profile in card.profiles.items():
            weights = [profile.get(x["kind"], profile.get(x["level"], 1.0)) for x in part]
            if sum(weights):
                expected = sum(w for w, bad in zip(weights, wrong, strict=True) if bad) / sum(weights)
                assert float(row[f"severity_{name}"]) == pytest.approx(expected, abs=1e-12)
            else:
                assert row[f"severity_{name}"] == "nan"
        yes = [x["given"] == "yes" for x in part if x["task"] == "yes/no"]
        assert row["yes_ratio"] == "" if not yes else float(row["yes_ratio"]) == pytest.approx(sum(yes) / len(yes))


def test_differences_are_paired_and_weighted(card: EvaluationCard) -> None:
    by_model = {m: {a.id: a for a in card.answers if a.model == m and a.benchmark == "a"} for m in card.models}
    for d in card.differences:
        assert (d.first, d.second) == ("first", "second")
        keys = [k for k, a in by_model["first"].items() if d.level in ("all", a.level or "no level")]
        profile = card.profiles[d.profile]
        weights = np.array(
            [profile.get(by_model["first"][k].kind, profile.get(by_model["first"][k].level, 1.0)) for k in keys]
        )
        change = np.array([int(by_model["second"][k].wrong) - int(by_model["first"][k].wrong) for k in keys])
        assert d.difference.n == len(keys)
        assert d.difference.value == pytest.approx(float(weights @ change / weights.sum()), abs=1e-12)
        assert d.difference.low <= d.difference.value <= d.difference.high
    assert {d.benchmark for d in card.differences} == {"all", "a"}


def test_the_ranking_changes_where_intervals_exclude_zero_with_opposite_signs() -> None:
    objects, attributes = dict.fromkeys(LEVELS, 0.05), dict.fromkeys(LEVELS, 0.05)
    objects, attributes = objects | {"object": 0.6}, attributes | {"attribute": 0.6}
    models = {"objects": {"a": answers(1, objects)}, "attributes": {"a": answers(1, attributes)}}
    changed = evaluation_card(models, profiles={"o": {"attribute": 0.1}, "a": {"object": 0.1}})
    assert changed.ranking("o") == ["attributes", "objects"]
    assert changed.ranking("a") == ["objects", "attributes"]
    assert changed.ranking_changes() == [("objects", "attributes", "o", "a")]
    same = evaluation_card({"objects": models["objects"], "again": models["objects"]})
    assert same.ranking_changes() == []
    assert all(d.difference.value == 0 for d in same.differences)


def test_models_without_a_common_question_are_not_ranked() -> None:
    first, second = answers(1, dict.fromkeys(LEVELS, 0.5), 40), answers(2, dict.fromkeys(LEVELS, 0.1), 40)
    card = evaluation_card({"worse": {"a": first}, "better": {"b": second}})
    assert card.ranking() == []
    assert ranking_lines(card) == ["The models are not ranked: no question was answered by all of them."]
    same = evaluation_card({"worse": {"a": first}, "copy": {"a": first}})
    assert ranking_lines(same)[0] == "Fewest errors first, under every profile: worse; copy."


def test_tables_state_a_severity_once_and_name_each_model_once(card: EvaluationCard) -> None:
    head, *lines = row_cells(card)
    of_profile = [head.index(f"severity, {name}") for name in card.profiles if name != "uniform"]
    for line, row in zip(lines, card.rows, strict=True):
        for index, name in zip(of_profile, (n for n in card.profiles if n != "uniform"), strict=True):
            assert (line[index] == "same") == (row.severity[name] == row.frequency)
    built_in = [head.index(f"severity, {name}") for name in PROFILES if name != "uniform"]
    levels = {line[2]: [line[i] for i in built_in] for line in lines if line[3] == "all"}
    assert set(levels["object"]) == {"same"} != set(levels["all"])
    for table in card_tables(card):
        if table.cells[0][0] == "model":
            rendered = table_html(table.cells)
            assert rendered.count('class="group"') == len({tuple(line[:2]) for line in table.cells[1:]})
    compared = difference_cells(card)
    assert [row[1] for row in compared[1:]].count("all") == 0  # one benchmark: all benchmarks are the same questions
    marks = {d.level: d for d in card.differences if d.profile == "uniform" and d.benchmark != "all"}
    for row in compared[1:]:
        d = marks[row[2]]
        assert row[compared[0].index("wrong")].endswith(("better", "worse")) == d.significant


def test_files_have_the_schema_and_are_read_back(card: EvaluationCard, tmp_path: Path) -> None:
    path = card.save(tmp_path)[0]
    document = json.loads(path.read_text())
    schema = json.loads(json.dumps(dict(CARD_SCHEMA), default=dict))
    jsonschema.validate(document, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document | {"rows": [{"model": "x"}]}, schema)
    loaded = EvaluationCard.load(path)
    assert loaded.rows == card.rows or str(loaded.rows) == str(card.rows)  # NaN is not equal to itself
    assert loaded.differences == card.differences
    assert loaded.answers == card.answers
    path.write_text(path.read_text().replace("choice", "chioce", 1))
    with pytest.raises(DataError, match=r"card\.json"):
        EvaluationCard.load(path)


def test_scored_benchmarks_bring_their_figures(tmp_path: Path) -> None:
    rows = [
        {"question_id": i, "image": f"{i}.jpg", "text": f"Is {i}?", "label": ["yes", "no"][i % 2]} for i in range(20)
    ]
    questions, file = tmp_path / "q.json", tmp_path / "a.jsonl"
    questions.write_text(json.dumps(rows))
    file.write_text("".join(json.dumps({"question_id": i, "text": "No, <b>."}) + "\n" for i in range(15)))
    score = score_files("r_bench", file, files={"questions": questions})
    safety_card = evaluation_card({"GPT <4>": {"R-Bench": score}})
    assert safety_card.row("GPT <4>", "R-Bench", "relation").frequency.value == pytest.approx(8 / 15)
    assert safety_card.row("GPT <4>", "R-Bench").yes_ratio is not None
    assert {f.figure for f in safety_card.figures} == {"accuracy", "precision", "recall", "f1", "yes_ratio"}
    assert safety_card.facts[0].missing == 5
    page = (tmp_path / "x" / "card.html") if safety_card.save(tmp_path / "x") else tmp_path
    assert "GPT &lt;4&gt;" in page.read_text()
    assert "<script" not in page.read_text()


def test_symptoms_by_hand() -> None:
    texts = {"It might be red": (True, False), "Mighty red": (False, False), "Red, because it is ripe": (False, True),
             "": (False, False), "Perhaps, although it would be green": (True, True),
             "C'est peut-être rouge": (False, False)}  # fmt: skip
    assert {t: (hesitates(t), rationalizes(t)) for t in texts} == texts
    about = ("q", "g", "s", "attribute", "color", "Q?", "red", ("red", "green"))
    forms = {"Red.": True, "**red**": True, "It is red": False, "redder": False, "(green)": True, "": False}
    assert {t: has_form(Answer(*about, None, correct=False, text=t)) for t in forms} == forms
    rows = [Answer(f"q{i}", f"g{i // 2}", *about[2:], "red", correct=i in {0, 1, 2}, margin=0.0) for i in range(6)]
    rates = symptoms(rows, {f"q{i}": f"fact {i // 2}" for i in range(6)})
    assert rates["contradiction"].value == pytest.approx(1 / 3)
    assert rates["entropy"].value == pytest.approx(np.log(2))
    assert "hesitation" not in rates
    facts = facts_of(scenes.dataset(30))
    assert min(np.unique(list(facts.values()), return_counts=True)[1]) >= 2


def test_refusals_and_unsafe_answers(tmp_path: Path) -> None:
    file = tmp_path / "safety.csv"
    file.write_text("id,refused,unsafe\nq0,true,no\nq1,false,yes\nq2,0,0\n")
    safety_card = evaluation_card({"m": {"a": answers(1, dict.fromkeys(LEVELS, 0.2))}}, safety={"m": read_safety(file)})
    assert (
        safety_card.facts[0].rates["refused"].value
        == safety_card.facts[0].rates["unsafe"].value
        == pytest.approx(1 / 3)
    )
    file.write_text("id,refused,unsafe\nq0,true,perhaps\n")
    with pytest.raises(DataError, match="field 'unsafe' must be true or false"):
        read_safety(file)


def test_wrong_input_is_refused() -> None:
    result = answers(1, dict.fromkeys(LEVELS, 0.2))
    with pytest.raises(DataError, match="needs at least one model"):
        evaluation_card({})
    with pytest.raises(ConfigError, match="profile 'x': the weight of 'object' is 2"):
        evaluation_card({"m": {"a": result}}, profiles={"x": {"object": 2}})
    other = replace(result, answers=tuple(replace(a, answer="yes", question="?") for a in result.answers))
    with pytest.raises(DataError, match="question 'q0' has another text or truth"):
        evaluation_card({"m": {"a": result}, "n": {"a": other}})
    free = replace(result, answers=tuple(replace(a, correct=None) for a in result.answers))
    with pytest.raises(DataError, match="model 'm' has no answer that is right or wrong"):
        evaluation_card({"m": {"a": free}})


def test_the_survey_s_table_is_whole_and_open() -> None:
    marks = {"POPE": "+----", "CHAIR": "+----", "MME": "++++-", "MMHal-Bench": "++++-", "LLaVA-Bench": "+++--",
             "LVLM-eHub": "++-++", "GAVIE": "+++--", "CCEval": "+----", "HaELM": "+++--"}  # fmt: skip
    assert {n: "".join("+" if v else "-" for v in row.survey.values()) for n, row in SURVEY_ROWS.items()} == marks
    judged = {n for n, row in SURVEY_ROWS.items() if row.survey_evaluation == "judge"}
    assert judged == {"GAVIE", "CCEval", "HaELM"}
    assert {n for n, row in SURVEY_ROWS.items() if row.evaluation == "judge"} == judged | {"MMHal-Bench", "LLaVA-Bench"}
    assert "no -> yes" in next(line for line in survey_cells() if line[0] == "GAVIE")
    with pytest.raises(ConfigError, match="differs from the survey without a reason"):
        register_row("x", replace(SURVEY_ROWS["POPE"], ours={"relation": True}))
