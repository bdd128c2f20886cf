"""Circuits of edges run alone: against the plain runs, hooks that move one edge by hand, and circuits that were planted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from circuits import attribution, faithfulness
from circuits.results.graph import Graph
from groundscope.core.errors import ConfigError, PatchError
from groundscope.testing.planted_circuits import plant
from lvlm import Lvlm
from tests.toys.edge_oracle import PATHS, Oracle, double, graph_of, parallel
from tests.toys.families import model
from tests.toys.patching_oracle import pair_of
from tests.toys.random_models import hooks_of


def with_edges(graph: Graph, mask: np.ndarray) -> Graph:
    return replace(graph, kept=mask & graph.shape.there)


def alone(lvlm: Lvlm, circuit: Graph, **options: Any) -> float:
    """The log-odds of the clean against the corrupt answer with a circuit alone."""
    return float(faithfulness.edges(lvlm, [pair_of(0)], [circuit], **options).margins[0, 0])


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "paligemma2", "blip2_opt", "gemma3", "phi"])
def test_all_edges_are_the_clean_run_and_none_the_corrupt_one(family: str) -> None:
    lvlm = parallel() if family == "phi" else model(family)
    graph = graph_of(lvlm, parallel_mlp=family == "phi")
    before = hooks_of(lvlm)
    curve = faithfulness.edges(lvlm, [pair_of(0)], graph, shares=(0, 0.3, 1))
    key = lvlm.processor.tokenizer.convert_tokens_to_ids
    right, wrong = (key(getattr(pair_of(0), side).answer) for side in ("clean", "corrupt"))
    clean, corrupt = (
        float(logits[right] - logits[wrong])
        for logits in (lvlm.logits(lvlm.encode(getattr(pair_of(0), side)).inputs)[0] for side in ("clean", "corrupt"))
    )
    assert curve.margins[0, [0, 2]] == pytest.approx([corrupt, clean], abs=2e-5)
    assert curve.full[0] == pytest.approx(clean, abs=1e-6)
    assert curve.empty[0] == pytest.approx(corrupt, abs=1e-6)
    assert abs(curve.margins[0, 1] - clean) > 1e-4
    assert hooks_of(lvlm) == before


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_a_circuit_with_one_edge_equals_hooks_that_patch_it(family: str) -> None:
    lvlm = double(family)
    oracle, graph = Oracle(lvlm, pair_of(0), PATHS[family]), graph_of(lvlm)
    shape = graph.shape
    moved = 0
    for source in ("L0.H1", "L0.mlp") if family == "qwen3_vl" else ("input", "L0.H1", "L0.mlp"):
        sender = shape.sources.index(source)
        for target in ("L1.H2.q", "L1.H2.k", "L2.H1.v", "L1.mlp", "logits"):
            # The sender has its clean value, this reader alone hears of it, and all that follow hear of the reader.
            mask = np.broadcast_to(shape.readers <= sender, shape.there.shape).copy()
            mask[sender + 1 :] = True
            mask[: sender + 1, shape.targets.index(target)] |= np.arange(sender + 1) == sender
            exact = oracle.edge_effect(source, target, 1.0)
            assert alone(lvlm, with_edges(graph, mask)) == pytest.approx(exact, abs=1e-7), (source, target)
            moved += abs(exact - oracle.seen["corrupt"]["metric"]) > 1e-6
    assert moved >= 10


def test_dead_ends_change_nothing_and_pairs_do_not_mix() -> None:
    lvlm = model("llava")
    cut = graph_of(lvlm).top(60, prune=False)
    assert len(cut.pruned()) < 60
    assert alone(lvlm, cut) == pytest.approx(alone(lvlm, cut.pruned()), abs=1e-5)
    pairs = [pair_of(0), pair_of(2)]
    joint = faithfulness.edges(lvlm, pairs, [cut])
    separate = [faithfulness.edges(lvlm, [pair], [cut]).margins[0, 0] for pair in pairs]
    np.testing.assert_allclose(joint.margins[:, 0], separate, atol=1e-5)
    gap = joint.full.mean() - joint.empty.mean()
    assert joint.faithfulness[0] == pytest.approx((np.mean(separate) - joint.empty.mean()) / gap, rel=1e-3)


@pytest.mark.parametrize("circuit", ["direct", "two_step"])
def test_a_planted_circuit_is_faithful_and_needs_every_edge(circuit: Any) -> None:
    planted = plant(1, circuit)
    heads = [f"L{h.layer}.H{h.head}" for h in (planted.grounding, planted.mover, planted.reader) if h is not None]
    chain = [f"{a} -> {b}.v" for a, b in zip(["input", *heads], heads, strict=False)] + [f"{heads[-1]} -> logits"]
    graph = graph_of(planted.model)
    at = [tuple(names.index(end) for names, end in zip((graph.shape.sources, graph.shape.targets), e.split(" -> "), strict=True))
          for e in chain]  # fmt: skip
    held_out = planted.pairs(6, seed=1)
    for missing in (None, *at):
        mask = np.zeros_like(graph.kept)
        for edge in at:
            mask[edge] = edge != missing
        f = faithfulness.edges(planted.model, held_out, [with_edges(graph, mask)]).faithfulness[0]
        assert f == pytest.approx(1.0 if missing is None else 0.0, abs=1e-3)


def test_a_curve_of_edges_has_areas_intervals_and_a_table() -> None:
    planted = plant(1)
    graph = attribution.edges(planted.model, planted.pairs(3))
    total = int(graph.shape.there.sum())
    curve = faithfulness.edges(planted.model, planted.pairs(6, seed=1), graph, shares=(0, 2 / total, 0.1, 1))
    assert curve.sizes == (0, 2, round(0.1 * total), total)
    np.testing.assert_allclose(curve.faithfulness, [0, 1, 1, 1], atol=1e-3)
    assert curve.cpr == pytest.approx(1 - 1 / total, abs=1e-3)
    assert curve.cmd == pytest.approx(1 / total, abs=1e-3)
    low, high = curve.interval("cpr").low, curve.interval("cpr").high
    assert low <= curve.cpr <= high
    assert list(curve.frame().columns) == ["share", "edges", "faithfulness", "low", "high"]
    top = faithfulness.edges(
        planted.model, planted.pairs(6, seed=1), graph, order="absolute", choose="top", shares=(0.1,)
    )
    assert top.sizes == (round(0.1 * total),)
    assert {e.name for e in top.circuits[0].edges} == {e.name for e in graph.top(top.sizes[0], prune=False).edges}


def test_invalid_arguments_are_named() -> None:
    lvlm = model("llava")
    graph, pairs = graph_of(lvlm), [pair_of(0)]
    options: list[tuple[dict[str, Any], str]] = [
        ({"order": "best"}, "unknown order 'best'; choose 'signed' or 'absolute'"),
        ({"choose": "random"}, "unknown choose 'random'; choose 'greedy' or 'top'"),
        ({"shares": (0.5, 0.1)}, "pass ascending shares of all edges"),
        ({"shares": ()}, "pass ascending shares of all edges"),
        ({"batch_size": 0}, "batch_size=0"),
    ]
    for option, message in options:
        with pytest.raises(ConfigError, match=message):
            faithfulness.edges(lvlm, pairs, graph, **option)
    with pytest.raises(ConfigError, match="in ascending size"):
        faithfulness.edges(lvlm, pairs, [graph.top(9, prune=False), graph.top(9, prune=False)])
    with pytest.raises(PatchError, match="but llava has"):
        faithfulness.edges(lvlm, pairs, graph_of(plant(0).model))
    with pytest.raises(PatchError, match="but llava has"):
        faithfulness.edges(lvlm, pairs, graph_of(lvlm, parallel_mlp=True))
    same = replace(pair_of(0), corrupt=replace(pair_of(0).corrupt, image=pair_of(0).clean.image))
    with pytest.raises(PatchError, match="without any edge"):
        faithfulness.edges(lvlm, [same], graph, shares=(1,))
