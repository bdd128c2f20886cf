"""How faithful a circuit of edges is: what the model still does with these alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from circuits.attribution.attention_nodes import check_opened
from circuits.attribution.estimates import Sides
from circuits.attribution.residual_stream import Form, forms_of, run
from circuits.faithfulness.circuit_run import Ends, ends_of, run_circuit
from circuits.faithfulness.curve import SHARES, FaithfulCurve, check_gap
from circuits.patching.activation import plans_of, settings_of
from circuits.patching.sweep import side_by_side
from circuits.results.graph import Graph, Shape
from concepts.schema import CounterfactualPair
from groundscope.core.errors import ConfigError, ModelError, PatchError
from groundscope.core.progress import progress_bar
from lvlm.model import Lvlm

EXACT = {2: 0.05, 4: 1e-3, 8: 1e-9}
"""How far, of the largest logit difference, runs with all edges and with none may be from the model's own, by bytes a number."""


@dataclass(frozen=True, eq=False)
class EdgeCurve(FaithfulCurve):
    """What is left of the difference between clean and corrupt answer, in logits, with circuits of edges alone."""

    counted = "edges"

    circuits: tuple[Graph, ...]
    """Cut at each share, or as given."""


def edges(
    model: Lvlm,
    pairs: Sequence[CounterfactualPair],
    graph: Graph | Sequence[Graph],
    order: Literal["signed", "absolute"] = "signed",
    *,
    choose: Literal["greedy", "top"] = "greedy",
    shares: Sequence[float] = SHARES,
    batch_pairs: int = 8,
    progress: bool | None = None,
) -> EdgeCurve:
    """Return how much of what tells clean from corrupt is left where all edges outside a circuit bring the corrupt run.

    Every node reads, along edges of the circuit, what nodes before it now write; along all others what they write in the
    corrupt run (Hanna et al. 2024, arXiv 2403.17806, section 2; Mueller et al. 2025, arXiv 2504.13151). Runs are whole and
    exact: with all edges the clean run, with none the corrupt one, which is checked. They take about as many forwards as
    heads read different streams.

    Parameters
    ----------
    model
        In evaluation mode; one whose edges can be scored.
    pairs
        Of equal length, true answers differing; other ones than the graph was made from.
    graph
        Scores, from which a circuit is cut at each share; or circuits, taken as they are, the smallest first.
    order
        Of a graph, best is the largest score (``signed``) or the largest size (``absolute``).
    choose
        How circuits are cut: ``greedy`` from the logits backwards, or ``top``. Pruning would change nothing: along dead
        ends nothing reaches the answer.
    shares
        Shares of all edges, ascending.
    batch_pairs
        Pairs side by side; what every layer's heads and MLP write is held of each.
    progress
        Show progress; by default where standard error is a terminal.

    Raises
    ------
    ConfigError
        For an option that does not exist, shares or circuits that do not ascend.
    PatchError
        For circuits of a decoder of another shape, or where the model tells clean from corrupt by as much without any edge;
        and as `patch_heads`.
    ModelError
        Where edges cannot be told apart (see `attribution.edges`), or runs are not what they have to be.
    """
    if batch_pairs < 1:
        msg = f"batch_pairs={batch_pairs} must be at least 1"
        raise ConfigError(msg)
    circuits = _circuits(graph, order, choose, shares)
    check_opened(model)
    for one in circuits:
        if (one.shape.n_layers, one.shape.n_heads) != (model.n_layers, model.n_heads):
            raise PatchError(_other(model, one))
    settings = settings_of(model, "denoise", "logit_difference", 1, None, 0.0, progress)
    plans = plans_of(model, pairs, "all", settings)
    ends = np.zeros((2, len(plans)))
    margins = np.zeros((len(plans), len(circuits)))
    shape, forms = circuits[0].shape, ()
    groups = side_by_side([plan.shape for plan in plans], lambda _: batch_pairs)
    with progress_bar(progress) as bar:
        task = bar.add_task("running circuits", total=len(plans) * len(circuits))
        for group in groups:
            members = [plans[i] for i in group]
            clean, corrupt = (model.collate([getattr(p, side) for p in members]) for side in ("clean", "corrupt"))
            sides = Sides(members, clean, corrupt)
            first = run(model, clean, sides.metric).written
            second = run(model, corrupt, sides.metric).written
            if not forms:
                forms, _ = forms_of(model, lambda given=clean, sides=sides: run(model, given, sides.metric))
                shape = Shape(model.n_layers, model.n_heads, tuple(form.parallel for form in forms))
                other = [c for c in circuits if c.shape != shape]
                if other:
                    raise PatchError(_other(model, other[0]))
            both = ends_of(model, clean, first, second)
            if not ends.any():
                _check_exact(model, forms, shape, both, sides, (first.metric, second.metric))
            ends[:, group] = [x.double().cpu().numpy() for x in (first.metric, second.metric)]
            for number, circuit in enumerate(circuits):
                found = run_circuit(model, forms, shape, both, circuit.kept, sides.metric)
                margins[group, number] = found.double().cpu().numpy()
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
            msg = f"{name}='{value}': choose {' or '.join(repr(a) for a in allowed)}"
            raise ConfigError(msg)
    if not isinstance(graph, Graph):
        sizes = [len(one) for one in graph]
        if not sizes or sizes != sorted(set(sizes)):
            msg = f"circuits of {sizes} edges: give at least one, each larger than the one before"
            raise ConfigError(msg)
        return tuple(graph)
    if not shares or list(shares) != sorted(set(shares)) or not 0 <= shares[0] <= shares[-1] <= 1:
        msg = f"shares={list(shares)}: give ascending shares of all edges between 0 and 1"
        raise ConfigError(msg)
    cut = graph.greedy if choose == "greedy" else graph.top
    total, found = int(graph.shape.there.sum()), []
    for share in shares:
        n = round(share * total)
        none = replace(graph, kept=np.zeros_like(graph.kept))
        found.append(cut(n, absolute=order == "absolute", prune=False) if n else none)
    return tuple(found)


def _check_exact(
    model: Lvlm, forms: tuple[Form, ...], shape: Shape, both: Ends, sides: Sides, own: tuple[Tensor, Tensor]
) -> None:
    """Raise `ModelError` where runs with all edges, or none, are not the clean and the corrupt run."""
    largest = max(float(torch.stack(own).abs().max()), 1.0)
    for kept, whole, name in ((shape.there, own[0], "all"), (np.zeros_like(shape.there), own[1], "no")):
        error = float((run_circuit(model, forms, shape, both, kept, sides.metric) - whole).abs().max()) / largest
        if not error <= EXACT[model.dtype.itemsize]:
            msg = (
                f"{model.name}: run with {name} edges its answers are off by {error:.1e} of the largest: what its layers read is "
                "not what its nodes write, so that circuits of edges cannot be run"
            )
            raise ModelError(msg)


def _other(model: Lvlm, graph: Graph) -> str:
    here, there = f"{model.n_layers} layers of {model.n_heads} heads", graph.shape
    beside = ", MLPs beside the attention in some" if any(there.parallel) else ""
    other = f"{there.n_layers} layers of {there.n_heads} heads{beside}"
    return f"a circuit of a decoder of {other} does not belong to {model.name} of {here}: score the edges of this model"
