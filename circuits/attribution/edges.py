"""Edge attribution patching: estimate from gradients how much each edge between decoder nodes affects the answer.

For nodes u before v, ``s(u -> v) = (a_source(u) - a_run(u)) . dM/d(input of v)``, summed over positions: the first-order
effect of replacing u by its value in the source run in the input of v only. Nodes are the input of the first layer
(``input``), heads, MLPs and the logits; a head has three inputs, before its layer's norm. Sources: Syed et al. 2023,
arXiv 2310.10348 (EAP); Hanna et al. 2024, arXiv 2403.17806 (EAP-IG: gradients averaged along the path between the
embeddings of both runs).

A head contributes ``z_h W_O^h`` to its layer's output; where a norm follows, that norm's derivative at the point of the
gradients is applied to it, so that the whole edge is linear at that point.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from circuits.attribution.attention_nodes import check_exposable
from circuits.attribution.estimates import (
    GradientSettings,
    Point,
    Sides,
    Variant,
    check_gradient_settings,
    groups,
    usable,
)
from circuits.attribution.norm_vjp import StreamReader, reader_of, through
from circuits.attribution.residual_stream import Form, Run, Written, check_split, forms_of, run, weights_of, written_by
from circuits.patching.activation import plans_of, record_of, settings_of
from circuits.patching.metrics import MetricFunction, gradient_metric
from circuits.patching.pairs import check_enough_pairs
from circuits.patching.sweep import Mode
from circuits.results.graph import Graph, Shape
from circuits.results.statistics import mean_interval
from concepts.counterfactual_pair import CounterfactualPair
from lvlm.access.weights import matrix_of
from lvlm.model import Lvlm

CHUNK = 2**27
"""Largest number of bytes for the outputs of nodes, or the gradients at their inputs, of one chunk of positions."""
HELD = 2**30
"""Largest number of bytes for the scores of all pairs, which the intervals need."""
EDGES = 2**12
"""Number of edges per bootstrap call."""
EXPLAINED = 0.1
"""Largest distance from 1 of the sum of the input's edge scores without a warning."""
_LOG = logging.getLogger("circuits.attribution")


def edges(
    model: Lvlm,
    pairs: Sequence[CounterfactualPair],
    *,
    mode: Mode = "denoise",
    metric: str | MetricFunction = "logit_difference",
    point: Point = "path",
    steps: int = 5,
    variant: Variant = "paper",
    min_effect: float | None = None,
    batch_size: int = 8,
    progress: bool | None = None,
) -> Graph:
    """Score every edge of the decoder, from its embeddings to the answer.

    Parameters
    ----------
    model
        In evaluation mode. Its attention must use transformers' table of attention functions.
    pairs
        Pairs of equal token length whose true answers differ.
    mode
        ``denoise``: the effect restored by patching clean values into the corrupt run; ``noise``: the effect destroyed by
        patching corrupt values into the clean run. In both modes positive where an edge carries the answer.
    metric
        Metric M, as for `attribution.heads`.
    point
        Where gradients are computed: ``run`` (with ``noise``: EAP), ``source``, or ``path``: the mean over `steps` points
        ``run + k / steps (source - run)`` between the embeddings of both (EAP-IG).
    steps
        Points on the path. The paper's 5 may explain far less or more than the whole difference: see `Graph.explained`.
    variant
        ``paper``: k = 1 ... steps; ``release``: k = 0 ... steps - 1, as in the authors' code.
    min_effect
        As for `patch_heads`, in units of the metric.
    batch_size
        Number of pairs per batch.
    progress
        Whether to show progress; by default only if standard error is a terminal.

    Returns
    -------
    Graph
        Mean over pairs of each edge's share of ``M_clean - M_corrupt``. With ``path``, the sum over the edges out of
        ``input`` approaches 1, the whole difference, as `steps` grows (completeness); `Graph.explained` is that sum. If it
        differs from 1 by more than `EXPLAINED`, the logger ``circuits.attribution`` emits a WARNING.
        Intervals of scores are bootstrapped over groups of pairs; they are empty for a single group, or if the scores of
        all pairs do not fit into memory.

    Raises
    ------
    ConfigError
        If an option has an unknown value.
    PatchError
        As `patch_heads`, and for pairs of unequal length.
    ModelError
        If the family's head inputs cannot be separated, or its attention cannot be differentiated; raised before any
        forward pass.

    Examples
    --------
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> pairs = gs.counterfactuals.pairs(gs.scenes.dataset(n_images=10, seed=0), "blank")[:2]
    >>> graph = gs.attribution.edges(model, pairs[:1], point="run")
    >>> len(graph), len(graph.greedy(20, prune=False))
    (3628, 20)
    """
    how = GradientSettings(mode, point, steps, variant=variant)
    check_gradient_settings(model, how, batch_size)
    check_exposable(model)
    settings = settings_of(model, mode, gradient_metric(metric), 1, None, min_effect, progress)
    plans = plans_of(model, pairs, "all", settings)
    decoder = _Decoder(model)
    total: np.ndarray | float = 0.0
    pair_scores = _PairScores()
    sums: list[float] = []
    baseline = np.zeros((2, len(plans)))

    def score_batch(sides: Sides) -> tuple[np.ndarray, Tensor, Tensor]:
        return _scores(decoder, sides, how)

    for group, share, metrics in groups(model, plans, how, settings, batch_size, score_batch, "scoring edges"):
        baseline[:, group] = metrics
        used = usable(metrics[0], metrics[1], settings.min_effect)
        total = total + share[used].sum(0)
        sums += share[used][:, 0].sum(-1).tolist()
        pair_scores.add(share[used], [plans[i].pair.clean.group for i, u in zip(group, used, strict=True) if u])
    used_pairs = usable(baseline[0], baseline[1], settings.min_effect)
    check_enough_pairs(baseline[0], baseline[1], used_pairs, settings.min_effect)
    low, high = pair_scores.ends(decoder.shape)
    return Graph(
        np.asarray(total) / used_pairs.sum(),
        decoder.shape,
        low=low,
        high=high,
        n_pairs=int(used_pairs.sum()),
        **record_of(model, plans, used_pairs, "all", settings),
        provenance={**settings.metric.provenance, **how.about, **_explained(model, how, sums)},
    )


def _explained(model: Lvlm, how: GradientSettings, sums: Sequence[float]) -> dict[str, Any]:
    """Return the sum of the input's edge scores (a share of the difference), and warn if it is far from 1."""
    if how.point != "path":
        return {}
    mean, lowest, highest = float(np.mean(sums)), min(sums), max(sums)
    if abs(mean - 1) > EXPLAINED:
        _LOG.warning(
            "%s: with steps=%d the scores sum to %.2f of the difference between clean and corrupt (%.2f to %.2f over %d "
            "pairs): use more steps",
            model.name,
            how.steps,
            mean,
            lowest,
            highest,
            len(sums),
        )
    return {"explained": {"mean": mean, "lowest": lowest, "highest": highest}}


@dataclass(eq=False)
class _PairScores:
    """Scores of every pair, while they fit into memory."""

    scores: list[np.ndarray] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    fits: bool = True

    def add(self, scores: np.ndarray, groups: Sequence[str]) -> None:
        """Store scores of pairs ``[P, sources, targets]``; drop all once they exceed `HELD` bytes."""
        self.scores.append(scores.astype(np.float32))
        self.groups += groups
        if sum(x.nbytes for x in self.scores) > HELD:
            self.fits, self.scores = False, []

    def ends(self, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
        """Return both ends of every edge's interval; empty arrays if there is no interval."""
        if not self.fits or len(set(self.groups)) < 2:
            return np.zeros(0), np.zeros(0)
        each = np.concatenate(self.scores)[:, shape.there]  # [pairs, edges]
        bounds = np.zeros((2, *shape.there.shape))
        parts = [each[:, k : k + EDGES] for k in range(0, each.shape[1], EDGES)]
        bounds[:, shape.there] = np.concatenate([mean_interval(x, self.groups, resamples=1000) for x in parts], axis=1)
        return bounds[0], bounds[1]


@dataclass(eq=False)
class _Decoder:
    """Properties of the model that are the same for every pair, determined from the first pair."""

    model: Lvlm
    forms: tuple[Form, ...] = ()
    readers: tuple[StreamReader, ...] = ()

    @property
    def shape(self) -> Shape:
        return Shape(self.model.n_layers, self.model.n_heads, tuple(form.parallel for form in self.forms))

    def run_source(self, sides: Sides) -> Run:
        """Run the source, and determine how each layer reads the stream."""
        if self.forms:
            return run(self.model, sides.source, sides.metric)
        self.forms, recorded = forms_of(self.model, lambda: run(self.model, sides.source, sides.metric))
        return recorded

    def prepare_readers(self, at: Run) -> None:
        """Prepare the backward pass to the inputs of heads, and check that the parts of heads sum to the whole."""
        if self.readers:
            return
        weights = [weights_of(self.model, i) for i in range(self.model.n_layers)]
        check_split(self.model, at.readings, weights)
        layers = zip(self.forms, weights, at.readings, strict=True)
        self.readers = tuple(reader_of(form.norm, weight, reading.entering) for form, weight, reading in layers)


def _scores(decoder: _Decoder, sides: Sides, how: GradientSettings) -> tuple[np.ndarray, Tensor, Tensor]:
    """Return the estimated change of the metric per edge, ``[P, sources, targets]``, and the metric of both runs."""
    model = decoder.model
    first = decoder.run_source(sides)
    forms = decoder.forms
    if how.point == "source":
        first = run(model, sides.source, sides.metric, forms)
    second = run(model, sides.run, sides.metric, forms if how.point == "run" else ())
    source, here = first.written, second.written
    moved = replace(
        source,
        embeddings=source.embeddings - here.embeddings,
        added={i: _added(source, i) - _added(here, i) for i in {*source.added, *here.added}},
        heads=tuple(a - b for a, b in zip(source.heads, here.heads, strict=True)),
        mlps=tuple(a - b for a, b in zip(source.mlps, here.mlps, strict=True)),
    )
    if how.point != "path":
        total = _at_point(decoder, first if how.point == "source" else second, moved)
        return total, source.metric, here.metric
    total = np.zeros((len(sides.members), decoder.shape.n_sources, decoder.shape.n_targets))
    for share in how.shares:
        embeddings = here.embeddings + share * moved.embeddings
        added = {i: share * x for i, x in moved.added.items()}
        total += _at_point(
            decoder, run(model, sides.run, sides.metric, forms, embeddings=embeddings, added=added), moved
        )
    return total / len(how.shares), source.metric, here.metric


def _added(written: Written, layer: int) -> Tensor:
    return written.added[layer] if layer in written.added else torch.zeros_like(written.embeddings)


@torch.no_grad()
def _at_point(decoder: _Decoder, at: Run, moved: Written) -> np.ndarray:
    """Return every edge's score from the gradients of one run, float64 ``[P, sources, targets]``."""
    decoder.prepare_readers(at)
    examples, length, width = moved.embeddings.shape
    shape = decoder.shape
    most = max(shape.n_sources, 3 * shape.n_heads + 1)
    size = max(1, CHUNK // (4 * examples * width * most))
    total = np.zeros((examples, shape.n_sources, shape.n_targets))
    for first in range(0, length, size):
        total += _in_part(decoder, at, moved, slice(first, first + size))
    return total


def _in_part(decoder: _Decoder, at: Run, moved: Written, part: slice) -> np.ndarray:
    """Return the contribution of some positions to every edge's score."""
    shape = decoder.shape
    nodes = _contributions(decoder, at, moved, part)  # [sources, P, t, D]
    scores = nodes.new_zeros(nodes.shape[1], shape.n_sources, shape.n_targets)
    layers = zip(decoder.forms, decoder.readers, at.readings, strict=True)
    for i, (form, reader, reading) in enumerate(layers):
        if i - 1 in moved.added:
            nodes[0] += moved.added[i - 1][:, part].to(nodes)
        entering = reading.entering[:, part]
        read = reader.back({c: slope[:, part] for c, slope in reading.heads.items()}, entering)
        mlp = reading.mlp[None, :, part]
        if form.shared and form.norm is not None:
            mlp = through(form.norm, entering, mlp)
        last = shape.columns(i).stop - 1
        before, middle = shape.before_attention(i), shape.before_mlp(i)
        scores[:, :before, shape.columns(i).start : last] = _product(nodes[:before], read)
        scores[:, :middle, last : last + 1] = _product(nodes[:middle], mlp)
    if at.final is not None:
        scores[..., -1:] = _product(nodes, at.final[None, :, part])
    return scores.double().cpu().numpy()


def _contributions(decoder: _Decoder, at: Run, moved: Written, part: slice) -> Tensor:
    """Return the change of every node's output in the stream, ``[sources, P, t, D]``, in at least float32."""
    model, shape = decoder.model, decoder.shape
    embeddings = moved.embeddings[:, part]
    dtype = torch.float32 if embeddings.element_size() < 4 else embeddings.dtype
    nodes = torch.empty(shape.n_sources, *embeddings.shape, dtype=dtype, device=embeddings.device)
    nodes[0] = embeddings
    for i in range(model.n_layers):
        first = shape.before_attention(i)
        z = moved.heads[i][:, part].unflatten(-1, (model.n_heads, -1))
        by_head = (
            matrix_of(model.output_projection("decoder", i), z).to(z).unflatten(1, (model.n_heads, -1))
        )  # [D, H, d]
        heads = torch.einsum("pthd,whd->hptw", z, by_head)
        nodes[first : first + model.n_heads] = _written(model, i, at.written.attention[i][:, part], heads)
        nodes[first + model.n_heads] = moved.mlps[i][:, part]
    return nodes


def _written(model: Lvlm, layer: int, whole: Tensor, heads: Tensor) -> Tensor:
    """Return the change of a layer's output per head, ``[H, P, t, D]``: the derivative of its post-norm applied."""
    place = model.place("decoder", layer, "attn_out")
    if place.gate is None and not model.spec.decoder.attention_out:
        return heads
    with torch.enable_grad():
        # A Jacobian-vector product by double backward: forward-mode differentiation emits warnings here.
        at = whole[None].expand_as(heads).detach().requires_grad_()
        written = written_by(model, layer, at)
        weight = torch.zeros_like(written).requires_grad_()
        (back,) = torch.autograd.grad(written, at, weight, create_graph=True)
        (moved,) = torch.autograd.grad(back, weight, heads)
    return moved


def _product(nodes: Tensor, read: Tensor) -> Tensor:
    """Return ``[N, P, t, D]`` times ``[K, P, t, D]``, summed over positions and width, ``[P, N, K]``."""
    read = read.to(nodes)
    return torch.stack([nodes[:, p].flatten(1) @ read[:, p].flatten(1).T for p in range(nodes.shape[1])])
