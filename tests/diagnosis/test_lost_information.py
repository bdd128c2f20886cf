"""The nats of what a diagnosis calls lost, on synthetic activations whose loss is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from activation_store import MemorySource
from diagnosis import Diagnoses, Diagnosis, measure_losses
from diagnosis.results import LOST, NOT_READABLE, Reading

ABOUT = {"id": "q0", "group": "0", "level": "attribute", "split": "neutral", "kind": "is_color"} | {
    "question": "Is the apple red?",
    "truth": "no",
}


def diagnosed(tokens: str = "object:mean") -> Diagnoses:
    """One answer whose truth is decodable in the tower, and at the projector not."""
    readings = (
        Reading("vision", "vision.L1.resid_post", tokens, 1, 2.0, "truth", used=True),
        Reading("projector", "projector.out", tokens, 0, -1.0, "other", used=True),
    )
    stages = {"vision": "truth", "projector": "other", "image": "other", "last": "other"}
    lost = Diagnosis(ABOUT, "yes", "attribute:red", LOST, 0.9, readings=readings, stages=stages)
    right = Diagnosis({**ABOUT, "id": "q1"}, "no", "attribute:red", None, float("nan"))
    return Diagnoses((lost, right), (), "m", "c", "w")


def store(kind: str) -> MemorySource:
    """The tower encodes red along one axis; the projector not at all, or as a product of signs."""
    rng = np.random.default_rng(0)
    red = np.arange(500) % 2
    sign = rng.choice([-1, 1], size=500)
    tower = rng.normal(size=(500, 2, 6))
    tower[:, 1, 0] += 3 * (2 * red - 1)
    projector = rng.normal(size=(500, 1, 6))
    if kind == "product":
        projector[:, 0, 0] += 3 * sign
        projector[:, 0, 1] += 3 * sign * (2 * red - 1)
    arrays = {("vision.resid_post", "object:mean"): tower, ("projector.out", "object:mean"): projector}
    label = red.astype(float)
    label[450:] = np.nan
    table = {"id": [f"q{i}" for i in range(500)], "group": np.arange(500), "level": ["attribute"] * 500}
    return MemorySource(arrays, {**table, "attribute:red": label})


def test_a_loss_needs_both_families(tmp_path: Path) -> None:
    before = diagnosed()
    lost, right = measure_losses(store("lost"), before)
    assert (lost.verdict, lost.confidence) == (LOST, 0.9)
    assert "About 'red', of 0.69 nats, a linear reader gets 0.6" in lost.information
    assert "-0.00" in lost.information or " 0.00 in the projector" in lost.information
    assert lost.information.endswith(": lost.")
    assert lost.information in str(lost)
    assert right == before[1]
    saved = replace(before, examples=(lost, right))
    assert Diagnoses.load(saved.save(tmp_path / "d.json"))[0] == lost

    (other, _) = measure_losses(store("product"), before)
    assert (other.verdict, other.confidence) == (NOT_READABLE, 0.0)
    assert (
        other.reason
        == "a nonlinear reader still reads 'red' in the projector, so it is less linearly available, not lost"
    )
    assert other.information.endswith("less linearly available.")


@pytest.mark.parametrize("tokens", ["image:all", "image:mean"])
def test_what_cannot_be_measured_stays_as_it_was(tokens: str) -> None:
    before = diagnosed(tokens)
    assert measure_losses(store("lost"), before).examples == before.examples
    few = store("lost").frame().assign(**{"attribute:red": [1.0, 0.0] + [np.nan] * 498})
    source = store("lost")
    arrays = {(f"{a.stack}.{a.component}", a.tokens): np.zeros((500, a.n_layers, a.width)) for a in source.arrays}
    read = diagnosed()
    assert measure_losses(MemorySource(arrays, few), read).examples == read.examples  # two examples with a label
