"""Many conditions at once against one forward each, and controls that push as far as what they are held against."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from behavior import answer, answer_each
from circuits import intervened, logits_under
from concepts.schema import ConceptDataset
from groundscope.core.errors import ConfigError, PatchError
from lvlm import Head, Site
from lvlm.model import Batch
from mitigation import ProbeGate, SteeringVector
from mitigation.steering.changes import AddChange, AmplifyChange, ProjectChange, VectorChange
from mitigation.steering.controls import displacement_rms, match_displacement, move_to_heads
from mitigation.steering.places import Key
from mitigation.steering.shuffling import shuffle_mask, swap_sides
from tests.toys.random_models import data, examples, hooks_of, pairs, shared_model

RNG = np.random.default_rng(0)
WIDTH = 192


def unit(size: int) -> np.ndarray:
    x = RNG.standard_normal(size)
    return x / np.linalg.norm(x)


def vector(kind: Any, keys: list[Key], **more: Any) -> SteeringVector:
    entries: dict[Key, VectorChange] = {}
    for key in keys:
        size = 24 if isinstance(key, Head) else WIDTH
        reads = unit(size)[None] if kind == "amplify" else None
        if reads is not None:
            entries[key] = AmplifyChange(unit(size), reads, 3 * unit(size)[None])
        else:
            entries[key] = AddChange(unit(size), 2.0) if kind == "add" else ProjectChange(unit(size))
    model = shared_model()
    return SteeringVector(entries, more.pop("positions", "last+generated"), 2.0, model.name, model.config_hash, **more)


HEADS: list[Key] = [Head(1, 2), Head(1, 3), Head(4, 7)]
MLP, ATTENTION = Site("decoder", 3, "mlp_out"), Site("decoder", 2, "attn_out")
VECTORS = {
    "heads": vector("add", HEADS),
    "amplified": vector("amplify", HEADS),
    "residual": vector("project", [0, 5]),
    "mixed": vector("add", [MLP, ATTENTION, 2, Head(5, 0)]),
    "kept": vector("add", [MLP], norm="kept"),
    "relative": vector("add", [3], norm="relative"),
    "fading": vector("add", HEADS, decay=0.5),
    "everywhere": vector("add", HEADS, positions="all"),
    "all tokens of a layer": vector("amplify", [2], positions="all"),
    "image": vector("add", [1], positions="image:all"),
    "gated": vector("add", HEADS, gate=ProbeGate(0, unit(WIDTH))),
}


def batch() -> Batch:
    return next(shared_model().batches([examples()[0], examples()[4]], 2))


def test_logits_of_each_condition_equal_its_own_forward() -> None:
    model, inputs_ = shared_model(), batch()
    plain = model.logits(inputs_.inputs)
    conditions = {name: steering.interventions() for name, steering in VECTORS.items()}
    logits = logits_under(model, [[], *conditions.values(), []])(inputs_)
    assert torch.equal(logits[0], logits[-1])
    torch.testing.assert_close(logits[0], plain, atol=1e-4, rtol=1e-4)
    for (name, items), got in zip(conditions.items(), logits[1:-1], strict=True):
        with intervened(model, items):
            expected = model.logits(inputs_.inputs)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4, msg=name)
        assert not torch.allclose(got, plain, atol=1e-3), name
    assert hooks_of(model) == 0


def test_interventions_at_the_last_token_or_all_tokens_need_no_additional_full_forward() -> None:
    model, inputs_ = shared_model(), batch()
    calls: list[int] = []
    hook = model.hf.register_forward_pre_hook(lambda *_: calls.append(1))
    late = [v.interventions() for name, v in VECTORS.items() if name not in ("image", "gated")]
    logits_under(model, [[], *late])(inputs_)
    assert len(calls) == 1
    logits_under(model, [[], *(v.interventions() for v in VECTORS.values())])(inputs_)
    hook.remove()
    assert len(calls) == 1 + 3


def test_a_model_that_cannot_resume_runs_full_forwards_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from circuits.execution import patch_runner
    from circuits.execution.prefix_attention import NotShared

    def refused(*_: Any, **__: Any) -> None:
        msg = "it is a test"
        raise NotShared(msg)

    model, inputs_ = shared_model(), batch()
    items = VECTORS["heads"].interventions()
    expected = logits_under(model, [[], items])(inputs_)
    monkeypatch.setattr(patch_runner, "record", refused)
    run = logits_under(model, [[], items])
    with caplog.at_level(logging.WARNING, "circuits.execution.patch_runner"):
        for _ in range(2):
            for got, reference in zip(run(inputs_), expected, strict=True):
                torch.testing.assert_close(got, reference, atol=1e-4, rtol=1e-4)
    assert [r.message.count("because it is a test") for r in caplog.records] == [1]


def test_answers_under_many_conditions_are_those_under_each() -> None:
    model = shared_model()
    dataset = ConceptDataset(
        "toys", (*data(), replace(data()[0], id="caption", candidates=(), question="Describe the image."))
    )
    items = {"plain": [], **{name: VECTORS[name].interventions() for name in ("heads", "everywhere")}}
    contexts = {
        name: (lambda interventions=interventions: intervened(model, interventions))
        for name, interventions in items.items()
    }
    for logits in (None, logits_under(model, list(items.values()))):
        answers = answer_each(model, dataset, contexts, batch_size=4, logits=logits, max_new_tokens=4)
        assert list(answers) == list(items)
        for name, interventions in items.items():
            with intervened(model, interventions):
                alone = answer(model, dataset, batch_size=4, max_new_tokens=4)
            assert [(a.given, a.text) for a in answers[name].answers] == [(a.given, a.text) for a in alone.answers]
            margins = [
                (a.margin or 0, b.margin or 0) for a, b in zip(answers[name].answers, alone.answers, strict=True)
            ]
            np.testing.assert_allclose(*np.transpose(margins), atol=1e-4)
            assert answers[name].provenance["condition"] == name
            assert (answers[name].cost.seconds, answers[name].cost.forwards) == (None, None)
    assert answer(model, dataset, batch_size=4, max_new_tokens=1).cost.forwards
    with pytest.raises(ConfigError, match="batch_size=0"):
        answer_each(model, dataset, contexts, batch_size=0)


# ---- controls ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Store:
    """Activations of heads at the last token, one example undefined."""

    x: np.ndarray
    digest: str = "s" * 64
    provenance: Any = None

    def read(self, site: str | Site, tokens: str, head: int | None = None, examples: Any = None) -> np.ndarray:
        assert tokens == "last"
        assert head is not None
        return self.x[:, Site.parse(str(site)).layer, head]

    def frame(self) -> pd.DataFrame:
        return pd.DataFrame()

    def __len__(self) -> int:
        return len(self.x)


def store() -> Store:
    scale = np.arange(1, 7)[None, :, None, None]
    x = scale * (np.random.default_rng(4).standard_normal((50, 6, 8, 24)) + 1)
    x[3] = np.nan
    return Store(x.astype(np.float32))


def displaced(steering: SteeringVector, key: Head, x: np.ndarray) -> np.ndarray:
    """What a strength of 1 adds at a head to each example, by the formula."""
    e: Any = steering.changes[key]
    if steering.kind == "add":
        return np.repeat(e.sigma * e.direction[None].astype(float), len(x), axis=0)
    deviation = x - e.mean
    if e.reads is None:
        return deviation if e.writes is None else deviation @ e.writes
    return deviation @ e.reads.T @ (e.reads if e.writes is None else e.writes)


def rms(x: np.ndarray) -> float:
    return float(np.sqrt((x**2).sum(1).mean()))


WHOLE = SteeringVector({h: AmplifyChange(unit(24)) for h in HEADS}, "last+generated", 1.0, "m", "c")
OTHERS = (Head(5, 1), Head(0, 4), Head(2, 2))


@pytest.mark.parametrize("steering", [VECTORS["heads"], VECTORS["amplified"], WHOLE], ids=["add", "subspace", "whole"])
def test_controls_displace_activations_by_the_same_rms(steering: SteeringVector) -> None:
    source = store()
    x = source.x[~np.isnan(source.x).any((1, 2, 3))].astype(float)
    control = vector(steering.kind, list(OTHERS)) if steering is not WHOLE else replace(
        WHOLE, changes={h: AmplifyChange(unit(24)) for h in OTHERS}
    )  # fmt: skip
    for moved in (match_displacement(control, steering, source), move_to_heads(steering, OTHERS, source)):
        for key, own in zip(sorted(OTHERS), steering.changes, strict=True):
            assert isinstance(own, Head)
            size = rms(displaced(steering, own, x[:, own.layer, own.head]))
            assert rms(displaced(moved, key, x[:, key.layer, key.head])) == pytest.approx(size, rel=1e-3)
            assert displacement_rms(steering.changes[own], own, source, "last") == pytest.approx(size, rel=1e-4)
    assert move_to_heads(steering, OTHERS, source).heads == tuple(sorted(OTHERS))


def test_moved_directions_keep_direction_and_distance_from_the_mean() -> None:
    steering, source = VECTORS["amplified"], store()
    x = source.x[~np.isnan(source.x).any((1, 2, 3))].astype(float)
    moved = move_to_heads(steering, OTHERS, source)
    for key, own in zip(sorted(OTHERS), steering.changes, strict=True):
        assert isinstance(own, Head)
        a: Any = moved.changes[key]
        b: Any = steering.changes[own]
        np.testing.assert_array_equal(a.reads, b.reads)  # pyright: ignore[reportArgumentType]  # both there
        offset = x[:, own.layer, own.head].mean(0) - b.mean
        np.testing.assert_allclose(x[:, key.layer, key.head].mean(0) - a.mean, offset, atol=1e-4)


def test_shuffled_masks_keep_their_size() -> None:
    mask, among = np.arange(40) < 10, np.arange(40) % 2 == 0
    permuted = shuffle_mask(mask, 3, among)
    assert permuted.sum() == 10
    assert (permuted[~among] == mask[~among]).all()
    assert (permuted != mask).any()
    assert (shuffle_mask(mask, 3) != shuffle_mask(mask, 4)).any()
    turned = swap_sides(pairs("blank"), 1)
    same = sum(a.clean is b.clean for a, b in zip(turned, pairs("blank"), strict=True))
    assert same == len(turned) // 2
    assert all(
        {a.clean.id, a.corrupt.id} == {b.clean.id, b.corrupt.id} for a, b in zip(turned, pairs("blank"), strict=True)
    )


def test_controls_that_cannot_be_made() -> None:
    source = store()
    with pytest.raises(PatchError, match="is defined only for kinds"):
        match_displacement(VECTORS["residual"], VECTORS["heads"], source)
    with pytest.raises(PatchError, match="the numbers must be equal"):
        match_displacement(vector("add", [Head(0, 0)]), VECTORS["heads"], source)
    with pytest.raises(PatchError, match="different heads"):
        move_to_heads(VECTORS["amplified"], [Head(0, 0)] * 3, source)
    with pytest.raises(PatchError, match="different heads"):
        move_to_heads(VECTORS["mixed"], OTHERS, source)
