"""One model under study: load it, encode examples, run it, and say where its tensors are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from concepts.errors import DataError, ModelError, SiteError
from concepts.schema import Box, Example
from lvlm.family import FamilySpec, resolve
from lvlm.sites import Site
from lvlm.tokens import PatchGrid, TokenMap

Inputs = dict[str, Tensor]
_INCIDENTAL = {"_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype"}


@dataclass(frozen=True)
class Encoding:
    """One example as the model takes it."""

    example: Example
    inputs: Inputs
    """Model inputs by name, each with a leading batch axis of 1, on the CPU."""
    tokens: TokenMap


@dataclass(frozen=True)
class Batch:
    """Encodings of equal length, side by side; nothing is padded."""

    index: tuple[int, ...]
    """Place of each row in the sequence the batch was cut from."""
    encodings: tuple[Encoding, ...]
    inputs: Inputs


@dataclass(frozen=True)
class Place:
    """Where a site is read and written: the input or the output of a module."""

    module: nn.Module
    side: Literal["input", "output"]

    def watch(self, see: Callable[[Tensor], None]) -> RemovableHandle:
        """Call `see` with the site's tensor on every forward."""
        return self.edit(lambda x: see(x))

    def edit(self, change: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        """Replace the site's tensor by what `change` returns (None leaves it) on every forward."""
        if self.side == "input":

            def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                if args:
                    new = change(args[0])
                    return None if new is None else ((new, *args[1:]), kwargs)
                new = change(kwargs["hidden_states"])
                return None if new is None else (args, {**kwargs, "hidden_states": new})

            return self.module.register_forward_pre_hook(before, with_kwargs=True)

        def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
            # Layers return a bare tensor in most families and releases, a tuple in others.
            if isinstance(output, tuple):
                new = change(output[0])
                return None if new is None else (new, *output[1:])
            return change(output)

        return self.module.register_forward_hook(after)


class Lvlm:
    """A large vision-language model with names for what is inside; made by `load_lvlm` or `wrap_lvlm`.

    Parameters
    ----------
    model
        A Hugging Face model; put into evaluation mode.
    processor
        Its processor: a tokenizer, an image processor and the image placeholder.
    spec
        Where things are.
    name
        What to call it in results.
    """

    def __init__(self, model: nn.Module, processor: Any, spec: FamilySpec, name: str) -> None:
        self.hf: Any = model.eval()
        self.processor = processor
        self.spec = spec
        self.name = name
        text = self.hf.config.get_text_config(decoder=True)
        self.n_heads: int = text.num_attention_heads
        self.n_vision_heads: int = self.hf.config.vision_config.num_attention_heads
        self._layers: dict[str, Any] = {s: resolve(model, spec.stack(s).layers, spec) for s in ("decoder", "vision")}
        self._places: dict[tuple[str, int, str], Place] = {}
        self._picture = lru_cache(maxsize=256)(self._encode_picture)

    # -- shape ---------------------------------------------------------------------------------------------------

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self._layers["decoder"])

    @property
    def n_vision_layers(self) -> int:
        """Number of vision tower layers."""
        return len(self._layers["vision"])

    @property
    def head_dim(self) -> int:
        """Width of a decoder head: its share of the input of the output projection."""
        return self.output_projection("decoder", 0).in_features // self.n_heads

    @property
    def width(self) -> int:
        """Width of the decoder's residual stream."""
        return self.output_projection("decoder", 0).out_features

    @property
    def device(self) -> torch.device:
        """Where the first parameter is."""
        return next(self.hf.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the first parameter."""
        return next(self.hf.parameters()).dtype

    def __repr__(self) -> str:
        return (
            f"Lvlm({self.name!r}, {self.spec.model_type}: {self.n_layers} layers x {self.n_heads} heads of "
            f"{self.head_dim}, vision {self.n_vision_layers} layers, {self.dtype}, {self.device})"
        )

    # -- identity ------------------------------------------------------------------------------------------------

    @cached_property
    def config_hash(self) -> str:
        """SHA-256 of the configuration, without what depends on where, how or with which release it was loaded."""
        config = _without(self.hf.config.to_dict(), _INCIDENTAL)
        text = json.dumps(config, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def weights_hash(self) -> str:
        """SHA-256 over name, shape and up to 4,096 evenly spaced values of every parameter.

        A sample, so that a model of many gigabytes is identified in seconds; any fine-tuning changes it.
        """
        h = hashlib.sha256()
        for name, parameter in sorted(self.hf.named_parameters()):
            flat = parameter.detach().flatten()
            step = max(1, flat.numel() // 4096)
            h.update(f"{name}{tuple(parameter.shape)}".encode())
            h.update(flat[::step].float().cpu().numpy().tobytes())
        return h.hexdigest()

    # -- places --------------------------------------------------------------------------------------------------

    def output_projection(self, stack: str, layer: int) -> nn.Linear:
        """Return the linear map from a layer's heads to its attention output."""
        module = resolve(self._layers[stack][layer], self.spec.stack(stack).output_projection, self.spec)
        if not isinstance(module, nn.Linear):
            msg = f"'{self.spec.stack(stack).output_projection}' is a {type(module).__name__}, not a linear layer"
            raise ModelError(msg)
        return module

    def place(self, stack: str, layer: int, component: str) -> Place:
        """Return where a component of a layer is read; raises `SiteError` for one that the model lacks."""
        key = (stack, layer, component)
        if key not in self._places:
            self._places[key] = self._find(stack, layer, component)
        return self._places[key]

    def locate(self, site: Site | str) -> Place:
        """Return where a site is read; raises `SiteError` for a site that the model lacks."""
        site = Site.parse(site) if isinstance(site, str) else site
        if site.cross:
            msg = f"site '{site}': {self.name} has no cross-attention layers"
            raise SiteError(msg)
        return self.place(site.stack, site.layer, site.component)

    def _find(self, stack: str, layer: int, component: str) -> Place:
        if stack == "projector":
            return Place(resolve(self.hf, self.spec.projector, self.spec), "output")
        count = len(self._layers[stack])
        if not 0 <= layer < count:
            msg = f"site '{stack}.L{layer}.{component}': {self.name} has {stack} layers 0-{count - 1}"
            raise SiteError(msg)
        paths = self.spec.stack(stack)
        where: dict[str, tuple[str, Literal["input", "output"]]] = {
            "resid_pre": ("", "input"),
            "resid_mid": (paths.mid_norm, "input"),
            "resid_post": ("", "output"),
            "attn_out": (paths.attention, "output"),
            "mlp_out": (paths.mlp, "output"),
            "z": (paths.output_projection, "input"),
            "q": (paths.query, "output"),
            "k": (paths.key, "output"),
            "v": (paths.value, "output"),
        }
        if component not in where:
            msg = f"site '{stack}.L{layer}.{component}' cannot be read as a tensor: there are {', '.join(where)}"
            raise SiteError(msg)
        path, side = where[component]
        module = self._layers[stack][layer]
        return Place(resolve(module, path, self.spec) if path else module, side)

    # -- encoding ------------------------------------------------------------------------------------------------

    def prompt(self, question: str) -> str:
        """Return the text the model reads, up to where its answer begins; the image placeholder stands for the image."""
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": question}]
            turn = [{"role": "user", "content": content}]
            return self.processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        return self.spec.template.format(image=self.processor.image_token, question=question)

    def _encode_picture(self, identity: str, source: _Source) -> tuple[Tensor, PatchGrid]:
        del identity  # the cache's key
        image = source.value.load()
        pixels = self.processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
        return pixels, patch_grid(self, image.size, tuple(pixels.shape[-2:]))

    def encode(self, example: Example) -> Encoding:
        """Turn an example into inputs and a token map.

        Raises
        ------
        DataError
            Where the image cannot be read, or the prompt does not hold the image's tokens.
        """
        pixels, grid = self._picture(example.image.identity, _Source(example.image))
        placeholder = self.processor.image_token
        text = self.prompt(example.question)
        if text.count(placeholder) != 1:
            msg = f"example '{example.id}': the prompt holds {text.count(placeholder)} image placeholders, not 1"
            raise DataError(msg)
        expanded = text.replace(placeholder, placeholder * grid.count)
        encoded = self.processor.tokenizer(expanded, return_offsets_mapping=True)
        ids: list[int] = encoded["input_ids"]
        image_id = self.processor.tokenizer.convert_tokens_to_ids(placeholder)
        image = tuple(i for i, token in enumerate(ids) if token == image_id)
        if len(image) != grid.count:
            msg = f"example '{example.id}': {len(image)} image tokens in the prompt, {grid.count} patches in the image"
            raise DataError(msg)
        start = expanded.rindex(example.question.strip())
        end = start + len(example.question.strip())
        question = tuple(i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < end and b > start and b > a)
        objects = {o.id: grid.patches(o.box) for o in example.objects}
        tokens = TokenMap(len(ids), image, question, grid, self.spec.vision_prefix, objects, example.subject)
        inputs = {
            "input_ids": torch.tensor([ids]),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
            "pixel_values": pixels,
        }
        return Encoding(example, inputs, tokens)

    def collate(self, encodings: Sequence[Encoding]) -> Inputs:
        """Stack inputs of equal length and put them on the model's device."""
        keys = encodings[0].inputs
        stacked = {k: torch.cat([e.inputs[k] for e in encodings]).to(self.device) for k in keys}
        return {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in stacked.items()}

    def batches(self, examples: Sequence[Example], size: int = 32) -> Iterator[Batch]:
        """Yield examples encoded in batches of equal length, shortest first, in a fixed order.

        Encodes lazily in chunks of ``64 * size`` examples, so that memory does not grow with the dataset.
        """
        for start in range(0, len(examples), 64 * size):
            chunk = [(i, self.encode(examples[i])) for i in range(start, min(len(examples), start + 64 * size))]
            by_length: dict[int, list[tuple[int, Encoding]]] = {}
            for item in chunk:
                by_length.setdefault(item[1].tokens.length, []).append(item)
            for _, items in sorted(by_length.items()):
                for k in range(0, len(items), size):
                    part = items[k : k + size]
                    encodings = tuple(e for _, e in part)
                    yield Batch(tuple(i for i, _ in part), encodings, self.collate(encodings))

    # -- running -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the logits at the last position, ``[B, V]``."""
        on_device = {k: v.to(self.device) for k, v in inputs.items()}
        return self.hf(**on_device, use_cache=False, logits_to_keep=1).logits[:, -1]

    @torch.no_grad()
    def generate(self, batch: Batch, max_new_tokens: int = 40) -> list[str]:
        """Return greedy continuations as text."""
        out = self.hf.generate(**batch.inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = out[:, batch.inputs["input_ids"].shape[1] :]
        return [t.strip() for t in self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)]

    def unembed(self, residual: Tensor) -> Tensor:
        """Apply the final norm and the unembedding to decoder residuals ``[..., D]`` -> ``[..., V]``."""
        norm = resolve(self.hf, self.spec.final_norm, self.spec)
        return resolve(self.hf, self.spec.unembedding, self.spec)(norm(residual))


@dataclass(frozen=True, eq=False)
class _Source:
    """An image source as a cache argument that never decides the key (equal to any other)."""

    value: Any

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Source)


def patch_grid(model: Lvlm, size: tuple[int, int], shown: tuple[int, ...]) -> PatchGrid:
    """Lay the vision tower's patches over the original image.

    Follows the image processor: resize (to a fixed size, or by the shortest edge), then centre crop.

    Parameters
    ----------
    model
        Gives the patch size and the image processor's settings.
    size
        Width and height of the original image in pixels.
    shown
        Height and width of what the vision tower gets, in pixels.
    """
    patch = int(model.hf.config.vision_config.patch_size)
    height, width = shown
    settings = model.processor.image_processor.size
    edge = settings.get("shortest_edge") if hasattr(settings, "get") else getattr(settings, "shortest_edge", None)
    if edge:
        scale_x = scale_y = min(size) / edge
        left, top = (size[0] / scale_x - width) / 2, (size[1] / scale_y - height) / 2
    else:
        scale_x, scale_y, left, top = size[0] / width, size[1] / height, 0.0, 0.0
    first = Box(left * scale_x, top * scale_y, (left + patch) * scale_x, (top + patch) * scale_y)
    return PatchGrid(height // patch, width // patch, first)


def _without(value: object, names: set[str]) -> object:
    if isinstance(value, dict):
        return {k: _without(v, names) for k, v in value.items() if k not in names}
    return value
