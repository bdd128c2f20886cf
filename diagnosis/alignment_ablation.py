"""Which heads and MLPs make images and texts alike: the change of each measure of alignment when one is mean-ablated.

Images and texts run alone (`activation_store.trace` with ``input="image"`` and ``input="text"``). A component's output is
replaced, at every token, by its mean over all tokens of the examples of the same modality; so what differs between
examples is lost, and the modality's common part remains. A component that aligns the modalities has a negative change.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from activation_store.row_input import RowInput
from activation_store.tracing.single_modality import select_modality
from circuits.head_set import all_heads
from circuits.interventions.intervention import Intervention, Replace, intervened
from circuits.patching.activation import check_evaluating
from concepts.schema import Example
from groundscope.core.artifacts import freeze
from groundscope.core.errors import ConfigError, DataError, SiteError
from groundscope.core.intervals import check_confidence
from groundscope.core.progress import step_bar
from groundscope.core.short_repr import short_repr
from groundscope.core.text import format_count
from lvlm.model import Lvlm
from lvlm.sites import Head, Site
from lvlm.token_selection import TokenSelection
from probes.alignment.comparison import choose_measures, measure_rows
from probes.alignment.measures import Measure, Settings
from probes.alignment.pairing import ImageRows
from probes.alignment.rows import CLAMP, NEIGHBORS

if TYPE_CHECKING:
    import pandas as pd

    from concepts.schema import ConceptDataset

BLOCKS = 40
"""Largest number of blocks of images that the jackknife leaves out, one after the other."""


@dataclass(frozen=True, eq=False)
class AlignmentAblation:
    """The change of each measure of alignment without a component; returned by `ablate_alignment`.

    Examples
    --------
    >>> import numpy as np
    >>> from diagnosis import AlignmentAblation
    >>> change = np.full((1, 1, 1), -0.2)
    >>> ablation = AlignmentAblation(("L0.H1",), (5,), ("cosine",), np.array([[0.5]]), change, change - 0.1, change + 0.1, 20)
    >>> ablation.table().round(1)
      component  layer measure  intact  change  low  high
    0     L0.H1      5  cosine     0.5    -0.2 -0.3  -0.1
    """

    components: tuple[str, ...]
    """``L1.H0`` or ``L1.mlp``."""
    layers: tuple[int, ...]
    """Layers of the residual stream where alignment is measured."""
    outputs: tuple[str, ...]
    """Names of the values."""
    intact: np.ndarray
    """float64 [layers, outputs]: the values of the whole model."""
    change: np.ndarray
    """float64 [components, layers, outputs]: the value without the component minus the intact one; 0 below its layer."""
    low: np.ndarray
    high: np.ndarray
    """Jackknife interval of the change over images."""
    n_images: int

    __repr__ = short_repr

    def __post_init__(self) -> None:
        freeze(self)

    def table(self) -> pd.DataFrame:
        """Return one row per component, layer and value: intact value, change, and the ends of its interval."""
        import pandas as pd

        rows = [
            (c, layer, m, self.intact[j, k], self.change[i, j, k], self.low[i, j, k], self.high[i, j, k])
            for i, c in enumerate(self.components)
            for j, layer in enumerate(self.layers)
            for k, m in enumerate(self.outputs)
        ]
        return pd.DataFrame(rows, columns=["component", "layer", "measure", "intact", "change", "low", "high"])


@torch.no_grad()
def ablate_alignment(
    model: Lvlm,
    data: ConceptDataset,
    components: Literal["heads", "mlps"] | Sequence[str] = "heads",
    *,
    layers: Sequence[int] | None = None,
    image: str = "image:mean",
    text: str = "question:mean",
    measures: Sequence[str] | None = None,
    k: int = NEIGHBORS,
    clamp: float | None = CLAMP,
    confidence: float = 0.95,
    batch_size: int = 32,
    progress: bool | None = None,
) -> AlignmentAblation:
    """Mean-ablate heads and MLPs of the decoder, one at a time, and measure the alignment of images and texts again.

    The first example of each image is used. Intervals of the change are those of the jackknife over blocks of whole images:
    draws with repetition would make equal images each other's neighbors.

    Parameters
    ----------
    model
        In evaluation mode; it must run on text alone.
    data
        Examples, the image and the text of which are compared.
    components
        ``heads``, ``mlps``, or names such as ``["L1.H0", "L2.mlp"]``.
    layers
        Layers of the residual stream where alignment is measured; by default the last.
    image, text
        Token selections, one vector of each example.
    measures, k, clamp
        As for `probes.alignment.compare`.
    confidence
        Of the intervals.
    batch_size
        Examples per forward pass; one pass for each component and modality.
    progress
        Whether to show a progress bar; by default only on a terminal.

    Raises
    ------
    SiteError
        If the model has no such component or layer, or a token selection does not give one vector.
    ModelError
        If the model does not run on text alone.
    ConfigError
        If there is no component, or the batch size is below 1.
    DataError
        If an example has no image, or none of the selected tokens.
    ProbeError
        If a measure is unknown, or there are too few images for it.

    Examples
    --------
    >>> import groundscope as gs
    >>> from diagnosis import ablate_alignment
    >>> data = gs.scenes.dataset(n_images=12, splits=["neutral"])
    >>> ablation = ablate_alignment(gs.load_lvlm("tiny"), data, ["L0.mlp"], measures=["cosine", "cka"])
    >>> ablation.change.shape, ablation.n_images
    ((1, 1, 2), 5)
    """
    if batch_size < 1:
        msg = f"batch_size={batch_size} must be at least 1"
        raise ConfigError(msg)
    check_confidence(confidence)
    check_evaluating(model)
    places = _components(model, components)
    measured = tuple(range(model.n_layers))[-1:] if layers is None else tuple(dict.fromkeys(layers))
    sites = tuple(model.sites(f"decoder.L{layer}.resid_post")[0] for layer in measured)
    of = ImageRows.of([e.group for e in data])
    first = replace(data, examples=tuple(data[int(i)] for i in of.first))
    without = next((e for e in first if not e.images), None)
    if without is not None:
        msg = f"example '{without.id}' has no image to compare its text with; leave it out: data.filter(lambda e: e.images)"
        raise DataError(msg)
    chosen = choose_measures(measures, ImageRows.of(range(len(first))), Settings(k, clamp))
    names = [str(site) for site in sites]
    alone: tuple[tuple[RowInput, str], ...] = (("image", image), ("text", text))
    sides = [
        _Side.of(model, select_modality(model, first, modality, names, [tokens], 0).examples, tokens, sites, batch_size)
        for modality, tokens in alone
    ]
    form = (chosen, Settings(k, clamp))
    outputs = tuple(output for name, measure in chosen.items() for output in measure.names(name))
    with step_bar("ablating for alignment", len(places) + 1, show=progress) as advance:
        whole = [side.rows(None) for side in sides]
        parts = _blocks(len(first))
        intact = np.array([_values([w[j] for w in whole], form) for j in range(len(sites))])
        left_out = np.array([[_values([w[j][p] for w in whole], form) for p in parts] for j in range(len(sites))])
        advance()
        change = np.zeros((len(places), len(sites), len(outputs)))
        spread = np.zeros_like(change)
        for i, (site, head) in enumerate(places.values()):
            ablated = [side.rows((site, head)) for side in sides]
            for j, layer in enumerate(measured):
                if layer < site.layer:
                    continue  # not reached by the component
                pair = [rows[j] for rows in ablated]
                change[i, j] = _values(pair, form) - intact[j]
                draws = np.array([_values([x[p] for x in pair], form) for p in parts]) - left_out[j]
                spread[i, j] = np.sqrt((len(parts) - 1) / len(parts) * ((draws - draws.mean(axis=0)) ** 2).sum(axis=0))
            advance()
    reach = _student(confidence, len(parts) - 1) * spread
    return AlignmentAblation(
        tuple(places), measured, outputs, intact, change, change - reach, change + reach, len(first)
    )


@dataclass(frozen=True, eq=False)
class _Side:
    """The examples of one modality, and the mean of each ablated output over all of their tokens."""

    model: Lvlm
    examples: tuple[Example, ...]
    selection: TokenSelection
    sites: tuple[Site, ...]
    batch_size: int
    means: dict[Site, Tensor]

    @classmethod
    def of(
        cls, model: Lvlm, examples: tuple[Example, ...], tokens: str, sites: tuple[Site, ...], batch_size: int
    ) -> _Side:
        selection = TokenSelection.parse(tokens)
        if selection.ragged:
            msg = f"'{tokens}' selects several vectors of an example; use ':mean' or a single token"
            raise SiteError(msg)
        return cls(model, examples, selection, sites, batch_size, {})

    def rows(self, ablated: tuple[Site, int | None] | None) -> np.ndarray:
        """Return the selected vectors [layers, N, D], with one output replaced by its mean or with none."""
        out: list[list[np.ndarray]] = [[np.empty(0)] * len(self.examples) for _ in self.sites]
        for batch in self.model.batches(self.examples, self.batch_size):
            positions = [list(e.tokens.positions(self.selection)) for e in batch.encodings]
            empty = next((e for e, p in zip(batch.encodings, positions, strict=True) if not p), None)
            if empty is not None:
                msg = (
                    f"example '{empty.example.id}' has no tokens of '{self.selection}'; choose a selection that it has"
                )
                raise DataError(msg)

            def take(_site: Site, x: Tensor, at: list[list[int]] = positions) -> Tensor:
                return torch.stack([x[row, p].double().mean(dim=0) for row, p in enumerate(at)])

            with nullcontext() if ablated is None else intervened(self.model, [self._intervention(*ablated)]):
                read = self.model.read(batch.inputs, self.sites, take=take)
            for j, site in enumerate(self.sites):
                for i, vector in zip(batch.index, read[str(site)].cpu().numpy(), strict=True):
                    out[j][i] = vector
        return np.array(out)

    def _intervention(self, site: Site, head: int | None) -> Intervention:
        if site not in self.means:
            self.means[site] = self._mean(site)
        mean = self.means[site]
        if head is not None:
            mean = mean[head * self.model.head_dim : (head + 1) * self.model.head_dim]
        return Intervention(site, Replace(mean), "all", head)

    def _mean(self, site: Site) -> Tensor:
        """Return the mean of a site over all tokens of all examples, ``[D]``."""
        total, count = torch.zeros(()), 0
        for batch in self.model.batches(self.examples, self.batch_size):
            x = self.model.read(batch.inputs, [site])[str(site)].double()
            total, count = total.to(x.device) + x.flatten(0, -2).sum(dim=0), count + x.flatten(0, -2).shape[0]
        return (total / count).to(self.model.dtype)


def _components(model: Lvlm, components: str | Sequence[str]) -> dict[str, tuple[Site, int | None]]:
    """Return the site, and the head, of each component by name."""
    if components == "heads":
        names = [str(head) for head in all_heads(model)]
    elif components == "mlps":
        names = [f"L{layer}.mlp" for layer in range(model.n_layers)]
    else:
        names = [components] if isinstance(components, str) else [str(c) for c in components]
    if not names:
        msg = "components is empty; pass 'heads', 'mlps', or names such as 'L1.H0' and 'L2.mlp'"
        raise ConfigError(msg)
    places: dict[str, tuple[Site, int | None]] = {}
    for name in names:
        if name.endswith(".mlp"):
            places[name] = model.sites(f"decoder.{name.removesuffix('.mlp')}.mlp_out")[0], None
            continue
        head = Head.parse(name)
        if not (head.layer < model.n_layers and head.head < model.n_heads):
            msg = f"{model.name} has no head {head}: it has {model.n_layers} layers of {format_count(model.n_heads, 'head')}"
            raise SiteError(msg)
        places[str(head)] = model.head_site(head.layer), head.head
    return places


def _values(pair: Sequence[np.ndarray], form: tuple[dict[str, Measure], Settings]) -> np.ndarray:
    x, y = pair
    return measure_rows(x, y, ImageRows.of(range(len(x))), *form)


def _blocks(n: int) -> list[np.ndarray]:
    """Return the rows that remain without each block of images."""
    count = min(n, BLOCKS)
    block = np.arange(n) % count
    return [np.flatnonzero(block != b) for b in range(count)]


def _student(confidence: float, degrees: int) -> float:
    from scipy import stats

    quantile: Any = stats.t.ppf((1 + confidence) / 2, degrees)
    return float(quantile)
