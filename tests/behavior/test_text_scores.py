"""Scores of whole candidate texts: against one forward pass in float64 for each candidate of each question."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from behavior import answer
from behavior.answering import answer_each
from concepts import ConceptDataset, Example
from groundscope.core.errors import ConfigError, DataError
from lvlm import Lvlm
from mitigation import SteeringVector
from mitigation.steering.changes import AddChange
from tests.toys.examples import example
from tests.toys.families import model

CANDIDATES = ("a red cat", "a red dog", "a big cat")


def questions() -> ConceptDataset:
    """Candidates that share their first token, of different lengths, and after prefixes."""
    first = replace(example(0), id="a", candidates=CANDIDATES, answer="a red dog")
    return ConceptDataset("texts", (
        first,
        replace(first, id="b", image=example(1).image, answer="a big cat"),
        replace(first, id="c", prefix="the cat is", candidates=("red", "a big dog"), answer="a big dog"),
        replace(first, id="d", candidates=("a cat", "a big red dog", "no"), answer="no"),
    ))  # fmt: skip


def log_probabilities(lvlm: Lvlm, hf: torch.nn.Module, question: Example, text: str) -> list[float]:
    """The log-probability of each token of a text after the prompt, from a forward pass over prompt and text."""
    plain = lvlm.encode(question)
    whole = lvlm.encode(replace(question, prefix=f"{question.prefix} {text}".strip()))
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in whole.inputs.items()}
    with torch.no_grad():
        log_p = hf(**inputs).logits[0].log_softmax(-1)
    ids = whole.inputs["decoder_input_ids" if lvlm.encoder_decoder else "input_ids"][0]
    return [float(log_p[at - 1, ids[at]]) for at in range(plain.tokens.length, whole.tokens.length)]


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "instructblip_t5"])
def test_scores_are_those_of_whole_forwards_in_float64(family: str) -> None:
    lvlm, data = model(family), questions()
    hf = copy.deepcopy(lvlm.hf).double()
    results = {
        (score, size): answer(lvlm, data, score=score, batch_size=size)
        for score, size in (("text", 4), ("text_per_token", 4), ("text", 1))
    }
    for i, question in enumerate(data):
        parts = [log_probabilities(lvlm, hf, question, text) for text in question.candidates]
        assert [len(p) for p in parts] == [len(text.split()) for text in question.candidates]
        right = question.candidates.index(question.answer)
        for (score, _), result in results.items():
            values = [sum(p) / (len(p) if score == "text_per_token" else 1) for p in parts]
            others = [v for k, v in enumerate(values) if k != right]
            row = result.answers[i]
            assert row.margin == pytest.approx(values[right] - max(others), abs=1e-4)
            assert row.given == question.candidates[int(np.argmax(values))]
            assert row.correct is (row.given == question.answer)
            np.testing.assert_allclose(np.log(row.probabilities), [sum(p) for p in parts], atol=1e-4)
    assert results["text", 4].provenance["score"] == "text"
    margins = [[row.margin for row in result.answers] for result in results.values()]
    assert not np.allclose(margins[0], margins[1], atol=1e-3)


def test_the_default_refuses_shared_first_tokens_and_names_the_way_out() -> None:
    lvlm, data = model("llava"), questions()
    with pytest.raises(DataError, match=r"begin with the same token.*score='text_per_token'"):
        answer(lvlm, data)
    single = ConceptDataset("d", (replace(data[2], candidates=("red", "green"), answer="red"),))
    by_token, by_text = (answer(lvlm, single, score=score).answers[0] for score in ("first_token", "text"))
    assert by_token.probabilities[0] == pytest.approx(by_text.probabilities[0], rel=1e-4)
    assert "score" not in answer(lvlm, single).provenance


def test_a_vector_acts_on_the_tokens_of_the_texts() -> None:
    lvlm, data = model("llava"), questions()
    direction = torch.randn(lvlm.width, generator=torch.Generator().manual_seed(0)).numpy()
    direction /= np.linalg.norm(direction)
    vector = SteeringVector({1: AddChange(direction)}, "last+generated", 1.0, lvlm.name, lvlm.config_hash)
    results = answer_each(lvlm, data, {"with": lambda: vector.applied(lvlm)}, score="text")["with"]
    start = {e.id: lvlm.encode(e).tokens.last for e in data}
    for question, row in zip(data, results.answers, strict=True):

        def change(_m: object, _a: object, out: torch.Tensor, at: int = start[question.id]) -> torch.Tensor:
            out = out.clone()
            out[:, at:] += torch.from_numpy(direction)
            return out

        hook = lvlm.layers("decoder")[1].register_forward_hook(change)
        whole = [replace(question, prefix=f"{question.prefix} {text}".strip()) for text in question.candidates]
        sums = []
        for completed in whole:
            encoding = lvlm.encode(completed)
            with torch.no_grad():
                log_p = lvlm.hf(**encoding.inputs).logits[0].log_softmax(-1)
            ids = encoding.inputs["input_ids"][0]
            sums.append(sum(float(log_p[p - 1, ids[p]]) for p in range(start[question.id] + 1, encoding.tokens.length)))
        hook.remove()
        np.testing.assert_allclose(np.log(row.probabilities), sums, atol=1e-4)


@pytest.mark.parametrize(
    ("score", "candidates", "message"),
    [
        ("text", ("a", "a big cat"), "the candidate 'a' begins 'a big cat', so its score cannot be lower"),
        ("text", ("a cat", "a zyzzyva"), "cannot encode the candidate 'a zyzzyva'"),
        ("text_per_token", ("a  cat", "a cat"), "have the same tokens; remove one"),
    ],
)
def test_candidates_that_texts_cannot_distinguish_are_refused(
    score: str, candidates: tuple[str, ...], message: str
) -> None:
    question = replace(example(0), candidates=candidates, answer=candidates[0])
    with pytest.raises(DataError, match=message):
        answer(model("llava"), ConceptDataset("d", (question,)), score=score)
    with pytest.raises(ConfigError, match="unknown score 'texts'; choose from first_token, text, text_per_token"):
        answer(model("llava"), ConceptDataset("d", (question,)), score="texts")


def test_a_prefix_of_another_candidate_is_compared_per_token() -> None:
    question = replace(example(0), candidates=("a", "a big cat"), answer="a")
    row = answer(model("llava"), ConceptDataset("d", (question,)), score="text_per_token").answers[0]
    assert row.probabilities[0] > row.probabilities[1]
