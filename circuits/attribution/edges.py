"""Edge attribution patching: what one node of the decoder tells another, estimated from gradients.

For nodes u before v, ``s(u -> v) = (a_source(u) - a_run(u)) . dM/d(input of v)``, summed over positions: what putting the
other run's value of u into the input of v, and nowhere else, would do, as far as the model is linear there. Nodes are
what the first layer is given (``input``), heads, MLPs and the logits; a head has three inputs, in front of its layer's
norm. Sources: Syed et al. 2023, arXiv 2310.10348 (EAP); Hanna et al. 2024, arXiv 2403.17806 (EAP-IG: gradients averaged
along the way between the embeddings of both runs).

A head's share of what its layer writes is ``z_h W_O^h``; where a norm follows, what that norm's derivative makes of it at
the point where gradients are taken, so that all of an edge is linear at that point.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from circuits.attribution.attention_nodes import check_opened
from circuits.attribution.estimates import How, Point, Sides, Variant, check_how, groups, kept_of
from circuits.attribution.norm_vjp import Reader, reader_of, through
from circuits.attribution.residual_stream import Form, Run, Written, check_split, forms_of, run, weights_of, written_by
from circuits.patching.activation import plans_of, settings_of
from circuits.patching.metrics import LEAST
from circuits.patching.pairs import check_kept, pairs_digest
from circuits.patching.sweep import Direction
from circuits.results.graph import Graph, Shape
from circuits.results.statistics import mean_interval
from concepts.schema import CounterfactualPair
from lvlm.model import Lvlm

CHUNK = 2**27
"""Bytes that nodes' outputs, or gradients at their inputs, may take at a time."""
HELD = 2**30
"""Bytes that the scores of all pairs, which intervals need, may take."""
EDGES = 2**12
"""Edges whose intervals are made at a time."""
EXPLAINED = 0.1
"""How far from 1 the sum of the scores of the input's edges may be before it is warned about."""
_METRIC = "logit_difference"
_LOG = logging.getLogger("circuits.attribution.heads")


def edges(
    model: Lvlm,
    pairs: Sequence[CounterfactualPair],
    direction: Direction = "denoise",
    *,
    point: Point = "path",
    steps: int = 5,
    variant: Variant = "paper",
    min_effect: float = LEAST[_METRIC],
    batch_pairs: int = 8,
    progress: bool | None = None,
) -> Graph:
    """Score every edge of the decoder, from its embeddings to the answer.

    Parameters
    ----------
    model
        In evaluation mode. Its attention has to go through transformers' table of attention functions.
    pairs
        Pairs of equal token length whose true answers differ.
    direction
        ``denoise``: what putting values of the clean run into the corrupt one would bring back; ``noise``: what values of
        the corrupt run in the clean one would destroy. Either way positive where an edge carries the answer.
    point
        Where gradients are taken: ``run`` (with ``noise`` EAP), ``source``, or ``path``: the mean over `steps` points
        ``run + k / steps (source - run)`` between the embeddings of both (EAP-IG).
    steps
        Points on the way. The paper's 5 may explain far less or more than the whole difference: see `Graph.explained`.
    variant
        ``paper``: k = 1 ... steps; ``release``: k = 0 ... steps - 1, as in the authors' code.
    min_effect
        As for `patch_heads`, in logits.
    batch_pairs
        Pairs side by side.
    progress
        Show progress; by default where standard error is a terminal.

    Returns
    -------
    Graph
        Mean over pairs of each edge's share of ``LD_clean - LD_corrupt``. With ``path``, the edges out of ``input`` add up
        to 1, the whole difference, the closer the more steps there are (completeness); `Graph.explained` is their sum. Where
        it is off by more than `EXPLAINED`, a record of level WARNING of the logger ``circuits.attribution.heads`` says so.
        Intervals of scores are over groups of pairs (percentile bootstrap); there are none for a single group, or where
        scores of all pairs would not fit into memory.

    Raises
    ------
    ConfigError
        For an option that does not exist.
    PatchError
        As `patch_heads`, pairs of unlike length among them.
    ModelError
        For a family whose heads' inputs cannot be told apart, or an attention that cannot be differentiated: before
        anything runs.
    """
    how = How(direction, point, steps, variant=variant)
    check_how(model, how, batch_pairs)
    check_opened(model)
    settings = settings_of(model, direction, _METRIC, 1, None, min_effect, progress)
    plans = plans_of(model, pairs, "all", settings)
    decoder = _Decoder(model)
    total: np.ndarray | float = 0.0
    apart = _Apart()
    sums: list[float] = []
    baseline = np.zeros((2, len(plans)))

    def do(sides: Sides) -> tuple[np.ndarray, Tensor, Tensor]:
        return _scores(decoder, sides, how)

    for group, share, metrics in groups(model, plans, how, settings, batch_pairs, do, "scoring edges"):
        baseline[:, group] = metrics
        used = kept_of(metrics[0], metrics[1], settings.min_effect)
        total = total + share[used].sum(0)
        sums += share[used][:, 0].sum(-1).tolist()
        apart.add(share[used], [plans[i].pair.clean.group for i, u in zip(group, used, strict=True) if u])
    kept = kept_of(baseline[0], baseline[1], settings.min_effect)
    check_kept(baseline[0], baseline[1], kept, settings.min_effect)
    low, high = apart.ends(decoder.shape)
    return Graph(
        scores=np.asarray(total) / kept.sum(),
        low=low,
        high=high,
        shape=decoder.shape,
        model=model.name,
        config_hash=model.config_hash,
        weights_hash=model.weights_hash,
        pairs_digest=pairs_digest([plan.pair for plan in plans]),
        n_pairs=int(kept.sum()),
        excluded=int((~kept).sum()),
        direction=direction,
        provenance={**how.about, "min_effect": min_effect, **_explained(model, how, sums)},
    )


def _explained(model: Lvlm, how: How, sums: Sequence[float]) -> dict[str, Any]:
    """Return what share of the difference the input's edges add up to, and warn where it is not all of it."""
    if how.point != "path":
        return {}
    mean, lowest, highest = float(np.mean(sums)), min(sums), max(sums)
    if abs(mean - 1) > EXPLAINED:
        _LOG.warning(
            "%s: with steps=%d the scores add up to %.2f of the difference between clean and corrupt (%.2f to %.2f over %d "
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
class _Apart:
    """Scores of every pair, as long as they fit."""

    scores: list[np.ndarray] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    fits: bool = True

    def add(self, scores: np.ndarray, groups: Sequence[str]) -> None:
        """Keep some pairs' scores ``[P, sources, targets]``, or give up."""
        self.scores.append(scores.astype(np.float32))
        self.groups += groups
        if sum(x.nbytes for x in self.scores) > HELD:
            self.fits, self.scores = False, []

    def ends(self, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
        """Return both ends of every edge's interval; empty without one."""
        if not self.fits or len(set(self.groups)) < 2:
            return np.zeros(0), np.zeros(0)
        each = np.concatenate(self.scores)[:, shape.there]  # [pairs, edges]
        found = np.zeros((2, *shape.there.shape))
        parts = [each[:, k : k + EDGES] for k in range(0, each.shape[1], EDGES)]
        found[:, shape.there] = np.concatenate([mean_interval(x, self.groups, resamples=1000) for x in parts], axis=1)
        return found[0], found[1]


@dataclass(eq=False)
class _Decoder:
    """What does not change from pair to pair, learned from the first of them."""

    model: Lvlm
    forms: tuple[Form, ...] = ()
    readers: tuple[Reader, ...] = ()

    @property
    def shape(self) -> Shape:
        return Shape(self.model.n_layers, self.model.n_heads, tuple(form.parallel for form in self.forms))

    def look(self, sides: Sides) -> Run:
        """Run the source, and find out how each layer reads."""
        if self.forms:
            return run(self.model, sides.source, sides.metric)
        self.forms, found = forms_of(self.model, lambda: run(self.model, sides.source, sides.metric))
        return found

    def know(self, at: Run) -> None:
        """Find out how to take gradients back to what heads read, and check that their parts make up the whole."""
        if self.readers:
            return
        weights = [weights_of(self.model, i) for i in range(self.model.n_layers)]
        check_split(self.model, at.readings, weights)
        given = zip(self.forms, weights, at.readings, strict=True)
        self.readers = tuple(reader_of(form.norm, weight, reading.entering) for form, weight, reading in given)


def _scores(decoder: _Decoder, sides: Sides, how: How) -> tuple[np.ndarray, Tensor, Tensor]:
    """Return what each edge would change of the metric, ``[P, sources, targets]``, and the metric of both runs."""
    model = decoder.model
    first = decoder.look(sides)
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
        found = _at_point(decoder, first if how.point == "source" else second, moved)
        return found, source.metric, here.metric
    found = np.zeros((len(sides.members), decoder.shape.n_sources, decoder.shape.n_targets))
    for share in how.shares:
        embeddings = here.embeddings + share * moved.embeddings
        added = {i: share * x for i, x in moved.added.items()}
        found += _at_point(
            decoder, run(model, sides.run, sides.metric, forms, embeddings=embeddings, added=added), moved
        )
    return found / len(how.shares), source.metric, here.metric


def _added(written: Written, layer: int) -> Tensor:
    return written.added[layer] if layer in written.added else torch.zeros_like(written.embeddings)


@torch.no_grad()
def _at_point(decoder: _Decoder, at: Run, moved: Written) -> np.ndarray:
    """Return every edge's score with gradients taken in one run, float64 ``[P, sources, targets]``."""
    decoder.know(at)
    examples, length, width = moved.embeddings.shape
    shape = decoder.shape
    most = max(shape.n_sources, 3 * shape.n_heads + 1)
    size = max(1, CHUNK // (4 * examples * width * most))
    total = np.zeros((examples, shape.n_sources, shape.n_targets))
    for first in range(0, length, size):
        total += _in_part(decoder, at, moved, slice(first, first + size))
    return total


def _in_part(decoder: _Decoder, at: Run, moved: Written, part: slice) -> np.ndarray:
    """Return what some positions add to every edge's score."""
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
    """Return what moves at every node as the stream sees it, ``[sources, P, t, D]``, of at least float32."""
    model, shape = decoder.model, decoder.shape
    embeddings = moved.embeddings[:, part]
    dtype = torch.float32 if embeddings.element_size() < 4 else embeddings.dtype
    nodes = torch.empty(shape.n_sources, *embeddings.shape, dtype=dtype, device=embeddings.device)
    nodes[0] = embeddings
    for i in range(model.n_layers):
        first = shape.before_attention(i)
        by_head = model.output_projection("decoder", i).weight.detach().unflatten(1, (model.n_heads, -1))  # [D, H, d]
        z = moved.heads[i][:, part].unflatten(-1, (model.n_heads, -1))
        heads = torch.einsum("pthd,whd->hptw", z, by_head)
        nodes[first : first + model.n_heads] = _written(model, i, at.written.attention[i][:, part], heads)
        nodes[first + model.n_heads] = moved.mlps[i][:, part]
    return nodes


def _written(model: Lvlm, layer: int, whole: Tensor, heads: Tensor) -> Tensor:
    """Return how what a layer adds moves with each head's part, ``[H, P, t, D]``: the derivative of its post-norm."""
    place = model.place("decoder", layer, "attn_out")
    if place.gate is None and not model.spec.decoder.attention_out:
        return heads
    with torch.enable_grad():
        # The derivative of the derivative's transpose: forward-mode differentiation warns of what it is built on.
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
