"""VHR: reinforce heads whose outputs depend on the image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from lvlm.access.reused_vision_run import reuse_vision_runs
from lvlm.decoding.attention_edits import edit_attention, read_attention
from lvlm.decoding.attention_rows import AttentionRows
from lvlm.decoding.decoder import AnswerRule
from lvlm.decoding.loop import first_logits, generate
from mitigation.protocol import ForwardCost
from mitigation.training_free.attention import AttentionMethod, check_layers
from mitigation.training_free.branches import check_runs_without_image, without_image
from mitigation.training_free.method import Category, check_choice, check_range
from mitigation.training_free.published_sizes import scaled_layers

if TYPE_CHECKING:
    from lvlm.decoding.decoder import Decoder
    from lvlm.encoding.encode import Batch
    from lvlm.model import Lvlm
    from lvlm.sampling import Sampling


@dataclass(frozen=True)
class VHR(AttentionMethod):
    """Vision-aware head reinforcement: scale the outputs of heads that change most when the image is removed.

    The vision-aware head divergence (VHD) of a head is the norm of the difference of its outputs, at the prompt's last token,
    with and without the image. Heads with a VHD above mean + sd of their layer whose output without the image has a norm above
    mean + sd are outliers: their VHD counts as 0. Outputs of heads with a VHD above the layer's median are multiplied by
    `factor` before the output projection, layer by layer: the VHD of a layer is measured in the run that is reinforced below it.
    The chosen heads stay for the answer. He et al. 2025, arXiv 2412.13949. Published layers are 1 and the last 14 of 32;
    layer 1 is not scaled to the depth.

    The paper leaves points open, which are parameters here: `outliers`, `norm`, `sample_sd`, `rows` and `strict`. Two have one
    form: the run without the image is not reinforced, and heads are chosen at the prompt's last token.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.methods.vhr import VHR
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["conflict"])
    >>> with VHR().applied(model):
    ...     answers = gs.answer(model, data)
    >>> len(answers), VHR().edited_layers(model)
    (6, (1, 3, 4, 5))
    """

    label: ClassVar[str] = "VHR"
    category: ClassVar[Category] = "heads"
    source: ClassVar[str] = "arXiv 2412.13949"
    cost: ClassVar[ForwardCost] = ForwardCost(per_token=1, prompts=1)

    factor: float = 2.0
    """Factor of the outputs of chosen heads; at least 0."""
    outliers: Literal["divergence", "head"] = "divergence"
    """What is zero for outliers: their VHD, or their outputs too."""
    norm: Literal["norm", "square"] = "norm"
    """Whether VHD and norms are Euclidean norms, or their squares."""
    sample_sd: bool = True
    """Whether standard deviations divide by n - 1."""
    rows: Literal["last", "all"] = "last"
    """Tokens whose heads are scaled: the prompt's last and generated ones, or all."""
    strict: bool = True
    """Whether a VHD equal to the median is not chosen; the median of an even number is the mean of the middle two."""
    layers: tuple[int, ...] | None = None
    """Blocks that are edited; None for 1 and the last 14 of 32, scaled."""

    def __post_init__(self) -> None:
        check_range("factor", self.factor, 0)
        check_choice("outliers", self.outliers, ("divergence", "head"))
        check_choice("norm", self.norm, ("norm", "square"))
        check_choice("rows", self.rows, ("last", "all"))
        check_layers(self.layers)

    def edited_layers(self, model: Lvlm) -> tuple[int, ...]:
        """Return the blocks whose attention is edited."""
        if self.layers is not None:
            return self.layers
        return tuple(sorted({min(1, model.n_layers - 1), *scaled_layers(18, 31, model.n_layers)}))

    def _check(self, model: Lvlm) -> None:
        super()._check(model)
        check_runs_without_image(model, self.label)

    def _enter(self, model: Lvlm, stack: ExitStack) -> Decoder | None:
        return None if self.factor == 1 and self.outliers == "divergence" else _Decoder(self)


@dataclass(frozen=True)
class _Decoder:
    method: VHR

    def first_logits(self, model: Lvlm, batch: Batch) -> Tensor:
        with self._reinforced(model, batch):
            return first_logits(model, batch, AnswerRule())

    def generate(
        self, model: Lvlm, batch: Batch, max_new_tokens: int, sampling: Sampling | None = None
    ) -> list[list[int]]:
        with self._reinforced(model, batch):
            return generate(model, batch, AnswerRule(), max_new_tokens, sampling=sampling)

    @contextmanager
    def _reinforced(self, model: Lvlm, batch: Batch) -> Iterator[None]:
        layers = self.method.edited_layers(model)
        heads = _Heads(self.method, blind_outputs(model, batch, layers))
        with (
            reuse_vision_runs(model),
            edit_attention(model, heads.edit, layers=layers, queries=self.method.rows, registered=True),
        ):
            yield


def blind_outputs(model: Lvlm, batch: Batch, layers: tuple[int, ...]) -> dict[int, Tensor]:
    """Return the outputs of heads at the last token of prompts without the image, by layer, ``[rows, heads, width]``."""
    outputs: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    order: list[int] = []
    with read_attention(model, lambda rows: outputs[rows.layer].append(rows.outputs[:, :, -1]), layers=layers):
        for prompts in without_image(model, batch).prompts:
            model.logits(prompts.inputs)
            order += prompts.rows
    place = torch.tensor(order).argsort()
    return {layer: torch.cat(parts)[place.to(parts[0].device)] for layer, parts in outputs.items()}


class _Heads:
    """Factors of heads, chosen at the prompt's last token."""

    def __init__(self, method: VHR, blind: Mapping[int, Tensor]) -> None:
        self._method, self._blind = method, blind
        self._factors: dict[int, Tensor] = {}

    def edit(self, rows: AttentionRows) -> AttentionRows:
        queries, keys = rows.scores.shape[-2:]
        last = rows.layout.prompt - 1 - (keys - queries)
        if last >= 0:
            self._factors[rows.layer] = head_factors(
                rows.outputs[:, :, last], self._blind[rows.layer].to(rows.outputs), self._method
            )
        return rows.with_outputs(rows.outputs * self._factors[rows.layer][:, :, None, None])


def head_factors(outputs: Tensor, blind: Tensor, method: VHR) -> Tensor:
    """Return the factor of each head ``[rows, heads]`` from its outputs with and without the image, ``[rows, heads, width]``."""
    power = 2 if method.norm == "square" else 1
    divergence, size = (outputs - blind).norm(dim=-1) ** power, blind.norm(dim=-1) ** power
    outlier = _large(divergence, method) & _large(size, method)
    divergence = divergence.masked_fill(outlier, 0)
    median = divergence.quantile(0.5, dim=-1, keepdim=True)
    chosen = divergence > median if method.strict else divergence >= median
    factors = torch.where(chosen, method.factor, 1.0).to(outputs)
    return factors.masked_fill(outlier, 0) if method.outliers == "head" else factors


def _large(values: Tensor, method: VHR) -> Tensor:
    """Return which values of heads are above mean + sd of their layer."""
    sd = values.std(-1, keepdim=True, correction=int(method.sample_sd))
    return values > values.mean(-1, keepdim=True) + sd
