"""Faithfulness: published areas, planted circuits, and the model run without heads by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from circuits import all_heads, faithfulness, patch_heads
from groundscope.core.errors import ConfigError, PatchError
from groundscope.testing.planted_circuits import plant
from lvlm.answer_keys import answer_key
from lvlm.model import Lvlm
from lvlm.sites import Head
from tests.toys.random_models import examples, layers_of, shared_model


def test_areas_of_the_published_curves() -> None:
    k = np.array(faithfulness.SHARES)
    assert faithfulness.area(k, np.ones(10)) == pytest.approx(0.999, abs=1e-12)
    assert faithfulness.area(k, np.abs(1 - np.ones(10))) == 0
    assert faithfulness.area(k, k) == pytest.approx(0.49999950, abs=1e-12)
    assert faithfulness.area(k, np.abs(1 - k)) == pytest.approx(0.49900050, abs=1e-12)


@torch.no_grad()
def margin_without(model: Lvlm, outside: list[Head]) -> np.ndarray:
    """Margins with heads zeroed by hand, one example at a time."""
    margins = []
    for example in examples():

        def zero(_module: object, args: tuple[torch.Tensor], layer: int) -> tuple[torch.Tensor]:
            z = args[0].clone()
            for head in outside:
                if head.layer == layer:
                    z[..., head.head * model.head_dim : (head.head + 1) * model.head_dim] = 0
            return (z,)

        hooks = [
            layer.self_attn.o_proj.register_forward_pre_hook(lambda m, a, i=i: zero(m, a, i))
            for i, layer in enumerate(layers_of(model))
        ]
        logits = model.hf(**model.encode(example).inputs).logits[0, -1].double()
        for hook in hooks:
            hook.remove()
        key = answer_key(model, example)
        right = key.candidates.index(example.answer)
        scores = np.array([float(logits[list(ids)].logsumexp(0)) for ids in key.tokens])
        margins.append(scores[right] - np.delete(scores, right).max())
    return np.array(margins)


def test_a_curve_is_the_model_without_all_other_heads() -> None:
    model = shared_model()
    ranking = np.random.default_rng(0).normal(size=(model.n_layers, model.n_heads))
    curve = faithfulness.curve(model, examples(), ranking, method="zero", shares=(0.1, 0.5, 1.0))
    order = [Head(int(i) // model.n_heads, int(i) % model.n_heads) for i in np.argsort(-ranking.ravel())]
    full, empty = margin_without(model, []), margin_without(model, order)
    np.testing.assert_allclose(curve.full, full, atol=1e-4)
    np.testing.assert_allclose(curve.empty, empty, atol=1e-4)
    for column, size in enumerate((5, 24, 48)):
        assert curve.circuits[column] == tuple(order[:size])
        margins = margin_without(model, order[size:])
        np.testing.assert_allclose(curve.margins[:, column], margins, atol=1e-4)
        f = (margins.mean() - empty.mean()) / (full.mean() - empty.mean())
        assert curve.faithfulness[column] == pytest.approx(f, abs=1e-3)
    assert curve.faithfulness[-1] == pytest.approx(1, abs=1e-9)


def test_the_planted_head_is_all_a_planted_model_needs() -> None:
    planted = plant(3, prior=False)
    grounding = planted.grounding
    assert grounding is not None
    pairs, held_out = planted.pairs(12), planted.examples(16, seed=1)
    scores = patch_heads(planted.model, pairs)
    shares = (0, 1 / 16, 0.5, 1)
    curve = faithfulness.curve(planted.model, held_out, scores, shares=shares)
    assert curve.circuits[1] == (grounding,)
    np.testing.assert_allclose(curve.faithfulness, [0, 1, 1, 1], atol=0.02)
    worst = faithfulness.curve(planted.model, held_out, -scores.mean, shares=shares)
    assert worst.cpr < 0.6 < 0.95 < curve.cpr
    assert curve.cmd < 0.05 < worst.cmd
    interval = curve.interval("cpr")
    assert interval.low <= curve.cpr <= interval.high
    assert list(curve.frame()["heads"]) == [0, 1, 8, 16]
    small = faithfulness.minimal(planted.model, held_out, scores)
    assert small.heads == (grounding,)
    assert small.left == pytest.approx(0, abs=0.02)
    assert small.lost[0] == pytest.approx(1, abs=0.02)


def test_a_minimal_set_contains_no_unnecessary_head() -> None:
    planted = plant(4, prior=False)
    grounding, decoy = planted.grounding, planted.decoys[0]
    assert grounding is not None
    model = planted.model
    others = [h for h in all_heads(model) if h not in (grounding, decoy)]
    small = faithfulness.minimal(model, planted.examples(12), [decoy, *others[:2], grounding, *others[2:]])
    assert small.heads == (grounding,)
    assert set(small.dropped) == {decoy, *others[:2]}


def test_random_rankings_lie_where_chance_puts_them() -> None:
    planted = plant(5, prior=False)
    model, rng = planted.model, np.random.default_rng(0)
    shares = (0.25, 0.5, 0.75)
    f = [
        faithfulness.curve(
            model, planted.examples(4), rng.normal(size=(model.n_layers, model.n_heads)), shares=shares
        ).faithfulness
        for _ in range(24)
    ]
    # One head carries everything, so f is 1 where a random ranking has it in time: with probability k.
    share = np.mean(f, axis=0)
    assert (np.abs(share - shares) < 3 * np.sqrt(np.array(shares) * (1 - np.array(shares)) / 24) + 0.02).all()


def test_absolute_order_takes_heads_that_work_against() -> None:
    model = shared_model()
    ranking = np.zeros((model.n_layers, model.n_heads))
    ranking[2, 3], ranking[1, 1] = -5, 2
    assert faithfulness.ranked(model, ranking)[0] == Head(1, 1)
    assert faithfulness.ranked(model, ranking)[-1] == Head(2, 3)
    assert faithfulness.ranked(model, ranking, order="absolute")[:2] == (Head(2, 3), Head(1, 1))


def test_a_mistake_is_named() -> None:
    model = shared_model()
    ranking = np.zeros((model.n_layers, model.n_heads))
    with pytest.raises(ConfigError, match="ascending"):
        faithfulness.curve(model, examples(), ranking, shares=(0.5, 0.1))
    with pytest.raises(ConfigError, match="unknown order 'up'"):
        faithfulness.curve(model, examples(), ranking, order="up")  # type: ignore[arg-type]
    with pytest.raises(PatchError, match="finite scores"):
        faithfulness.curve(model, examples(), ranking[:2])
    with pytest.raises(PatchError, match="each of the 48 heads"):
        faithfulness.curve(model, examples(), [Head(0, 0)])
