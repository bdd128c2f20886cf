"""Steer a Hugging Face model with a groundscope vector: copy this file, it needs only torch and safetensors.

    from apply_vector import steer
    with steer(model, "vector.safetensors"):
        output = model.generate(**inputs)

The file must have been written with the model (`mitigation.export.safetensors(vector, path, model)`, or stage ``export`` of a
run), because then it names the modules of every place. Heads, layers and other sites, all kinds of changes, norms, token
positions, decay and gates are supported. Token positions are the same with and without a cache.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

_IMAGE_RULES = ("image:all", "suffix:all", "suffix+generated")
_TINY = 1e-12


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors by name, and the metadata; raises `ValueError` for a file that cannot be applied."""
    if not Path(path).is_file():  # a FIFO would block forever
        raise ValueError(f"{path} is not a steering vector: not a regular file")  # noqa: EM102  # self-contained file
    try:
        with safe_open(str(path), framework="pt") as file:
            card = json.loads((file.metadata() or {})["steering_vector"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except (SafetensorError, KeyError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a steering vector: {error}") from error  # noqa: EM102
    modules = card.get("modules")
    if not isinstance(modules, dict):
        raise ValueError(
            f"{path} does not name the model's modules; write it with the model: export.safetensors(vector, path, model)"  # noqa: EM102
        )
    missing = [name for name in card["entries"] if name not in modules]
    if missing:
        text = f"{path}: '{missing[0]}' is not the plain input or output of a module of this family; apply it with groundscope"
        raise ValueError(text)
    return tensors, card


@contextmanager
def steer(model: nn.Module, path: str | Path, strength: float | None = None) -> Iterator[None]:
    """Steer a model while the context is open; afterwards it is unchanged.

    Parameters
    ----------
    model
        The model of transformers that the vector was derived for.
    path
        File of the vector.
    strength
        Strength; by default the one in the file.

    Raises
    ------
    ValueError
        If the file cannot be applied, or the model lacks a module; the model is then unchanged.
    """
    undo = apply(model, path, strength)
    try:
        yield
    finally:
        undo()


def apply(model: nn.Module, path: str | Path, strength: float | None = None) -> Callable[[], None]:
    """Steer a model as `steer`, until the returned function is called."""
    tensors, card = read(path)
    s = float(card["strength"] if strength is None else strength)
    places = {name: _module(model, card["modules"][name]["module"], path) for name in card["entries"]}
    gate = card.get("gate")
    if gate is not None:
        places["gate"] = _module(model, card["modules"]["gate"]["module"], path)
    positions = card["positions"]
    if positions in _IMAGE_RULES and card.get("image_token_id") is None:
        text = f"{path}: this family's image tokens at positions '{positions}' are not those of one id; apply it with groundscope"
        raise ValueError(text)
    tokens = _Tokens(model, card.get("image_token_id"))
    handles, masks = tokens.watch(), {}
    if s and gate is not None:  # before the changes: the probe reads the unchanged value
        probe, weights = card["modules"]["gate"], tensors["gate.weights"]

        def evaluate(x: Tensor) -> None:
            masks["gate"] = _columns(x, probe) @ weights.to(x) + float(gate["bias"]) > 0

        handles.append(_hook(places["gate"], probe, evaluate))
    for name, entry in card["entries"].items() if s else ():
        change = _change(card["kind"], card["norm"], name, tensors, s * float(entry["sigma"]), s)
        about, decoder = card["modules"][name], str(entry["site"]).startswith("decoder")

        def edit(
            x: Tensor, change: Callable[..., Tensor] = change, about: dict = about, decoder: bool = decoder
        ) -> Tensor:
            if x.dim() != 3:
                text = f"{path}: '{about['module']}' flattens its tokens; apply the vector with groundscope"
                raise ValueError(text)
            part = _columns(x, about)
            chosen = tokens.chosen(positions, x, decoder)
            if "gate" in masks:
                chosen = chosen & masks["gate"]
            factor = float(card["decay"]) ** tokens.steps(x) if decoder and card["decay"] < 1 else None
            new = torch.where(chosen[..., None], change(part, factor), part)
            if about.get("columns") is None:
                return new
            first, end = about["columns"]
            return torch.cat([x[..., :first], new, x[..., end:]], dim=-1)

        handles.append(_hook(places[name], about, edit))

    def undo() -> None:
        for remove in handles:
            remove()

    return undo


def _module(model: nn.Module, name: str, path: str | Path) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        text = (
            f"{path}: {type(model).__name__} has no module '{name}'; load the model with the class and the release of "
            "transformers that the vector was derived with"
        )
        raise ValueError(text) from error


def _columns(x: Tensor, about: dict[str, Any]) -> Tensor:
    columns = about.get("columns")
    return x if columns is None else x[..., columns[0] : columns[1]]


def _change(
    kind: str, norm: str, name: str, tensors: dict[str, Tensor], push: float, strength: float
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Return the change of ``[rows, positions, d]``, with a factor on its strength for each token."""
    vector = tensors[name]

    def add(x: Tensor, factor: Tensor | None) -> Tensor:
        value = push * vector
        if norm == "free":
            return x + (value.to(x) if factor is None else (factor * value.to(factor)).to(x))
        wide = x.float()  # the squared norm of a long residual stream overflows in float16
        value = value.to(wide) if factor is None else factor * value.to(factor)
        length = wide.norm(dim=-1, keepdim=True)
        start = wide if norm == "kept" else wide / length.clamp_min(_TINY)
        if norm == "away":
            size = value.norm(dim=-1, keepdim=True).clamp_min(_TINY)
            value = value * (1 + (-(start * value).sum(-1, keepdim=True) / size).clamp_min(0))
        moved = start + value
        return (moved * (length / moved.norm(dim=-1, keepdim=True).clamp_min(_TINY))).to(x)

    def amplify(x: Tensor, factor: Tensor | None) -> Tensor:
        deviation = x - vector.to(x)
        reads, writes = tensors.get(f"{name}.reads"), tensors.get(f"{name}.writes")
        if reads is not None:
            deviation = deviation @ reads.to(x).T @ (reads if writes is None else writes).to(x)
        elif writes is not None:
            deviation = deviation @ writes.to(x)
        return x + (strength if factor is None else (strength * factor).to(x)) * deviation

    def project(x: Tensor, factor: Tensor | None) -> Tensor:
        t = vector.to(x)
        share = ((x @ t).clamp_min(0) / (t @ t))[..., None]
        return x - (strength if factor is None else (strength * factor).to(x)) * share * t

    return {"add": add, "amplify": amplify, "project": project}[kind]


def _hook(module: nn.Module, about: dict[str, Any], edit: Callable[[Tensor], Tensor | None]) -> Callable[[], None]:
    """Edit a module's first input or its output; return a function that stops."""
    if about["side"] == "input":

        def before(_module: nn.Module, args: tuple, kwargs: dict) -> Any:
            name = (
                None
                if args
                else next((n for n in ("hidden_states", "hidden_state") if n in kwargs), next(iter(kwargs)))
            )
            new = edit(args[0] if name is None else kwargs[name])
            if new is None:
                return None
            return ((new, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: new})

        return module.register_forward_pre_hook(before, with_kwargs=True).remove

    def after(_module: nn.Module, _args: tuple, output: Any) -> Any:
        at = int(about.get("element", 0))
        new = edit(output[at] if isinstance(output, tuple) else output)
        if new is None or not isinstance(output, tuple):
            return new
        return (*output[:at], new, *output[at + 1 :])

    return module.register_forward_hook(after).remove


class _Tokens:
    """Which tokens a forward pass contains; `generate` gives the prompt's length, the cache the number of earlier tokens."""

    def __init__(self, model: nn.Module, image_token_id: int | None) -> None:
        self._model, self._image_id = model, image_token_id
        self._past, self._prompt, self._ids, self._generating = 0, 0, None, False

    def watch(self) -> list[Callable[[], None]]:
        """Follow the model's forward passes and generations; return the functions that stop."""
        handle = self._model.register_forward_pre_hook(self._enter, with_kwargs=True)
        original = getattr(self._model, "generate", None)
        if original is None:
            return [handle.remove]

        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            ids = args[0] if args and isinstance(args[0], Tensor) else kwargs.get("input_ids", kwargs.get("inputs"))
            embeddings = kwargs.get("inputs_embeds")
            length = next((x.shape[1] for x in (embeddings, ids) if isinstance(x, Tensor) and x.dim() > 1), 0)
            mask = kwargs.get("attention_mask")
            length = max(length, mask.shape[1] if isinstance(mask, Tensor) and mask.dim() == 2 else 0)
            self._generating, self._prompt, self._ids = True, length, ids if isinstance(ids, Tensor) else None
            try:
                return original(*args, **kwargs)
            finally:
                self._generating, self._ids = False, None

        object.__setattr__(self._model, "generate", generate)
        return [handle.remove, lambda: object.__delattr__(self._model, "generate")]

    def _enter(self, _module: nn.Module, args: tuple, kwargs: dict) -> None:
        cache = kwargs.get("past_key_values")
        length: Any = getattr(cache, "get_seq_length", None)
        self._past = 0 if length is None else int(length())
        ids = args[0] if args and isinstance(args[0], Tensor) else kwargs.get("input_ids")
        if not self._generating:
            self._ids = ids
            if self._past == 0:
                self._prompt = 0  # all tokens of this forward pass

    def _length(self, count: int) -> int:
        """Return the prompt's length, in a forward pass of `count` tokens."""
        if self._prompt == 0:
            if self._past and count > 1:
                text = f"{count} tokens after a cache of {self._past} may belong to the prompt or the answer; call generate"
                raise ValueError(text)
            self._prompt = self._past or count
        return self._prompt

    def steps(self, x: Tensor) -> Tensor:
        """Return the number of generated tokens up to each token, ``[1, positions, 1]``; 0 in the prompt."""
        count = x.shape[1]
        number = torch.arange(count, device=x.device) + self._past - self._length(count) + 1
        return number.clamp_min(0).float()[None, :, None]

    def chosen(self, rule: str, x: Tensor, decoder: bool) -> Tensor:
        """Return the tokens that a rule selects, bool ``[rows, positions]``."""
        rows, count = x.shape[:2]
        if rule == "all":
            return torch.ones(rows, count, dtype=torch.bool, device=x.device)
        at = torch.arange(count, device=x.device)
        if not decoder:
            return (at == count - 1).expand(rows, count)
        if getattr(self._model.config, "is_encoder_decoder", False):
            text = f"positions '{rule}' of a model with an encoder; apply the vector with groundscope"
            raise ValueError(text)
        at, prompt = at + self._past, self._length(count)
        if rule == "last":
            return (at == prompt - 1).expand(rows, count)
        if rule in ("last+generated", "generated:all"):
            return (at >= prompt - (rule == "last+generated")).expand(rows, count)
        return self._around_image(rule, rows, at, prompt)

    def _around_image(self, rule: str, rows: int, at: Tensor, prompt: int) -> Tensor:
        generated = (at >= prompt).expand(rows, -1) & (rule == "suffix+generated")
        inside = at[at < prompt]
        if not len(inside):
            return generated
        ids = self._ids
        if ids is None or ids.shape[1] < prompt or rows % ids.shape[0]:
            text = f"positions '{rule}' need input_ids with a token for every part of the image; pass them to forward or generate"
            raise ValueError(text)
        image = (ids[:, :prompt] == self._image_id).repeat_interleave(rows // len(ids), 0).to(at.device)
        chosen = image if rule == "image:all" else image.flip(1).cumsum(1).flip(1) == 0
        generated = generated.clone()
        generated[:, : len(inside)] = chosen[:, inside]
        return generated
