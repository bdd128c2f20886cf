"""The decoder as a graph of nodes and scored edges, and the selection of circuits from it."""

from __future__ import annotations

import heapq
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from circuits.results.pair_scores import PairRecord, upgraded
from groundscope.core.artifacts import reading_result, write_bytes
from groundscope.core.document_digest import KEY, document_digest, take_digest
from groundscope.core.errors import PatchError, StoreError
from groundscope.core.result_fields import building, check_fields
from groundscope.core.text import format_count
from groundscope.core.user_files import read_json

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

VERSION = 4
_LAST_WITHOUT_DIGEST = 2
_LAST_WITH_OLD_NAMES = 3
"""Later versions have all fields of `PairRecord`, and name nodes ``L0.H1`` and ``L0.mlp``, not ``a0.h1`` and ``m0``."""
_OLD_NODE = re.compile(r"\ba(\d+)\.h(\d+)(?:<([qkv])>)?|\bm(\d+)\b")
MOST = 2**27
"""Largest number of entries of an edge table that `Graph.load` accepts."""
_KIND = "edge_graph"


@dataclass(frozen=True)
class Shape:
    """The nodes of a decoder, in the order in which they write, and the edges between them."""

    n_layers: int
    n_heads: int
    parallel: tuple[bool, ...]
    """For each layer, whether its MLP is parallel to its attention, so that its heads have no edge to the MLP."""

    @property
    def n_sources(self) -> int:
        """Number of nodes that write: the input, and the heads and the MLP of each layer."""
        return 1 + self.n_layers * (self.n_heads + 1)

    @property
    def n_targets(self) -> int:
        """Number of targets that read: three per head and one per MLP, and the logits."""
        return 1 + self.n_layers * (3 * self.n_heads + 1)

    def before_attention(self, layer: int) -> int:
        """Return the number of nodes that write before a layer's attention reads; also the index of its first head."""
        return 1 + layer * (self.n_heads + 1)

    def before_mlp(self, layer: int) -> int:
        """Return the number of nodes that write before a layer's MLP reads."""
        return self.before_attention(layer) + (0 if self.parallel[layer] else self.n_heads)

    def columns(self, layer: int) -> slice:
        """Return the indices of a layer's targets: queries, keys and values of all heads, then the MLP."""
        width = 3 * self.n_heads + 1
        return slice(layer * width, (layer + 1) * width)

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Names of the nodes that write: ``input``, then per layer ``L0.H0``, … and ``L0.mlp``."""
        layers = ((*(f"L{i}.H{h}" for h in range(self.n_heads)), f"L{i}.mlp") for i in range(self.n_layers))
        return ("input", *(name for layer in layers for name in layer))

    @cached_property
    def targets(self) -> tuple[str, ...]:
        """Names of the targets that read: ``L0.H0.q``, …, ``L0.H0.k``, …, ``L0.H0.v``, …, ``L0.mlp``, …, ``logits``."""
        layers = (
            (*(f"L{i}.H{h}.{c}" for c in "qkv" for h in range(self.n_heads)), f"L{i}.mlp") for i in range(self.n_layers)
        )
        return (*(name for layer in layers for name in layer), "logits")

    @cached_property
    def there(self) -> np.ndarray:
        """Which edges exist, bool ``[n_sources, n_targets]``."""
        exists = np.zeros((self.n_sources, self.n_targets), bool)
        for i in range(self.n_layers):
            columns = self.columns(i)
            exists[: self.before_attention(i), columns] = True
            exists[: self.before_mlp(i), columns.stop - 1] = True
        exists[:, -1] = True
        exists.setflags(write=False)
        return exists

    @cached_property
    def readers(self) -> np.ndarray:
        """Index of the node of each target, int ``[n_targets]``; `n_sources` for the logits."""
        by_layer = [
            [self.before_attention(i) + h for _ in "qkv" for h in range(self.n_heads)]
            + [self.before_attention(i) + self.n_heads]
            for i in range(self.n_layers)
        ]
        return np.array([number for layer in by_layer for number in layer] + [self.n_sources])


@dataclass(frozen=True)
class Edge:
    """One edge, such as ``L3.H5 -> logits`` or ``input -> L0.H1.q``."""

    source: str
    target: str
    score: float
    kept: bool

    @property
    def name(self) -> str:
        """Name of the edge."""
        return f"{self.source} -> {self.target}"

    @property
    def reader(self) -> tuple[str, str]:
        """The node that reads, and which of its inputs: ``("L0.H1", "q")``; an empty input for an MLP and the logits."""
        node, _, letter = self.target.rpartition(".")
        return (node, letter) if letter in ("q", "k", "v") else (self.target, "")


@dataclass(frozen=True, eq=False, repr=False)
class Graph(PairRecord):
    """Scores of all edges, and the subset of edges in the circuit; returned by `attribution.edges`.

    Views (`edges`, `nodes`, `frame`) read two arrays. Circuits (`top`, `threshold`, `greedy`) are graphs with another
    `kept` mask.

    Examples
    --------
    >>> import numpy as np
    >>> from circuits.results.graph import Graph, Shape
    >>> shape = Shape(n_layers=1, n_heads=1, parallel=(False,))
    >>> record = {"mode": "denoise", "excluded": 0, "model": "toy", "config_hash": "", "weights_hash": "", "pairs_digest": ""}
    >>> graph = Graph(np.where(shape.there, 0.5, 0), shape, n_pairs=3, **record)
    >>> graph.score("input -> L0.H0.v"), graph.top(2, prune=False).edges[0].name
    (0.5, 'input -> L0.H0.q')
    """

    scores: np.ndarray
    """Mean over pairs of the share of ``M_clean - M_corrupt`` that an edge carries, float64 ``[n_sources, n_targets]``;
    0 without an edge. Read-only."""
    shape: Shape
    n_pairs: int = field(kw_only=True)
    """Number of pairs used."""
    tokens: str = field(default="all", kw_only=True)
    kept: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    """Edges in the circuit, bool, shaped as `scores`; all existing edges by default."""
    low: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """Lower end of each score's interval over groups of pairs, shaped as `scores`; empty without intervals."""
    high: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """Upper end of each score's interval, as `low`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        there = self.shape.there
        mask = there if self.kept.size == 0 and there.size else np.array(self.kept, bool)
        scores = np.array(self.scores, np.float64)
        if scores.shape != there.shape or mask.shape != there.shape or not np.isfinite(scores).all():
            decoder = f"{self.shape.n_layers} layers of {self.shape.n_heads} heads"
            msg = f"a graph of {decoder} needs finite scores, and kept, of shape {list(there.shape)}"
            raise PatchError(msg)
        if len(self.shape.parallel) != self.shape.n_layers or (scores[~there] != 0).any() or mask[~there].any():
            msg = "the graph has scores of edges that do not exist (backward edges); set them to 0"
            raise PatchError(msg)
        ends = {name: np.array(getattr(self, name), np.float64) for name in ("low", "high")}
        if (
            any(array.shape not in ((0,), there.shape) for array in ends.values())
            or len({a.shape for a in ends.values()}) > 1
        ):
            msg = f"low and high must both have the shape of the scores {list(there.shape)}, or both be empty"
            raise PatchError(msg)
        for name, array in (("scores", scores), ("kept", mask.copy()), *ends.items()):
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    def __repr__(self) -> str:
        return (
            f"Graph({self.model}: {len(self)} of {format_count(int(self.shape.there.sum()), 'edge')}, "
            f"{format_count(len(self.nodes), 'node')}, {format_count(self.n_pairs, 'pair')}, {self.mode})"
        )

    def __len__(self) -> int:
        """Return the number of edges in the circuit."""
        return int(self.kept.sum())

    # ---- views

    @property
    def edges(self) -> tuple[Edge, ...]:
        """Edges of the circuit, by decreasing absolute score."""
        return tuple(self._edge(a, b) for a, b in self._ordered(self.kept, absolute=True))

    @property
    def nodes(self) -> tuple[str, ...]:
        """Nodes at either end of an edge of the circuit, in the order in which they write, ``logits`` last."""
        return tuple(name for name, there in zip((*self.shape.sources, "logits"), self._touched, strict=True) if there)

    def score(self, name: str) -> float:
        """Return the score of an edge by name; raise `PatchError` if there is no such edge."""
        source, _, target = (part.strip() for part in name.partition("->"))
        if source not in self.shape.sources or target not in self.shape.targets:
            msg = f"unknown edge '{name}'; use names such as 'input -> L0.H1.q', 'L0.H1 -> L0.mlp', 'L0.mlp -> logits'"
            raise PatchError(msg)
        at = self.shape.sources.index(source), self.shape.targets.index(target)
        if not self.shape.there[at]:
            msg = f"edge '{name}' does not exist: '{target}' reads before '{source}' writes"
            raise PatchError(msg)
        return float(self.scores[at])

    @property
    def heads(self) -> np.ndarray:
        """Sum of the scores of each head's outgoing edges in the circuit, float64 ``[n_layers, n_heads]``; ranks heads."""
        sums = np.where(self.kept, self.scores, 0).sum(1)[1:]
        return sums.reshape(self.shape.n_layers, self.shape.n_heads + 1)[:, :-1].copy()

    @property
    def explained(self) -> float | None:
        """Sum of the scores of all edges out of ``input``, as a share of ``M_clean - M_corrupt``, mean over pairs; ideally 1.

        For scores with ``point="path"`` only (completeness); else None, also for graphs of earlier releases. The minimum
        and maximum over pairs are in ``provenance["explained"]``.
        """
        summary = self.provenance.get("explained")
        return float(summary["mean"]) if isinstance(summary, Mapping) and "mean" in summary else None

    def frame(self) -> pd.DataFrame:
        """Return one row per edge, by decreasing absolute score: name, source, target, input, score, low, high.

        ``low`` and ``high`` are the score's 95 % bootstrap interval over groups of pairs; NaN without intervals.
        """
        import pandas as pd

        columns = ("name", "source", "target", "input", "score", "low", "high")
        rows = [
            (e.name, e.source, *e.reader, e.score, *ends)
            for e, ends in (
                (self._edge(a, b), self._interval(a, b)) for a, b in self._ordered(self.kept, absolute=True)
            )
        ]
        return pd.DataFrame(rows, columns=list(columns))

    # ---- circuits

    def top(self, n: int, *, absolute: bool = True, prune: bool = True) -> Self:
        """Return the circuit of the `n` edges of largest absolute score (or score), without dead ends.

        Raises
        ------
        PatchError
            If the graph has fewer than `n` edges.
        """
        self._check(n)
        mask = np.zeros_like(self.kept)
        for a, b in list(self._ordered(self.shape.there, absolute=absolute))[:n]:
            mask[a, b] = True
        return self._cut(mask, prune=prune)

    def threshold(self, least: float, *, absolute: bool = True, prune: bool = True) -> Self:
        """Return the circuit of the edges with at least this absolute score (or score), without dead ends."""
        size = np.abs(self.scores) if absolute else self.scores
        return self._cut((size >= least) & self.shape.there, prune=prune)

    def greedy(self, n: int, *, absolute: bool = True, prune: bool = True) -> Self:
        """Return the circuit of `n` edges, selected from the logits backwards: always the largest edge into the circuit.

        As in the released code of Hanna et al. 2024: unlike `top`, every edge leads to the logits. Fewer than `n` remain
        if pruning removes nodes that the input does not reach.

        Raises
        ------
        PatchError
            If the graph has fewer than `n` edges.
        """
        self._check(n)
        shape, mask = self.shape, np.zeros_like(self.kept)
        size = np.abs(self.scores) if absolute else self.scores
        inside = np.zeros(shape.n_sources + 1, bool)
        waiting: list[tuple[float, int, int]] = []

        def enter(node: int) -> None:
            inside[node] = True
            for b in np.flatnonzero(shape.readers == node):
                for a in np.flatnonzero(shape.there[:, b]):
                    heapq.heappush(waiting, (-float(size[a, b]), int(a), int(b)))

        enter(shape.n_sources)
        for _ in range(n):
            if not waiting:
                break
            _, a, b = heapq.heappop(waiting)
            mask[a, b] = True
            if not inside[a]:
                enter(a)
        return self._cut(mask, prune=prune)

    def pruned(self) -> Self:
        """Return the circuit without dead ends: nodes without a path from the input or to the logits."""
        mask, shape = self.kept.copy(), self.shape
        while True:
            reached = np.zeros(shape.n_sources, bool)
            reached[shape.readers[mask.any(0)][shape.readers[mask.any(0)] < shape.n_sources]] = True
            reached[0] = True
            alive = np.append(reached & mask.any(1), True)
            fewer = mask & alive[:-1, None] & alive[shape.readers][None]
            if (fewer == mask).all():
                return replace(self, kept=mask)
            mask = fewer

    def draw(
        self, path: str | Path | None = None, ax: Axes | None = None, *, most: int = 200, title: str | None = None
    ) -> Axes:
        """Draw the circuit, first layer at the bottom, edges by size and sign; see `circuits.results.graph_plot.draw`."""
        from circuits.results.graph_plot import draw

        return draw(self, path, ax, most=most, title=title)

    # ---- files

    def save(self, path: str | Path, *, every: bool = True) -> Path:
        """Write one JSON file: provenance of the graph, its nodes, and its edges by name with score and ``kept``.

        Parameters
        ----------
        path
            File to write.
        every
            Whether to write edges outside the circuit too; if not, their scores are 0 after loading.
        """
        path = Path(path)
        record = self.card(skip=("scores", "kept", "shape", "low", "high"))
        chosen = self.shape.there if every else self.kept
        edges = {
            f"{self.shape.sources[a]} -> {self.shape.targets[b]}": {
                "score": float(self.scores[a, b]),
                "kept": bool(self.kept[a, b]),
                **(dict(zip(("low", "high"), self._interval(a, b), strict=True)) if self.low.size else {}),
            }
            for a, b in np.argwhere(chosen)
        }
        shape = {"n_layers": self.shape.n_layers, "n_heads": self.shape.n_heads, "parallel": list(self.shape.parallel)}
        document = {_KIND: VERSION, **record, **shape, "nodes": list(self.nodes), "edges": edges}
        document[KEY] = document_digest(document)
        write_bytes(path, (json.dumps(document, indent=1) + "\n").encode(), "graph")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file written by `save`; raise `StoreError` if it is missing, damaged, of another kind or newer."""
        try:
            with reading_result(Path(path), "graph"):
                record = read_json(path, error=StoreError)
        except RecursionError as error:
            msg = f"{path} is not a graph file, or is damaged: {error}"
            raise StoreError(msg) from error
        version = record.get(_KIND) if isinstance(record, dict) else None
        if not isinstance(version, int) or not 1 <= version <= VERSION:
            problem = "not a graph file" if version is None else f"a graph of version {version}"
            msg = f"{path} is {problem}; supported versions: 1 to {VERSION}"
            raise StoreError(msg)
        take_digest(record, str(path), StoreError, required=version > _LAST_WITHOUT_DIGEST)
        with building(f"{path} is a damaged graph file", StoreError):
            record.pop(_KIND)
            sizes = check_fields({name: record.pop(name) for name in ("n_layers", "n_heads", "parallel")}, Shape)
            shape = Shape(sizes["n_layers"], sizes["n_heads"], tuple(sizes["parallel"]))
            record.pop("nodes")
            if min(shape.n_layers, shape.n_heads) < 0 or not 0 < shape.n_sources * shape.n_targets <= MOST:
                msg = f"{shape.n_layers} layers of {shape.n_heads} heads"
                raise ValueError(msg)
            edges = record.pop("edges")
            if version <= _LAST_WITH_OLD_NAMES:
                edges = {_renamed(name): edge for name, edge in edges.items()}
            arrays = _arrays(shape, edges)
            record = upgraded(record)
            if version <= _LAST_WITH_OLD_NAMES:
                record |= {name: value for name, value in record.get("provenance", {}).items() if name == "min_effect"}
            return cls(arrays.pop("scores"), shape, **arrays, **check_fields(record, cls))

    # ---- helpers

    @property
    def _touched(self) -> np.ndarray:
        touched = np.append(self.kept.any(1), False)
        touched[self.shape.readers[self.kept.any(0)]] = True
        return touched

    def _edge(self, a: int, b: int) -> Edge:
        return Edge(self.shape.sources[a], self.shape.targets[b], float(self.scores[a, b]), bool(self.kept[a, b]))

    def _interval(self, a: int, b: int) -> tuple[float, float]:
        return (float(self.low[a, b]), float(self.high[a, b])) if self.low.size else (float("nan"), float("nan"))

    def _ordered(self, among: np.ndarray, *, absolute: bool) -> Iterator[tuple[int, int]]:
        at = np.argwhere(among)
        size = self.scores[tuple(at.T)]
        order = np.argsort(-(np.abs(size) if absolute else size), kind="stable")
        return ((int(a), int(b)) for a, b in at[order])

    def _cut(self, mask: np.ndarray, *, prune: bool) -> Self:
        circuit = replace(self, kept=mask)
        return circuit.pruned() if prune else circuit

    def _check(self, n: int) -> None:
        there = int(self.shape.there.sum())
        if not 1 <= n <= there:
            msg = f"a circuit of {format_count(n, 'edge')} is impossible: choose 1 to {there}"
            raise PatchError(msg)


@dataclass(frozen=True)
class _StoredEdge:
    """Types of an edge's fields in a file."""

    score: float
    kept: bool
    low: float
    high: float


def _renamed(edge: str) -> str:
    """Return an edge of groundscope 0.1, ``m0 -> a1.h2<q>``, by today's names."""

    def node(match: re.Match[str]) -> str:
        layer, head, letter, mlp = match.groups()
        return f"L{mlp}.mlp" if mlp else f"L{layer}.H{head}" + (f".{letter}" if letter else "")

    return _OLD_NODE.sub(node, edge)


def _arrays(shape: Shape, edges: Mapping[str, Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Return scores, the circuit mask and ends of intervals as arrays, from edges by name."""
    arrays = {name: np.zeros(shape.there.shape) for name in ("scores", "low", "high")}
    arrays["kept"] = np.zeros(shape.there.shape, bool)
    rows = {name: i for i, name in enumerate(shape.sources)}
    columns = {name: i for i, name in enumerate(shape.targets)}
    ends = all("low" in edge for edge in edges.values())
    for name, edge in edges.items():
        check_fields(edge, _StoredEdge, name)
        source, _, target = name.partition(" -> ")
        at = rows[source], columns[target]
        arrays["scores"][at], arrays["kept"][at] = float(edge["score"]), edge["kept"]
        if ends:
            arrays["low"][at], arrays["high"][at] = float(edge["low"]), float(edge["high"])
    return arrays if ends and edges else {name: arrays[name] for name in ("scores", "kept")}
