"""Which tokens a forward pass of the decoder contains: prompt tokens and generated tokens.

A position rule depends on a token's place in its sequence, not on the forward pass that contains it. With a cache, every
forward pass after the first contains one new token; without a cache it contains all tokens; a chunked prefill contains a
part of the prompt. So the prompt length comes from the call of `generate`, and the number of earlier tokens from the
cache.
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
from lvlm.access.decoder_module import decoder_of
from lvlm.active_interventions import mark_observer
from lvlm.image_tokens import image_in_sequence, image_tokens, tokens_after_image
from lvlm.model import Lvlm

_UNKNOWN_PREFILL = ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size")


@dataclass
class _Call:
    """An active call of `generate`, or of the model's forward."""

    inputs: Mapping[str, Any]
    """Its arguments by name."""
    generates: bool
    prompt: int | None = None
    """Number of prompt tokens; None until the decoder's first forward pass determines it."""
    image: Tensor | None = None
    """Which tokens of `inputs` are image tokens, bool ``[rows, positions]``."""


class DecoderTokens:
    """The tokens of the decoder's current forward pass.

    Outside of `generate`, a forward pass without a cache or with an empty cache reads a prompt, and a forward pass of one
    token with a filled cache reads a generated token. Several tokens with a filled cache are ambiguous; methods that need
    the distinction raise `ModelError`.
    """

    def __init__(self, model: Lvlm) -> None:
        self._model = model
        self._call: _Call | None = None
        self._past: int | None = 0
        self._prompt: int | None = None

    # ---- tracking of calls

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Track the model's forward passes and generations while the context is open."""
        with ExitStack() as stack:
            hf = self._model.hf
            stack.callback(hf.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
            stack.callback(hf.register_forward_hook(self._leave, with_kwargs=True, always_call=True).remove)
            stack.callback(
                decoder_of(self._model).register_forward_pre_hook(self._read_decoder_call, with_kwargs=True).remove
            )
            for module in hf.modules():
                for name, around in (("generate", self._track), ("generate_batch", self._refuse)):
                    if callable(getattr(type(module), name, None)):
                        stack.callback(_replace_method(module, name, around(module, getattr(module, name))))
            yield

    @mark_observer
    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._call is None:
            self._call = _Call(_named(module.forward, args, kwargs), generates=False)

    @mark_observer
    def _leave(self, _module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], _output: Any) -> None:
        if self._call is not None and not self._call.generates:
            self._call = None

    @mark_observer
    def _read_decoder_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = _named(module.forward, args, kwargs)
        tokens = arguments.get("inputs_embeds")
        tokens = arguments.get("input_ids") if tokens is None else tokens
        count = tokens.shape[1] if isinstance(tokens, Tensor) and tokens.dim() > 1 else None
        self._past = _length(arguments.get("past_key_values"), arguments.get("attention_mask"), count)
        if self._past == 0:
            self._prompt = count

    def _track(self, module: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            outer, arguments = self._call, _named(original, args, kwargs)
            self._call = self._generation_call(module, arguments, outer)
            try:
                return original(*args, **kwargs)
            finally:
                self._call = outer

        return generate

    def _refuse(self, _module: nn.Module, _original: Callable[..., Any]) -> Callable[..., Any]:
        def generate_batch(*_args: Any, **_kwargs: Any) -> Any:
            msg = (
                f"{self._model.name}: continuous batching packs the tokens of many prompts into one row, so their positions "
                "are unknown; call generate"
            )
            raise ModelError(msg)

        return generate_batch

    def _generation_call(self, module: nn.Module, arguments: dict[str, Any], outer: _Call | None) -> _Call:
        ids = arguments.get("input_ids")
        ids = arguments.get("inputs") if ids is None else ids
        tokens = arguments.get("inputs_embeds")
        tokens = ids if tokens is None else tokens
        prompt = None
        if not self._model.encoder_decoder and isinstance(tokens, Tensor) and tokens.dim() > 1:
            mask = arguments.get("attention_mask")  # longer than the tokens if a call continues from a cache
            mask_length = mask.shape[1] if isinstance(mask, Tensor) and mask.dim() == 2 else 0
            prompt = max(tokens.shape[1], mask_length)
        elif any(_option(module, arguments, name) for name in _UNKNOWN_PREFILL):
            msg = (
                f"{self._model.name}: the prompt length is unknown before {', '.join(_UNKNOWN_PREFILL)} take effect; "
                "generate without them, or pass input_ids"
            )
            raise ModelError(msg)
        if isinstance(ids, Tensor):
            arguments = {**arguments, "input_ids": ids}
        if outer is not None and outer.generates:  # a nested call of the language model, with a part of the inputs
            arguments = {**outer.inputs, **{name: value for name, value in arguments.items() if value is not None}}
        return _Call(arguments, generates=True, prompt=prompt)

    # ---- meaning of position rules

    def past(self) -> int:
        """Return the number of tokens before this forward pass; raise `ModelError` if it is unknown."""
        if self._past is None:
            msg = (
                f"{self._model.name}: its cache does not report its number of tokens; generate with use_cache=False, or use "
                "positions='all'"
            )
            raise ModelError(msg)
        return self._past

    def prompt(self, count: int) -> int:
        """Return the prompt length of the sequence; the forward pass contains `count` of its tokens.

        Raises
        ------
        ModelError
            If it is unknown whether the tokens belong to the prompt.
        """
        past = self.past()
        if self._call is not None and self._call.generates:
            if self._call.prompt is None:
                self._call.prompt = past + count
            return self._call.prompt
        if past == 0:
            start = self._model.answer_from
            # A pass of fewer tokens than the prompt contains its prefix (`lvlm.decoding.prefix_run`).
            self._prompt = count if start is None else start
            return self._prompt
        if self._model.answer_from is not None:  # `lvlm.decoding` states where the answers begin
            return self._model.answer_from
        if count > 1:
            msg = (
                f"{self._model.name}: {count} tokens after a cache of {past} outside of generate may belong to the prompt or the "
                "answer, so positions are unknown; run the prompt in one forward pass, or call generate"
            )
            raise ModelError(msg)
        if self._prompt is None or self._prompt > past:
            self._prompt = past  # the context opened after the prompt pass
        return self._prompt

    def start(self, rule: str, count: int) -> int:
        """Return the index in the forward pass of the first token that a rule selects; it selects all tokens after it too.

        For ``all``, ``last+generated`` and ``generated:all``.
        """
        if rule == "all":
            return 0
        return max(self.prompt(count) - (rule == "last+generated") - self.past(), 0)

    def last(self, count: int) -> int | None:
        """Return the index in the forward pass of the prompt's last token; None if the pass does not contain it."""
        index = self.prompt(count) - 1 - self.past()
        return index if 0 <= index < count else None

    def steps(self, count: int) -> list[int]:
        """Return for each token of the forward pass the number of generated tokens up to and including it; 0 in the prompt."""
        first = self.past() - self.prompt(count) + 1
        return [max(0, first + i) for i in range(count)]

    def mask(self, rule: str, x: Tensor, where: object) -> Tensor:
        """Return the tokens that ``image:all``, ``suffix+generated`` or ``suffix:all`` selects, bool ``[rows, positions]``.

        Raises
        ------
        PatchError
            If the image tokens are unknown: no token ids were passed to the model's forward or generate.
        """
        rows, count = x.shape[:2]
        past, prompt = self.past(), self.prompt(count)
        first, end = min(past, prompt), min(past + count, prompt)
        written = torch.full(
            (rows, count - (end - first)), rule == "suffix+generated", dtype=torch.bool, device=x.device
        )
        if first == end:
            return written
        if not image_in_sequence(self._model):
            return torch.cat([torch.full((rows, end - first), True, device=x.device), written], dim=1)
        image = self._image(rule, rows, prompt, where).to(x.device)
        chosen = image if rule == "image:all" else tokens_after_image(image)
        offset = prompt - image.shape[1]  # tokens of an earlier cache
        return torch.cat([chosen[:, first - offset : end - offset], written], dim=1)

    def _image(self, rule: str, rows: int, prompt: int, where: object) -> Tensor:
        call = self._call
        ids = None if call is None else call.inputs.get("input_ids")
        has_ids = isinstance(ids, Tensor) and ids.dim() == 2 and ids.shape[0] > 0 and rows % ids.shape[0] == 0
        length = ids.shape[1] if isinstance(ids, Tensor) and has_ids else 0
        answered = not (call is None or call.generates) and self._model.answer_from is not None
        fits = 0 < length <= prompt if call is not None and call.generates else length == prompt
        if call is None or not (fits or (answered and length > prompt)):
            msg = f"positions '{rule}' at '{where}' need input_ids [rows, positions]; pass them to forward or generate"
            raise PatchError(msg)
        if call.image is None:
            call.image = image_tokens(self._model, call.inputs)
        image = call.image[:, :prompt]
        return image.repeat_interleave(rows // len(image), 0)  # beams of one prompt are adjacent rows


def _named(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a call's arguments by name."""
    if not args:
        return dict(kwargs)
    names = [name for name, p in inspect.signature(function).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _option(module: nn.Module, arguments: Mapping[str, Any], name: str) -> Any:
    """Return an option of `generate`: from its arguments, or the generation configuration in use."""
    config = arguments.get("generation_config")
    config = getattr(module, "generation_config", None) if config is None else config
    return arguments[name] if name in arguments else getattr(config, name, None)


def _length(cache: Any, mask: Any, count: int | None) -> int | None:
    """Return the number of tokens in a cache; None if the cache does not report it."""
    if cache is None or (isinstance(cache, tuple | list) and (not cache or cache[0] is None)):
        return 0
    length = getattr(cache, "get_seq_length", None)
    if length is not None:
        return int(length())
    if isinstance(mask, Tensor) and mask.dim() == 2 and count is not None:  # a tuple of tensors, in any layout
        return mask.shape[1] - count
    return None


def _replace_method(module: nn.Module, name: str, method: Callable[..., Any]) -> Callable[[], None]:
    """Replace a method of one object, and return a function that restores it."""
    before = vars(module).get(name)
    object.__setattr__(module, name, method)

    def restore() -> None:
        if before is None:
            object.__delattr__(module, name)
        else:
            object.__setattr__(module, name, before)

    return restore
