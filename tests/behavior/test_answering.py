"""Answers of a model: batches against one by one, margins against raw logits, what is kept and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from behavior import BehaviorResult, answer, pope
from behavior.result import Answer, Cost
from concepts.scenes import questions
from concepts.scenes.scene import TEST, generator, sample_scene
from concepts.schema import ConceptDataset, Example
from groundscope.core.document_digest import document_digest
from groundscope.core.errors import ConfigError, DataError, ModelError
from lvlm import Lvlm, wrap_lvlm
from lvlm.tiny.architecture import build_model, build_processor


@pytest.fixture(scope="module")
def model() -> Lvlm:
    return wrap_lvlm(build_model(), build_processor(), name="random", validate=False)


@pytest.fixture(scope="module")
def data() -> ConceptDataset:
    examples: list[Example] = []
    for index in range(6):
        scene = sample_scene(generator(TEST, 0, index), f"s{index}", count=3)
        thing = scene.objects[0]
        scene_questions = [
            questions.existence(scene, thing.noun),
            questions.existence(scene, next(n for n in ("apple", "bus", "key", "bell") if scene.get(n) is None)),
            questions.what_color(scene, thing),
            questions.caption(scene),
            questions.color(scene, thing, "red"),
        ]
        examples += [
            questions.as_example(scene, q, "conflict" if q.kind == "color" else "neutral") for q in scene_questions
        ]
    return ConceptDataset("mixed", tuple(examples))


@pytest.fixture(scope="module")
def result(model: Lvlm, data: ConceptDataset) -> BehaviorResult:
    return answer(model, data, batch_size=4, max_new_tokens=5)


def test_order_and_fields_are_those_of_the_data(result: BehaviorResult, data: ConceptDataset) -> None:
    assert [a.id for a in result.answers] == [e.id for e in data]
    for reply, example in zip(result.answers, data, strict=True):
        for name in ("group", "split", "level", "kind", "question", "answer", "candidates", "prior_answer"):
            assert getattr(reply, name) == getattr(example, name)


def test_batches_give_the_answers_of_single_examples(model: Lvlm, data: ConceptDataset, result: BehaviorResult) -> None:
    single = answer(model, data, batch_size=1, max_new_tokens=5)
    for alone, batched in zip(single.answers, result.answers, strict=True):
        assert (alone.given, alone.correct, alone.text) == (batched.given, batched.correct, batched.text)
        if alone.margin is not None:
            assert batched.margin == pytest.approx(alone.margin, abs=1e-4)
            assert batched.probabilities == pytest.approx(alone.probabilities, abs=1e-6)


def test_margin_and_probabilities_follow_from_the_logits(
    model: Lvlm, data: ConceptDataset, result: BehaviorResult
) -> None:
    """The tokenizer knows each of these answers as one lower-case word."""
    for reply, example in zip(result.answers, data, strict=True):
        if not example.candidates:
            continue
        logits = model.logits(model.encode(example).inputs)[0].double().numpy()
        scores = {c: logits[model.processor.tokenizer.convert_tokens_to_ids(c)] for c in example.candidates}
        best = max(scores, key=scores.__getitem__)
        margin = scores[example.answer] - max(v for c, v in scores.items() if c != example.answer)
        shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        assert reply.given == best
        assert reply.correct == (best == example.answer)
        assert reply.margin == pytest.approx(margin, abs=1e-4)
        expected = [shares[model.processor.tokenizer.convert_tokens_to_ids(c)] for c in example.candidates]
        assert reply.probabilities == pytest.approx(expected, abs=1e-6)


def test_captions_are_written_and_not_judged(result: BehaviorResult) -> None:
    captions = result.where(kind="caption").answers
    assert len(captions) == 6
    for caption in captions:
        assert isinstance(caption.text, str)
        assert (caption.given, caption.correct, caption.margin, caption.probabilities) == (None, None, None, ())


def test_written_answers_are_read_by_the_named_parser(
    model: Lvlm, data: ConceptDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {"existence": "No, there is not.", "what_color": "It is green.", "caption": "a car", "color": "Perhaps"}
    monkeypatch.setattr(
        model, "generate_batch", lambda batch, _, **__: [texts[e.example.kind] for e in batch.encodings]
    )
    plain = answer(model, data, generate=True)
    release = answer(model, data, generate=True, parser="pope_release")
    strict = answer(model, data, generate=True, parser="strict")
    assert {a.given for a in release.answers if a.kind == "existence"} == {"no"}
    assert {a.given for a in release.answers if a.kind == "color"} == {"yes"}
    assert {a.given for a in release.answers if a.kind == "what_color"} == {"green"}
    assert {a.given for a in strict.answers if a.kind in {"existence", "color"}} == {None}
    assert strict.unparsed == 18
    assert not any(a.correct for a in strict.answers if a.kind == "existence")
    assert (plain.provenance["parser"], release.provenance["parser"]) == ("yes_no", "pope_release")
    # "Perhaps" is no answer, and yes by the rule of POPE's release only.
    assert {a.given for a in plain.answers if a.kind == "existence"} == {"no"}
    assert {a.given for a in plain.answers if a.kind == "color"} == {None}


def test_cost_counts_forwards(model: Lvlm, data: ConceptDataset) -> None:
    choices = data.filter(lambda e: bool(e.candidates))
    cost = answer(model, choices, batch_size=4).cost
    assert (cost.forwards, cost.answers) == (6 * 2, 24)  # for each of six images: the prefix, and what follows it
    assert cost.seconds is not None
    assert cost.forwards is not None
    assert cost.seconds_per_answer == cost.seconds / 24 > 0
    assert cost.forwards_per_answer == cost.forwards / 24
    written = answer(model, data.where(kind="caption")[:1], max_new_tokens=3).cost
    assert written.forwards in {1, 2, 3}
    assert not model.hf._forward_pre_hooks


def test_provenance_names_model_and_data(model: Lvlm, data: ConceptDataset, result: BehaviorResult) -> None:
    expected = {"model": "random", "config_hash": model.config_hash, "data_digest": data.digest}
    assert expected.items() <= dict(result.provenance).items()
    assert result.provenance["weights_hash"] == model.weights_hash


def test_hooks_on_the_model_act(model: Lvlm, data: ConceptDataset, result: BehaviorResult) -> None:
    push = torch.ones(model.width) * 3
    hook = model.locate("decoder.L3.resid_post").edit(lambda x: x + push)
    changed = answer(model, data.where(kind="existence"))
    hook.remove()
    before = result.where(kind="existence")
    assert [a.margin for a in changed.answers] != pytest.approx([a.margin for a in before.answers], abs=1e-3)


def test_a_tie_is_wrong(model: Lvlm, data: ConceptDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "answer_logits", lambda batch: torch.zeros(len(batch.encodings), 200))
    for row in answer(model, data.where(kind="existence")).answers:
        assert (row.margin, row.correct) == (0.0, False)
        assert row.given != row.answer


def test_invalid_data_is_refused_before_the_first_forward(
    model: Lvlm, data: ConceptDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        pytest.fail("a forward was run")

    first = data[0]
    cases = [
        (ConceptDataset("none", ()), DataError, "'none' has no examples"),
        (
            ConceptDataset("odd", (first, replace(first, id="b", answer="perhaps"))),
            DataError,
            "example 'b': the true answer 'perhaps'",
        ),
        (
            ConceptDataset("odd", (replace(first, answer="yes", candidates=("yes",)),)),
            DataError,
            "two or more different",
        ),
        (
            ConceptDataset("odd", (replace(first, answer="zebra", candidates=("zebra", "no")),)),
            DataError,
            "is unknown to the tokenizer",
        ),
    ]
    monkeypatch.setattr(model, "logits", never)
    for dataset, error, words in cases:
        with pytest.raises(error, match=words):
            answer(model, dataset)
    with pytest.raises(ConfigError, match="unknown parser 'best'; choose from pope_release, mme, strict"):
        answer(model, data, parser="best")
    with pytest.raises(ConfigError, match="batch_size=0"):
        answer(model, data, batch_size=0)


def test_logits_that_are_not_finite_are_refused(
    model: Lvlm, data: ConceptDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "answer_logits", lambda batch: torch.full((len(batch.encodings), 200), torch.nan))
    with pytest.raises(ModelError, match="not finite"):
        answer(model, data.where(kind="existence"))


# ---- rates -------------------------------------------------------------------------------------------------------------


def make_answer(number: int, true: str, prediction: str | None, split: str = "random", **more: object) -> Answer:
    values = {"level": "object", "kind": "existence", "question": "?", "candidates": ("yes", "no"), **more}
    return Answer(
        f"q{number}",
        f"g{number // 2}",
        split=split,
        answer=true,
        given=prediction,
        correct=prediction == true,
        **values,
    )  # pyright: ignore[reportArgumentType]


@pytest.fixture
def small_result() -> BehaviorResult:
    rows = [
        make_answer(0, "yes", "yes"),
        make_answer(1, "no", "yes"),
        make_answer(2, "no", "no"),
        make_answer(3, "no", None),
        make_answer(4, "yes", "no", "conflict", level="attribute", kind="color", prior_answer="no"),
        make_answer(5, "no", "no", "conflict", level="attribute", kind="color", prior_answer="yes"),
        make_answer(
            6, "red", "green", "conflict", kind="what_color", candidates=("red", "green"), prior_answer="green"
        ),
        make_answer(7, "red", "green", "typical", kind="what_color", candidates=("red", "green"), prior_answer="green"),
    ]
    caption = replace(rows[0], id="c", kind="caption", candidates=(), given=None, correct=None, text="a car")
    return BehaviorResult((*rows, caption), Cost(2.0, 3, 9), {"model": "m"})


def test_rates_by_hand(small_result: BehaviorResult) -> None:
    table = small_result.accuracy(by="split").set_index("split")
    assert dict(table["n"]) == {"random": 4, "conflict": 3, "typical": 1}
    assert dict(table["accuracy"]) == pytest.approx({"random": 2 / 4, "conflict": 1 / 3, "typical": 0})
    assert (table["low"] < table["high"]).all()
    assert small_result.rate("accuracy").value == pytest.approx(3 / 8)
    # Predictions: yes, yes, no, unparsed, no, no. The labels' ratio would be 2/6, that of random 1/4.
    assert small_result.rate("yes_ratio").value == pytest.approx(2 / 6)
    assert small_result.yes_ratio(by="split")["yes_ratio"].tolist() == pytest.approx([2 / 4, 0])
    assert small_result.rate("false_positive_rate").value == pytest.approx(1 / 4)
    assert small_result.rate("false_positive_rate").n == 4
    assert small_result.rate("wrong_by_prior").value == pytest.approx(2 / 3)
    assert small_result.wrong_by_prior(by=["level", "kind"])["wrong_by_prior"].tolist() == pytest.approx([1 / 2, 1])
    assert small_result.unparsed == 1
    assert small_result.accuracy().to_dict("records")[0]["n"] == 8
    assert list(small_result.where(kind="caption").accuracy("split").columns) == [
        "split",
        "n",
        "accuracy",
        "low",
        "high",
    ]
    assert len(small_result.where(kind="caption").accuracy("split")) == 0


def test_unknown_names_are_refused(small_result: BehaviorResult) -> None:
    with pytest.raises(ConfigError, match="unknown rate 'f1'; choose from accuracy"):
        small_result.rate("f1")
    with pytest.raises(ConfigError, match="cannot be split by 'color'"):
        small_result.accuracy(by="color")
    with pytest.raises(ConfigError, match="unknown field 'color'"):
        small_result.where(color="red")
    with pytest.raises(DataError, match="same id"):
        BehaviorResult(small_result.answers[:1] * 2, small_result.cost)


def test_results_are_frozen_and_tabular(small_result: BehaviorResult) -> None:
    frame = small_result.frame()
    assert frame["id"].tolist() == [a.id for a in small_result.answers]
    with pytest.raises(AttributeError):
        small_result.cost = Cost(0, 0, 0)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError):
        small_result.provenance["model"] = "x"  # pyright: ignore[reportIndexIssue]


# ---- files -------------------------------------------------------------------------------------------------------------


def test_saved_answers_are_the_same_when_loaded(
    tmp_path: Path, small_result: BehaviorResult, result: BehaviorResult
) -> None:
    markup = replace(
        small_result.answers[0], id='<b>"\n', text="", prior_answer="ünï", margin=1 / 3, probabilities=(0.1, 2e-9)
    )
    for number, answers in enumerate((small_result, result, BehaviorResult((markup,), small_result.cost))):
        path = tmp_path / "new" / f"{number}.json"
        answers.save(path)
        assert BehaviorResult.load(path) == answers
        assert json.loads(path.read_text())["format"] == "groundscope.behavior"


def test_damaged_answers_are_refused(tmp_path: Path, small_result: BehaviorResult) -> None:
    path = tmp_path / "answers.json"
    small_result.save(path)
    whole = path.read_text()
    document = json.loads(whole)
    cases = {
        "invalid JSON": whole[:-30],
        "is not a behavior result file": json.dumps([1]),
        "is a behavior result of version 3": {**document, "version": 3},
        "are damaged: 'cost'": {k: v for k, v in document.items() if k != "cost"},
        "are damaged: .*color": {**document, "answers": [{**document["answers"][0], "color": 1}]},
        "does not match its digest": json.dumps({**document, "cost": {**document["cost"], "forwards": 12345}}),
    }
    for words, content in cases.items():
        if isinstance(content, dict):
            content = json.dumps({**content, "digest": document_digest(content)})
        path.write_text(content)
        with pytest.raises(DataError, match=words):
            BehaviorResult.load(path)
    with pytest.raises(DataError, match=r"no behavior result at .*none\.json"):
        BehaviorResult.load(tmp_path / "none.json")


# ---- POPE on a model ---------------------------------------------------------------------------------------------------


def test_pope_asks_the_existence_questions(model: Lvlm, data: ConceptDataset, result: BehaviorResult) -> None:
    scored = pope(model, data)
    expected = [a.given for a in result.answers if a.kind == "existence"]
    assert [a.given for a in scored.answers.answers] == expected
    assert list(scored.splits) == ["neutral"]
    scores = scored.splits["neutral"]
    assert scores.n == 12
    assert scores.yes_ratio.value == pytest.approx(expected.count("yes") / 12)
    frame = scored.frame()
    assert frame["accuracy"].tolist() == [scores.accuracy.value]
    assert {"split", "n", "unparsed", "f1", "f1_low", "f1_high", "yes_ratio"} <= set(frame.columns)
    with pytest.raises(DataError, match="no yes-no questions of kind 'existence'"):
        pope(model, data.where(kind="caption"))


def test_answers_continue_after_a_prefix(model: Lvlm, data: ConceptDataset) -> None:
    captions = data.where(kind="caption")[:2]
    tokenizer = model.processor.tokenizer
    whole = answer(model, captions, max_new_tokens=6)
    assert whole.texts == {a.id: a.text for a in whole.answers}
    for caption in captions:
        text = whole.texts[caption.id]
        words = text.split()
        if len(tokenizer(text, add_special_tokens=False)["input_ids"]) != len(words):
            continue  # a random model may write marks without spaces
        prefixed = replace(caption, prefix=" ".join(words[:3]))
        continuation = answer(model, ConceptDataset("p", (prefixed,)), max_new_tokens=6 - 3)
        assert continuation.texts[caption.id].split() == words[3:]
        choice = replace(prefixed, candidates=("red", "green"), answer="red")
        margin = answer(model, ConceptDataset("p", (choice,))).answers[0].margin
        logits = model.logits(model.encode(prefixed).inputs)[0]
        red, green = tokenizer.convert_tokens_to_ids(["red", "green"])
        assert margin == pytest.approx(float(logits[red] - logits[green]), abs=1e-4)
        break
    else:
        pytest.fail("no caption could be cut at a word")
    with pytest.raises(DataError, match="prefix is white space"):
        answer(model, ConceptDataset("p", (replace(captions[0], prefix=" "),)))
