"""Circuits cut out of small graphs, against loops over named edges."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from circuits.results.graph import Graph, Shape
from groundscope.core.document_digest import document_digest
from groundscope.core.errors import PatchError, StoreError

RECORD: dict[str, Any] = {
    "model": "toy", "config_hash": "c", "weights_hash": "w", "pairs_digest": "p", "mode": "denoise", "n_pairs": 4,
    "excluded": 1,
}  # fmt: skip


def graph(seed: int = 0, layers: int = 3, heads: int = 2, parallel: bool = False) -> Graph:
    shape = Shape(layers, heads, (parallel,) * layers)
    draw = np.random.default_rng(seed).normal(size=shape.there.shape)
    return Graph(np.where(shape.there, draw, 0), shape, **RECORD, provenance={"steps": 5})


def named(graph_: Graph) -> dict[str, float]:
    """All edges by name, derived independently from the order in which nodes write."""
    layers, heads = graph_.shape.n_layers, graph_.shape.n_heads
    scores: dict[str, float] = {}
    written = ["input"]
    for i in range(layers):
        mine = [f"L{i}.H{h}" for h in range(heads)]
        scores |= {f"{u} -> {v}.{c}": 0.0 for u in written for v in mine for c in "qkv"}
        scores |= {f"{u} -> L{i}.mlp": 0.0 for u in written + ([] if graph_.shape.parallel[i] else mine)}
        written += [*mine, f"L{i}.mlp"]
    scores |= {f"{u} -> logits": 0.0 for u in written}
    return {name: graph_.score(name) for name in scores}


def ends(name: str) -> tuple[str, str]:
    source, target = name.split(" -> ")
    return source, re.sub(r"\.[qkv]$", "", target)


def without_dead_ends(edges: set[str]) -> set[str]:
    while True:
        begun, ended = ({ends(e)[k] for e in edges} for k in (0, 1))
        keep = {e for e in edges if ends(e)[0] in ended | {"input"} and ends(e)[1] in begun | {"logits"}}
        if keep == edges:
            return edges
        edges = keep


@pytest.mark.parametrize("parallel", [False, True])
def test_edges_are_those_from_earlier_writers_to_later_readers(parallel: bool) -> None:
    example = graph(parallel=parallel)
    edges = named(example)
    assert len(example) == len(edges) == example.shape.there.sum()
    assert {e.name: e.score for e in example.edges} == edges
    assert [abs(e.score) for e in example.edges] == sorted((abs(s) for s in edges.values()), reverse=True)
    frame = example.frame()
    assert dict(zip(frame.name, frame.score, strict=True)) == edges
    assert set(frame.input) == {"q", "k", "v", ""}
    assert example.nodes[0] == "input"
    assert example.nodes[-1] == "logits"
    assert len(example.nodes) == 2 + 3 * 3


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_top_threshold_and_pruning(seed: int, absolute: bool) -> None:
    example = graph(seed)
    edges = named(example)
    order = sorted(edges, key=lambda name: -(abs(edges[name]) if absolute else edges[name]))
    for n in (1, 8, 20, len(edges)):
        plain = example.top(n, absolute=absolute, prune=False)
        assert {e.name for e in plain.edges} == set(order[:n])
        assert {e.name for e in example.top(n, absolute=absolute).edges} == without_dead_ends(set(order[:n]))
    least = 0.7
    above = {name for name, score in edges.items() if (abs(score) if absolute else score) >= least}
    assert {e.name for e in example.threshold(least, absolute=absolute, prune=False).edges} == above
    cut = example.threshold(least, absolute=absolute)
    assert {e.name for e in cut.edges} == without_dead_ends(above)
    assert cut.pruned().edges == cut.edges
    assert (cut.scores == example.scores).all()


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_greedy_adds_the_largest_edge_into_the_circuit_at_each_step(seed: int, absolute: bool) -> None:
    example = graph(seed)
    edges = named(example)
    inside, chosen = {"logits"}, []
    while len(chosen) < 25:
        open_ = [name for name in edges if ends(name)[1] in inside and name not in chosen]
        best = max(open_, key=lambda name: abs(edges[name]) if absolute else edges[name])
        chosen.append(best)
        inside.add(ends(best)[0])
        circuit = example.greedy(len(chosen), absolute=absolute, prune=False)
        assert {e.name for e in circuit.edges} == set(chosen)
    assert {e.name for e in example.greedy(25, absolute=absolute).edges} == without_dead_ends(set(chosen))


def test_heads_are_ranked_by_the_sum_of_their_outgoing_edges() -> None:
    example = graph()
    edges = named(example)
    for i in range(3):
        for h in range(2):
            expected = sum(score for name, score in edges.items() if ends(name)[0] == f"L{i}.H{h}")
            assert example.heads[i, h] == pytest.approx(expected)


def test_a_loaded_graph_equals_the_saved_one(tmp_path: Path) -> None:
    example = graph(parallel=True).top(12)
    path = example.save(tmp_path / "deep" / "graph.json")
    back = Graph.load(path)
    assert repr(back) == repr(example)
    assert back.low.size == 0
    ends = replace(example, low=example.scores - 1, high=example.scores + example.shape.there)
    loaded = Graph.load(ends.save(tmp_path / "ends.json"))
    np.testing.assert_array_equal(loaded.high, ends.high)
    np.testing.assert_array_equal(loaded.low, np.where(example.shape.there, ends.low, 0))
    assert loaded.frame().iloc[0][["low", "high"]].tolist() == pytest.approx(
        [loaded.edges[0].score + d for d in (-1, 1)]
    )
    assert example.frame()["low"].isna().all()
    with pytest.raises(PatchError, match="shape of the scores"):
        replace(example, low=example.scores)
    np.testing.assert_array_equal(back.scores, example.scores)
    np.testing.assert_array_equal(back.kept, example.kept)
    assert back.shape == example.shape
    assert back.provenance == example.provenance
    record = json.loads(path.read_text())
    assert record["edges"]["input -> L0.H0.q"] == {
        "score": example.score("input -> L0.H0.q"),
        "kept": bool(example.kept[0, 0]),
    }
    small = Graph.load(example.save(tmp_path / "small.json", every=False))
    assert small.edges == example.edges
    assert not small.scores[~example.kept].any()
    with pytest.raises(ValueError, match="read-only"):
        back.scores[0, 0] = 1


def test_a_file_of_the_last_version_with_old_node_names_is_read(tmp_path: Path) -> None:
    shape, sha = Shape(2, 1, (False, False)), "c" * 64
    old = {
        "edge_graph": 3, "model": "m", "config_hash": sha, "weights_hash": sha, "pairs_digest": sha, "n_pairs": 4,
        "excluded": 1, "direction": "noise", "provenance": {"steps": 5, "min_effect": 0.25}, "n_layers": 2, "n_heads": 1,
        "parallel": [False, False], "nodes": ["a0.h0", "logits"],
        "edges": {
            "input -> a0.h0<q>": {"score": 1.0, "kept": False}, "a0.h0 -> m1": {"score": 2.0, "kept": True},
            "m0 -> a1.h0<v>": {"score": 3.0, "kept": True},
        },
    }  # fmt: skip
    (tmp_path / "old.json").write_text(json.dumps(old | {"digest": document_digest(old)}))
    read = Graph.load(tmp_path / "old.json")
    assert {e.name: e.score for e in read.edges} == {"L0.H0 -> L1.mlp": 2.0, "L0.mlp -> L1.H0.v": 3.0}
    assert read.score("input -> L0.H0.q") == 1.0
    assert (read.mode, read.metric, read.tokens, read.min_effect) == ("noise", "logit_difference", "all", 0.25)
    assert (read.shape, read.n_pairs, read.ids) == (shape, 4, ())
    rewritten = Graph.load(read.save(tmp_path / "new.json"))
    assert rewritten.edges == read.edges


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ("{", "damaged"),
        ("[1]", "not a graph file"),
        ({"edge_graph": 9}, "version 9"),
        ({"n_layers": 10**6}, "damaged graph"),
        ({"n_layers": 2}, "damaged graph"),
        ({"edges": {"L2.mlp -> L0.H0.q": {"score": 1, "kept": True}}}, "damaged graph"),
        ({"edges": {"input -> L0.mlp": {"score": None, "kept": True}}}, "damaged graph"),
        ({"model": None, "n_pairs": None, "more": 1}, "damaged graph"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, change: str | dict[str, object], match: str) -> None:
    path = graph().save(tmp_path / "graph.json")
    if not isinstance(change, str):
        changed = json.loads(path.read_text()) | change
        change = json.dumps(changed | {"digest": document_digest(changed)})
    path.write_text(change)
    with pytest.raises(StoreError, match=match):
        Graph.load(path)
    with pytest.raises(StoreError, match="no such file"):
        Graph.load(tmp_path / "none.json")


def test_invalid_arguments_are_named() -> None:
    example = graph()
    for n in (0, 10**6):
        with pytest.raises(PatchError, match=f"circuit of {n:,} edges is impossible"):
            example.top(n)
        with pytest.raises(PatchError, match=f"circuit of {n:,} edges is impossible"):
            example.greedy(n)
    with pytest.raises(PatchError, match="use names such as"):
        example.score("L9.H0 -> L0.mlp")
    with pytest.raises(PatchError, match=r"'L0\.H0' reads before 'L0.mlp' writes|reads before"):
        example.score("L0.mlp -> L0.H0.q")
    with pytest.raises(PatchError, match="needs finite scores"):
        Graph(example.scores[:2], example.shape, **RECORD)
    backwards = example.scores.copy()
    backwards[-1, 0] = 1
    with pytest.raises(PatchError, match="backward edges"):
        Graph(backwards, example.shape, **RECORD)


def test_the_plot_draws_the_edges_of_the_circuit(tmp_path: Path) -> None:
    from matplotlib.patches import FancyArrowPatch

    example = graph().greedy(15)
    ax = example.draw(tmp_path / "deep" / "graph.png")
    assert (tmp_path / "deep" / "graph.png").stat().st_size > 5000
    arrows = [p for p in ax.patches if isinstance(p, FancyArrowPatch)]
    assert len(arrows) == len(example)
    assert {t.get_text() for t in ax.texts if len(t.get_text()) > 1} == set(example.nodes)
    assert len([p for p in example.draw(most=3).patches if isinstance(p, FancyArrowPatch)]) == 3
    assert "the largest 3 drawn" in example.draw(most=3).get_title()
    empty = example.threshold(1e9)
    assert len(empty) == 0
    assert not empty.draw().patches
