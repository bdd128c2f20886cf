"""MemVR: where an inner layer is uncertain, the next feed-forward network looks at the image again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from groundscope.core.errors import ModelError
from lvlm.active_interventions import mark_intervention, mark_observer
from lvlm.decoding.decoder import AnswerRule, RuleDecoder
from lvlm.family.specification import resolve
from lvlm.image_tokens import image_tokens
from mitigation.training_free.editable_rows import first_live_query
from mitigation.training_free.lens import at_least_float32, check_blocks, check_depth, lens
from mitigation.training_free.method import (
    Category,
    TrainingFree,
    Variant,
    check_choice,
    check_count,
    check_image_tokens,
    check_range,
)
from mitigation.training_free.published_sizes import scaled_layers

if TYPE_CHECKING:
    from lvlm.decoding.decoder import Decoder
    from lvlm.encoding.encode import Batch
    from lvlm.model import Lvlm


@dataclass(frozen=True)
class MemVR(TrainingFree):
    """Memory-space visual retracing: where the model is uncertain, image tokens are memory of a feed-forward network.

    At the last token of the prompt and at each generated token, the logit lens of a block gives the next-token
    probabilities of the `top_k` most likely words, renormalized; their entropy, divided by ``log(top_k)``, is the
    uncertainty. After the first block of a range with uncertainty above `threshold`, the output of the next block's
    feed-forward network with input x becomes ``(1 - ratio) FFN(x) + ratio sum_i phi(<x, z_i>) z_i``, where ``z_i`` are
    the image tokens as they enter the decoder and phi is the activation function of the network. A token is changed in
    one block at most. Zou et al. 2024, arXiv 2410.03577.

    ``variant="release"`` (github.com/1zhou-Wang/MemVR) differs in three points. There is no activation function, and
    the addition ``a = sum_i <x, z_i> z_i`` is scaled to the mean absolute value of the network's output (the release's
    scales of the two weight matrices cancel). The range excludes its ends. At the prompt, the decision of the last
    token applies to all tokens of the prompt. Its entropy is the sum over the batch; here each answer has its own.

    Published blocks are 5 to 16 of 32, scaled to the depth of the model, and at most the last but one.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.methods.memvr import MemVR
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["conflict"])
    >>> with MemVR(variant="release").applied(model):
    ...     answers = gs.answer(model, data)
    >>> len(answers), MemVR().used_parameters(model)["layers"]
    (6, (1, 2))
    """

    label: ClassVar[str] = "MemVR"
    category: ClassVar[Category] = "layers"
    source: ClassVar[str] = "arXiv 2410.03577"

    ratio: float = 0.12
    """Share of the image in the network's output, in [0, 1]."""
    threshold: float = 0.75
    """Uncertainty above which the image is looked at again, at least 0."""
    top_k: int = 10
    """Number of words whose entropy is the uncertainty; at least 2."""
    layers: tuple[int, ...] | None = None
    """Blocks whose uncertainty is measured; None for 5 to 16 of 32 (6 to 15 in the release), scaled."""
    variant: Variant = "paper"

    def __post_init__(self) -> None:
        check_range("ratio", self.ratio, 0, 1)
        check_range("threshold", self.threshold, 0)
        check_count("top_k", self.top_k, 2)
        check_blocks(self.layers)
        check_choice("variant", self.variant, ("paper", "release"))

    def used_parameters(self, model: Lvlm) -> Mapping[str, Any]:
        """Return the parameters with the blocks that are used."""
        return {**self.parameters, "layers": self._layers(model)}

    def _layers(self, model: Lvlm) -> tuple[int, ...]:
        if self.layers is not None:
            return self.layers
        first, last = (5, 16) if self.variant == "paper" else (6, 15)
        within = tuple(n for n in scaled_layers(first, last, model.n_layers) if n < model.n_layers - 1)
        return within or (max(0, model.n_layers - 2),)

    def _check(self, model: Lvlm) -> None:
        check_image_tokens(model, self.label)
        check_depth(self._layers(model), model.n_layers - 1, self.label, model)
        for layer in self._layers(model):
            _network(model, layer + 1)

    def _enter(self, model: Lvlm, stack: ExitStack) -> Decoder | None:
        if not self.ratio:
            return None
        state = _Retracing(self, model)
        stack.callback(model.hf.register_forward_pre_hook(mark_observer(state.read_inputs), with_kwargs=True).remove)
        stack.callback(model.place("decoder", 0, "resid_pre").watch(state.read_image).remove)
        for layer in self._layers(model):
            stack.callback(model.place("decoder", layer, "resid_post").watch(state.measure).remove)
            hook = mark_intervention(state.look_again)
            stack.callback(_network(model, layer + 1).register_forward_hook(hook, with_kwargs=True).remove)
        return _Decoder(state)


@dataclass(frozen=True)
class _Decoder(RuleDecoder):
    """Decodes by `lvlm.decoding`, which states the image tokens and the rows of cached steps."""

    state: _Retracing

    def start(self, model: Lvlm, batch: Batch) -> AnswerRule:
        return _Rule(self.state)


class _Rule(AnswerRule):
    def __init__(self, state: _Retracing) -> None:
        self._state = state

    def select(self, parents: Sequence[int]) -> None:
        self._state.select(parents)


class _Retracing:
    """State of the hooks of a context: image tokens of each row, and which tokens of the current pass look again."""

    def __init__(self, method: MemVR, model: Lvlm) -> None:
        self._method, self._model = method, model
        self._memory: list[Tensor] = []
        self._inputs: Mapping[str, Any] = {}
        self._first = 0
        self._has_prompt = True
        self._changed = torch.empty(0)
        self._now: Tensor | None = None

    def select(self, parents: Sequence[int]) -> None:
        self._memory = [self._memory[parent] for parent in parents]

    def read_inputs(self, _module: nn.Module, _args: Any, inputs: Mapping[str, Any]) -> None:
        self._inputs = inputs

    def read_image(self, x: Tensor) -> None:
        """Begin a forward pass, whose decoder reads ``[rows, T, D]``."""
        rows, length = x.shape[:2]
        layout = self._model.row_layout
        if layout is not None:
            image = layout.image[:, -length:]
            self._has_prompt = layout.valid.shape[1] - length < layout.prompt
        else:
            image, self._has_prompt = image_tokens(self._model, self._inputs), True
        if self._has_prompt:
            self._memory = [row[marks.to(row.device)] for row, marks in zip(x, image, strict=True)]
        self._first = first_live_query(self._model, length)
        self._changed = torch.zeros(rows, length - self._first, dtype=torch.bool, device=x.device)
        self._now = None

    def measure(self, x: Tensor) -> None:
        """Find the tokens that the next block changes, from the output of a block ``[rows, T, D]``."""
        self._now = None
        if bool(self._changed.all()):
            return
        now = uncertainty(lens(self._model, x[:, self._first :]), self._method.top_k) > self._method.threshold
        now = now.to(self._changed.device) & ~self._changed
        self._changed = self._changed | now
        self._now = now if bool(now.any()) else None

    def look_again(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        """Return the new output of a feed-forward network."""
        if self._now is None:
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        before = output[0] if isinstance(output, tuple) else output
        new = before.clone()
        for row, token in self._now.nonzero().tolist():
            memory = self._memory[row].to(x)
            if len(memory):
                part = self._part(token)
                new[row, part] = self._mixed(module, x[row, part], before[row, part], memory)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    def _part(self, token: int) -> slice:
        """Return the tokens that the decision of a live token applies to."""
        whole = self._method.variant == "release" and token == 0 and self._has_prompt
        position = self._first + token
        return slice(0 if whole else position, position + 1)

    def _mixed(self, module: nn.Module, x: Tensor, output: Tensor, memory: Tensor) -> Tensor:
        ratio = self._method.ratio
        if self._method.variant == "paper":
            return (1 - ratio) * output + ratio * (_activation(self._model, module)(x @ memory.T) @ memory)
        return (1 - ratio) * output + ratio * scaled_addition(x @ memory.T @ memory, output)


def uncertainty(logits: Tensor, top_k: int) -> Tensor:
    """Return the entropy of the `top_k` most likely words of ``[..., V]``, renormalized, divided by its maximum.

    Examples
    --------
    >>> import torch
    >>> from mitigation.training_free.methods.memvr import uncertainty
    >>> [round(float(x), 3) for x in uncertainty(torch.tensor([[0.0, 0.0, -99.0], [99.0, 0.0, 0.0]]), 2)]
    [1.0, 0.0]
    """
    count = min(top_k, logits.shape[-1])
    log_p = logits.topk(count).values.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1) / math.log(count)


def scaled_addition(addition: Tensor, output: Tensor) -> Tensor:
    """Return an addition, scaled to the mean absolute value of an output."""
    wide = at_least_float32(addition)
    scale = at_least_float32(output).abs().mean() / wide.abs().mean().clamp_min(1e-12)
    return (wide * scale).to(output.dtype)


def _network(model: Lvlm, layer: int) -> nn.Module:
    """Return the feed-forward network of a block; raises `ModelError` if no module has its input and output."""
    module = resolve(model.layers("decoder")[layer], model.spec.decoder.mlp, model.spec)
    if isinstance(module, nn.Linear):
        msg = (
            f"MemVR changes the feed-forward network of a block, and in {model.name} ({model.spec.model_type}) it is no "
            "separate module"
        )
        raise ModelError(msg)
    return module


def _activation(model: Lvlm, module: nn.Module) -> Any:
    """Return the activation function of a feed-forward network, a function of a tensor."""
    for name in ("act_fn", "activation_fn", "act"):
        function: Any = getattr(module, name, None)
        if callable(function):
            return function
    from transformers.activations import ACT2FN

    text = model.hf.config.get_text_config(decoder=True)
    return ACT2FN[getattr(text, "hidden_act", None) or text.hidden_activation]
