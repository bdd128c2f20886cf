"""One model under study: load it, encode examples, run it, and find its activations."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from concepts.annotated_object import Box, check_box
from concepts.image_source import ImageSource
from concepts.schema import Example
from groundscope.core.bounded_cache import BoundedCache
from groundscope.core.errors import ModelError
from lvlm.access.attention_parts import has_attention, head_site, output_projection
from lvlm.access.eager_attention import eager, implementations
from lvlm.access.hook_point import HookPoint
from lvlm.access.reading import read_sites
from lvlm.access.shared_vision_run import share_vision_runs, vision_tower
from lvlm.access.site_lookup import expand_sites, find_hook_point
from lvlm.access.unembedding import last_logits, unembed
from lvlm.access.weights import device_of
from lvlm.active_interventions import ActiveIntervention, Registration, active_interventions, unregistered_hooks
from lvlm.answering import answer_batch, answer_logits, answer_prompt
from lvlm.config_hash import config_hash
from lvlm.encoding.batches import batches
from lvlm.encoding.encode import Batch, Encoding, Inputs, Prompt, check_alike, encode
from lvlm.encoding.image_placeholder import content_id, content_token, placeholder
from lvlm.encoding.registry import image_encodings
from lvlm.family.module_detection import complete, heads_of, text_config, vision_heads
from lvlm.family.specification import FamilySpec, layer_list
from lvlm.interfaces import EncodedImage, ImageEncoding
from lvlm.processor_digest import pixel_settings_key
from lvlm.prompting import prompt_of
from lvlm.sampling import Sampling
from lvlm.sites import Site
from lvlm.token_map import TokenMap
from lvlm.weights_hash import has_weights, weights_hash

if TYPE_CHECKING:
    from lvlm.decoding.decoder import Decoder
    from lvlm.decoding.prefix_run import PrefixBatch
    from lvlm.decoding.row_layout import RowLayout

__all__ = ["Batch", "Encoding", "HookPoint", "Inputs", "Lvlm", "Prompt"]

_Value = TypeVar("_Value")
IMAGE_CACHE_BYTES = 256 << 20
"""Largest number of bytes of encoded images that a model caches, because several questions may be about one image."""
_ANSWER_CACHE = 1024


class Lvlm:
    """A large vision-language model whose sites have names; returned by `load_lvlm` and `wrap_lvlm`.

    Parameters
    ----------
    model
        A Hugging Face model; it is set to evaluation mode.
    processor
        Its processor: a tokenizer, an image processor and an image placeholder.
    spec
        Its family.
    name
        Name in results and messages.
    revision
        Commit of a Hugging Face id; None for other models.
    unused_weights
        Names of tensors in its checkpoint that the model does not use.

    Examples
    --------
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> model.n_layers, model.n_heads, model.head_dim
    (6, 8, 24)
    >>> example = gs.scenes.dataset(10, seed=0).examples[0]
    >>> encoding = model.encode(example)
    >>> inputs = model.collate([encoding])
    >>> model.logits(inputs).shape == (1, model.hf.config.text_config.vocab_size)
    True
    >>> residual = model.read(inputs, ["decoder.L2.resid_post"])["decoder.L2.resid_post"]
    >>> residual.shape == (1, encoding.tokens.length, model.width)
    True
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
        self.image_encoding: ImageEncoding = image_encodings[spec.view]
        config = self.hf.config
        text = text_config(config)
        self.encoder_decoder: bool = bool(getattr(config, "is_encoder_decoder", False) or text.is_encoder_decoder)
        self.n_heads: int = heads_of(text, config)
        self.n_vision_heads: int = vision_heads(self.spec, model, self.layers("vision"))
        self.answer_from: int | None = None
        self.row_layout: RowLayout | None = None
        self.decoder: Decoder | None = None
        self.ends: bool = True
        self._softcap: float | None = getattr(text, "final_logit_softcapping", None)
        self._scaled: bool = bool(getattr(text, "scale_decoder_outputs", False))
        self._tower: tuple[tuple[nn.Module, ...], nn.Module | None] | None = None
        self._answer_cache: dict[Hashable, Any] = {}
        self._signature: tuple[Any, frozenset[str]] | None = None
        self._image_cache: BoundedCache[EncodedImage] = BoundedCache(IMAGE_CACHE_BYTES, _bytes_of)

    def __repr__(self) -> str:
        return (
            f"Lvlm({self.name!r}, {self.spec.model_type}: {self.n_layers} layers x {self.n_heads} heads of "
            f"{self.head_dim}, vision {self.n_vision_layers} layers, {self.dtype}, {self.device})"
        )

    # -- encoding examples -----------------------------------------------------------------------------------------

    def prompt(self, question: str, images: int = 1, *, system: str | None = None) -> str:
        """Return the text up to where the model's answer begins, with one placeholder per image.

        `question` is all text of the user (`Example.request`), `system` a system prompt instead of the template's own.

        Raises
        ------
        ModelError
            If the chat template fails, does not end, returns no text or too much, or has no place for a system prompt.
        """
        return prompt_of(self, question, images, system)

    def encode(self, example: Example) -> Encoding:
        """Return the model inputs and the token map of an example: its prompt, and its prefix if it has one.

        The prompt has the images of the example in their order: none, one or several; boxes belong to the first.

        Raises
        ------
        DataError
            If an image cannot be read, the family needs another number of images or images of equal size, the prompt does not
            contain the image's tokens, or the prefix is not plain text that the tokenizer knows.
        """
        images = [self._encode_image(image) for image in example.images]
        boxes = {o.id: (0, o.box) for o in example.objects if o.box is not None}
        text = self.prompt(example.request, len(images), system=example.system)
        prompt = Prompt(text, example.question, example.id, boxes, example.subject, example.prefix, example.mentions)
        return Encoding(example, *encode(self, prompt, images))

    def encode_prompt(
        self,
        text: str,
        images: Sequence[Any],
        *,
        question: str = "",
        name: str = "prompt",
        boxes: Mapping[str, tuple[int, Box]] | None = None,
        subject: str | None = None,
        prefix: str = "",
    ) -> tuple[Inputs, TokenMap]:
        """Return the model inputs and the token map of any prompt about any number of images.

        Parameters
        ----------
        text, question, name, boxes, subject, prefix
            As the fields of `lvlm.encoding.encode.Prompt`.
        images
            RGB images, in the order of their placeholders.

        Raises
        ------
        DataError
            If the number of placeholders is not that of the images, images of different sizes cannot share a prompt of this
            family, a box is not finite, is negative or has no area, or the prefix is not plain text.
        """
        for identity, (_, box) in (boxes or {}).items():
            check_box(box, identity)
        encoded = [self.image_encoding.encode(self, image) for image in images]
        sizes = [image.size for image in images]
        return encode(self, Prompt(text, question, name, boxes, subject, prefix), encoded, sizes)

    def batches(self, examples: Sequence[Example], size: int = 32, *, in_order: bool = True) -> Iterator[Batch]:
        """Yield encoded examples in batches of equal shape, in a fixed order.

        Memory grows neither with the number of examples nor with the size of their images: they are encoded in chunks, of
        ``64 * size`` examples or of `lvlm.encoding.batches.CHUNK_BYTES`.

        Parameters
        ----------
        examples
            Examples to encode.
        size
            Largest number of rows of a batch.
        in_order
            True: encode a chunk, then yield its batches by shape, shortest first. False: yield each batch when it is full.
        """
        return batches(examples, size, self.encode, self.collate, in_order=in_order)

    def collate(self, encodings: Sequence[Encoding]) -> Inputs:
        """Stack inputs of equal shape and move them to the model's device; raises `DataError` if shapes differ."""
        check_alike(encodings)
        return self.on_device({k: torch.cat([e.inputs[k] for e in encodings]) for k in encodings[0].inputs})

    def on_device(self, inputs: Inputs) -> Inputs:
        """Return inputs on the model's device, floating ones in its dtype."""
        moved = {k: v.to(self.device) for k, v in inputs.items()}
        return {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in moved.items()}

    @property
    def placeholder(self) -> str:
        """Text that stands for an image in a prompt."""
        return placeholder(self)

    @property
    def content_id(self) -> int:
        """Id of the image token, whose embeddings are replaced by those of the image."""
        return content_id(self)

    @property
    def content_token(self) -> str:
        """Text of the image token; raises `ModelError` if the tokenizer has no such token."""
        return content_token(self)

    @property
    def accepts(self) -> frozenset[str]:
        """Names of the arguments of the model's forward method."""
        forward = self.hf.forward  # tools may replace it
        if self._signature is None or self._signature[0] != forward:
            self._signature = forward, frozenset(inspect.signature(forward).parameters)
        return self._signature[1]

    def _encode_image(self, source: ImageSource) -> EncodedImage:
        key = (source.identity, pixel_settings_key(self.processor))
        return self._image_cache.get(key, lambda: self.image_encoding.encode(self, source.load()))

    # -- running ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def logits(self, inputs: Mapping[str, Tensor], images: Sequence[str] = ()) -> Tensor:
        """Return the logits at the last position, ``[B, V]``; rows with equal `images` share one run of the vision tower.

        See `lvlm.access.shared_vision_run`.
        """
        with share_vision_runs(self, images):
            return self.forward(inputs)[:, -1]

    def answer_logits(self, batch: Batch | PrefixBatch) -> Tensor:
        """Return the logits that the first token of each answer is chosen from, ``[B, V]``: the decoder's if one is active."""
        return answer_logits(self, batch)

    def forward(self, inputs: Mapping[str, Tensor], *, keep: int = 1, **options: Any) -> Tensor:
        """Run one forward pass, with gradients if they are enabled; return the logits at the last positions.

        Parameters
        ----------
        inputs
            Model inputs by name, on any device.
        keep
            Number of last positions whose logits are computed.
        **options
            Further arguments of the model; by default ``use_cache=False``.

        Returns
        -------
        Tensor
            ``[B, keep, V]``.
        """
        on_device = {k: v.to(self.device) for k, v in inputs.items()}
        with self.last_logits(keep) as logits_option:
            return self.hf(**on_device, **{"use_cache": False, **options, **logits_option}).logits[:, -keep:]

    def last_logits(self, keep: int = 1) -> AbstractContextManager[dict[str, Any]]:
        """Compute logits at the last `keep` positions only while the context is open; yields the model's arguments for it."""
        return last_logits(self, keep)

    def ask(self, image: Any, question: str, *, system: str | None = None, max_new_tokens: int = 40) -> str:
        """Return the model's answer to a question about an image, in the prompt of its chat template.

        Parameters
        ----------
        image
            Path, Pillow image, array of unsigned bytes ``[height, width, 3]``, or a `concepts.image_source.ImageSource`; a list
            of them for a question about several images.
        question
            The user's turn.
        system
            System prompt instead of the template's own.
        max_new_tokens
            Largest number of tokens of the answer.

        Raises
        ------
        DataError
            If an image cannot be read, or the family cannot read these images together.
        ModelError
            If the chat template fails, or the logits are not finite.

        Examples
        --------
        >>> import groundscope as gs
        >>> model = gs.load_lvlm("tiny")
        >>> scene = next(e for e in gs.scenes.dataset(10, seed=0) if e.kind == "existence")
        >>> model.ask(scene.image, scene.question) in ("yes", "no")
        True
        """
        text = self.prompt(question, len(image) if isinstance(image, list | tuple) else 1, system=system)
        return answer_prompt(self, image, text, max_new_tokens, question=question, system=system)

    def generate(self, images: Any, prompt: str, *, max_new_tokens: int = 40) -> str:
        """Return the greedy continuation of a prompt as text, without a chat template.

        The checkpoint's generation settings are ignored, see `lvlm.generation.greedy`.

        Parameters
        ----------
        images
            An image or a list of images, as in `ask`.
        prompt
            Text with the model's `placeholder` once per image, up to where the answer begins; `prompt` writes the one of a
            question.
        max_new_tokens
            Largest number of tokens of the answer.

        Raises
        ------
        DataError
            As `encode_prompt`; also if an image cannot be read, and while a mitigation is active that writes another prompt for
            the question, because this one has no question.

        Examples
        --------
        >>> import groundscope as gs
        >>> model = gs.load_lvlm("tiny")
        >>> scene = gs.scenes.dataset(10, seed=0).examples[0]
        >>> model.generate(scene.image, model.prompt(scene.question)) == model.ask(scene.image, scene.question)
        True
        """
        return answer_prompt(self, images, prompt, max_new_tokens)

    def generate_batch(
        self, batch: Batch | PrefixBatch, max_new_tokens: int = 40, *, sampling: Sampling | None = None
    ) -> list[str]:
        """Return the answers to a batch as text, without the prefixes that they continue: greedy, or sampled.

        The checkpoint's generation settings are ignored, see `generate`. Sampled answers depend on the ids of their examples.
        """
        return answer_batch(self, batch, max_new_tokens, sampling)

    def unembed(self, residual: Tensor) -> Tensor:
        """Apply the final norm and the unembedding to decoder residuals ``[..., D]`` -> ``[..., V]``."""
        return unembed(self, residual, scaled=self._scaled, softcap=self._softcap)

    def read(
        self,
        inputs: Mapping[str, Tensor],
        sites: Sequence[Site | str],
        *,
        take: Callable[[Site, Tensor], Tensor | None] | None = None,
        quiet: bool = False,
    ) -> dict[str, Tensor]:
        """Run one forward pass and return activations by site name, in the model's dtype.

        Parameters
        ----------
        inputs
            Model inputs by name.
        sites
            Sites to read. A ``pattern`` is attention as ``[B, heads, queries, keys]``; for it, attention of this forward pass
            is computed step by step, which changes the last bits of all values and logs a warning.
        take
            Function of a site and its tensor, called during the forward pass; only its result is stored, and nothing for None
            (``lambda _, x: x[:, -1]`` stores the last token). By default the full tensor.
        quiet
            Whether to suppress the warning for patterns.

        Raises
        ------
        SiteError
            For a site that the model lacks or the forward pass does not reach.
        """
        return read_sites(self, lambda: self.logits(inputs), sites, take=take, quiet=quiet)

    def eager(self) -> AbstractContextManager[None]:
        """Compute attention step by step while the context is open, so that its pattern can be read."""
        return eager(self)

    def reading_answers(self, start: int | None) -> AbstractContextManager[None]:
        """Treat tokens from `start` on as generated in forward passes while the context is open; None: no token.

        Interventions then act on prompts with appended answers as they do during generation.
        """
        return _replaced(self, "answer_from", start)

    @contextmanager
    def decoding_with(self, decoder: Decoder) -> Iterator[None]:
        """Choose the tokens of answers by a decoder while the context is open; see `lvlm.decoding`.

        Raises
        ------
        ModelError
            If another decoder is active: two rules for the next token have no order.
        """
        if self.decoder is not None:
            msg = f"{type(self.decoder).__name__} and {type(decoder).__name__} both choose the next token; apply one of them"
            raise ModelError(msg)
        with _replaced(self, "decoder", decoder):
            yield

    def without_end_tokens(self) -> AbstractContextManager[None]:
        """Write answers of full length while the context is open, to measure their cost: end tokens end nothing."""
        return _replaced(self, "ends", False)

    def with_row_layout(self, layout: RowLayout | None) -> AbstractContextManager[None]:
        """State what the rows and columns of forward passes are while the context is open; see `RowLayout`."""
        return _replaced(self, "row_layout", layout)

    def remember(self, key: Hashable, make: Callable[[], _Value]) -> _Value:
        """Return a cached value, or compute it; the cache has 1,024 entries and is freed with the model.

        Parameters
        ----------
        key
            Everything that the value depends on.
        make
            Function that computes the value.
        """
        if key not in self._answer_cache:
            while len(self._answer_cache) >= _ANSWER_CACHE:
                del self._answer_cache[next(iter(self._answer_cache))]
            self._answer_cache[key] = make()
        return self._answer_cache[key]

    # -- sites and modules -----------------------------------------------------------------------------------------

    def sites(self, name: Site | str) -> tuple[Site, ...]:
        """Return the sites that a name means: a component without a stack is the decoder's, without a layer every layer's.

        ``z`` is every ``decoder.L<layer>.z``, ``vision.resid_post`` every vision layer's, ``cross.z`` that of every layer with
        cross-attention, ``decoder.L3.z`` and ``projector.out`` a single site.

        Raises
        ------
        SiteError
            For an unknown name, and for a site that the model lacks.
        """
        return expand_sites(self, name)

    def locate(self, site: Site | str) -> HookPoint:
        """Return the hook point of a site; raises `SiteError` for a site that the model lacks."""
        return find_hook_point(self, Site.parse(site) if isinstance(site, str) else site)

    def place(self, stack: str, layer: int, component: str, *, cross: bool = False) -> HookPoint:
        """Return the hook point of a layer's component; raises `SiteError` for a component that the model lacks."""
        return self.locate(Site(cast("Any", stack), layer, cast("Any", component), cross=cross))

    def layers(self, stack: str) -> tuple[nn.Module, ...]:
        """Return the layers of ``decoder`` or ``vision`` in the order in which they run."""
        # Not cached, because a layer may be replaced, for example by an adapter.
        return layer_list(self.hf, self.spec.stack(stack).layers, self.spec)

    def attends(self, stack: str, layer: int, *, cross: bool) -> bool:
        """Whether a layer has self-attention, or cross-attention."""
        return has_attention(self, stack, layer, cross=cross)

    def head_site(self, layer: int) -> Site:
        """Return the site of a decoder layer's heads: in its self-attention, or in its only attention, cross-attention."""
        return head_site(self, layer)

    def head_projection(self, layer: int) -> nn.Linear:
        """Return the output projection of the heads of `head_site`."""
        return self.output_projection("decoder", layer, cross=self.head_site(layer).cross)

    def output_projection(self, stack: str, layer: int, *, cross: bool = False) -> nn.Linear:
        """Return the linear map from a layer's heads to its attention output."""
        return output_projection(self, stack, layer, cross=cross)

    @property
    def tower(self) -> nn.Module | None:
        """The vision tower; None if no module contains all vision layers and no decoder layer."""
        layers = (self.hf, *self.layers("vision"), *self.layers("decoder"))
        if self._tower is None or self._tower[0] != layers:
            self._tower = layers, vision_tower(self)
        return self._tower[1]

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers("decoder"))

    @property
    def n_vision_layers(self) -> int:
        """Number of layers of the vision tower."""
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
        """Device of the model's inputs: that of its first parameter while the model runs."""
        return device_of(self.hf)

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the first parameter that is not quantized."""
        kinds = (p.dtype for p in self.hf.parameters())
        return next((d for d in kinds if d.is_floating_point and d.itemsize > 1), torch.float32)

    # -- state, for provenance -------------------------------------------------------------------------------------

    @property
    def config_hash(self) -> str:
        """SHA-256 of the configuration, without fields that depend on where, how and with which release it was loaded."""
        return config_hash(self.hf.config)

    @property
    def weights_hash(self) -> str:
        """``<algorithm>:<hex>`` over all bytes of the weights, recomputed after changes; see `lvlm.weights_hash`."""
        return weights_hash(self.hf)

    def has_weights(self, recorded: str) -> bool:
        """Whether the weights have a recorded hash; hashes of earlier releases are compared too, with a warning."""
        return has_weights(self.hf, recorded)

    @property
    def attention(self) -> str:
        """Attention implementations by transformers' names (``sdpa``, ``eager``), joined by commas if parts differ."""
        return ", ".join(implementations(self))

    @property
    def interventions(self) -> tuple[ActiveIntervention, ...]:
        """Active interventions in the order of their application: steering vectors, patches, attention knockouts."""
        return active_interventions(self.hf)

    @property
    def unregistered_hooks(self) -> tuple[str, ...]:
        """Forward hooks of unknown effect, by qualified name; see `lvlm.active_interventions`."""
        return unregistered_hooks(self.hf)

    def register(self, intervention: ActiveIntervention) -> Registration:
        """Add an intervention to `interventions` until the registration is removed."""
        return Registration(self.hf, intervention)


def _bytes_of(image: EncodedImage) -> int:
    return sum(x.nbytes for x in image.inputs.values())


@contextmanager
def _replaced(model: Lvlm, name: str, value: object) -> Iterator[None]:
    """Set an attribute of a model while the context is open."""
    before = getattr(model, name)
    setattr(model, name, value)
    try:
        yield
    finally:
        setattr(model, name, before)
