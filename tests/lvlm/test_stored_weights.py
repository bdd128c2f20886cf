"""Every function that runs a model, with weights in bfloat16, 8 bits, 4 bits and outside the modules, and the published table."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import circuits
from activation_store import trace
from behavior import answer
from circuits import (
    HeadSet,
    attention_to_image,
    attribution,
    faithfulness,
    head_table,
    patch,
    patch_heads,
    patch_paths,
)
from concepts import ConceptDataset, counterfactuals, scenes
from concepts.counterfactual_pair import CounterfactualPair
from lvlm import Head, Lvlm
from lvlm.access.weights import columns, matrix_of, quantized
from lvlm.identity_checks import validate
from mitigation import Contrast, SteeringVector, derive, export
from mitigation.steering.export import apply_bias
from mitigation.steering.export.residual_conversion import to_residual
from tests.toys.stored_weights import KINDS, Packed, stored

PAGE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "families.md"
HEADS = (Head(4, 7), Head(5, 2))
"""Heads with an effect, so that errors are relative to more than rounding."""
QUIET: dict[str, Any] = {"min_effect": 0.0, "progress": False}
Values = np.ndarray


@cache
def data() -> ConceptDataset:
    icon_scenes = scenes.dataset(10, 0, splits=("neutral",))
    alike = [
        e
        for e in icon_scenes
        if e.kind == "existence" and e.question.startswith("Is there a ") and e.question.count(" ") == 6
    ]
    return ConceptDataset("d", tuple(alike[:2]), {})


@cache
def pairs() -> tuple[CounterfactualPair, ...]:
    return tuple(counterfactuals.pairs(scenes.dataset(10, 0, splits=("neutral",)), "object", limit=1))


def logits(model: Lvlm) -> Values:
    return model.logits(model.collate([model.encode(data().examples[0])])).detach().float().numpy()


def vector(model: Lvlm) -> SteeringVector:
    return derive.mean_difference(Contrast.from_pairs(model, pairs()), heads=HEADS)


def changes(of: SteeringVector) -> Values:
    return np.concatenate([np.ravel(getattr(change, "direction")) for change in of.changes.values()])  # noqa: B009


def effects(scores: Any) -> Values:
    """Return the first array of scores that a result has."""
    names = ("ablated", "effects", "scores", "values", "shares")
    return np.asarray(next(getattr(scores, n) for n in names if isinstance(getattr(scores, n, None), np.ndarray)))


def traced(model: Lvlm, folder: Path) -> Values:
    store = trace(model, data(), ["z", "vision.resid_post"], ["last", "image:mean"], folder / "s", progress=False)
    sites = (("decoder.L3.z", "last"), ("vision.L2.resid_post", "image:mean"))
    return np.concatenate([store.read(site, tokens).ravel() for site, tokens in sites])


def steered(model: Lvlm, _: Path) -> Values:
    with vector(model).applied(model):
        return logits(model)


def baked(model: Lvlm, folder: Path) -> Values:
    undo = apply_bias.apply(model.hf, export.baked(vector(model).at("all"), folder / "b.safetensors", model))
    try:
        return logits(model)
    finally:
        undo()


def graph_of(model: Lvlm) -> Any:
    return attribution.edges(model, pairs(), point="run", steps=1, **QUIET)


def edge_curve(model: Lvlm, _: Path) -> Values:
    return np.asarray(faithfulness.edges(model, pairs(), [circuit()], progress=False).faithfulness)


@cache
def circuit() -> Any:
    return graph_of(stored("CPU offload")[1]).greedy(400, prune=False)


def table_of(model: Lvlm, _: Path) -> Values:
    return np.concatenate([np.ravel(v) for v in head_table(model, list(data()), progress=False).values.values()])


@dataclass(frozen=True)
class Row:
    """A function of the table."""

    run: Callable[[Lvlm, Path], Values]
    half: float
    """Tolerance with bfloat16, relative to the largest value."""
    eight: float
    """Tolerance with 8 bits."""
    unit: float = 0.0
    """Value that counts as large if all values are smaller: 1 for scores, where 1 is the whole effect, and for margins."""
    refused: str = ""
    """Kind of weights with which it is an error that names the reason."""


ROWS: Mapping[str, Row] = {
    "`Lvlm.logits`, `read`, `ask`, `generate`": Row(lambda m, _: logits(m), 0.1, 0.1),
    "`activation_store.trace`": Row(traced, 0.05, 0.05),
    "`behavior.answer`": Row(
        lambda m, _: np.array([a.margin for a in answer(m, data(), progress=False).answers]), 0.1, 0.1
    ),
    "`patch_heads`": Row(lambda m, _: effects(patch_heads(m, pairs(), **QUIET)), 0.1, 0.1),
    "`patch`": Row(lambda m, _: effects(patch(m, pairs(), ["resid_post"], **QUIET)), 0.1, 0.1),
    "`patch_paths`": Row(lambda m, _: effects(patch_paths(m, pairs(), HEADS, **QUIET)), 0.1, 0.1, unit=1),
    "`ablate`": Row(
        lambda m, _: effects(circuits.ablate(m, list(data()), [HeadSet(HEADS)], progress=False)), 0.1, 0.1, unit=1
    ),
    "`head_table`": Row(table_of, 0.1, 0.1),
    "`attention_to_image`": Row(lambda m, _: attention_to_image(m, list(data()), HEADS, progress=False).maps, 0.1, 0.1),
    "`attribution.heads`": Row(lambda m, _: effects(attribution.heads(m, pairs(), **QUIET)), 0.1, 0.1),
    "`attribution.nodes`": Row(lambda m, _: effects(attribution.nodes(m, pairs(), **QUIET)), 0.1, 0.1),
    "`attribution.inputs`": Row(lambda m, _: effects(attribution.inputs(m, pairs(), **QUIET)), 0.1, 0.1, unit=1),
    "`attribution.edges`": Row(lambda m, _: graph_of(m).scores, 0.1, 0.1),
    "`faithfulness.edges`": Row(edge_curve, 0.1, 0.1),
    "`mitigation.derive`": Row(lambda m, _: changes(vector(m)), 0.1, 0.1),
    "`SteeringVector.applied`": Row(steered, 0.1, 0.1),
    "`to_residual`, exports of heads to layers": Row(lambda m, _: changes(to_residual(vector(m), m)), 0.1, 0.1),
    "`export.baked`, `apply_bias`": Row(baked, 0.1, 0.1, refused="CPU offload"),
}


@pytest.mark.parametrize("name", list(ROWS))
def test_a_function_runs_and_agrees_with_the_same_weights_in_float32(name: str, tmp_path: Path) -> None:
    """4 bits and offloaded weights are the same matrices, so their values are equal; bfloat16 and 8 bits round activations."""
    row, errors = ROWS[name], {}
    for kind in KINDS:
        model, reference = stored(kind)
        (tmp_path / kind).mkdir()
        (tmp_path / f"{kind} reference").mkdir()
        if kind == row.refused:
            with pytest.raises(ValueError, match="offloaded by accelerate"):
                row.run(model, tmp_path / kind)
            continue
        actual, expected = row.run(model, tmp_path / kind), row.run(reference, tmp_path / f"{kind} reference")
        there = np.isfinite(expected)
        assert there.any()
        assert (np.isfinite(actual) == there).all()
        largest = max(row.unit, np.abs(expected[there]).max())
        errors[kind] = float(np.abs(actual - expected)[there].max() / largest)
    assert errors["bfloat16"] <= row.half
    assert errors["8-bit"] <= row.eight
    assert errors["4-bit"] <= 1e-5
    assert errors.get("CPU offload", 0.0) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_checks_at_load_and_hashes_run(kind: str) -> None:
    model, _ = stored(kind)
    errors = validate(model, model.encode(data().examples[0]))
    assert not np.isnan(list(errors.values())).any()
    assert model.weights_hash


def test_the_matrix_of_a_packed_layer_is_what_it_applies() -> None:
    for kind in ("8-bit", "4-bit"):
        layer = stored(kind)[0].output_projection("decoder", 0)
        assert isinstance(layer, Packed)
        assert quantized(layer)
        assert layer.weight.shape[1] == 1
        inputs = torch.zeros(0)
        torch.testing.assert_close(matrix_of(layer, inputs), layer.matrix())
        torch.testing.assert_close(columns(layer, slice(3, 5), inputs), layer.matrix()[:, 3:5])


def table() -> str:
    lines = ["| function | bfloat16 | 8-bit | 4-bit | CPU offload |", "|---|---|---|---|---|"]
    for name, row in ROWS.items():
        lines.append(f"| {name} | {row.half:g} | {row.eight:g} | equal | {'refused' if row.refused else 'equal'} |")
    lines.append("| `validate`, `weights_hash` | runs | runs | runs | runs |")
    return "\n".join(lines)


def test_the_guide_shows_the_table() -> None:
    start, end = "<!-- weights: begin -->\n", "\n<!-- weights: end -->"
    text = PAGE.read_text(encoding="utf-8")
    if os.environ.get("WRITE_WEIGHTS"):
        head, _, tail = text.partition(start)
        PAGE.write_text(head + start + table() + end + tail.partition(end)[2], encoding="utf-8")
        text = PAGE.read_text(encoding="utf-8")
    assert table() == text.partition(start)[2].partition(end)[0], (
        "run this test with WRITE_WEIGHTS=1 to renew the table"
    )
