"""Questions about one image share its prefix in `answer` and `answer_each`: counts of tokens, and answers of questions alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from behavior import BehaviorResult, answer, answer_each
from behavior.question_batches import sharing_conditions
from circuits import Add, Intervention, Zero, intervened
from concepts.image_source import NoImage
from concepts.schema import ConceptDataset
from lvlm import Lvlm, Site, load_lvlm
from lvlm.prefix_sharing import unshared_because
from mitigation import SteeringVector, training_free_methods
from mitigation.steering.changes import AddChange
from mitigation.strength import answer_under
from tests.toys.examples import example

QUESTIONS = ("Is there a dog?", "Is there a cat in the image? Is there a dog?", "Is there a car?")
CANDIDATES = ("yes", "no")


@pytest.fixture(scope="module")
def model() -> Lvlm:
    return load_lvlm("tiny", validate=False)


@pytest.fixture(scope="module")
def data() -> ConceptDataset:
    """Three questions about each of two images in alternation, one about another image, and one without an image."""
    pairs = [(example(number), text) for text in QUESTIONS for number in (0, 1)] + [(example(2), QUESTIONS[0])]
    rows = [
        replace(e, id=f"q{i}", question=text, answer="yes", candidates=CANDIDATES) for i, (e, text) in enumerate(pairs)
    ]
    rows.insert(3, replace(rows[0], id="text", image=NoImage(), objects=(), subject=None))
    return ConceptDataset("shared", tuple(rows))


@contextmanager
def tokens_of(lvlm: Lvlm, site: str) -> Iterator[list[int]]:
    counts: list[int] = []
    handle = lvlm.locate(site).watch(lambda x: counts.append(x.shape[0] * x.shape[1]))
    try:
        yield counts
    finally:
        handle.remove()


def answers_alone(lvlm: Lvlm, data: ConceptDataset, context: Any = nullcontext, **options: Any) -> list[Any]:
    """The answers to each question alone: no two share a prefix."""
    with context():
        return [answer(lvlm, data[i : i + 1], **options).answers[0] for i in range(len(data))]


def assert_equal(result: BehaviorResult, expected: list[Any]) -> None:
    assert [a.id for a in result.answers] == [a.id for a in expected]
    for got, want in zip(result.answers, expected, strict=True):
        assert (got.given, got.correct, got.text) == (want.given, want.correct, want.text)
        if want.margin is not None:
            assert got.margin == pytest.approx(want.margin, abs=1e-4)
            assert got.probabilities == pytest.approx(want.probabilities, abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"score": "text"}, {"generate": True, "max_new_tokens": 4}], ids=str)
@pytest.mark.parametrize("batch_size", [2, 32])
def test_answers_are_those_of_questions_alone(
    model: Lvlm, data: ConceptDataset, options: dict[str, Any], batch_size: int
) -> None:
    result = answer(model, data, batch_size=batch_size, **options)
    assert_equal(result, answers_alone(model, data, **options))
    assert result.provenance["prefixes"] == "shared"


def test_each_image_and_prefix_runs_once(model: Lvlm, data: ConceptDataset) -> None:
    assert unshared_because(model) == ""  # measured before tokens are counted
    encodings = [model.encode(e) for e in data]
    image = len(encodings[0].tokens.image)
    with tokens_of(model, "projector.out") as pictures, tokens_of(model, "decoder.L0.resid_post") as counts:
        cost = answer(model, data).cost
    assert sum(pictures) == 3 * image
    assert sum(counts) < 3 * image + sum(e.tokens.length - len(e.tokens.image) for e in encodings) + 60  # padding
    assert cost.forwards == 4  # prefixes, tails, the question without a partner, and the one without an image


def test_no_image_in_common_changes_nothing(model: Lvlm, data: ConceptDataset) -> None:
    alone = data[:2]
    result = answer(model, alone)
    assert "prefixes" not in result.provenance
    for row, given in zip(alone, result.answers, strict=True):
        logits = model.logits(model.encode(row).inputs)
        yes = logits.softmax(-1)[0, model.processor.tokenizer.convert_tokens_to_ids("yes")]
        assert given.probabilities[0] == pytest.approx(float(yes), abs=1e-6)


def double(output: Any) -> Any:
    return 2 * output


def steer(model: Lvlm, positions: str) -> Callable[[], Any]:
    return partial(
        intervened, model, [Intervention(Site.parse("decoder.L2.resid_post"), Add(torch.ones(model.width)), positions)]
    )


def test_conditions_share_prefixes_if_they_act_after_them(model: Lvlm, data: ConceptDataset) -> None:
    @contextmanager
    def hooked() -> Iterator[None]:
        handle = model.layers("decoder")[1].register_forward_hook(lambda _m, _a, output: double(output))
        try:
            yield
        finally:
            handle.remove()

    def scaled() -> Any:
        return intervened(model, [Intervention(Site.parse("decoder.L1.z"), Zero(), "last", head=2)])

    conditions = {
        "plain": nullcontext,
        "image": steer(model, "image:all"),
        "last": steer(model, "last+generated"),
        "head": scaled,
        "hook": hooked,
        "vcd": partial(training_free_methods["vcd"]().applied, model),
    }
    sharing = sharing_conditions(model, data.examples, conditions)
    assert sharing == ("plain", "last", "head")
    image = len(model.encode(data[0]).tokens.image)
    with tokens_of(model, "projector.out") as pictures:
        late = answer_each(model, data, {name: conditions[name] for name in sharing})
    assert sum(pictures) == 5 * image  # two images once for three conditions; the single question's once for each
    every = answer_each(model, data, conditions)
    for name, context in conditions.items():
        assert_equal(every[name], answers_alone(model, data, context))
        assert ("prefixes" in every[name].provenance) == (name in sharing)
        if name in sharing:
            assert_equal(late[name], list(every[name].answers))


def test_a_vector_that_is_applied_around_the_call_does_not_act_on_the_prefix(model: Lvlm, data: ConceptDataset) -> None:
    for options in ({}, {"generate": True, "max_new_tokens": 3}):
        with steer(model, "last+generated")():
            result = answer(model, data, **options)
        assert result.provenance["prefixes"] == "shared"
        assert_equal(result, answers_alone(model, data, steer(model, "last+generated"), **options))


def test_answers_under_several_vectors_are_those_of_questions_alone(model: Lvlm, data: ConceptDataset) -> None:
    direction = torch.nn.functional.normalize(torch.ones(model.width), dim=0).numpy()
    vectors = {
        name: SteeringVector({2: AddChange(direction, 3.0)}, positions, 2.0, model.name, model.config_hash)
        for name, positions in (("last", "last+generated"), ("all", "all"), ("image", "image:all"))
    }
    results = answer_under(model, data, {"plain": None, **vectors}, progress=False)
    assert_equal(results["plain"], answers_alone(model, data))
    for name, vector in vectors.items():
        assert_equal(results[name], answers_alone(model, data, partial(vector.applied, model)))
        assert ("prefixes" in results[name].provenance) == (name != "image")
