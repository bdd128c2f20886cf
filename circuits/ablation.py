"""Ablation of heads, sets of heads and layers: zero, mean or resample ablation, and the loss of the answer's margin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
import torch
from torch import Tensor

from circuits.execution.memory import MEMORY
from circuits.head_set import HeadSet, all_heads, head_sets_of
from circuits.interventions.intervention import Intervention, Replace, Zero, intervened
from circuits.patching.activation import check_evaluating
from circuits.results.statistics import mean_interval
from concepts.schema import Example
from groundscope.core.artifacts import freeze
from groundscope.core.errors import ConfigError, PatchError
from groundscope.core.progress import progress_bar
from groundscope.core.short_repr import short_repr
from groundscope.core.statistics import changes_of_columns, rates_of_columns
from lvlm.answer_keys import answer_key
from lvlm.encoding.encode import Encoding
from lvlm.finite_logits import check_finite
from lvlm.model import Lvlm
from lvlm.sites import Head, Site
from lvlm.token_map import TokenMap
from lvlm.token_selection import TokenSelection

if TYPE_CHECKING:
    import pandas as pd

Method = Literal["zero", "mean", "resample"]
METHODS: tuple[Method, ...] = ("zero", "mean", "resample")
TOKENS = ("last", "suffix:all", "image:all", "all")
_BY_EXAMPLE = ("ids", "groups", "levels")


@dataclass(frozen=True, eq=False)
class Ablation:
    """The answer's margin with and without sets of heads; returned by `ablate`.

    Examples
    --------
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> questions = gs.scenes.dataset(n_images=10, seed=0)[:3]
    >>> ablation = gs.ablate(model, questions, ["L1.H0"], method="zero")
    >>> ablation.effects.shape, bool((ablation.select(ablation.right).margins > 0).all())
    ((3, 1), True)
    """

    margins: np.ndarray
    """Score of the true answer minus the best other score, of the intact model, float32 ``[n_examples]``, in logits."""
    ablated: np.ndarray
    """The margin with each set ablated, float32 ``[n_examples, n_sets]``."""
    heads: tuple[HeadSet, ...]
    """The heads of each run."""
    ids: tuple[str, ...]
    groups: tuple[str, ...]
    """Scene or image of each example: the resampling unit of the intervals."""
    levels: tuple[str, ...]
    method: Method
    tokens: str
    reference: int
    """Number of examples that the mean or the donors come from; 0 for ``zero``."""
    seed: int
    """Random seed of the choice of donors for ``resample``."""
    model: str
    config_hash: str
    weights_hash: str

    __repr__ = short_repr

    def __post_init__(self) -> None:
        freeze(self)

    @property
    def effects(self) -> np.ndarray:
        """Margin lost without each set, float32 ``[n_examples, n_sets]``: positive where the set supports the true answer."""
        return self.margins[:, None] - self.ablated

    @property
    def right(self) -> np.ndarray:
        """Whether the intact model prefers the true answer, bool ``[n_examples]``."""
        return self.margins > 0

    @property
    def right_without(self) -> np.ndarray:
        """Whether the model prefers the true answer with each set ablated, bool ``[n_examples, n_sets]``."""
        return self.ablated > 0

    def select(self, keep: np.ndarray) -> Self:
        """Return the results of a subset of the examples, selected by a boolean mask or by indices."""
        which = np.arange(len(self.margins))[keep]
        lists = {name: tuple(getattr(self, name)[i] for i in which) for name in _BY_EXAMPLE}
        return replace(self, margins=self.margins[which], ablated=self.ablated[which], **lists)

    def frame(self, *, confidence: float = 0.95) -> pd.DataFrame:
        """Return one row per set: its name, size, mean effect and accuracy without it, with intervals.

        Intervals are clustered by group: a bootstrap for effects, a formula for rates. ``accuracy`` is the share of
        correct answers without the set, ``lost`` the accuracy of the intact model minus ``accuracy``.
        """
        import pandas as pd

        columns: dict[str, object] = {
            "name": [str(heads) for heads in self.heads],
            "heads": [len(heads) for heads in self.heads],
        }
        lost = self.right[:, None].astype(float) - self.right_without
        measured = (
            ("effect", self.effects, mean_interval),
            ("accuracy", self.right_without, rates_of_columns),
            ("lost", lost, changes_of_columns),
        )
        for name, values, interval in measured:
            low, high = interval(values, self.groups, confidence)
            columns |= {name: values.mean(axis=0, dtype=float), f"{name}_low": low, f"{name}_high": high}
        return pd.DataFrame(columns)


@torch.no_grad()
def ablate(
    model: Lvlm,
    examples: Sequence[Example],
    heads: Literal["each", "layers"] | Head | HeadSet | str | Sequence[Head | HeadSet | str] = "each",
    *,
    tokens: str = "all",
    method: Method = "mean",
    reference: Sequence[Example] | None = None,
    batch_size: int = 64,
    memory: int = MEMORY,
    seed: int = 0,
    progress: bool | None = None,
) -> Ablation:
    """Ablate heads of the decoder and measure the effect on the answer's margin.

    Parameters
    ----------
    model
        In evaluation mode.
    examples
        Questions with candidate answers.
    heads
        What is ablated in one run: each head (``each``), all heads of each layer (``layers``), or a sequence of heads
        (one run each) and of `HeadSet` (one run for all heads of the set).
    tokens
        Positions to ablate: ``last``, ``suffix:all`` (every token after the image), ``image:all`` or ``all``.
    method
        Replacement of a head's output. ``zero``: 0. ``mean``: its mean over `reference`, at tokens of the same role.
        ``resample``: its output on one random example of `reference` from another group with the same number of tokens
        of that role, token by token (Chan et al. 2022, causal scrubbing; Zhang & Nanda 2024, arXiv 2309.16042).
    reference
        Examples that means and donors come from; `examples` by default.
    batch_size
        Largest number of examples per forward pass.
    memory
        Largest number of bytes for the donors of one batch (``resample``); batches shrink to fit.
    seed
        Seed of the random choice of donors.
    progress
        Whether to show progress; by default only if standard error is a terminal.

    Raises
    ------
    ConfigError
        If an option has an unknown value.
    SiteError
        If the model has no such head, `heads` contains anything but heads, or `tokens` is unknown or ambiguous.
    PatchError
        If `examples` or `heads` is empty, the model is in training mode, or an example has no donor.
    DataError
        If an answer cannot be read from one token.
    ModelError
        If logits are not finite, with or without ablation.

    Examples
    --------
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> questions = gs.scenes.dataset(n_images=10, seed=0)[:3]
    >>> ablation = gs.ablate(model, questions, ["L1.H0", gs.HeadSet(["L2.H0", "L2.H1"])])
    >>> ablation.frame()["name"].tolist(), ablation.effects.shape
    (['L1.H0', 'L2.H0+L2.H1'], (3, 2))
    """
    if method not in METHODS or batch_size < 1 or memory < 1:
        msg = (
            f"invalid method='{method}', batch_size={batch_size} or memory={memory}: choose method from "
            f"{', '.join(METHODS)}; batch_size and memory must be at least 1"
        )
        raise ConfigError(msg)
    where = TokenSelection.parse(tokens, allowed=TOKENS)
    check_evaluating(model)
    head_sets = _sets(model, heads)
    if not head_sets:
        msg = "heads is empty; pass 'each', 'layers', or at least one head"
        raise PatchError(msg)
    reference_examples = list(examples if reference is None else reference)
    if not examples or not reference_examples:
        msg = (
            "examples is empty; pass at least one" if not examples else "reference is empty; pass at least one example"
        )
        raise PatchError(msg)
    answer_keys = [answer_key(model, example) for example in examples]
    layers = sorted({head.layer for heads in head_sets for head in heads})
    margins = np.empty(len(examples), np.float32)
    ablated = np.empty((len(examples), len(head_sets)), np.float32)
    with progress_bar(progress) as bar:
        means = _means(model, reference_examples, layers, where, batch_size) if method == "mean" else {}
        donors = _donors(model, examples, reference_examples, where, seed) if method == "resample" else []
        task = bar.add_task("ablating heads", total=len(examples) * len(head_sets))
        if donors:
            batch_size = _rows_within(model, examples[0], len(layers), where, batch_size, memory)
        for batch in model.batches(examples, batch_size):

            def margin(logits: Tensor, index: tuple[int, ...] = batch.index) -> list[float]:
                check_finite(logits.float().logsumexp(-1), [f"example '{examples[i].id}'" for i in index], model.name)
                return [
                    float(answer_keys[i].margin(row.float(), examples[i].answer))
                    for i, row in zip(index, logits, strict=True)
                ]

            rows = list(batch.index)
            margins[rows] = margin(model.logits(batch.inputs))
            at = _positions(batch.encodings, where)
            values: dict[int, Tensor] = means
            if method == "resample":
                donor_examples = [reference_examples[donors[i]] for i in rows]
                values = _outputs(model, donor_examples, layers, where, batch_size)
            for s, head_set in enumerate(head_sets):
                with intervened(model, [_ablation_of(model, head, values, at) for head in head_set]):
                    ablated[rows, s] = margin(model.logits(batch.inputs))
                bar.advance(task, len(rows))
    return Ablation(
        margins=margins,
        ablated=ablated,
        heads=head_sets,
        ids=tuple(e.id for e in examples),
        groups=tuple(e.group for e in examples),
        levels=tuple(e.level or "" for e in examples),
        method=method,
        tokens=str(where),
        reference=0 if method == "zero" else len(reference_examples),
        seed=seed,
        model=model.name,
        config_hash=model.config_hash,
        weights_hash=model.weights_hash,
    )


def positions_of(tokens: TokenMap, where: TokenSelection) -> list[int]:
    """Return the positions of a selection in one example; raise `PatchError` if it has none."""
    positions = list(tokens.positions(where)) if where.role != "image" else list(tokens.image)
    if not positions:
        msg = f"tokens='{where}' requires image tokens in the decoder's sequence; choose 'last', 'suffix:all' or 'all'"
        raise PatchError(msg)
    return positions


def _sets(
    model: Lvlm, heads: Literal["each", "layers"] | Head | HeadSet | str | Sequence[Head | HeadSet | str]
) -> tuple[HeadSet, ...]:
    if heads == "each":
        return tuple(HeadSet([head]) for head in all_heads(model))
    if heads == "layers":
        return tuple(HeadSet(Head(i, h) for h in range(model.n_heads)) for i in range(model.n_layers))
    return head_sets_of(model, heads)


def _ablation_of(model: Lvlm, head: Head, values: dict[int, Tensor], at: Tensor) -> Intervention:
    site = model.head_site(head.layer)
    if not values:
        return Intervention(site, Zero(), at, head.head)
    columns = slice(head.head * model.head_dim, (head.head + 1) * model.head_dim)
    return Intervention(site, Replace(values[head.layer][..., columns]), at, head.head)


def _positions(encodings: Sequence[Encoding], where: TokenSelection) -> Tensor:
    """Return the positions of a batch, ``[rows, n]``."""
    positions = [positions_of(e.tokens, where) for e in encodings]
    if len({len(row) for row in positions}) != 1:
        msg = f"tokens='{where}': examples of equal length differ in the number of such tokens; use batch_size=1"
        raise PatchError(msg)
    return torch.tensor(positions)


def _means(
    model: Lvlm, examples: Sequence[Example], layers: Sequence[int], where: TokenSelection, size: int
) -> dict[int, Tensor]:
    """Return each layer's mean head output over the tokens `where` of all examples, ``[H * head_dim]``."""
    sites = [model.head_site(layer) for layer in layers]
    sums: dict[int, Tensor] = {}
    count = 0
    for batch in model.batches(examples, size):
        at = [positions_of(encoding.tokens, where) for encoding in batch.encodings]

        def total(_site: Site, z: Tensor, at: list[list[int]] = at) -> Tensor:
            return torch.stack([z[row, row_positions].double().sum(0) for row, row_positions in enumerate(at)])

        outputs = model.read(batch.inputs, sites, take=total)  # [rows, H * head_dim]
        for row, row_positions in enumerate(at):
            for layer, site in zip(layers, sites, strict=True):
                row_sum = outputs[str(site)][row]
                sums[layer] = sums[layer] + row_sum if layer in sums else row_sum
            count += len(row_positions)
    return {layer: (total / count).to(model.dtype) for layer, total in sums.items()}


def _outputs(
    model: Lvlm, examples: Sequence[Example], layers: Sequence[int], where: TokenSelection, size: int
) -> dict[int, Tensor]:
    """Return each layer's head outputs at the n tokens `where` of every example, ``[rows, n, H * head_dim]``."""
    sites = [model.head_site(layer) for layer in layers]
    out: dict[int, Tensor] = {}
    for batch in model.batches(examples, size):
        at = torch.tensor([positions_of(encoding.tokens, where) for encoding in batch.encodings])
        rows = torch.arange(len(at))[:, None]
        index = torch.tensor(batch.index)

        def store(site: Site, z: Tensor, at: Tensor = at, rows: Tensor = rows, index: Tensor = index) -> None:
            if site.layer not in out:
                out[site.layer] = z.new_empty(len(examples), at.shape[1], z.shape[-1])
            out[site.layer][index.to(z.device)] = z[rows.to(z.device), at.to(z.device)]

        model.read(batch.inputs, sites, take=store)
    return out


def _rows_within(model: Lvlm, example: Example, layers: int, where: TokenSelection, size: int, memory: int) -> int:
    """Return how many examples' donors fit into `memory`: head outputs of each layer at each token `where`."""
    tokens = model.encode(example).tokens
    each = layers * len(positions_of(tokens, where)) * model.n_heads * model.head_dim * model.dtype.itemsize
    return max(1, min(size, memory // each))


def _donors(
    model: Lvlm, examples: Sequence[Example], candidates: Sequence[Example], where: TokenSelection, seed: int
) -> list[int]:
    """Draw for each example one candidate from another group with the same number of tokens."""
    rng = np.random.default_rng(seed)
    sizes = [1 if where.role == "last" else len(positions_of(model.encode(e).tokens, where)) for e in candidates]
    by_size: dict[int, list[int]] = {}
    for number, size in enumerate(sizes):
        by_size.setdefault(size, []).append(number)
    out = []
    for example in examples:
        size = 1 if where.role == "last" else len(positions_of(model.encode(example).tokens, where))
        eligible = [i for i in by_size.get(size, []) if candidates[i].group != example.group]
        if not eligible:
            msg = (
                f"example '{example.id}' has no donor: no reference example of another group has {size} '{where}' "
                "tokens; pass a larger reference, or tokens='last'"
            )
            raise PatchError(msg)
        out.append(eligible[int(rng.integers(len(eligible)))])
    return out
