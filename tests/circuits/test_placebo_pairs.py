"""Placebo pairs and outcomes of pairs against plain forwards, and one error for all pairs of unequal length."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from circuits import OUTCOMES, PairOutcomes, attribution, pair_outcomes, patch, patch_heads
from concepts import counterfactuals, scenes
from concepts.counterfactual_pair import CounterfactualPair
from concepts.schema import ConceptDataset
from groundscope.core.errors import ConfigError, PatchError
from lvlm import load_lvlm
from lvlm.model import Lvlm
from tests.toys.examples import example as example_of
from tests.toys.families import model as model_of
from tests.toys.random_models import pairs, shared_model


def placebo_of(pair: CounterfactualPair) -> CounterfactualPair:
    """The same two images, with the clean answer stated for both."""
    return replace(pair, corrupt=replace(pair.corrupt, answer=pair.clean.answer), placebo=True)


@torch.no_grad()
def scores_of(model: Lvlm, pair: CounterfactualPair) -> dict[str, tuple[float, float]]:
    """Logit of each candidate in both runs; the toy tokenizer has one token for each."""
    logits = [model.hf(**model.encode(e).inputs).logits[0, -1] for e in (pair.clean, pair.corrupt)]
    ids = {c: model.processor.tokenizer.convert_tokens_to_ids(c) for c in pair.clean.candidates}
    return {c: (float(logits[0][i]), float(logits[1][i])) for c, i in ids.items()}


@pytest.mark.parametrize("mode", ["denoise", "noise"])
def test_effects_of_placebos_are_differences_over_one_scale(mode: Any) -> None:
    model, real = shared_model(), pairs("object")
    own = patch_heads(model, real, mode=mode, min_effect=0)
    # A placebo of a yes-no pair compares the same two answers, so its changes are those of the pair.
    control = patch_heads(model, [placebo_of(p) for p in real], mode=mode)
    gaps = own.clean - own.corrupt
    assert own.scale == pytest.approx(np.abs(gaps).mean(), rel=1e-6)
    np.testing.assert_allclose(control.effects, own.effects * gaps[:, None, None], atol=1e-5)
    scaled = patch_heads(model, [placebo_of(p) for p in real], mode=mode, scale=own.scale)
    np.testing.assert_allclose(scaled.effects, control.effects / own.scale, atol=1e-6)
    assert (scaled.provenance["scale"], scaled.excluded) == (own.scale, 0)
    assert "scale" not in own.provenance
    sites = patch(model, [placebo_of(real[0])], ["L1.H0"], mode=mode)
    assert sites.effects[0, 0, 0] == pytest.approx(control.effects[0, 1, 0], abs=1e-5)


def test_a_placebo_compares_the_answer_with_the_one_by_prior() -> None:
    model, pair = shared_model(), pairs("color")[0]
    others = [c for c in pair.clean.candidates if c != pair.clean.answer]
    for prior, other in ((others[2], others[2]), (None, others[0])):
        clean = replace(pair.clean, prior_answer=prior)
        control = patch_heads(model, [placebo_of(replace(pair, clean=clean))])
        logits = scores_of(model, pair)
        assert control.clean[0] == pytest.approx(logits[clean.answer][0] - logits[other][0], abs=1e-4)


def test_placebos_are_refused_where_they_have_no_scale() -> None:
    real = pairs("object")
    with pytest.raises(PatchError, match="1 of 3 pairs are placebos, whose own differences are near 0: patch them sep"):
        patch_heads(shared_model(), [*real[:2], placebo_of(real[0])])
    with pytest.raises(PatchError, match=r"is a placebo, whose two true answers are equal; use patch_heads or patch"):
        attribution.heads(shared_model(), [placebo_of(real[0])])
    with pytest.raises(ConfigError, match=r"scale=0 must be finite and above 0"):
        patch_heads(shared_model(), real, scale=0)


def test_all_pairs_of_unequal_length_are_one_error_before_any_forward() -> None:
    model, real = shared_model(), [*pairs("object"), *pairs("color")]
    longer = [replace(p, corrupt=replace(p.corrupt, question=f"Well {p.corrupt.question}")) for p in real[:4]]
    forwards: list[object] = []
    hook = model.hf.register_forward_pre_hook(lambda *_: forwards.append(1))
    with pytest.raises(PatchError) as error:
        patch_heads(model, [*real, *longer])
    hook.remove()
    assert not forwards
    assert str(error.value).startswith(f"4 of {len(real) + 4} pairs have different numbers or positions of tokens")
    length = model.encode(longer[0].clean).tokens.length
    assert f"'{longer[0].clean.id}' ({length} and {length + 1})" in str(error.value)
    assert "and 1 more; put all images on one canvas" in str(error.value)
    assert "\n" not in str(error.value)


def test_outcomes_are_those_of_plain_forwards() -> None:
    model = load_lvlm("tiny")  # its answers are right, so stated answers decide the outcome
    data = scenes.dataset(10)
    real = [*counterfactuals.pairs(data, "object")[:3], *counterfactuals.pairs(data, "color")[:3]]
    # Further pairs of the same images with other stated answers, so that every outcome occurs.
    turned = [replace(p, clean=replace(p.clean, answer=p.corrupt.answer, id=f"{p.clean.id}|t")) for p in real]
    swapped = [
        replace(
            p, clean=replace(p.clean, answer=p.corrupt.answer, id=f"{p.clean.id}|s"),
            corrupt=replace(p.corrupt, answer=p.clean.answer),
        )
        for p in real
    ]  # fmt: skip
    every = [*real, *swapped, *map(placebo_of, turned), *(replace(p, corrupt=p.clean) for p in turned)]
    outcomes = pair_outcomes(model, every)
    expected = []
    for pair in every:
        logits = scores_of(model, pair)
        answers = tuple(max(logits, key=lambda c, s=s: logits[c][s]) for s in (0, 1))
        right = (answers[0] == pair.clean.answer) + (answers[1] == pair.corrupt.answer)
        same = "unchanged" if answers[0] == answers[1] else ("both wrong", "one wrong")[min(right, 1)]
        expected.append("right on both" if right == 2 else same)
    assert outcomes.outcomes == tuple(expected)
    assert set(expected) == set(OUTCOMES)
    assert outcomes.counts == {name: expected.count(name) for name in OUTCOMES}
    assert list(outcomes.frame()["outcome"]) == expected


def test_scores_are_selected_by_outcome() -> None:
    model, real = shared_model(), pairs("object")
    scores = patch_heads(model, real, min_effect=0)
    rows = [("yes", "no") if p.clean.answer == "yes" else ("no", "yes") for p in real]
    model_answers = (rows[0], *(("no", "no") for _ in rows[1:]))
    outcomes = PairOutcomes(tuple(p.clean.id for p in real), tuple(rows), model_answers, tuple(p.group for p in real))
    assert outcomes.select(scores).ids == (real[0].clean.id,)
    np.testing.assert_array_equal(outcomes.select(scores, "unchanged").effects, scores.effects[1:])
    assert outcomes.select(scores, *OUTCOMES).n_pairs == len(real)
    with pytest.raises(PatchError, match=f"none of the {len(real)} pairs of the scores is both wrong"):
        outcomes.select(scores, "both wrong")
    with pytest.raises(ConfigError, match=r"unknown outcome 'right'; choose from right on both"):
        outcomes.select(scores, "right")
    with pytest.raises(PatchError, match="pairs is empty"):
        pair_outcomes(model, [])


def test_a_canvas_makes_pairs_of_any_size_patchable() -> None:
    lvlm = model_of("qwen2_vl")  # its number of image tokens depends on the size of the image
    sizes = ((140, 100), (84, 140), (140, 140))
    couples = []
    for number, size in enumerate(sizes):
        clean, other = example_of(number), example_of(number + 3, size)
        answer = "no" if clean.answer == "yes" else "yes"
        corrupt = replace(
            other, id=f"{clean.id}|{size}", question=clean.question, answer=answer, candidates=clean.candidates
        )
        couples.append((clean, replace(corrupt, group=clean.group)))
    real = [CounterfactualPair(clean, corrupt, "object", "another size") for clean, corrupt in couples]
    with pytest.raises(PatchError, match=r"2 of 3 pairs have different numbers or positions of tokens"):
        patch_heads(lvlm, real, min_effect=0)
    data = ConceptDataset("sizes", tuple(e for pair in couples for e in pair))
    placed = counterfactuals.on_canvas(data, (112, 112))
    examples = dict(zip([e.id for e in data], placed, strict=True))
    same = [CounterfactualPair(examples[a.id], examples[b.id], "object", "another size") for a, b in couples]
    assert patch_heads(lvlm, same, min_effect=0).n_pairs == 3
