"""VISTA: steer each answer along what its image adds to the activations, and mix in the logits of earlier layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lvlm.access.reused_vision_run import reuse_vision_runs
from lvlm.access.shared_vision_run import share_vision_runs
from lvlm.active_interventions import mark_intervention
from lvlm.decoding.decoder import AnswerRule, RuleDecoder, Step
from mitigation.protocol import ForwardCost
from mitigation.training_free.branches import check_runs_without_image, without_image
from mitigation.training_free.editable_rows import first_live_query
from mitigation.training_free.lens import (
    at_least_float32,
    block_outputs,
    check_blocks,
    check_depth,
    lens_without_norm,
    stacked,
)
from mitigation.training_free.method import (
    Category,
    TrainingFree,
    Variant,
    check_choice,
    check_image_tokens,
    check_range,
)
from mitigation.training_free.published_sizes import scaled_layers

if TYPE_CHECKING:
    from lvlm.decoding.decoder import Decoder
    from lvlm.encoding.encode import Batch
    from lvlm.model import Lvlm
    from lvlm.sampling import Sampling

_TINY = 1e-12
PAPER_STRENGTH = 0.1
"""Default strength of the paper's form, for which no value is published."""
RELEASE_STRENGTH = 0.17


@dataclass(frozen=True)
class VISTA(TrainingFree):
    """Visual steering vectors with self-logits augmentation, computed for each image and question.

    **Vector.** ``v`` is the output of a block at the last token of the prompt, minus that of the prompt without the
    image. In every block ``h <- |h| unit(h + strength v)`` at the last token of the prompt and at generated tokens.
    **Logits.** The next token is chosen from ``(1 - gamma) l + gamma mean_i W_U h_i``, where ``h_i`` are outputs of
    late blocks in the steered pass and ``W_U`` is the unembedding without the final norm; the mean is taken before the
    unembedding, which is one row more. Li et al. 2025, arXiv 2502.03628.

    ``variant="release"`` (github.com/LzVv123456/VISTA) steers the outputs of the MLPs, at every token of the prompt
    too: ``x <- |x| unit(unit(x) + strength (1 + max(0, cos(x, -v))) unit(v))``. Its principal component analysis of one
    sample leaves v unchanged, except that 1 is added to coordinate 0 of block 0.

    No strength is published for the paper's form: 0.1 is a placeholder, to be chosen on other images. The release's
    scripts use 0.17 for captions and 0.01 for POPE. Published late blocks are 25 to 30 of 32; in a model of fewer than
    8 blocks they are the last block alone. Questions that are scored by the logits of candidates are corrected in the
    same way.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.methods.vista import VISTA
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["conflict"])
    >>> with VISTA(strength=0.1, gamma=0.1).applied(model):
    ...     answers = gs.answer(model, data)
    >>> len(answers), VISTA().used_parameters(model)["layers"]
    (6, (5,))
    """

    label: ClassVar[str] = "VISTA"
    category: ClassVar[Category] = "steering"
    source: ClassVar[str] = "arXiv 2502.03628"
    cost: ClassVar[ForwardCost] = ForwardCost(prompts=2)

    strength: float | None = None
    """Weight of the vector, at least 0; None for `PAPER_STRENGTH`, and for 0.17 in the release."""
    gamma: float = 0.3
    """Weight of the logits of late blocks, in [0, 1]."""
    layers: tuple[int, ...] | None = None
    """Blocks whose logits are mixed in; None for 25 to 30 of 32, scaled."""
    variant: Variant = "paper"

    def __post_init__(self) -> None:
        if self.strength is not None:
            check_range("strength", self.strength, 0)
        check_range("gamma", self.gamma, 0, 1)
        check_choice("variant", self.variant, ("paper", "release"))
        check_blocks(self.layers)

    @property
    def used_strength(self) -> float:
        """The strength that is used."""
        default = PAPER_STRENGTH if self.variant == "paper" else RELEASE_STRENGTH
        return default if self.strength is None else self.strength

    def used_parameters(self, model: Lvlm) -> Mapping[str, Any]:
        """Return the parameters with the strength and the blocks that are used."""
        return {**self.parameters, "strength": self.used_strength, "layers": self._layers(model)}

    def _layers(self, model: Lvlm) -> tuple[int, ...]:
        return tuple(scaled_layers(25, 30, model.n_layers)) if self.layers is None else self.layers

    def _check(self, model: Lvlm) -> None:
        check_depth(self.layers, model.n_layers, self.label, model)
        check_image_tokens(model, self.label)
        check_runs_without_image(model, self.label)

    def _enter(self, model: Lvlm, stack: ExitStack) -> Decoder | None:
        return _Decoder(self) if self.used_strength or self.gamma else None


@dataclass(frozen=True)
class _Decoder(RuleDecoder):
    method: VISTA

    def start(self, model: Lvlm, batch: Batch) -> AnswerRule:
        return _Rule(self.method, model)

    def first_logits(self, model: Lvlm, batch: Batch) -> Tensor:
        with steered(model, batch, self.method.used_strength, self.method.variant):
            return super().first_logits(model, batch)

    def generate(
        self, model: Lvlm, batch: Batch, max_new_tokens: int, sampling: Sampling | None = None
    ) -> list[list[int]]:
        with steered(model, batch, self.method.used_strength, self.method.variant):
            return super().generate(model, batch, max_new_tokens, sampling)


class _Rule(AnswerRule):
    """Self-logits augmentation."""

    def __init__(self, method: VISTA, model: Lvlm) -> None:
        self._gamma, self._model = method.gamma, model
        self.sites = block_outputs(method._layers(model)) if self._gamma else ()

    def combine(self, step: Step) -> Tensor:
        if not self._gamma:
            return step.logits
        logits = at_least_float32(step.logits)
        early = lens_without_norm(self._model, stacked(step.activations, self.sites).mean(1))
        return (1 - self._gamma) * logits + self._gamma * early.to(logits.device)


@contextmanager
def steered(model: Lvlm, batch: Batch, strength: float, variant: Variant) -> Iterator[None]:
    """Steer the answers to a batch, whose rows are those of every forward pass while the context is open."""
    if not strength:
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(reuse_vision_runs(model))
        vectors = visual_vectors(model, batch)
        if variant == "release":
            vectors[0] = vectors[0].clone()
            vectors[0][:, 0] += 1
        component = "resid_post" if variant == "paper" else "mlp_out"
        for layer, vector in enumerate(vectors):
            change = _live_change(model, vector, strength) if variant == "paper" else _change(vector, strength)
            point = model.place("decoder", layer, component)
            stack.callback(point.edit(mark_intervention(change)).remove)
        yield


def visual_vectors(model: Lvlm, batch: Batch) -> list[Tensor]:
    """Return for each block the difference that the image makes at the last token of each prompt, ``[B, D]``."""
    sites = block_outputs(range(model.n_layers))

    def last(_site: Any, x: Tensor) -> Tensor:
        return x[:, -1]

    with share_vision_runs(model, batch.images), model.with_row_layout(None):
        image = model.read(batch.inputs, sites, take=last)
        blind = {name: torch.empty_like(x) for name, x in image.items()}
        for group in without_image(model, batch).prompts:
            for name, x in model.read(group.inputs, sites, take=last).items():
                blind[name][list(group.rows)] = x
    return [image[str(site)] - blind[str(site)] for site in sites]


def _change(vector: Tensor, strength: float) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        return away_from_blindness(x, vector[:, None], strength)

    return change


def _live_change(model: Lvlm, vector: Tensor, strength: float) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        first = first_live_query(model, x.shape[1])
        return torch.cat([x[:, :first], with_equal_length(x[:, first:], vector[:, None], strength)], dim=1)

    return change


def with_equal_length(x: Tensor, vector: Tensor, strength: float) -> Tensor:
    """Return ``|x| unit(x + strength vector)``."""
    wide = at_least_float32(x)
    moved = wide + strength * vector.to(wide)
    return _scaled(moved, wide.norm(dim=-1, keepdim=True)).to(x.dtype)


def away_from_blindness(x: Tensor, vector: Tensor, strength: float) -> Tensor:
    """Return ``|x| unit(unit(x) + strength (1 + max(0, cos(x, -vector))) unit(vector))``."""
    wide = at_least_float32(x)
    length = wide.norm(dim=-1, keepdim=True)
    unit, push = wide / length.clamp_min(_TINY), vector.to(wide)
    push = push / push.norm(dim=-1, keepdim=True).clamp_min(_TINY)
    factor = 1 + (-(unit * push).sum(-1, keepdim=True)).clamp_min(0)
    return _scaled(unit + strength * factor * push, length).to(x.dtype)


def _scaled(x: Tensor, length: Tensor) -> Tensor:
    return x * (length / x.norm(dim=-1, keepdim=True).clamp_min(_TINY))
