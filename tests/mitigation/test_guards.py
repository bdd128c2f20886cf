"""Guards against hand-made answers, and the choice that they restrict."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from behavior import Answer, BehaviorResult, Cost
from concepts.annotated_object import AnnotatedObject
from concepts.schema import ConceptDataset, Example
from groundscope.core.errors import ConfigError
from mitigation import AddChange, Guard, SteeringVector, guards
from mitigation.free_text_prompts import FreeTextPrompts, caption_prompts
from mitigation.guard import guard_limits
from mitigation.guard_loss import excess, loss_errors, losses, measure_guards, not_measured
from mitigation.model_outputs import ModelOutputs
from mitigation.strength import LOSS, choose_guarded, sweep_strengths
from tests.toys.random_models import examples, shared_model

YES_NO = ("yes", "no")


def make_answer(number: int, truth: str, choice: str, *, split: str = "random", kind: str = "existence") -> Answer:
    about = (f"q{number}", f"image {number % 4}", split, "object", kind, "?", truth, YES_NO)
    return Answer(*about, given=choice, correct=truth == choice)


def described(name: str, text: str, objects: tuple[str, ...] = ()) -> tuple[Example, Answer]:
    scene_objects = tuple(AnnotatedObject(str(i), noun, None) for i, noun in enumerate(objects))
    example = replace(
        examples()[0], id=name, group=name, kind="caption", candidates=(), answer="", objects=scene_objects
    )
    about = (name, name, "caption", "object", "caption", "Describe.", "", ())
    return example, Answer(*about, given=None, correct=None, text=text)


def outputs(answers: list[Answer], captions: list[tuple[Example, Answer]] | None = None, **more: Any) -> ModelOutputs:
    captions = captions or []
    data = ConceptDataset("by hand", tuple(example for example, _ in captions))
    return ModelOutputs(
        data, BehaviorResult((*answers, *(a for _, a in captions)), Cost(None, None, len(answers))), **more
    )


PRESENT = [make_answer(i, "yes", "yes") for i in range(10)]
ABSENT = [make_answer(10 + i, "no", "yes" if i < 4 else "no", split="adversarial") for i in range(10)]
COLORS = [make_answer(20 + i, "yes", "yes", split="neutral", kind="color") for i in range(5)]
BEFORE = outputs(PRESENT + ABSENT + COLORS)


def test_losses_are_the_counts_by_hand() -> None:
    denied = [replace(a, given="no", correct=False) for a in PRESENT[:3]] + PRESENT[3:]
    honest = [replace(a, given="no", correct=True) for a in ABSENT]
    wrong_color = [replace(COLORS[0], given="no", correct=False), *COLORS[1:]]
    lost = losses(BEFORE, outputs(denied + honest + wrong_color))
    assert lost["recall"] == pytest.approx(3 / 10)
    assert lost["neutral"] == lost["other_questions"] == pytest.approx(1 / 5)
    # Before: 4 yes too many of 25; after: 3 + 1 too few. Both are 4 away, so the share of yes did not get worse.
    assert lost["yes_ratio"] == pytest.approx(0)
    everything_no = [replace(a, given="no", correct=a.answer == "no") for a in BEFORE.answers.answers]
    assert losses(BEFORE, outputs(everything_no))["yes_ratio"] == pytest.approx(15 / 25 - 4 / 25)
    assert set(lost) == {"recall", "neutral", "other_questions", "yes_ratio"}
    assert set(not_measured(BEFORE)) == {"typical", "chair", "caption_recall", "caption_length", "plain_text"}
    assert "it needs questions of split 'typical'" in not_measured(BEFORE)["typical"]


def test_captions_and_plain_text_by_hand() -> None:
    before = outputs(
        [],
        [described("a", "an apple and a car", ("apple", "car")), described("b", "a dog", ("dog", "cat"))],
        plain_text=(np.array([1, 2, 3, 4]), np.array([5, 6])),
    )
    after = outputs(
        [],
        [described("a", "an apple and a bird", ("apple", "car")), described("b", "a dog , a cat", ("dog", "cat"))],
        plain_text=(np.array([1, 2, 9, 9]), np.array([5, 6])),
    )
    lost = losses(before, after)
    assert lost["chair"] == pytest.approx(1 / 4 - 0 / 3)  # the bird, of four named
    assert lost["caption_recall"] == pytest.approx(3 / 4 - 3 / 4)  # the car is lost, the cat won
    assert lost["caption_length"] == pytest.approx(abs(5 - 3.5 - 0) / 3.5 - 0) or lost[
        "caption_length"
    ] == pytest.approx(abs((5 + 5) / 2 - (5 + 2) / 2) / ((5 + 2) / 2))
    assert lost["plain_text"] == pytest.approx(2 / 6)
    measured = measure_guards(before, after)
    assert {n: r.loss.value for n, r in measured.items()} == pytest.approx(lost)
    assert (measured["chair"].before.value, measured["chair"].after.value) == (0.0, 0.25)
    assert measured["plain_text"].loss.low <= 2 / 6 <= measured["plain_text"].loss.high
    # Without annotated objects only the length is measured.
    bare = outputs([], [described("a", "an apple")])
    assert set(losses(bare, bare)) == {"caption_length"}


def test_errors_of_losses_are_those_of_the_plain_formula_and_of_resampled_images() -> None:
    rng = np.random.default_rng(0)
    nouns = ("apple", "car", "dog", "cat", "bird")

    def caption(present: tuple[str, ...], share: float) -> str:
        named = [noun for noun in nouns if rng.random() < (share if noun in present else 0.2)]
        return " , ".join(["a picture", *(f"a {noun}" for noun in named)])

    present = [tuple(rng.permutation(nouns)[: rng.integers(2, 5)]) for _ in range(120)]
    before = outputs([], [described(str(i), caption(s, 0.9), s) for i, s in enumerate(present)])
    after = outputs([], [described(str(i), caption(s, 0.8), s) for i, s in enumerate(present)])
    errors = loss_errors(before, after)
    # Words: a mean over images, so the error is that of a mean of paired differences.
    words = np.array([[len((a.text or "").split()) for a in o.answers.answers] for o in (before, after)], float)
    difference = words[1] - words[0]
    assert errors["caption_length"] == pytest.approx(difference.std(ddof=1) / np.sqrt(120) / words[0].mean())
    for name in ("chair", "caption_recall"):
        tables = [rows[0] for o in (before, after) if (rows := guards[name].rows(o, before)) is not None]
        pairs = []
        for _ in range(2000):
            at = rng.integers(0, 120, 120)
            (a, b), (c, d) = (table[at].sum(0) for table in tables)
            pairs.append(c / d - a / b)
        assert errors[name] == pytest.approx(np.std(pairs), rel=0.1)
    assert loss_errors(before, before) == dict.fromkeys(errors, 0.0)


def test_limits_are_defaults_max_drop_and_overrides() -> None:
    limits = guard_limits({"chair": 0.05, "yes_ratio": None}, max_drop=0.02)
    assert (limits["recall"], limits["neutral"], limits["chair"], limits["yes_ratio"]) == (0.02, 0.02, 0.05, None)
    assert limits["caption_recall"] == guards["caption_recall"].limit
    assert excess({"recall": 0.01, "yes_ratio": 9.0}, limits) == pytest.approx(0.5)
    assert excess({"recall": 0.0}, {"recall": 0.0}) == 0
    assert excess({"recall": 0.001}, {"recall": 0.0}) == np.inf
    assert excess({"chair": float("nan")}, limits) == np.inf  # nothing is named any more
    with pytest.raises(ConfigError, match=r"unknown guard 'recal'; choose from .*did you mean recall\?"):
        guard_limits({"recal": 0.1})
    with pytest.raises(ConfigError, match="guard 'chair': the limit -1 must be at least 0, or null for no limit"):
        guard_limits({"chair": -1.0})


def test_a_new_guard_is_measured_and_limited() -> None:
    guard = Guard(
        "answers", lambda o, _: (np.ones((len(o.answers), 2)), list(range(len(o.answers)))), "lower", 0.5, "answers"
    )
    guards.register("answers", guard)
    try:
        assert losses(BEFORE, BEFORE, ["answers"]) == {"answers": 0.0}
        assert guard_limits({})["answers"] == 0.5
    finally:
        guards.unregister("answers")
    with pytest.raises(ConfigError, match=r"must be a mitigation\.Guard"):
        guards.register("answers", object())  # pyright: ignore[reportArgumentType]


def test_the_choice_takes_the_least_harm_at_which_every_guard_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shared_model()
    vector = SteeringVector({2: AddChange(np.eye(192)[0])}, "all", 1.0, model.name, model.config_hash)

    def row(strength: float, harm: float, excess: float = 0.0) -> dict[str, float]:
        return {"strength": strength, "harm": harm, "cost": 0.0, "excess": excess}

    rows = [row(0.0, 0.5), row(1.0, 0.3), row(2.0, 0.2), row(3.0, 0.1), row(4.0, 0.0, 1.5)]
    texts = {0.0: "an apple", 1.0: "an apple", 2.0: "an apple and a bird", 3.0: ""}
    tried = []

    def outputs_of(_probe: FreeTextPrompts, _model: Any, steered: SteeringVector | None, **_: Any) -> ModelOutputs:
        strength = 0.0 if steered is None else steered.strength
        tried.append(strength)
        return outputs([], [described("a", texts[strength], ("apple",))])

    monkeypatch.setattr(FreeTextPrompts, "outputs", outputs_of)
    prompts = FreeTextPrompts(ConceptDataset("none", ()), None)
    name, chosen = choose_guarded(model, {"one": (vector, rows)}, prompts)
    assert (name, chosen["strength"]) == ("one", 1.0)
    assert tried == [0.0, 3.0, 2.0, 1.0]  # 4 is beyond a guard on questions, so its captions are not written
    assert (rows[2][f"{LOSS}chair"], rows[3][f"{LOSS}caption_recall"]) == (0.5, 1.0)
    assert rows[2]["excess"] == 50
    with pytest.raises(ConfigError, match="add strength 0"):
        choose_guarded(model, {"one": (vector, [row(1.0, 0.3, 2.0)])}, prompts)


@pytest.mark.parametrize(("caution", "strength"), [(0.0, 1.0), (1.0, 0.0)])
def test_a_cautious_choice_adds_the_error_of_the_loss(
    monkeypatch: pytest.MonkeyPatch, caution: float, strength: float
) -> None:
    model = shared_model()
    vector = SteeringVector({2: AddChange(np.eye(192)[0])}, "all", 1.0, model.name, model.config_hash)
    rows = [{"strength": s, "harm": 1 - s, "cost": 0.0, "excess": 0.0} for s in (0.0, 1.0)]

    def outputs_of(_probe: FreeTextPrompts, _model: Any, steered: SteeringVector | None, **_: Any) -> ModelOutputs:
        lost = {"7"} if steered is not None else set()  # one of 60: 1.7 points, with an error of 1.7
        return outputs(
            [], [described(str(i), "a dog" if str(i) in lost else "an apple", ("apple",)) for i in range(60)]
        )

    monkeypatch.setattr(FreeTextPrompts, "outputs", outputs_of)
    prompts = FreeTextPrompts(ConceptDataset("none", ()), None)
    limits = guard_limits({"chair": None})
    _, chosen = choose_guarded(model, {"one": (vector, rows)}, prompts, limits=limits, caution=caution)
    assert chosen["strength"] == strength
    assert rows[1][f"{LOSS}caption_recall"] == pytest.approx(1 / 60)


def test_a_sweep_has_the_losses_of_the_guards_on_questions() -> None:
    model = shared_model()
    vector = SteeringVector({2: AddChange(np.eye(192)[0], sigma=50.0)}, "all", 1.0, model.name, model.config_hash)
    data = ConceptDataset("few", examples())
    start, pushed = sweep_strengths(model, data, {"v": (vector, [1.0])}, progress=False)["v"]
    assert start["excess"] == 0
    assert all(start[name] == 0 for name in start if name.startswith(LOSS))
    assert {n for n in pushed if n.startswith(LOSS)} == {n for n in start if n.startswith(LOSS)} != set()


def test_prompts_for_captions_are_the_datas_own_and_then_others() -> None:
    own = replace(examples()[0], id="own", kind="caption", candidates=(), answer="", question="What is there?")
    data = ConceptDataset("mixed", (own, *examples()))
    prompts = caption_prompts(data, 4)
    assert prompts[0] == own
    assert {e.question for e in prompts} == {"What is there?"}
    assert len({e.group for e in prompts}) == len(prompts) == 4
    bare = caption_prompts(ConceptDataset("bare", examples()), 3)
    assert [e.objects for e in bare] == [()] * 3  # objects that happen to be annotated are not all of them
