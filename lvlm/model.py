"""One model under study: load it, encode examples, run it, and say where its tensors are."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from concepts.schema import Box, Example, ImageSource, check_box
from groundscope.core.bounded_cache import BoundedCache
from groundscope.core.errors import ModelError, SiteError
from lvlm.access.eager_attention import eager, implementations, say_eager
from lvlm.access.hook_point import Place
from lvlm.access.shared_vision_run import each_picture_once, tower_of
from lvlm.access.site_lookup import find_place
from lvlm.access.weights import device_of
from lvlm.active_interventions import (
    ActiveIntervention,
    Registration,
    active_interventions,
    mark_observer,
    unregistered_hooks,
)
from lvlm.encoding.encode import Batch, Encoding, Inputs, Prompt, check_alike, encode
from lvlm.encoding.registry import VIEWS, Look, View
from lvlm.family.discovery import complete, heads_of, text_config, vision_heads
from lvlm.family.specification import FamilySpec, find, layer_list, resolve
from lvlm.generation import greedy
from lvlm.processor_digest import pixel_settings
from lvlm.prompting import prompt_of
from lvlm.sites import Site
from lvlm.token_map import TokenMap
from lvlm.weights_hash import has_weights, weights_hash

__all__ = ["Batch", "Encoding", "Inputs", "Lvlm", "Place", "Prompt"]

_Value = TypeVar("_Value")
LOOK_BYTES = 256 << 20
"""Bytes of processed images that a model keeps, because several questions may ask about one image."""
CHUNK_BYTES = 256 << 20
"""Bytes of encodings after which `Lvlm.batches` stops to collect more of them before it yields batches."""
_INCIDENTAL = {"_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype"}


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
    revision
        The commit of a Hugging Face id; None for any other model.
    unused_weights
        Tensors of its checkpoint that the model does not use.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        spec: FamilySpec,
        name: str,
        *,
        revision: str | None = None,
        unused_weights: tuple[str, ...] = (),
    ) -> None:
        self.hf: Any = model.eval()
        self.processor = processor
        self.spec = complete(spec, model)
        self.name = name
        self.revision = revision
        self.unused_weights = unused_weights
        if spec.view not in VIEWS:
            msg = f"family '{spec.model_type}': no view '{spec.view}'; there are {', '.join(VIEWS)}"
            raise ModelError(msg)
        self.view: View = VIEWS[spec.view]
        config = self.hf.config
        text = text_config(config)
        self.encoder_decoder: bool = bool(getattr(config, "is_encoder_decoder", False) or text.is_encoder_decoder)
        self.n_heads: int = heads_of(text, config)
        self._softcap: float | None = getattr(text, "final_logit_softcapping", None)
        self._scaled: bool = bool(getattr(text, "scale_decoder_outputs", False))
        self.n_vision_heads: int = vision_heads(self.spec, model, self.layers("vision"))
        self._tower: tuple[tuple[nn.Module, ...], nn.Module | None] | None = None
        self._answers: dict[Hashable, Any] = {}
        self._looks: BoundedCache[Look] = BoundedCache(LOOK_BYTES, _bytes_of)
        self.answer_from: int | None = None

    # -- shape ---------------------------------------------------------------------------------------------------

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers("decoder"))

    @property
    def n_vision_layers(self) -> int:
        """Number of vision tower layers."""
        return len(self.layers("vision"))

    @property
    def head_dim(self) -> int:
        """Width of a decoder head: its share of the input of the output projection."""
        return self.head_projection(0).in_features // self.n_heads

    @property
    def width(self) -> int:
        """Width of the decoder's residual stream."""
        return self.head_projection(0).out_features

    @property
    def device(self) -> torch.device:
        """Where inputs go: where the first parameter is, or will be when it is needed."""
        return device_of(self.hf)

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

    @property
    def config_hash(self) -> str:
        """SHA-256 of the configuration, without what depends on where, how or with which release it was loaded."""
        config = _without(self.hf.config.to_dict(), _INCIDENTAL)
        text = json.dumps(config, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def weights_hash(self) -> str:
        """``<algorithm>:<hex>`` over every byte of the weights, computed again when they changed; see `lvlm.weights_hash`."""
        return weights_hash(self.hf)

    def has_weights(self, recorded: str) -> bool:
        """Whether these are the weights whose hash was recorded; hashes of earlier releases are compared, with a warning."""
        return has_weights(self.hf, recorded)

    @property
    def attention(self) -> str:
        """How attention is computed, by transformers' names: ``sdpa``, ``eager``, ...; several where parts differ."""
        return ", ".join(implementations(self))

    # -- what is done to it --------------------------------------------------------------------------------------

    @property
    def interventions(self) -> tuple[ActiveIntervention, ...]:
        """Changes that are active now, in the order in which they were applied: steering vectors, patches, cut attention."""
        return active_interventions(self.hf)

    @property
    def unregistered_hooks(self) -> tuple[str, ...]:
        """Forward hooks of unknown effect, by qualified name; see `lvlm.active_interventions`."""
        return unregistered_hooks(self.hf)

    def register(self, intervention: ActiveIntervention) -> Registration:
        """Record that something changes what the model computes, until the registration is removed."""
        return Registration(self.hf, intervention)

    # -- places --------------------------------------------------------------------------------------------------

    def layers(self, stack: str) -> tuple[nn.Module, ...]:
        """Return the layers of ``decoder`` or ``vision`` in the order they run."""
        # Found again each time: a layer may be replaced, by an adapter for example.
        return layer_list(self.hf, self.spec.stack(stack).layers, self.spec)

    def output_projection(self, stack: str, layer: int, *, cross: bool = False) -> nn.Linear:
        """Return the linear map from a layer's heads to its attention output."""
        spec = self.spec.stack(stack)
        path = spec.cross_output_projection if cross else spec.output_projection
        module = resolve(self.layers(stack)[layer], path, self.spec)
        if not isinstance(module, nn.Linear):
            msg = f"'{path}' is a {type(module).__name__}, not a linear layer"
            raise ModelError(msg)
        return module

    def attends(self, stack: str, layer: int, *, cross: bool) -> bool:
        """Whether a layer has self-attention, or cross-attention."""
        spec = self.spec.stack(stack)
        path = spec.cross_attention if cross else spec.attention
        if not path:
            return False
        layers = self.layers(stack)
        found = find(layers[layer], path)
        # A path that no layer has is a mistake in the spec, not a layer without attention; `place` names it.
        return found is not None or not any(find(one, path) is not None for one in layers)

    def head_site(self, layer: int) -> Site:
        """Return where a decoder layer's heads are: in its self-attention, or in its cross-attention where it has no other."""
        own = self.attends("decoder", layer, cross=False)
        return Site("decoder", layer, "z", cross=not own and self.attends("decoder", layer, cross=True))

    def head_projection(self, layer: int) -> nn.Linear:
        """Return the linear map from the heads of `head_site` to the output of their attention."""
        return self.output_projection("decoder", layer, cross=self.head_site(layer).cross)

    def place(self, stack: str, layer: int, component: str, *, cross: bool = False) -> Place:
        """Return where a component of a layer is read; raises `SiteError` for one that the model lacks."""
        return find_place(self, stack, layer, component, cross=cross)

    def locate(self, site: Site | str) -> Place:
        """Return where a site is read; raises `SiteError` for a site that the model lacks."""
        site = Site.parse(site) if isinstance(site, str) else site
        return self.place(site.stack, site.layer, site.component, cross=site.cross)

    # -- encoding ------------------------------------------------------------------------------------------------

    @property
    def placeholder(self) -> str:
        """What stands for an image in a prompt."""
        token = self.spec.placeholder or self.processor.image_token
        return str(getattr(token, "content", token))

    @property
    def content_id(self) -> int:
        """The id of the token that the embedding of a part of an image takes the place of."""
        config = self.hf.config
        for name in ("image_token_id", "image_token_index"):
            if isinstance(found := getattr(config, name, None), int):
                return found
        return int(self.processor.tokenizer.convert_tokens_to_ids(self.placeholder))

    @property
    def content_token(self) -> str:
        """That token as text; raises `ModelError` where the tokenizer has none."""
        token = self.processor.tokenizer.convert_ids_to_tokens(self.content_id)
        if token is None:
            msg = (
                f"the tokenizer of {self.name} has no token {self.content_id}, the configuration's image token; use the "
                "tokenizer that belongs to the model"
            )
            raise ModelError(msg)
        return str(token)

    @property
    def accepts(self) -> frozenset[str]:
        """Names of the inputs that the model's forward takes."""
        return frozenset(inspect.signature(self.hf.forward).parameters)

    def prompt(self, question: str, images: int = 1) -> str:
        """Return the text the model reads, up to where its answer begins; each placeholder stands for an image.

        Raises
        ------
        ModelError
            Where the chat template fails, does not end, or writes no text or too much of it.
        """
        return prompt_of(self, question, images)

    def _look(self, source: ImageSource) -> Look:
        key = (source.identity, pixel_settings(self.processor))
        return self._looks.get(key, lambda: self.view.look(self, source.load()))

    def encode(self, example: Example) -> Encoding:
        """Turn an example into inputs and a token map.

        Raises
        ------
        DataError
            Where the image cannot be read, or the prompt does not hold the image's tokens.
        """
        look = self._look(example.image)
        boxes = {o.id: (0, o.box) for o in example.objects if o.box is not None}
        prompt = Prompt(self.prompt(example.question), example.question, example.id, boxes, example.subject)
        return Encoding(example, *encode(self, prompt, [look], self.view.axis))

    def encode_prompt(
        self,
        text: str,
        images: Sequence[Any],
        *,
        question: str = "",
        name: str = "prompt",
        boxes: Mapping[str, tuple[int, Box]] | None = None,
        subject: str | None = None,
    ) -> tuple[Inputs, TokenMap]:
        """Turn any prompt about any number of images into inputs and a token map.

        Parameters
        ----------
        text
            With the model's `placeholder` once for each image, up to where the answer begins.
        images
            RGB images, in the order of their placeholders.
        question
            The part of the text whose words ``question`` selects.
        name
            What to call the prompt in errors.
        boxes
            Object id to the number of its image, counted from 0, and its pixel box.
        subject
            Id of the object that ``object:mean`` means.

        Raises
        ------
        DataError
            Where there are not as many placeholders as images, images are of unlike size that the family cannot take in one
            prompt, or a box is not finite, negative or without area.
        """
        for identity, (_, box) in (boxes or {}).items():
            check_box(box, identity)
        looks = [self.view.look(self, image) for image in images]
        sizes = [image.size for image in images]
        return encode(self, Prompt(text, question, name, boxes, subject), looks, self.view.axis, sizes)

    def collate(self, encodings: Sequence[Encoding]) -> Inputs:
        """Stack inputs of equal shape and put them on the model's device; raises `DataError` where shapes differ."""
        check_alike(encodings)
        stacked = {k: torch.cat([e.inputs[k] for e in encodings]).to(self.device) for k in encodings[0].inputs}
        return {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in stacked.items()}

    def batches(self, examples: Sequence[Example], size: int = 32, *, in_order: bool = True) -> Iterator[Batch]:
        """Yield examples encoded in batches of equal shape, in a fixed order.

        Encodes lazily in chunks of ``64 * size`` examples, or of fewer where their inputs hold `CHUNK_BYTES`, so that memory
        grows neither with the dataset nor with the size of images.

        Parameters
        ----------
        examples
            What to encode.
        size
            Most rows of a batch.
        in_order
            Encode a chunk, then yield its batches, shortest first; else the same batches, each as soon as it is full.
        """
        start = 0
        while start < len(examples):
            by_shape: dict[tuple[Any, ...], list[tuple[int, Encoding]]] = {}
            tensors: dict[int, int] = {}  # bytes by identity: questions about one image share its pixels
            i = start
            while i < min(len(examples), start + 64 * size):
                encoding = self.encode(examples[i])
                by_shape.setdefault(encoding.shape, []).append((i, encoding))
                tensors |= {id(x): x.nbytes for x in encoding.inputs.values()}
                i += 1
                if not in_order and len(by_shape[encoding.shape]) == size:
                    yield self._batch(by_shape.pop(encoding.shape))
                # Only whole batches: a chunk that ends anywhere would leave a short batch behind.
                if (i - start) % size == 0 and sum(tensors.values()) > CHUNK_BYTES:
                    break
            start = i
            for _, items in sorted(by_shape.items()):
                for k in range(0, len(items), size):
                    yield self._batch(items[k : k + size])

    def _batch(self, items: Sequence[tuple[int, Encoding]]) -> Batch:
        index, encodings = zip(*items, strict=True)
        return Batch(index, encodings, self.collate(encodings))

    # -- running -------------------------------------------------------------------------------------------------

    @property
    def tower(self) -> nn.Module | None:
        """The vision tower; None where no module holds all vision layers and no decoder layer."""
        layers = (self.hf, *self.layers("vision"), *self.layers("decoder"))
        if self._tower is None or self._tower[0] != layers:
            self._tower = layers, tower_of(self)
        return self._tower[1]

    def remember(self, key: Hashable, make: Callable[[], _Value]) -> _Value:
        """Return the value of a key that names all it depends on, made once; freed with the model. The last 1,024 are kept."""
        if key not in self._answers:
            while len(self._answers) >= 1024:
                del self._answers[next(iter(self._answers))]
            self._answers[key] = make()
        return self._answers[key]

    @contextmanager
    def last_logits(self, keep: int = 1) -> Iterator[dict[str, Any]]:
        """Let forwards compute logits at the last `keep` positions only; yields the options to call the model with.

        All positions times the vocabulary is the largest tensor of a forward. Where the model's forward takes
        ``logits_to_keep``, it is used; elsewhere the unembedding is given the last positions alone.
        """
        if "logits_to_keep" in self.accepts:
            yield {"logits_to_keep": keep}
            return

        @mark_observer
        def cut(_module: nn.Module, args: tuple[Any, ...]) -> Any:
            x = args[0] if args else None
            return (x[:, -keep:], *args[1:]) if isinstance(x, Tensor) and x.dim() == 3 and x.shape[1] > keep else None

        handle = resolve(self.hf, self.spec.unembedding or "", self.spec).register_forward_pre_hook(cut)
        try:
            yield {}
        finally:
            handle.remove()

    def forward(self, inputs: Mapping[str, Tensor], *, keep: int = 1, **options: Any) -> Tensor:
        """Run one forward, with gradients where they are enabled; return the logits at the last positions.

        Parameters
        ----------
        inputs
            Tensors by name, on any device.
        keep
            At how many of the last positions.
        **options
            What else the model is called with; by default without a cache.

        Returns
        -------
        Tensor
            ``[B, keep, V]``.
        """
        on_device = {k: v.to(self.device) for k, v in inputs.items()}
        with self.last_logits(keep) as less:
            return self.hf(**on_device, **{"use_cache": False, **options, **less}).logits[:, -keep:]

    @torch.no_grad()
    def logits(self, inputs: Mapping[str, Tensor], images: Sequence[str] = ()) -> Tensor:
        """Return the logits at the last position, ``[B, V]``; rows of equal `images` share one run of the vision tower.

        See `lvlm.access.shared_vision_run`.
        """
        with each_picture_once(self, images):
            return self.forward(inputs)[:, -1]

    def generate(self, batch: Batch, max_new_tokens: int = 40) -> list[str]:
        """Return greedy continuations as text: the largest logit at each step, whatever the checkpoint's generation settings."""
        answers = greedy(self, batch, max_new_tokens)
        return [t.strip() for t in self.processor.tokenizer.batch_decode(answers, skip_special_tokens=True)]

    def unembed(self, residual: Tensor) -> Tensor:
        """Apply the final norm and the unembedding to decoder residuals ``[..., D]`` -> ``[..., V]``."""
        if self.spec.final_norm:
            residual = resolve(self.hf, self.spec.final_norm, self.spec)(residual)
        if self._scaled:
            residual = residual * residual.shape[-1] ** -0.5
        logits = resolve(self.hf, self.spec.unembedding or "", self.spec)(residual)
        extra = getattr(self.hf, "final_logits_bias", None)
        logits = logits if extra is None else logits + extra
        return torch.tanh(logits / self._softcap) * self._softcap if self._softcap else logits

    @contextmanager
    def reading_answers(self, start: int | None) -> Iterator[None]:
        """Let forwards hold prompts with their answers: tokens from `start` on count as generated (None: forwards as usual).

        Interventions then act as they do while an answer is generated.
        """
        before, self.answer_from = self.answer_from, start
        try:
            yield
        finally:
            self.answer_from = before

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Let attention be computed step by step, so that its pattern can be read; afterwards it is as it was."""
        with eager(self):
            yield

    def read(
        self,
        inputs: Mapping[str, Tensor],
        sites: Sequence[Site | str],
        *,
        take: Callable[[Site, Tensor], Tensor | None] | None = None,
        quiet: bool = False,
    ) -> dict[str, Tensor]:
        """Run one forward and return the tensors of some sites by name, as the model has them.

        Many sites at all tokens are much memory. `take` is called with each site and its tensor while the forward runs,
        and only what it returns is kept (``lambda _, x: x[:, -1]``: the last token), nothing for None.

        A ``pattern`` is attention as ``[B, heads, queries, keys]``; asking for one computes all attention of this forward
        step by step, whose last bits differ from the usual way's, and says so through `logging` unless `quiet`.

        Raises
        ------
        SiteError
            For a site that the model lacks or the forward does not reach.
        """
        asked = [Site.parse(s) if isinstance(s, str) else s for s in sites]
        places = [(site, self.locate(site)) for site in asked]
        seen: dict[str, Tensor] = {}
        reached: set[Site] = set()
        if not quiet and any(s.component == "pattern" for s in asked):
            say_eager(self)
        with ExitStack() as stack:
            if any(s.component == "pattern" for s in asked):
                stack.enter_context(self.eager())
            for site, place in places:

                def see(x: Tensor, site: Site = site) -> None:
                    reached.add(site)
                    part = x if take is None else take(site, x)
                    if part is not None:
                        # A copy: a view keeps the whole tensor alive, and modules may write into what they were given.
                        seen[str(site)] = part.clone()

                stack.callback(place.watch(see).remove)
            self.logits(inputs)
        missing = [str(s) for s in asked if s not in reached]
        if missing:
            why = (
                "its attention gives no weights" if missing[0].endswith("pattern") else "its forward does not reach it"
            )
            msg = f"site '{missing[0]}' is in {self.name}, but {why}"
            raise SiteError(msg)
        return seen


def _bytes_of(look: Look) -> int:
    return sum(x.nbytes for x in look.inputs.values())


def _without(value: object, names: set[str]) -> object:
    if isinstance(value, dict):
        return {k: _without(v, names) for k, v in value.items() if k not in names}
    return value
