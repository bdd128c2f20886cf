"""The decoder as a graph of nodes and scored edges, and the circuits that can be cut out of it."""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from groundscope.core.artifacts import reading_result, write_bytes
from groundscope.core.document_digest import KEY, document_digest, take_digest
from groundscope.core.errors import PatchError, StoreError
from groundscope.core.user_files import read_json

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

VERSION = 3
_LAST_WITHOUT_DIGEST = 2
MOST = 2**27
"""Most entries of the table of edges that is read from a file."""
_KIND = "edge_graph"


@dataclass(frozen=True)
class Shape:
    """Which nodes a decoder has, in the order they write, and which edges there are between them."""

    n_layers: int
    n_heads: int
    parallel: tuple[bool, ...]
    """For each layer whether its MLP reads what its attention reads, so that no edge leads from its heads to it."""

    @property
    def n_sources(self) -> int:
        """Nodes that write: the input, and of each layer its heads and its MLP."""
        return 1 + self.n_layers * (self.n_heads + 1)

    @property
    def n_targets(self) -> int:
        """Places that read: of each layer three of every head and one of the MLP, and the logits."""
        return 1 + self.n_layers * (3 * self.n_heads + 1)

    def before_attention(self, layer: int) -> int:
        """Return how many nodes have written before a layer's attention reads: also its first head's number."""
        return 1 + layer * (self.n_heads + 1)

    def before_mlp(self, layer: int) -> int:
        """Return how many nodes have written before a layer's MLP reads."""
        return self.before_attention(layer) + (0 if self.parallel[layer] else self.n_heads)

    def columns(self, layer: int) -> slice:
        """Return the numbers of a layer's targets: queries, keys and values of all heads, then the MLP."""
        width = 3 * self.n_heads + 1
        return slice(layer * width, (layer + 1) * width)

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Names of the nodes that write: ``input``, then of each layer ``a0.h0``, … and ``m0``."""
        layers = ((*(f"a{i}.h{h}" for h in range(self.n_heads)), f"m{i}") for i in range(self.n_layers))
        return ("input", *(name for layer in layers for name in layer))

    @cached_property
    def targets(self) -> tuple[str, ...]:
        """Names of the places that read: ``a0.h0<q>``, …, ``a0.h0<k>``, …, ``a0.h0<v>``, …, ``m0``, …, ``logits``."""
        layers = (
            (*(f"a{i}.h{h}<{c}>" for c in "qkv" for h in range(self.n_heads)), f"m{i}") for i in range(self.n_layers)
        )
        return (*(name for layer in layers for name in layer), "logits")

    @cached_property
    def there(self) -> np.ndarray:
        """Which edges there are, bool ``[n_sources, n_targets]``."""
        found = np.zeros((self.n_sources, self.n_targets), bool)
        for i in range(self.n_layers):
            columns = self.columns(i)
            found[: self.before_attention(i), columns] = True
            found[: self.before_mlp(i), columns.stop - 1] = True
        found[:, -1] = True
        found.setflags(write=False)
        return found

    @cached_property
    def readers(self) -> np.ndarray:
        """Number of the node that each target belongs to, int ``[n_targets]``; `n_sources` for the logits."""
        by_layer = [
            [self.before_attention(i) + h for _ in "qkv" for h in range(self.n_heads)]
            + [self.before_attention(i) + self.n_heads]
            for i in range(self.n_layers)
        ]
        return np.array([number for layer in by_layer for number in layer] + [self.n_sources])


@dataclass(frozen=True)
class Edge:
    """One edge, as its name says it: ``a3.h5 -> logits``, ``input -> a0.h1<q>``."""

    source: str
    target: str
    score: float
    kept: bool

    @property
    def name(self) -> str:
        """Name of the edge."""
        return f"{self.source} -> {self.target}"


@dataclass(frozen=True, eq=False)
class Graph:
    """Scores of all edges, and which of them are in the circuit; made by `attribution.edges`.

    Views (`edges`, `nodes`, `frame`) read two arrays. Circuits (`top`, `threshold`, `greedy`) are graphs with other edges
    kept.
    """

    scores: np.ndarray
    """Mean over pairs of the share of ``LD_clean - LD_corrupt`` that an edge carries, float64 ``[n_sources, n_targets]``; 0
    where there is no edge. Read-only."""
    shape: Shape
    model: str
    config_hash: str
    weights_hash: str
    pairs_digest: str
    """SHA-256 of all pairs that were given."""
    n_pairs: int
    excluded: int
    """Pairs left out because the model hardly tells their sides apart."""
    direction: str
    kept: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    """Edges in the circuit, bool, shaped as `scores`; all that there are unless something was cut out."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """How gradients were taken, plain JSON."""
    low: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """Lower end of each score's interval over the pairs' groups, shaped as `scores`; empty where there is none."""
    high: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """Upper end."""

    def __post_init__(self) -> None:
        there = self.shape.there
        kept = there if self.kept.size == 0 and there.size else np.array(self.kept, bool)
        scores = np.array(self.scores, np.float64)
        if scores.shape != there.shape or kept.shape != there.shape or not np.isfinite(scores).all():
            msg = f"a graph of {self.shape.n_layers} layers of {self.shape.n_heads} heads needs finite scores {list(there.shape)}"
            raise PatchError(msg)
        if len(self.shape.parallel) != self.shape.n_layers or (scores[~there] != 0).any() or kept[~there].any():
            msg = "a graph has scores of edges that lead backwards: they do not belong to it"
            raise PatchError(msg)
        ends = {name: np.array(getattr(self, name), np.float64) for name in ("low", "high")}
        if (
            any(array.shape not in ((0,), there.shape) for array in ends.values())
            or len({a.shape for a in ends.values()}) > 1
        ):
            msg = f"intervals of a graph's scores {list(there.shape)} need as many ends"
            raise PatchError(msg)
        for name, array in (("scores", scores), ("kept", kept.copy()), *ends.items()):
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))

    def __repr__(self) -> str:
        return (
            f"Graph({self.model}: {len(self)} of {int(self.shape.there.sum())} edges, {len(self.nodes)} nodes, "
            f"{self.n_pairs} pairs, {self.direction})"
        )

    def __len__(self) -> int:
        """Return the number of edges kept."""
        return int(self.kept.sum())

    # ---- views

    @property
    def edges(self) -> tuple[Edge, ...]:
        """Edges kept, those of largest size first."""
        return tuple(self._edge(a, b) for a, b in self._ordered(self.kept, absolute=True))

    @property
    def nodes(self) -> tuple[str, ...]:
        """Nodes that an edge kept begins or ends at, in the order they write, ``logits`` last."""
        return tuple(name for name, there in zip((*self.shape.sources, "logits"), self._touched, strict=True) if there)

    def score(self, name: str) -> float:
        """Return the score of an edge by name; raises `PatchError` for one that there is not."""
        source, _, target = (part.strip() for part in name.partition("->"))
        if source not in self.shape.sources or target not in self.shape.targets:
            msg = f"no edge '{name}': edges are named like 'input -> a0.h1<q>', 'a0.h1 -> m0', 'm0 -> logits'"
            raise PatchError(msg)
        at = self.shape.sources.index(source), self.shape.targets.index(target)
        if not self.shape.there[at]:
            msg = f"no edge '{name}': '{target}' reads before '{source}' writes"
            raise PatchError(msg)
        return float(self.scores[at])

    @property
    def heads(self) -> np.ndarray:
        """Sum of the scores of each head's outgoing edges kept, float64 ``[n_layers, n_heads]``: a ranking of heads."""
        sums = np.where(self.kept, self.scores, 0).sum(1)[1:]
        return sums.reshape(self.shape.n_layers, self.shape.n_heads + 1)[:, :-1].copy()

    @property
    def explained(self) -> float | None:
        """What share of ``LD_clean - LD_corrupt`` all edges out of ``input`` add up to, mean over pairs; 1 is all of it.

        Of scores along the path only (completeness); None for others, and for graphs of earlier releases. The lowest and the
        highest of the pairs are in ``provenance["explained"]``.
        """
        found = self.provenance.get("explained")
        return float(found["mean"]) if isinstance(found, Mapping) and "mean" in found else None

    def frame(self) -> pd.DataFrame:
        """Return one row an edge kept, those of largest size first: name, source, target, input, score, low, high.

        The last two are the score's 95 % interval when whole groups of pairs are drawn again; NaN where it is not known.
        """
        import pandas as pd

        columns = ("name", "source", "target", "input", "score", "low", "high")
        rows = [
            (e.name, e.source, e.target.partition("<")[0], e.target.partition("<")[2].rstrip(">"), e.score, *ends)
            for e, ends in (
                (self._edge(a, b), self._interval(a, b)) for a, b in self._ordered(self.kept, absolute=True)
            )
        ]
        return pd.DataFrame(rows, columns=list(columns))

    # ---- circuits

    def top(self, n: int, *, absolute: bool = True, prune: bool = True) -> Self:
        """Return the circuit of the `n` edges of largest size (or score), dead ends pruned.

        Raises
        ------
        PatchError
            Where there are fewer edges.
        """
        self._check(n)
        kept = np.zeros_like(self.kept)
        for a, b in list(self._ordered(self.shape.there, absolute=absolute))[:n]:
            kept[a, b] = True
        return self._cut(kept, prune=prune)

    def threshold(self, least: float, *, absolute: bool = True, prune: bool = True) -> Self:
        """Return the circuit of the edges of at least this size (or score), dead ends pruned."""
        size = np.abs(self.scores) if absolute else self.scores
        return self._cut((size >= least) & self.shape.there, prune=prune)

    def greedy(self, n: int, *, absolute: bool = True, prune: bool = True) -> Self:
        """Return the circuit of `n` edges chosen from the logits backwards: always the largest edge into what is there.

        As in the released code of Hanna et al. 2024: unlike `top`, no edge is chosen that leads nowhere. Fewer than `n`
        remain where pruning finds nodes that nothing reaches.

        Raises
        ------
        PatchError
            Where there are fewer edges.
        """
        self._check(n)
        shape, kept = self.shape, np.zeros_like(self.kept)
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
            kept[a, b] = True
            if not inside[a]:
                enter(a)
        return self._cut(kept, prune=prune)

    def pruned(self) -> Self:
        """Return the circuit without dead ends: nodes that nothing leads to from the input, or that lead nowhere."""
        kept, shape = self.kept.copy(), self.shape
        while True:
            reached = np.zeros(shape.n_sources, bool)
            reached[shape.readers[kept.any(0)][shape.readers[kept.any(0)] < shape.n_sources]] = True
            reached[0] = True
            alive = np.append(reached & kept.any(1), True)
            fewer = kept & alive[:-1, None] & alive[shape.readers][None]
            if (fewer == kept).all():
                return replace(self, kept=kept)
            kept = fewer

    def draw(
        self, path: str | Path | None = None, ax: Axes | None = None, *, most: int = 200, title: str | None = None
    ) -> Axes:
        """Draw the circuit, layers upwards, widths by size and colors by sign; see `circuits.results.graph_plot.draw`."""
        from circuits.results.graph_plot import draw

        return draw(self, path, ax, most=most, title=title)

    # ---- files

    def save(self, path: str | Path, *, every: bool = True) -> Path:
        """Write one JSON file: what the graph is of, its nodes, and its edges by name with score and whether kept.

        Parameters
        ----------
        path
            Where.
        every
            Also edges that are not kept; without them, what is read back has scores of 0 there.
        """
        path = Path(path)
        arrays = {"scores", "kept", "shape", "low", "high"}
        record = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in arrays}
        record["provenance"] = dict(self.provenance)
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
        whole = {_KIND: VERSION, **record, **shape, "nodes": list(self.nodes), "edges": edges}
        whole[KEY] = document_digest(whole)
        write_bytes(path, (json.dumps(whole, indent=1) + "\n").encode(), "graph")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote; raises `StoreError` where it is missing, damaged, something else or newer."""
        try:
            with reading_result(Path(path), "graph"):
                record = read_json(path, error=StoreError)
        except RecursionError as error:
            msg = f"{path} is no graph, or is damaged: {error}"
            raise StoreError(msg) from error
        version = record.get(_KIND) if isinstance(record, dict) else None
        if not isinstance(version, int) or not 1 <= version <= VERSION:
            msg = f"{path}: {'no graph' if version is None else f'a graph of version {version}'}; this reads up to {VERSION}"
            raise StoreError(msg)
        take_digest(record, str(path), StoreError, required=version > _LAST_WITHOUT_DIGEST)
        try:
            record.pop(_KIND)
            shape = Shape(int(record.pop("n_layers")), int(record.pop("n_heads")), tuple(record.pop("parallel")))
            record.pop("nodes")
            if not 0 < shape.n_sources * shape.n_targets <= MOST:
                msg = f"{shape.n_layers} layers of {shape.n_heads} heads"
                raise ValueError(msg)  # said below
            return cls(shape=shape, **_arrays(shape, record.pop("edges")), **record)
        except (KeyError, TypeError, ValueError, AttributeError, MemoryError) as error:
            msg = f"{path}: damaged graph: {error!r}"
            raise StoreError(msg) from error

    # ---- inside

    @property
    def _touched(self) -> np.ndarray:
        found = np.append(self.kept.any(1), False)
        found[self.shape.readers[self.kept.any(0)]] = True
        return found

    def _edge(self, a: int, b: int) -> Edge:
        return Edge(self.shape.sources[a], self.shape.targets[b], float(self.scores[a, b]), bool(self.kept[a, b]))

    def _interval(self, a: int, b: int) -> tuple[float, float]:
        return (float(self.low[a, b]), float(self.high[a, b])) if self.low.size else (float("nan"), float("nan"))

    def _ordered(self, among: np.ndarray, *, absolute: bool) -> Iterator[tuple[int, int]]:
        at = np.argwhere(among)
        size = self.scores[tuple(at.T)]
        order = np.argsort(-(np.abs(size) if absolute else size), kind="stable")
        return ((int(a), int(b)) for a, b in at[order])

    def _cut(self, kept: np.ndarray, *, prune: bool) -> Self:
        found = replace(self, kept=kept)
        return found.pruned() if prune else found

    def _check(self, n: int) -> None:
        there = int(self.shape.there.sum())
        if not 1 <= n <= there:
            msg = f"a circuit of {n} edges: there are {there}"
            raise PatchError(msg)


def _arrays(shape: Shape, edges: Mapping[str, Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Return scores, which edges are kept, and ends of intervals, of edges by name."""
    found = {name: np.zeros(shape.there.shape) for name in ("scores", "low", "high")}
    found["kept"] = np.zeros(shape.there.shape, bool)
    rows = {name: i for i, name in enumerate(shape.sources)}
    columns = {name: i for i, name in enumerate(shape.targets)}
    ends = all("low" in edge for edge in edges.values())
    for name, edge in edges.items():
        source, _, target = name.partition(" -> ")
        at = rows[source], columns[target]
        found["scores"][at], found["kept"][at] = float(edge["score"]), bool(edge["kept"])
        if ends:
            found["low"][at], found["high"][at] = float(edge["low"]), float(edge["high"])
    return found if ends and edges else {name: found[name] for name in ("scores", "kept")}
