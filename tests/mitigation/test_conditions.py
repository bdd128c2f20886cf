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
from tests.toys.random_models import data, examples, hooks_of, pairs, shared

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
    model = shared()
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
    "image": vector("add", [1], positions="image:all"),
    "gated": vector("add", HEADS, gate=ProbeGate(0, unit(WIDTH))),
}


def batch() -> Batch:
    return next(shared().batches([examples()[0], examples()[4]], 2))


def test_every_condition_is_what_a_forward_under_it_gives() -> None:
    model, given = shared(), batch()
    plain = model.logits(given.inputs)
    conditions = {name: made.interventions() for name, made in VECTORS.items()}
    found = logits_under(model, [[], *conditions.values(), []])(given)
    assert torch.equal(found[0], found[-1])
    torch.testing.assert_close(found[0], plain, atol=1e-4, rtol=1e-4)
    for (name, items), got in zip(conditions.items(), found[1:-1], strict=True):
        with intervened(model, items):
            expected = model.logits(given.inputs)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4, msg=name)
        assert not torch.allclose(got, plain, atol=1e-3), name
    assert hooks_of(model) == 0


def test_what_acts_at_the_last_token_alone_takes_no_forward_of_its_own() -> None:
    model, given = shared(), batch()
    calls: list[int] = []
    hook = model.hf.register_forward_pre_hook(lambda *_: calls.append(1))
    late = [v.interventions() for name, v in VECTORS.items() if name not in ("everywhere", "image", "gated")]
    logits_under(model, [[], *late])(given)
    assert len(calls) == 1
    logits_under(model, [[], *(v.interventions() for v in VECTORS.values())])(given)
    hook.remove()
    assert len(calls) == 1 + 4


def test_a_model_that_cannot_be_resumed_says_so_and_runs_whole(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from circuits.execution import patch_runner
    from circuits.execution.prefix_attention import NotShared

    def refused(*_: Any, **__: Any) -> None:
        msg = "it is a test"
        raise NotShared(msg)

    model, given = shared(), batch()
    items = VECTORS["heads"].interventions()
    expected = logits_under(model, [[], items])(given)
    monkeypatch.setattr(patch_runner, "record", refused)
    run = logits_under(model, [[], items])
    with caplog.at_level(logging.WARNING, "circuits.execution.patch_runner"):
        for _ in range(2):
            for got, wanted in zip(run(given), expected, strict=True):
                torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    assert [r.message.count("because it is a test") for r in caplog.records] == [1]


def test_answers_under_many_conditions_are_those_under_each() -> None:
    model = shared()
    told = ConceptDataset(
        "toys", (*data(), replace(data()[0], id="told", candidates=(), question="Describe the image."))
    )
    items = {"plain": [], **{name: VECTORS[name].interventions() for name in ("heads", "everywhere")}}
    contexts = {name: (lambda one=one: intervened(model, one)) for name, one in items.items()}
    for logits in (None, logits_under(model, list(items.values()))):
        found = answer_each(model, told, contexts, 4, logits=logits, max_new_tokens=4)
        assert list(found) == list(items)
        for name, one in items.items():
            with intervened(model, one):
                alone = answer(model, told, 4, max_new_tokens=4)
            assert [(a.given, a.text) for a in found[name].answers] == [(a.given, a.text) for a in alone.answers]
            margins = [(a.margin or 0, b.margin or 0) for a, b in zip(found[name].answers, alone.answers, strict=True)]
            np.testing.assert_allclose(*np.transpose(margins), atol=1e-4)
            assert found[name].provenance["condition"] == name
            assert (found[name].cost.seconds, found[name].cost.forwards) == (None, None)
    assert answer(model, told, 4, max_new_tokens=1).cost.forwards
    with pytest.raises(ConfigError, match="batch_size=0"):
        answer_each(model, told, contexts, 0)


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


def pushed(made: SteeringVector, key: Head, x: np.ndarray) -> np.ndarray:
    """What a strength of 1 adds at a head to each example, by the formula."""
    e: Any = made.changes[key]
    if made.kind == "add":
        return np.repeat(e.sigma * e.direction[None].astype(float), len(x), axis=0)
    deviation = x - e.mean
    if e.reads is None:
        return deviation if e.writes is None else deviation @ e.writes
    return deviation @ e.reads.T @ (e.reads if e.writes is None else e.writes)


def rms(x: np.ndarray) -> float:
    return float(np.sqrt((x**2).sum(1).mean()))


WHOLE = SteeringVector({h: AmplifyChange(unit(24)) for h in HEADS}, "last+generated", 1.0, "m", "c")
OTHERS = (Head(5, 1), Head(0, 4), Head(2, 2))


@pytest.mark.parametrize("made", [VECTORS["heads"], VECTORS["amplified"], WHOLE], ids=["add", "subspace", "whole"])
def test_controls_push_as_far_at_every_place(made: SteeringVector) -> None:
    held = store()
    x = held.x[~np.isnan(held.x).any((1, 2, 3))].astype(float)
    control = vector(made.kind, list(OTHERS)) if made is not WHOLE else replace(
        WHOLE, changes={h: AmplifyChange(unit(24)) for h in OTHERS}
    )  # fmt: skip
    for one in (match_displacement(control, made, held), move_to_heads(made, OTHERS, held)):
        for key, own in zip(sorted(OTHERS), made.changes, strict=True):
            assert isinstance(own, Head)
            wanted = rms(pushed(made, own, x[:, own.layer, own.head]))
            assert rms(pushed(one, key, x[:, key.layer, key.head])) == pytest.approx(wanted, rel=1e-3)
            assert displacement_rms(made.changes[own], own, held, "last") == pytest.approx(wanted, rel=1e-4)
    assert move_to_heads(made, OTHERS, held).heads == tuple(sorted(OTHERS))


def test_moved_directions_are_the_same_and_stand_as_far_from_the_mean() -> None:
    made, held = VECTORS["amplified"], store()
    x = held.x[~np.isnan(held.x).any((1, 2, 3))].astype(float)
    one = move_to_heads(made, OTHERS, held)
    for key, own in zip(sorted(OTHERS), made.changes, strict=True):
        assert isinstance(own, Head)
        a: Any = one.changes[key]
        b: Any = made.changes[own]
        np.testing.assert_array_equal(a.reads, b.reads)  # pyright: ignore[reportArgumentType]  # both there
        offset = x[:, own.layer, own.head].mean(0) - b.mean
        np.testing.assert_allclose(x[:, key.layer, key.head].mean(0) - a.mean, offset, atol=1e-4)


def test_labels_that_mean_nothing() -> None:
    mask, among = np.arange(40) < 10, np.arange(40) % 2 == 0
    made = shuffle_mask(mask, 3, among)
    assert made.sum() == 10
    assert (made[~among] == mask[~among]).all()
    assert (made != mask).any()
    assert (shuffle_mask(mask, 3) != shuffle_mask(mask, 4)).any()
    turned = swap_sides(pairs("blank"), 1)
    same = sum(a.clean is b.clean for a, b in zip(turned, pairs("blank"), strict=True))
    assert same == len(turned) // 2
    assert all(
        {a.clean.id, a.corrupt.id} == {b.clean.id, b.corrupt.id} for a, b in zip(turned, pairs("blank"), strict=True)
    )


def test_controls_that_cannot_be_made() -> None:
    held = store()
    with pytest.raises(PatchError, match="is defined only for kinds"):
        match_displacement(VECTORS["residual"], VECTORS["heads"], held)
    with pytest.raises(PatchError, match="the numbers must be equal"):
        match_displacement(vector("add", [Head(0, 0)]), VECTORS["heads"], held)
    with pytest.raises(PatchError, match="different heads"):
        move_to_heads(VECTORS["amplified"], [Head(0, 0)] * 3, held)
    with pytest.raises(PatchError, match="different heads"):
        move_to_heads(VECTORS["mixed"], OTHERS, held)
