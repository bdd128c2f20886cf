"""What is lost without some heads: zero, mean and resample ablation of heads, sets of heads and layers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
import torch
from torch import Tensor

from circuits.execution.memory import MEMORY
from circuits.interventions.intervention import Intervention, Replace, Zero, intervened
from circuits.patching.activation import check_evaluating
from circuits.results.statistics import mean_interval
from concepts.schema import Example
from groundscope.core.errors import ConfigError, PatchError, SiteError
from groundscope.core.progress import progress_bar
from lvlm.answers import answer_key
from lvlm.encoding.encode import Encoding
from lvlm.finite import check_finite
from lvlm.model import Lvlm
from lvlm.sites import Head, Site, parse_heads
from lvlm.token_map import TokenMap

if TYPE_CHECKING:
    import pandas as pd

How = Literal["zero", "mean", "resample"]
Where = Literal["last", "suffix", "image", "all"]
HOW: tuple[How, ...] = ("zero", "mean", "resample")
WHERE: tuple[Where, ...] = ("last", "suffix", "image", "all")
_BY_EXAMPLE = ("ids", "groups", "levels")


@dataclass(frozen=True, eq=False)
class Ablation:
    """The answer's margin with and without sets of heads; made by `ablate`."""

    margins: np.ndarray
    """Score of the true answer minus that of the best other, of the whole model, float32 ``[n_examples]``, in logits."""
    ablated: np.ndarray
    """The same without each set, float32 ``[n_examples, n_sets]``."""
    sets: tuple[tuple[Head, ...], ...]
    ids: tuple[str, ...]
    groups: tuple[str, ...]
    """Scene or image of each example: the unit of the intervals."""
    levels: tuple[str, ...]
    how: How
    tokens: Where
    reference: int
    """Number of examples that the mean or the donors were taken from; 0 for ``zero``."""
    seed: int
    """Decided the donors of ``resample``."""
    model: str
    config_hash: str
    weights_hash: str

    def __post_init__(self) -> None:
        self.margins.setflags(write=False)
        self.ablated.setflags(write=False)

    @property
    def effects(self) -> np.ndarray:
        """Margin lost without each set, float32 ``[n_examples, n_sets]``: positive where it speaks for the truth."""
        return self.margins[:, None] - self.ablated

    @property
    def right(self) -> np.ndarray:
        """Whether the whole model prefers the true answer, bool ``[n_examples]``."""
        return self.margins > 0

    @property
    def right_without(self) -> np.ndarray:
        """The same without each set, bool ``[n_examples, n_sets]``."""
        return self.ablated > 0

    def select(self, keep: np.ndarray) -> Self:
        """Return the ablation of some examples only: a boolean mask or numbers."""
        which = np.arange(len(self.margins))[keep]
        lists = {name: tuple(getattr(self, name)[i] for i in which) for name in _BY_EXAMPLE}
        return replace(self, margins=self.margins[which], ablated=self.ablated[which], **lists)

    def frame(self, level: float = 0.95) -> pd.DataFrame:
        """Return one row a set: its name, size, mean effect and accuracy without it, each with its interval.

        Intervals are percentile intervals of a bootstrap over groups. ``accuracy`` is the share of answers that are
        right without the set, ``lost`` what that is below the whole model's.
        """
        import pandas as pd

        columns: dict[str, object] = {
            "name": [" ".join(map(str, heads)) for heads in self.sets],
            "heads": [len(heads) for heads in self.sets],
        }
        lost = self.right[:, None].astype(float) - self.right_without
        for name, values in (("effect", self.effects), ("accuracy", self.right_without), ("lost", lost)):
            low, high = mean_interval(values, self.groups, level)
            columns |= {name: values.mean(axis=0, dtype=float), f"{name}_low": low, f"{name}_high": high}
        return pd.DataFrame(columns)


@torch.no_grad()
def ablate(
    model: Lvlm,
    examples: Sequence[Example],
    sets: Literal["heads", "layers"] | Sequence[Head | str | Collection[Head | str]] = "heads",
    how: How = "mean",
    tokens: Where = "all",
    *,
    reference: Sequence[Example] | None = None,
    batch_size: int = 64,
    memory: int = MEMORY,
    seed: int = 0,
    progress: bool | None = None,
) -> Ablation:
    """Take heads of the decoder out, and measure what that does to the answer's margin.

    Parameters
    ----------
    model
        In evaluation mode.
    examples
        Questions with candidate answers.
    sets
        What is taken out at a time: each head (``heads``), all heads of each layer (``layers``), or a sequence of heads
        and of collections of heads that go together.
    how
        What a head's output becomes. ``zero``: 0. ``mean``: its mean over `reference`, over the same role of tokens.
        ``resample``: its output for one example of `reference`, drawn from those of other groups with as many tokens
        of that role, token for token (Chan et al. 2022, causal scrubbing; Zhang & Nanda 2024, arXiv 2309.16042).
    tokens
        Where: ``last``, ``suffix`` (every token after the image), ``image`` or ``all``.
    reference
        The distribution that means and donors are taken from; `examples` themselves by default.
    batch_size
        Examples side by side, at most.
    memory
        Bytes that the donors of one batch may take (``resample``); batches are smaller where they would take more.
    seed
        Decides the donors.
    progress
        Show progress; by default where standard error is a terminal.

    Raises
    ------
    ConfigError
        For an option that does not exist.
    SiteError
        For a head that the model lacks.
    PatchError
        For no examples or sets, a model in training mode, or an example for which there is no donor.
    DataError
        Where an answer cannot be read from one token.
    ModelError
        Where the logits are not finite, of the whole model or without some heads.
    """
    if how not in HOW or tokens not in WHERE or batch_size < 1 or memory < 1:
        msg = f"how='{how}' of {HOW}, tokens='{tokens}' of {WHERE}, batch_size={batch_size} and memory={memory} of at least 1"
        raise ConfigError(msg)
    check_evaluating(model)
    chosen = _sets(model, sets)
    given = list(examples if reference is None else reference)
    if not examples or not given:
        msg = "no examples to ablate heads on" if not examples else "an empty reference has no mean and no donors"
        raise PatchError(msg)
    keys = [answer_key(model, example) for example in examples]
    layers = sorted({head.layer for heads in chosen for head in heads})
    margins = np.empty(len(examples), np.float32)
    ablated = np.empty((len(examples), len(chosen)), np.float32)
    with progress_bar(progress) as bar:
        means = _means(model, given, layers, tokens, batch_size) if how == "mean" else {}
        donors = _donors(model, examples, given, tokens, seed) if how == "resample" else []
        task = bar.add_task("ablating heads", total=len(examples) * len(chosen))
        if donors:
            batch_size = _rows_within(model, examples[0], len(layers), tokens, batch_size, memory)
        for batch in model.batches(examples, batch_size):

            def margin(logits: Tensor, index: tuple[int, ...] = batch.index) -> list[float]:
                check_finite(logits.float().logsumexp(-1), [f"example '{examples[i].id}'" for i in index], model.name)
                return [
                    float(keys[i].margin(row.float(), examples[i].answer)) for i, row in zip(index, logits, strict=True)
                ]

            rows = list(batch.index)
            margins[rows] = margin(model.logits(batch.inputs))
            at = _positions(batch.encodings, tokens)
            values: dict[int, Tensor] = means
            if how == "resample":
                taken = [given[donors[i]] for i in rows]
                values = _outputs(model, taken, layers, tokens, batch_size)
            for s, heads in enumerate(chosen):
                with intervened(model, [_taken_out(model, head, values, at) for head in heads]):
                    ablated[rows, s] = margin(model.logits(batch.inputs))
                bar.advance(task, len(rows))
    return Ablation(
        margins=margins,
        ablated=ablated,
        sets=chosen,
        ids=tuple(e.id for e in examples),
        groups=tuple(e.group for e in examples),
        levels=tuple(e.level for e in examples),
        how=how,
        tokens=tokens,
        reference=0 if how == "zero" else len(given),
        seed=seed,
        model=model.name,
        config_hash=model.config_hash,
        weights_hash=model.weights_hash,
    )


def positions_of(tokens: TokenMap, where: Where) -> list[int]:
    """Return the positions that a role means in one example; raises `PatchError` where it has none."""
    if where == "last":
        return [tokens.last]
    if where == "all":
        return list(range(tokens.length))
    if where == "suffix":
        return list(tokens.suffix)
    if not tokens.image:
        msg = f"tokens='{where}' need the image's tokens in the decoder's own sequence: use 'last', 'suffix' or 'all'"
        raise PatchError(msg)
    return list(tokens.image)


def _sets(
    model: Lvlm, sets: Literal["heads", "layers"] | Sequence[Head | str | Collection[Head | str]]
) -> tuple[tuple[Head, ...], ...]:
    every = [[Head(i, h) for h in range(model.n_heads)] for i in range(model.n_layers)]
    if isinstance(sets, str):
        if sets not in ("heads", "layers"):
            msg = f"sets='{sets}': choose 'heads', 'layers', or give heads and collections of heads"
            raise ConfigError(msg)
        return tuple(tuple(layer) for layer in every) if sets == "layers" else tuple((h,) for row in every for h in row)
    chosen = tuple(tuple(dict.fromkeys(parse_heads(item))) for item in sets)
    known = {head for layer in every for head in layer}
    wrong = [str(head) for heads in chosen for head in heads if head not in known]
    if wrong:
        msg = f"heads {', '.join(wrong)}: {model.name} has {model.n_layers} layers of {model.n_heads} heads"
        raise SiteError(msg)
    if not chosen or not all(chosen):
        msg = "no heads to ablate: every set needs at least one"
        raise PatchError(msg)
    return chosen


def _taken_out(model: Lvlm, head: Head, values: dict[int, Tensor], at: Tensor) -> Intervention:
    site = model.head_site(head.layer)
    if not values:
        return Intervention(site, Zero(), at, head.head)
    columns = slice(head.head * model.head_dim, (head.head + 1) * model.head_dim)
    return Intervention(site, Replace(values[head.layer][..., columns]), at, head.head)


def _positions(encodings: Sequence[Encoding], where: Where) -> Tensor:
    """Return the positions of a batch, ``[rows, n]``."""
    found = [positions_of(e.tokens, where) for e in encodings]
    if len({len(row) for row in found}) != 1:
        msg = f"tokens='{where}': examples of equal length have unlike numbers of such tokens; use batch_size=1"
        raise PatchError(msg)
    return torch.tensor(found)


def _means(
    model: Lvlm, examples: Sequence[Example], layers: Sequence[int], where: Where, size: int
) -> dict[int, Tensor]:
    """Return each layer's mean head output over all such tokens of all examples, ``[H * head_dim]``."""
    sites = [model.head_site(layer) for layer in layers]
    sums: dict[int, Tensor] = {}
    count = 0
    for batch in model.batches(examples, size):
        at = [positions_of(encoding.tokens, where) for encoding in batch.encodings]

        def total(_site: Site, z: Tensor, at: list[list[int]] = at) -> Tensor:
            return torch.stack([z[row, some].double().sum(0) for row, some in enumerate(at)])

        seen = model.read(batch.inputs, sites, take=total)  # [rows, H * head_dim]
        for row, some in enumerate(at):
            for layer, site in zip(layers, sites, strict=True):
                part = seen[str(site)][row]
                sums[layer] = sums[layer] + part if layer in sums else part
            count += len(some)
    return {layer: (total / count).to(model.dtype) for layer, total in sums.items()}


def _outputs(
    model: Lvlm, examples: Sequence[Example], layers: Sequence[int], where: Where, size: int
) -> dict[int, Tensor]:
    """Return for each layer the head outputs of examples with as many such tokens, ``[rows, n, H * head_dim]``."""
    sites = [model.head_site(layer) for layer in layers]
    out: dict[int, Tensor] = {}
    for batch in model.batches(examples, size):
        at = torch.tensor([positions_of(encoding.tokens, where) for encoding in batch.encodings])
        rows = torch.arange(len(at))[:, None]
        index = torch.tensor(batch.index)

        def put(site: Site, z: Tensor, at: Tensor = at, rows: Tensor = rows, index: Tensor = index) -> None:
            if site.layer not in out:
                out[site.layer] = z.new_empty(len(examples), at.shape[1], z.shape[-1])
            out[site.layer][index.to(z.device)] = z[rows.to(z.device), at.to(z.device)]

        model.read(batch.inputs, sites, take=put)
    return out


def _rows_within(model: Lvlm, example: Example, layers: int, where: Where, size: int, memory: int) -> int:
    """Return of how many examples a budget holds the donors: a head output of each layer at each such token."""
    tokens = model.encode(example).tokens
    each = layers * len(positions_of(tokens, where)) * model.n_heads * model.head_dim * model.dtype.itemsize
    return max(1, min(size, memory // each))


def _donors(model: Lvlm, examples: Sequence[Example], given: Sequence[Example], where: Where, seed: int) -> list[int]:
    """Draw for each example one of `given` from another group with as many tokens."""
    rng = np.random.default_rng(seed)
    sizes = [1 if where == "last" else len(positions_of(model.encode(e).tokens, where)) for e in given]
    by_size: dict[int, list[int]] = {}
    for number, size in enumerate(sizes):
        by_size.setdefault(size, []).append(number)
    out = []
    for example in examples:
        size = 1 if where == "last" else len(positions_of(model.encode(example).tokens, where))
        possible = [i for i in by_size.get(size, []) if given[i].group != example.group]
        if not possible:
            msg = (
                f"example '{example.id}': no example of another group in the reference has {size} tokens of "
                f"'{where}' to resample from; give a larger reference, or tokens='last'"
            )
            raise PatchError(msg)
        out.append(possible[int(rng.integers(len(possible)))])
    return out
