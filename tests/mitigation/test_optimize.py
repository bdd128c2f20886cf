"""The optimized addition: its first step against an independent gradient, and what it does to answers and descriptions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from concepts import scenes
from concepts.schema import ConceptDataset
from groundscope.core.errors import ConfigError, DataError, PatchError, SiteError
from lvlm import answer_key, load_lvlm
from mitigation import AddChange, SteeringVector, answer_under, derive
from mitigation.free_text_prompts import FreeTextPrompts, caption_prompts, plain_texts
from tests.toys.random_models import hooks_of, shared_model

DATA = scenes.dataset(24, seed=5, splits=["conflict"])


def answers_under(vector: SteeringVector | None) -> list[bool]:
    return [bool(a.correct) for a in answer_under(load_lvlm("tiny"), DATA, {"": vector}, progress=False)[""].answers]


def test_the_first_step_follows_the_gradient_of_the_loss() -> None:
    """Adam's first step is ``-step`` times the sign of each derivative, in units of the activations' root mean square."""
    model = load_lvlm("tiny")
    questions = [
        e
        for e in DATA
        if len(model.encode(e).inputs["input_ids"][0]) == len(model.encode(DATA[0]).inputs["input_ids"][0])
    ]
    vector = derive.optimize(
        model, questions, layers=[3], passes=1, steps=1, step=0.01, right=1000, emphasis=3.0, progress=False
    )
    change = vector.changes[3]
    assert isinstance(change, AddChange)
    # The same loss by plain hooks on one full forward pass for each question.
    layer = model.layers("decoder")[3]
    addition = torch.zeros(model.width, requires_grad=True)
    squares, losses, weights = [], [], []
    for example in questions:
        hook = layer.register_forward_hook(
            lambda _m, _a, out: (squares.append(out.detach().pow(2).mean()), out + addition)[1]
        )
        logits = model.forward(model.encode(example).inputs)[0, -1].float()
        hook.remove()
        key = answer_key(model, example)
        scores, truth = key.scores(logits), key.candidates.index(example.answer)
        weights.append(3.0 if int(scores.argmax()) != truth else 1.0)
        losses.append(-weights[-1] * scores.log_softmax(-1)[truth])
    gradient = torch.autograd.grad(torch.stack(losses).sum() / sum(weights), addition)[0]
    rms = float(torch.stack(squares).mean().sqrt())
    expected = -0.01 * rms * gradient.sign().double().numpy()
    clear = gradient.abs().numpy() > 1e-4 * float(gradient.abs().max())
    np.testing.assert_allclose(change.displacement(1.0)[clear], expected[clear], rtol=2e-2)
    assert vector.provenance["wrong"] == weights.count(3.0) > 0


def test_answers_improve_and_descriptions_stay() -> None:
    model = load_lvlm("tiny")
    texts = list(caption_prompts(DATA, 6))
    options: dict[str, Any] = {"layers": [3, 4], "passes": 3, "steps": 1, "step": 0.03, "progress": False}
    vector = derive.optimize(model, DATA, texts=texts, keep=10.0, **options)
    assert (vector.kind, vector.positions, vector.layers, vector.decay) == ("add", "all", (3, 4), 1.0)
    assert sum(answers_under(vector)) > sum(answers_under(None))
    prompts = FreeTextPrompts(ConceptDataset("captions", tuple(texts)), None)
    before = [a.text for a in prompts.outputs(model, None).answers.answers]
    changed = {}
    for name, steered in (("with texts", vector), ("without", derive.optimize(model, DATA, **options))):
        after = [a.text for a in prompts.outputs(model, steered).answers.answers]
        changed[name] = sum(a != b for a, b in zip(after, before, strict=True))
    assert changed["with texts"] < changed["without"]
    assert hooks_of(model) == 0


def test_stored_activations_change_nothing_but_the_time() -> None:
    model = load_lvlm("tiny")
    options = {"layers": [4], "passes": 2, "steps": 1, "texts": list(caption_prompts(DATA, 2)), "progress": False}
    stored = derive.optimize(model, DATA[:8], **options)
    whole = derive.optimize(model, DATA[:8], memory=0, **options)
    np.testing.assert_allclose(
        stored.displacements()[4], whole.displacements()[4], atol=0.02 * np.abs(whole.displacements()[4]).max()
    )


@torch.no_grad()
def test_texts_without_an_image_are_preserved() -> None:
    model = load_lvlm("tiny")
    (text,) = plain_texts(model, DATA, limit=1) or []
    inputs, keep = {"input_ids": text.tokens}, text.tokens.shape[1] - text.start + 1
    before = model.forward(inputs, keep=keep).log_softmax(-1)
    distances = []
    for weight in (0.0, 100.0):
        vector = derive.optimize(
            model,
            DATA[:8],
            plain=[(text.tokens, text.start)],
            layers=[4],
            passes=2,
            steps=1,
            step=0.03,
            keep_plain=weight,
            progress=False,
        )
        with vector.applied(model):
            after = model.forward(inputs, keep=keep).log_softmax(-1)
        distances.append(float((before.exp() * (before - after)).sum(-1).mean()))
    assert distances[1] < 0.5 * distances[0]


def test_heads_and_the_last_token() -> None:
    model = load_lvlm("tiny")
    vector = derive.optimize(
        model, DATA[:8], heads=["L3.H1", "L4.H7"], positions="last+generated", passes=1, steps=1, progress=False
    )
    assert [str(h) for h in vector.heads] == ["L3.H1", "L4.H7"]
    assert vector.positions == "last+generated"
    change = vector.changes[vector.heads[0]]
    assert isinstance(change, AddChange)
    assert change.direction.shape == (model.head_dim,)


def test_what_cannot_be_optimized_is_refused_before_work() -> None:
    model = shared_model()
    captions = [replace(e, candidates=()) for e in DATA[:2]]
    with pytest.raises(DataError, match="no question has candidate answers"):
        derive.optimize(model, captions, layers=[2])
    with pytest.raises(PatchError, match="no heads, layers or sites"):
        derive.optimize(model, DATA[:2])
    with pytest.raises(ConfigError, match=r"positions='last', passes=6: choose positions all or last\+generated"):
        derive.optimize(model, DATA[:2], layers=[2], positions="last")
    with pytest.raises(SiteError):
        derive.optimize(model, DATA[:2], layers=[99])
    tiny = load_lvlm("tiny")
    right = [e for e, ok in zip(DATA, answers_under(None), strict=True) if ok]
    with pytest.raises(PatchError, match="answers every question correctly"):
        derive.optimize(tiny, right[:3], layers=[2], progress=False)
