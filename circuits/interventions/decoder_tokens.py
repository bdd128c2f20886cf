"""Which tokens a forward of the decoder holds: those of the prompt, and those that generation has added.

A token's place in its sequence decides what a rule of positions means for it, not the forward it happens to be in. With a
cache every forward after the first holds one new token; without one it holds all tokens again; a prefill in chunks holds a
part of the prompt. So the length of the prompt is taken from the call of `generate`, and how many tokens came before a
forward from its cache.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from groundscope.core.errors import ModelError, PatchError
from lvlm.applied import observer
from lvlm.image_tokens import after_image, image_in_sequence, image_tokens
from lvlm.model import Lvlm
from lvlm.text_only import decoder_of

_UNKNOWN_PREFILL = ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size")


@dataclass
class _Call:
    """A call of `generate`, or of the model's own forward, that is under way."""

    inputs: Mapping[str, Any]
    """Its arguments by name."""
    generates: bool
    prompt: int | None = None
    """Tokens of the prompt; None until the decoder's first forward shows it."""
    image: Tensor | None = None
    """Which tokens of `inputs` stand for an image, bool ``[rows, positions]``."""


class DecoderTokens:
    """The tokens of the decoder's forward that is under way.

    Outside of `generate` a forward without a cache, or onto an empty one, reads a prompt, and a forward of one token onto a
    filled cache a generated token. More than one token onto a filled cache may be either, and is refused by whatever needs
    to know.
    """

    def __init__(self, model: Lvlm) -> None:
        self._model = model
        self._call: _Call | None = None
        self._past: int | None = 0
        self._prompt: int | None = None

    # ---- what is watched

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Follow the model's forwards and generations while the context is open."""
        with ExitStack() as stack:
            hf = self._model.hf
            stack.callback(hf.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
            stack.callback(hf.register_forward_hook(self._leave, with_kwargs=True, always_call=True).remove)
            stack.callback(decoder_of(self._model).register_forward_pre_hook(self._look, with_kwargs=True).remove)
            for module in hf.modules():
                for name, around in (("generate", self._around), ("generate_batch", self._refusing)):
                    if callable(getattr(type(module), name, None)):
                        stack.callback(_replace_method(module, name, around(module, getattr(module, name))))
            yield

    @observer
    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._call is None:
            self._call = _Call(_named(module.forward, args, kwargs), generates=False)

    @observer
    def _leave(self, _module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], _output: Any) -> None:
        if self._call is not None and not self._call.generates:
            self._call = None

    @observer
    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = _named(module.forward, args, kwargs)
        fed = given.get("inputs_embeds")
        fed = given.get("input_ids") if fed is None else fed
        count = fed.shape[1] if isinstance(fed, Tensor) and fed.dim() > 1 else None
        self._past = _length(given.get("past_key_values"), given.get("attention_mask"), count)
        if self._past == 0:
            self._prompt = count

    def _around(self, module: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            outer, given = self._call, _named(original, args, kwargs)
            self._call = self._begun(module, given, outer)
            try:
                return original(*args, **kwargs)
            finally:
                self._call = outer

        return generate

    def _refusing(self, _module: nn.Module, _original: Callable[..., Any]) -> Callable[..., Any]:
        def generate_batch(*_args: Any, **_kwargs: Any) -> Any:
            msg = (
                f"{self._model.name}: continuous batching packs the tokens of many prompts into one row, in which positions "
                "cannot be told apart: call generate"
            )
            raise ModelError(msg)

        return generate_batch

    def _begun(self, module: nn.Module, given: dict[str, Any], outer: _Call | None) -> _Call:
        ids = given.get("input_ids")
        ids = given.get("inputs") if ids is None else ids
        fed = given.get("inputs_embeds")
        fed = ids if fed is None else fed
        prompt = None
        if not self._model.encoder_decoder and isinstance(fed, Tensor) and fed.dim() > 1:
            mask = given.get("attention_mask")  # longer than the tokens where an earlier cache is gone on with
            seen = mask.shape[1] if isinstance(mask, Tensor) and mask.dim() == 2 else 0
            prompt = max(fed.shape[1], seen)
        elif any(_option(module, given, name) for name in _UNKNOWN_PREFILL):
            msg = (
                f"{self._model.name}: where its prompt ends is not known before {', '.join(_UNKNOWN_PREFILL)} take effect: "
                "generate without them, or pass input_ids"
            )
            raise ModelError(msg)
        if isinstance(ids, Tensor):
            given = {**given, "input_ids": ids}
        if outer is not None and outer.generates:  # the language model's own call, which is given a part of the inputs
            given = {**outer.inputs, **{name: value for name, value in given.items() if value is not None}}
        return _Call(given, generates=True, prompt=prompt)

    # ---- what rules mean

    def past(self) -> int:
        """Return how many tokens of the sequence came before the forward; raises `ModelError` where it cannot be known."""
        if self._past is None:
            msg = (
                f"{self._model.name}: its cache does not say how many tokens it holds: generate with use_cache=False, or act "
                "on 'all' positions"
            )
            raise ModelError(msg)
        return self._past

    def prompt(self, count: int) -> int:
        """Return the length of the prompt of the sequence of which `count` tokens are in the forward.

        Raises
        ------
        ModelError
            Where it cannot be known whether the tokens belong to the prompt.
        """
        past = self.past()
        if self._call is not None and self._call.generates:
            if self._call.prompt is None:
                self._call.prompt = past + count
            return self._call.prompt
        if past == 0:
            start = self._model.answer_from
            self._prompt = count if start is None else min(start, count)
            return self._prompt
        if count > 1:
            msg = (
                f"{self._model.name}: {count} tokens that follow a cache of {past} outside of generate may continue the prompt "
                "or the answer, so their positions cannot be told apart: run the prompt in one forward, or call generate"
            )
            raise ModelError(msg)
        if self._prompt is None or self._prompt > past:
            self._prompt = past  # the context was opened after the prompt was read
        return self._prompt

    def start(self, rule: str, count: int) -> int:
        """Return the first token of the forward, counted from 0 in it, that ``all``, ``last`` or ``generated`` means."""
        if rule == "all":
            return 0
        return max(self.prompt(count) - (rule == "last") - self.past(), 0)

    def steps(self, count: int) -> list[int]:
        """Return for each token of the forward how many tokens were generated up to it, itself included; 0 in the prompt."""
        first = self.past() - self.prompt(count) + 1
        return [max(0, first + i) for i in range(count)]

    def mask(self, rule: str, x: Tensor, where: object) -> Tensor:
        """Return the tokens that ``image``, ``suffix`` or ``question`` means, bool ``[rows, positions]``.

        Raises
        ------
        PatchError
            Where the image's tokens are not known: no token ids were passed to the model's own forward or generate.
        """
        rows, count = x.shape[:2]
        past, prompt = self.past(), self.prompt(count)
        first, end = min(past, prompt), min(past + count, prompt)
        written = torch.full((rows, count - (end - first)), rule == "suffix", dtype=torch.bool, device=x.device)
        if first == end:
            return written
        if not image_in_sequence(self._model):
            return torch.cat([torch.full((rows, end - first), True, device=x.device), written], dim=1)
        image = self._image(rule, rows, prompt, where).to(x.device)
        chosen = image if rule == "image" else after_image(image)
        offset = prompt - image.shape[1]  # tokens that an earlier cache holds
        return torch.cat([chosen[:, first - offset : end - offset], written], dim=1)

    def _image(self, rule: str, rows: int, prompt: int, where: object) -> Tensor:
        call = self._call
        ids = None if call is None else call.inputs.get("input_ids")
        known = isinstance(ids, Tensor) and ids.dim() == 2 and ids.shape[0] > 0 and rows % ids.shape[0] == 0
        length = ids.shape[1] if isinstance(ids, Tensor) and known else 0
        answered = not (call is None or call.generates) and self._model.answer_from is not None
        fits = 0 < length <= prompt if call is not None and call.generates else length == prompt
        if call is None or not (fits or (answered and length > prompt)):
            msg = f"positions '{rule}' at '{where}' need input_ids [rows, positions] given to the model's own forward or generate"
            raise PatchError(msg)
        if call.image is None:
            call.image = image_tokens(self._model, call.inputs)
        image = call.image[:, :prompt]
        return image.repeat_interleave(rows // len(image), 0)  # beams of one prompt stand side by side


def _named(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a call's arguments by name."""
    if not args:
        return dict(kwargs)
    names = [name for name, p in inspect.signature(function).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _option(module: nn.Module, given: Mapping[str, Any], name: str) -> Any:
    """Return an option of `generate`: from its arguments, or the generation configuration in use."""
    config = given.get("generation_config")
    config = getattr(module, "generation_config", None) if config is None else config
    return given[name] if name in given else getattr(config, name, None)


def _length(cache: Any, mask: Any, count: int | None) -> int | None:
    """Return how many tokens a cache holds; None where it does not say."""
    if cache is None or (isinstance(cache, tuple | list) and (not cache or cache[0] is None)):
        return 0
    length = getattr(cache, "get_seq_length", None)
    if length is not None:
        return int(length())
    if isinstance(mask, Tensor) and mask.dim() == 2 and count is not None:  # a tuple of tensors, in any layout
        return mask.shape[1] - count
    return None


def _replace_method(module: nn.Module, name: str, method: Callable[..., Any]) -> Callable[[], None]:
    """Put a method onto one object alone, and return what takes it off again."""
    before = vars(module).get(name)
    object.__setattr__(module, name, method)

    def restore() -> None:
        if before is None:
            object.__delattr__(module, name)
        else:
            object.__setattr__(module, name, before)

    return restore
