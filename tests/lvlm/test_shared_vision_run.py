"""Questions about one image share one run of the vision tower, without a change of logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from behavior import answer
from concepts import ConceptDataset
from concepts.schema import Example
from lvlm import Lvlm
from lvlm.model import Batch
from tests.toys.examples import example
from tests.toys.families import BUILDERS, model

WITHOUT = {"chameleon", "mistral3"}
"""Without a tower of layers; with one that gives one sequence for all rows."""


def questions() -> list[Example]:
    """Ask two questions about one image, and one about each of two others."""
    other = replace(example(0), id="other", question=f"{example(0).question[:-1]} or a key?")
    long = [replace(e, question=f"{e.question[:-1]} or a car?") for e in (example(0), example(1), example(2))]
    return [long[0], long[1], other, long[2]]


def batch_of(lvlm: Lvlm, examples: list[Example]) -> Batch:
    (batch,) = lvlm.batches(examples, 8)
    return batch


@torch.no_grad()
def plain(lvlm: Lvlm, batch: Batch) -> torch.Tensor:
    """The model's own forward, all positions, by nothing of ours."""
    return lvlm.hf(**batch.inputs).logits[:, -1]


@contextmanager
def sizes(lvlm: Lvlm) -> Iterator[list[int]]:
    """How much the first vision layer is given at each call, seen from behind a hook's back."""
    counts: list[int] = []
    layer = lvlm.layers("vision")[0]
    method, override = layer.forward, vars(layer).get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        counts.append((args[0] if args else next(iter(kwargs.values()))).numel())
        return method(*args, **kwargs)

    layer.forward = forward
    try:
        yield counts
    finally:
        del layer.forward
        if override is not None:  # a tracer has its own there, and other tests share the model
            layer.forward = override


@pytest.mark.parametrize("family", list(BUILDERS))
def test_logits_equal_plain_forwards_with_fewer_images_in_the_tower(family: str) -> None:
    lvlm = model(family)
    examples = questions()
    different = batch_of(lvlm, [examples[0], examples[1], examples[3]])
    grouped = batch_of(lvlm, examples)
    alike = batch_of(lvlm, [examples[0], examples[2]])
    assert len(set(grouped.images)) == 3
    for batch in (different, grouped, alike):
        want = plain(lvlm, batch)
        torch.testing.assert_close(lvlm.logits(batch.inputs, batch.images), want, rtol=0, atol=1e-6)
        assert not torch.allclose(want[0], want[1], rtol=0, atol=1e-4)
    if not lvlm.layers("vision"):
        return
    with sizes(lvlm) as counts:
        for batch in (different, grouped, alike):
            lvlm.logits(batch.inputs, batch.images)
    row = counts[0] // 3
    assert counts == [3 * row, 4 * row, 2 * row] if family in WITHOUT else [3 * row, 3 * row, row]


def test_hooks_on_the_tower_receive_every_row() -> None:
    lvlm, batch = model("llava"), batch_of(model("llava"), questions())
    counts: list[int] = []

    def push(x: torch.Tensor) -> torch.Tensor:
        counts.append(len(x))
        return x + torch.arange(len(x))[:, None, None]  # another change for each row

    hook = lvlm.locate("vision.L0.resid_post").edit(push)
    try:
        want, got = plain(lvlm, batch), lvlm.logits(batch.inputs, batch.images)
    finally:
        hook.remove()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert counts == [4, 4]
    assert not torch.allclose(got[1:], lvlm.logits(batch.inputs, batch.images)[1:], rtol=0, atol=1e-4)


def test_other_pictures_under_one_name_are_not_shared() -> None:
    lvlm, batch = model("llava"), batch_of(model("llava"), questions())
    torch.testing.assert_close(lvlm.logits(batch.inputs, ["same"] * 4), plain(lvlm, batch), rtol=0, atol=1e-6)


def test_a_tower_that_gives_something_else_is_run_for_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    lvlm, batch = model("llava"), batch_of(model("llava"), questions())
    tower: Any = lvlm.tower
    method, expected, counts = tower.forward, plain(lvlm, batch), []

    def odd(pixels: torch.Tensor, **kwargs: Any) -> Any:
        counts.append(len(pixels))
        out = method(pixels, **kwargs)
        out["attentions"] = torch.ones(1)  # one, whatever the number of pictures
        return out

    monkeypatch.setattr(tower, "forward", odd)
    torch.testing.assert_close(lvlm.logits(batch.inputs, batch.images), expected, rtol=0, atol=1e-6)
    assert counts == [3, 4]
    torch.testing.assert_close(lvlm.logits(batch.inputs, ["a", "b", "a"]), expected, rtol=0, atol=1e-6)
    assert counts == [3, 4, 4]


@pytest.mark.parametrize("written", [False, True])
def test_answers_share_pictures_and_leave_no_hook(written: bool) -> None:
    lvlm = model("llava")
    data = ConceptDataset("asked", tuple(questions()))
    with sizes(lvlm) as counts:
        grouped = answer(lvlm, data, batch_size=8, generate=written, max_new_tokens=3)
        alone = answer(lvlm, data, batch_size=1, generate=written, max_new_tokens=3)
    assert counts == [3 * counts[1]] + [counts[1]] * 4
    for reference, other in zip(alone.answers, grouped.answers, strict=True):
        assert (reference.given, reference.text) == (other.given, other.text)
        assert written or reference.margin == pytest.approx(other.margin, abs=1e-5)
    tower: Any = lvlm.tower
    assert not tower._forward_hooks
    assert not tower._forward_pre_hooks


def test_batches_as_they_fill_up_are_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    lvlm = model("llava")
    short = [replace(example(n), id=f"short{n}") for n in range(3)]
    examples = [short[0], *questions()[:2], short[1], *questions()[2:], short[2]]
    ordered = list(lvlm.batches(examples, 2))
    own, encoded = lvlm.encode, []
    monkeypatch.setattr(lvlm, "encode", lambda e: encoded.append(e.id) or own(e))
    filling = lvlm.batches(examples, 2, in_order=False)
    first = next(filling)
    assert (first.index, len(encoded)) == ((1, 2), 3)
    batches = [first, *filling]
    assert sorted(b.index for b in batches) == sorted(b.index for b in ordered)
    for batch in batches:
        same = next(b for b in ordered if b.index == batch.index)
        assert all(torch.equal(batch.inputs[name], same.inputs[name]) for name in same.inputs)
