"""DAMRO: contrast with an answer that sees only the image tokens that the vision tower's class token attends to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from groundscope.core.errors import ModelError
from lvlm.active_interventions import mark_intervention
from lvlm.decoding.decoder import Branch, Prompts, Step
from lvlm.family.specification import resolve
from lvlm.image_tokens import image_tokens
from mitigation.protocol import ForwardCost
from mitigation.training_free.branch_methods import BranchMethod
from mitigation.training_free.method import (
    Category,
    Regime,
    Variant,
    check_choice,
    check_count,
    check_image_tokens,
    check_range,
)
from mitigation.training_free.plausibility import contrast
from mitigation.training_free.published_sizes import scaled_count

if TYPE_CHECKING:
    from concepts.schema import Example
    from lvlm.encoding.encode import Batch
    from lvlm.model import Lvlm


@dataclass(frozen=True)
class DAMRO(BranchMethod):
    """Dive into attention of the visual encoder: subtract the logits of a model that sees only outliers of the class token.

    In the branch the image consists of the K tokens with the largest attention of the class token, in the block of the vision
    tower whose output the projector reads: softmax over all tokens, averaged over heads. They stay in their order, and the
    shortened prompt has contiguous positions. The next token is chosen from ``(1 + alpha) l - alpha l'`` among tokens with at
    least `beta` times the largest probability. Gong et al. 2024, arXiv 2410.04514.

    ``variant="release"``: the released code for LLaVA computes one head of the full width (``q k / sqrt(width)``), puts the
    tokens in descending order of attention, and ignores the logits processor that restricts candidates (`beta` 0). K is 10 of 576
    and `alpha` 2 (InstructBLIP, which is refused here: 4, and 1.5 or 0.5). Families without a class token, and those whose image
    tokens are not single patches, are refused. The vision tower runs once more for each batch.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.methods.damro import DAMRO
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["conflict"])
    >>> with DAMRO().applied(model):
    ...     answers = gs.answer(model, data)
    >>> len(answers)
    6
    """

    label: ClassVar[str] = "DAMRO"
    category: ClassVar[Category] = "decoding"
    source: ClassVar[str] = "arXiv 2410.04514"
    regime: ClassVar[Regime] = "sampling"
    cost: ClassVar[ForwardCost] = ForwardCost(per_token=2, prompts=1)

    alpha: float = 2.0
    """Weight of the contrast; at least 0."""
    beta: float = 0.1
    """Smallest probability of a candidate, as a share of the largest; in [0, 1], 0 for all tokens."""
    count: int = 10
    """Number of image tokens that stay, of 576."""
    variant: Variant = "paper"
    """``release``: one head of full width, descending order, all tokens as candidates."""

    def __post_init__(self) -> None:
        check_range("alpha", self.alpha, 0)
        check_range("beta", self.beta, 0, 1)
        check_count("count", self.count)
        check_choice("variant", self.variant, ("paper", "release"))

    @property
    def _neutral(self) -> bool:
        return self.alpha == 0 and (self.beta == 0 or self.variant == "release")

    def used_parameters(self, model: Lvlm) -> Mapping[str, Any]:
        """Return the parameters with the threshold that is used."""
        return {**self.parameters, "beta": self._beta}

    @property
    def _beta(self) -> float:
        return self.beta if self.variant == "paper" else 0.0

    def problem(self, model: Lvlm, example: Example) -> str | None:
        """Return why a question cannot be answered: it has no image, or several."""
        count = len(example.images)
        return None if count == 1 else f"not applicable: {count} images"

    def _check(self, model: Lvlm) -> None:
        check_image_tokens(model, self.label)
        who = f"{model.name} ({model.spec.model_type})"
        if model.spec.vision_prefix != 1:
            msg = f"{self.label} ranks image tokens by attention of the class token, and {who} has none"
            raise ModelError(msg)
        if model.spec.view != "whole":
            msg = f"{self.label} selects image tokens that are patches of one image, and those of {who} are not"
            raise ModelError(msg)

    def _branches(self, model: Lvlm, batch: Batch, state: Any) -> list[Branch]:
        image = image_tokens(model, batch.inputs)
        count = int(image[0].sum())
        attention = class_attention(model, batch.inputs["pixel_values"], single_head=self.variant == "release")
        top = attention.topk(scaled_count(self.count, count), dim=-1).indices
        chosen = top if self.variant == "release" else top.sort(dim=-1).values
        inputs = dict(batch.inputs)
        # Which of the equal placeholders stay does not matter: the projector's output decides what they are.
        keep = ~image | (image.cumsum(1) <= chosen.shape[1])
        for name in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
            if name in inputs:
                inputs[name] = torch.stack([row[which] for row, which in zip(inputs[name], keep, strict=True)])
        prompts = Prompts(tuple(range(len(image))), inputs, batch.images)
        return [Branch("outliers of the class token", (prompts,), lambda: _selected(model, chosen))]

    def _combine(self, step: Step, state: Any) -> Tensor:
        return contrast(step.logits, step.branches[0], self.alpha, self._beta)


def class_attention(model: Lvlm, pixels: Tensor, *, single_head: bool = False) -> Tensor:
    """Return the attention of the class token to the patches of each image, ``[images, patches]``.

    Of the block whose output the projector reads: softmax over all tokens, averaged over heads; or of one head of the full width.
    """
    layer = getattr(model.hf.config, "vision_feature_layer", -1)
    layer = layer[-1] if isinstance(layer, list | tuple) else layer
    block = layer - 1 if layer > 0 else model.n_vision_layers + layer
    vectors: dict[str, Tensor] = {}
    handles = [
        model.place("vision", block, name).watch(lambda x, name=name: vectors.__setitem__(name, x))
        for name in ("q", "k")
    ]
    try:
        if model.tower is None:
            msg = f"{model.name} has no vision tower"
            raise ModelError(msg)
        model.tower(pixels)
    finally:
        for handle in handles:
            handle.remove()
    heads = 1 if single_head else model.n_vision_heads
    q, k = (vectors[name].unflatten(-1, (heads, -1)) for name in ("q", "k"))
    scores = torch.einsum("nhd,nthd->nht", q[:, 0], k) * q.shape[-1] ** -0.5
    return scores.softmax(-1).mean(1)[:, 1:]


@contextmanager
def _selected(model: Lvlm, chosen: Tensor) -> Iterator[None]:
    """Let the projector return some of its tokens only, by index ``[images, K]``, while the context is open."""

    @mark_intervention
    def after(_module: nn.Module, _args: Any, features: Tensor) -> Tensor:
        index = chosen.to(features.device)
        return features[torch.arange(len(index), device=features.device)[:, None], index]

    handle = resolve(model.hf, model.spec.projector, model.spec).register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()
