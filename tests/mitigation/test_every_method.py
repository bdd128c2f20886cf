"""Every registered method runs on the embedded model wherever answers are made, and leaves the model as it was."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import groundscope as gs
from behavior.chair import score_captions
from groundscope.core.errors import ConfigError, ModelError
from mitigation import TrainingFree, training_free_methods
from tests.toys.random_models import hooks_of

DATA = gs.scenes.dataset(10)
QUESTIONS = gs.ConceptDataset(
    "questions",
    (
        *DATA.where(kind="existence", split="adversarial")[:2],
        *DATA.where(kind="what_color")[:1],
        *DATA.where(kind="caption")[:1],
    ),
)
ARGUMENTS: Mapping[str, Mapping[str, Any]] = {
    # The embedded model has no system prompt and knows about 70 words: published prompts are replaced by words that it knows.
    "icd": {"place": "after image", "instruction": "Please do not see the image."},
    "code": {"prompt": "Describe the image.", "max_new_tokens": 8},
    "vdgd": {"prompt": "Describe the image.", "template": "{description} {question}", "max_new_tokens": 8},
    "augment": {"texts": {e.id: "the image shows a dog ." for e in QUESTIONS}},
    "sumgd": {"summary_prompt": "Describe the image: {}", "summary_tokens": 8},
}
NAMES = [name for name in training_free_methods if not training_free_methods[name].needs]


def method_named(name: str) -> TrainingFree:
    return training_free_methods[name](**ARGUMENTS.get(name, {}))


@pytest.fixture(scope="module")
def plain() -> gs.BehaviorResult:
    return gs.answer(gs.load_lvlm("tiny"), QUESTIONS, max_new_tokens=6)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_runs_everywhere_and_is_absent_afterwards(name: str, plain: gs.BehaviorResult) -> None:
    lvlm, method = gs.load_lvlm("tiny"), method_named(name)
    hooks, weights = hooks_of(lvlm), lvlm.weights_hash
    batch = next(lvlm.batches(list(QUESTIONS), 4))
    before = lvlm.logits(batch.inputs)
    try:
        method.check(lvlm)
    except ModelError as error:
        assert lvlm.name in str(error)  # noqa: PT017  # the reason names the model
        return
    if name == "counterfactual_keywords":
        assert str(method.problem(lvlm, QUESTIONS[0])).startswith("not applicable: ")
    with method.applied(lvlm):
        margins = gs.answer(lvlm, QUESTIONS, max_new_tokens=6)
        written = gs.answer(lvlm, QUESTIONS, generate=True, max_new_tokens=6)
        options: dict[str, Any] = {
            "max_new_tokens": 4,
            "generate": True,
            "sampling": gs.Sampling(seed=1),
            "batch_size": 4,
        }
        sampled = None
        if method.regime == "beam":
            with pytest.raises(ConfigError, match="sampl"):
                gs.answer(lvlm, QUESTIONS, **options)
        else:
            sampled = gs.answer(lvlm, QUESTIONS, **options)
        text = lvlm.ask(QUESTIONS[0].image, QUESTIONS[0].question, max_new_tokens=6) if name != "augment" else None
        pope = gs.behavior.pope(lvlm, QUESTIONS)
    each = gs.behavior.answer_each(
        lvlm, QUESTIONS, {"plain": nullcontext, "method": lambda: method.applied(lvlm)}, max_new_tokens=6
    )
    assert each["plain"].answers == plain.answers
    for row, other in zip(each["method"].answers, margins.answers, strict=True):
        assert (row.given, row.text) == (other.given, other.text)
    for result in (margins, written, *([] if sampled is None else [sampled])):
        (record,) = [r for r in result.provenance["interventions"] if r["kind"] == "training-free method"]
        assert record["name"] == method.name
        assert all(row.text is not None for row in result.answers if not row.candidates)
    assert text is None or text == written.answers[0].text
    assert set(pope.splits) == {"adversarial"}
    captions = score_captions(written, QUESTIONS)
    assert len(captions.captions) == 1
    # Absent, bit for bit.
    assert torch.equal(lvlm.logits(batch.inputs), before)
    assert (lvlm.decoder, lvlm.row_layout, lvlm.interventions) == (None, None, ())
    assert (hooks_of(lvlm), lvlm.weights_hash) == (hooks, weights)


def test_controls_are_marked() -> None:
    controls = {name for name in training_free_methods if training_free_methods[name].control}
    expected = {"apc_only", "constant_bias", "gaussian_branch", "greedy", "greedy_cut", "other_image_branch"}
    assert expected <= controls
    assert not controls & {"vcd", "icd", "vdd", "augment"}
