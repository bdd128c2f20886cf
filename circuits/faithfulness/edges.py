"""Faithfulness of circuits of edges: run the model with the circuit's edges only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from circuits.attribution.attention_nodes import check_exposable
from circuits.attribution.estimates import Sides
from circuits.attribution.residual_stream import Form, forms_of, run
from circuits.faithfulness.circuit_run import Ends, ends_of, run_circuit
from circuits.faithfulness.curve import SHARES, FaithfulCurve, check_gap
from circuits.patching.activation import plans_of, settings_of
from circuits.patching.metrics import metric_of
from circuits.patching.sweep import side_by_side
from circuits.results.graph import Graph, Shape
from concepts.counterfactual_pair import CounterfactualPair
from groundscope.core.errors import ConfigError, ModelError, PatchError
from groundscope.core.progress import progress_bar
from groundscope.core.short_repr import short_repr
from lvlm.access.weights import quantized
from lvlm.identity_checks import QUANTIZED
from lvlm.model import Lvlm

EXACT = {2: 0.05, 4: 1e-3, 8: 1e-9}
"""Largest relative error of runs with all edges and with none, by bytes per number of the model's dtype."""


@dataclass(frozen=True, eq=False)
class EdgeCurve(FaithfulCurve):
    """Difference between clean and corrupt answer, in logits, that circuits of edges preserve.

    Examples
    --------
    >>> import numpy as np
    >>> from circuits.faithfulness import EdgeCurve
    >>> curve = EdgeCurve((1.0,), np.array([[1.0]]), np.array([2.0]), np.array([0.0]), ("scene",), ((),))
    >>> curve.faithfulness.tolist()
    [0.5]
    """

    counted = "edges"

    circuits: tuple[Graph, ...]
    """The circuit at each share, or the circuits passed to `edges`."""

    __repr__ = short_repr


def edges(
    model: Lvlm,
    pairs: Sequence[CounterfactualPair],
    graph: Graph | Sequence[Graph],
    *,
    order: Literal["signed", "absolute"] = "signed",
    choose: Literal["greedy", "top"] = "greedy",
    shares: Sequence[float] = SHARES,
    batch_size: int = 8,
    progress: bool | None = None,
) -> EdgeCurve:
    """Measure how much of the logit difference circuits preserve if all other edges carry the corrupt run.

    Every node reads the current outputs of earlier nodes along the circuit's edges, and their outputs in the corrupt run
    along all other edges (Hanna et al. 2024, arXiv 2403.17806, section 2; Mueller et al. 2025, arXiv 2504.13151). Runs are
    exact: all edges give the clean run, no edges the corrupt run, and both are checked. The cost grows with the number of
    different streams that heads read.

    Parameters
    ----------
    model
        In evaluation mode; must support `attribution.edges`.
    pairs
        Pairs of equal length whose true answers differ; not the pairs that the graph was scored on.
    graph
        Scores, from which a circuit is selected at each share; or circuits in ascending size.
    order
        Rank edges of a graph by score (``signed``) or by absolute score (``absolute``).
    choose
        How circuits are selected: ``greedy`` from the logits backwards, or ``top``. Circuits are not pruned: dead ends do
        not affect the answer.
    shares
        Shares of all edges, ascending.
    batch_size
        Number of pairs per batch; the outputs of all heads and MLPs stay in memory.
    progress
        Whether to show progress; by default only if standard error is a terminal.

    Raises
    ------
    ConfigError
        If an option has an unknown value, or shares or circuits are not ascending.
    PatchError
        If circuits belong to a decoder of another shape, or the logit difference is the same without any edge; and as
        `patch_heads`.
    ModelError
        If edges cannot be separated (see `attribution.edges`), or a run with all or no edges is not exact.

    Examples
    --------
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> pairs = gs.counterfactuals.pairs(gs.scenes.dataset(n_images=10, seed=0), "blank")[:2]
    >>> graph = gs.attribution.edges(model, pairs[:1], point="run")
    >>> curve = gs.faithfulness.edges(model, pairs[:1], [graph.greedy(20, prune=False)])
    >>> curve.sizes, curve.faithfulness.shape
    ((20,), (1,))
    """
    if batch_size < 1:
        msg = f"batch_size={batch_size} must be at least 1"
        raise ConfigError(msg)
    circuits = _circuits(graph, order, choose, shares)
    check_exposable(model)
    for candidate in circuits:
        if (candidate.shape.n_layers, candidate.shape.n_heads) != (model.n_layers, model.n_heads):
            raise PatchError(_mismatch(model, candidate))
    settings = settings_of(model, "denoise", metric_of("logit_difference"), 1, None, 0.0, progress)
    plans = plans_of(model, pairs, "all", settings)
    ends = np.zeros((2, len(plans)))
    margins = np.zeros((len(plans), len(circuits)))
    shape, forms = circuits[0].shape, ()
    groups = side_by_side([plan.shape for plan in plans], lambda _: batch_size)
    with progress_bar(progress) as bar:
        task = bar.add_task("running circuits", total=len(plans) * len(circuits))
        for group in groups:
            members = [plans[i] for i in group]
            clean, corrupt = (model.collate([getattr(p, side) for p in members]) for side in ("clean", "corrupt"))
            sides = Sides(members, clean, corrupt, settings.metric)
            first = run(model, clean, sides.metric).written
            second = run(model, corrupt, sides.metric).written
            if not forms:
                forms, _ = forms_of(model, lambda clean=clean, sides=sides: run(model, clean, sides.metric))
                shape = Shape(model.n_layers, model.n_heads, tuple(form.parallel for form in forms))
                other = [c for c in circuits if c.shape != shape]
                if other:
                    raise PatchError(_mismatch(model, other[0]))
            both = ends_of(model, clean, first, second)
            if not ends.any():
                _check_exact(model, forms, shape, both, sides, (first.metric, second.metric))
            ends[:, group] = [x.double().cpu().numpy() for x in (first.metric, second.metric)]
            for number, circuit in enumerate(circuits):
                scores = run_circuit(model, forms, shape, both, circuit.kept, sides.metric)
                margins[group, number] = scores.double().cpu().numpy()
                bar.advance(task, len(group))
    check_gap(model.name, ends[0], ends[1], "without any edge")
    total = int(shape.there.sum())
    names = tuple(plan.pair.clean.group for plan in plans)
    return EdgeCurve(
        tuple(len(c) / total for c in circuits) if not isinstance(graph, Graph) else tuple(shares),
        margins,
        ends[0],
        ends[1],
        names,
        circuits,
    )


def _circuits(graph: Graph | Sequence[Graph], order: str, choose: str, shares: Sequence[float]) -> tuple[Graph, ...]:
    for name, value, allowed in (("order", order, ("signed", "absolute")), ("choose", choose, ("greedy", "top"))):
        if value not in allowed:
            msg = f"unknown {name} '{value}'; choose {' or '.join(repr(a) for a in allowed)}"
            raise ConfigError(msg)
    if not isinstance(graph, Graph):
        sizes = [len(circuit) for circuit in graph]
        if not sizes or sizes != sorted(set(sizes)):
            msg = f"circuits have {sizes} edges: pass at least one circuit, in ascending size"
            raise ConfigError(msg)
        return tuple(graph)
    if not shares or list(shares) != sorted(set(shares)) or not 0 <= shares[0] <= shares[-1] <= 1:
        msg = f"invalid shares={list(shares)}: pass ascending shares of all edges between 0 and 1"
        raise ConfigError(msg)
    cut = graph.greedy if choose == "greedy" else graph.top
    total, circuits = int(graph.shape.there.sum()), []
    for share in shares:
        n = round(share * total)
        none = replace(graph, kept=np.zeros_like(graph.kept))
        circuits.append(cut(n, absolute=order == "absolute", prune=False) if n else none)
    return tuple(circuits)


def _check_exact(
    model: Lvlm, forms: tuple[Form, ...], shape: Shape, both: Ends, sides: Sides, own: tuple[Tensor, Tensor]
) -> None:
    """Raise `ModelError` unless runs with all edges and with none reproduce the clean and the corrupt run."""
    largest = max(float(torch.stack(own).abs().max()), 1.0)
    for mask, whole, name in ((shape.there, own[0], "all"), (np.zeros_like(shape.there), own[1], "no")):
        error = float((run_circuit(model, forms, shape, both, mask, sides.metric) - whole).abs().max()) / largest
        if not error <= max(EXACT[model.dtype.itemsize], QUANTIZED if quantized(model.head_projection(0)) else 0.0):
            msg = (
                f"{model.name}: a run with {name} edges has a relative error of {error:.1e}: the inputs of its layers are not "
                "the sum of node outputs, so circuits of edges cannot be run"
            )
            raise ModelError(msg)


def _mismatch(model: Lvlm, graph: Graph) -> str:
    here, there = f"{model.n_layers} layers of {model.n_heads} heads", graph.shape
    parallel = ", with MLPs parallel to the attention in some layers" if any(there.parallel) else ""
    other = f"{there.n_layers} layers of {there.n_heads} heads{parallel}"
    return f"the circuit is for a decoder of {other}, but {model.name} has {here}: score the edges of this model"
