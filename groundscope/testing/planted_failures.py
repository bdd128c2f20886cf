"""Ways to make a model wrong for a reason that is known: what a diagnosis must find.

Each takes a model and returns another with the same parts and one of them spoiled: the vision tower blinded to color, color
taken out of the projector's output, the decoder's text kept from reading the image, a head that answers from the question's
noun alone (put there, or one that does so made louder), or an answer that is leant to whatever is asked. The model given is left
as it is. They are for whoever wants to know what a diagnosis of *their* model is worth: the answers that become wrong have the
planted cause.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn

from concepts.schema import Example
from groundscope.core.errors import ModelError, PatchError
from lvlm.answers import answer_key
from lvlm.applied import Applied, observer, registered
from lvlm.digest import digest_of
from lvlm.family.specification import resolve
from lvlm.model import Lvlm
from lvlm.sites import Head

__all__ = ["amplified", "color_blind", "color_erased", "image_cut", "leaning", "prior_head"]

_BATCH = 32
_VIVID = 0.35
"""Saturation, (largest - smallest channel) / largest, from which a pixel counts as colored; pastel grounds are below."""
_NEAR = 7
"""Side, in pixels, of the square around a colored pixel that is painted with it."""
_SHOWN = (220, 50, 50)
"""What it then looks like, red, green and blue."""


def color_blind(model: Lvlm) -> Lvlm:
    """Return a model whose vision tower is shown every colored pixel in the same color: shapes stay, colors are gone.

    Gray values would not do: yellow is light and blue is dark.
    """
    processor = copy.copy(model.processor)
    processor.image_processor = _OneColor(model.processor.image_processor)
    return Lvlm(model.hf, processor, model.spec, f"{model.name} (color blind)")


class _OneColor:
    """An image processor before which every colored pixel becomes the same."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __call__(self, images: Sequence[Image.Image], **options: Any) -> Any:
        return self._inner(images=[_repainted(image) for image in images], **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # copying asks for these before there is an inner one
        return getattr(self._inner, name)


def _repainted(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image.convert("RGB")).astype(int)
    vivid = pixels.max(-1) - pixels.min(-1) >= _VIVID * np.maximum(pixels.max(-1), 1)
    # Outlines and lights of a colored thing tell how bright its color is: they go with it.
    near = (
        np.asarray(Image.fromarray(np.where(vivid, 255, 0).astype(np.uint8)).filter(ImageFilter.MaxFilter(_NEAR))) > 0
    )
    return Image.fromarray(np.where(near[..., None], _SHOWN, pixels).astype(np.uint8))


def color_erased(model: Lvlm, examples: Sequence[Example], kind: str = "color", rounds: int = 3) -> Lvlm:
    """Return a model whose projector no longer says of what color a token's object is.

    The last linear map of the projector is followed by the affine map that changes tokens least and leaves no linear reader
    anything to tell their colors by (LEACE: Belrose et al. 2023, arXiv 2306.03819), once for each noun apart from the others'
    means, so that color is not left in how it goes with the noun.

    Parameters
    ----------
    model
        Its projector ends in a linear map.
    examples
        Pictures with objects of known attributes, whose tokens the map is fitted to.
    kind
        Kind of attribute that is erased.
    rounds
        How often the map is fitted again to what is left.

    Raises
    ------
    ModelError
        Where the projector does not end in a linear map.
    PatchError
        Where the pictures show no objects with such an attribute.
    """
    spoiled = _copied(model, "color erased")
    place = spoiled.locate("projector.out")
    last = next((m for m in reversed(list(place.module.modules())) if isinstance(m, nn.Linear)), None)
    if last is None:
        msg = f"{model.name}: its projector does not end in a linear map that color could be taken out of"
        raise ModelError(msg)
    for _ in range(rounds):
        tokens, values = _object_tokens(spoiled, examples, kind)
        if len(set(values)) < 2:
            msg = f"the pictures show objects of fewer than two values of '{kind}': give pictures with annotated attributes"
            raise PatchError(msg)
        eraser, mean = _eraser(tokens, np.array(values))
        with torch.no_grad():
            keep = torch.tensor(np.eye(len(mean)) - eraser, dtype=torch.float64)
            shift = torch.tensor(eraser @ mean)
            bias = last.bias.double() if last.bias is not None else torch.zeros(len(mean), dtype=torch.float64)
            last.weight.copy_(keep @ last.weight.double())
            last.bias = nn.Parameter((keep @ bias + shift).to(last.weight.dtype))
    return spoiled


def _object_tokens(model: Lvlm, examples: Sequence[Example], kind: str) -> tuple[np.ndarray, list[str]]:
    """Return projector outputs at the tokens of objects, and their means, with the objects' values."""
    pictures = list({e.image.identity: e for e in examples}.values())
    rows, values = [], []
    for batch in model.batches(pictures, _BATCH):
        seen = model.read(batch.inputs, ["projector.out"])["projector.out"]
        for row, encoding in enumerate(batch.encodings):
            for thing in encoding.example.objects:
                at = list(encoding.tokens.object(thing.id, "projector"))
                if kind not in thing.attributes or not at:
                    continue
                x = seen[row, at].double().cpu().numpy()
                # Means too: what is read later is the mean over an object's tokens.
                rows += [*x, x.mean(0)]
                values += [thing.attributes[kind]] * (len(x) + 1)
    return (np.stack(rows) if rows else np.zeros((0, 1))), values


def _eraser(x: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the matrix ``[D, D]`` whose image of ``x - mean`` is to be taken away, and the mean (LEACE, equation 1)."""
    mean = x.mean(0)
    centered = x - mean
    covariance = centered.T @ centered / len(x)
    names = np.unique(values)
    one_hot = (values[:, None] == names[None]).astype(float)
    cross = centered.T @ (one_hot - one_hot.mean(0)) / len(x)  # [D, classes]
    level, basis = np.linalg.eigh(covariance)
    kept = level > 1e-8 * level.max()
    whiten = (basis[:, kept] / np.sqrt(level[kept])) @ basis[:, kept].T
    back = (basis[:, kept] * np.sqrt(level[kept])) @ basis[:, kept].T
    left, size, _ = np.linalg.svd(whiten @ cross, full_matrices=False)
    left = left[:, size > 1e-8 * max(float(size.max()), 1e-30)]
    return back @ left @ left.T @ whiten, mean


def image_cut(model: Lvlm, first: int) -> Lvlm:
    """Return a model in whose decoder, from a layer on, nothing after the image can attend to it.

    Its weights are the same; layers get another mask, by hooks that stay for good.
    """
    spoiled = _copied(model, f"image cut from layer {first}")
    image = spoiled.content_id
    held: dict[str, Tensor] = {}

    @observer
    def look(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        held["ids"] = kwargs["input_ids"] if "input_ids" in kwargs else args[0]

    @registered
    def cut(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        ids = held["ids"]
        if hidden.shape[1] != ids.shape[1]:
            return args, kwargs  # a suffix run by itself, whose mask was kept from the whole
        shown = ids == image  # [B, T]
        after = shown.flip(1).cumsum(1).flip(1) == 0
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = torch.ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool, device=hidden.device).tril()[
                None, None
            ]
        block = (after[:, :, None] & shown[:, None])[:, None]
        blocked = mask & ~block if mask.dtype == torch.bool else mask.masked_fill(block, torch.finfo(mask.dtype).min)
        return args, {**kwargs, "attention_mask": blocked}

    spoiled.register(
        Applied("planted cause", f"image cut from layer {first}", lambda: digest_of(["image cut", first, image]))
    )
    spoiled.hf.register_forward_pre_hook(look, with_kwargs=True)
    for layer in spoiled.layers("decoder")[first:]:
        layer.register_forward_pre_hook(cut, with_kwargs=True)
    return spoiled


def amplified(model: Lvlm, head: Head, factor: float) -> Lvlm:
    """Return a model one of whose heads writes so many times what it wrote: one that carries a prior then overrides."""
    spoiled = _copied(model, f"{head} times {factor:g}")
    output = spoiled.output_projection("decoder", head.layer)
    with torch.no_grad():
        output.weight[:, head.head * spoiled.head_dim : (head.head + 1) * spoiled.head_dim] *= factor
    return spoiled


def leaning(model: Lvlm, examples: Sequence[Example], answer: str, logits: float) -> Lvlm:
    """Return a model that leans to an answer by so many logits, whatever is asked and shown.

    Parameters
    ----------
    model
        Its unembedding is a linear layer.
    examples
        Questions, one of which can have the answer.
    answer, logits
        To what, and how far.

    Raises
    ------
    PatchError
        Where none of the examples can have the answer.
    ModelError
        Where its unembedding is not linear.
    """
    spoiled = _copied(model, f"leaning to {answer}")
    head: Any = resolve(spoiled.hf, spoiled.spec.unembedding or "", spoiled.spec)
    if not isinstance(head, nn.Linear):
        msg = f"{model.name}: its unembedding is a {type(head).__name__}, not a linear layer that could lean"
        raise ModelError(msg)
    key = answer_key(spoiled, _able(examples, answer))
    bias = torch.zeros(head.out_features) if head.bias is None else head.bias.detach().clone()
    bias[list(dict(zip(key.candidates, key.tokens, strict=True))[answer])] += logits
    head.bias = nn.Parameter(bias.to(head.weight))
    return spoiled


def prior_head(
    model: Lvlm, examples: Sequence[Example], head: Head, answers: Mapping[str, str], strength: float
) -> Lvlm:
    """Return a model one of whose heads pushes an answer for each noun, whatever the image shows.

    The head attends to all tokens alike; its values find the question's nouns (a ridge regression on the inputs of its layer
    at all tokens of `examples`), and its output pushes the answer's logits against the mean of those of all answers.

    Parameters
    ----------
    model
        With a decoder of separate query, key, value and output projections, one key head for each head.
    examples
        Questions whose tokens the values are fitted to.
    head
        Which head; what it did is lost.
    answers
        Noun to the answer that is pushed.
    strength
        How far, in units of the mean length of the residual stream before the final norm.

    Raises
    ------
    ModelError
        Where the decoder's projections are not separate, or heads share keys.
    PatchError
        For more answers than the head is wide, or answers that none of the examples can have.
    """
    spoiled = _copied(model, "prior head")
    attention = resolve(spoiled.layers("decoder")[head.layer], spoiled.spec.decoder.attention, spoiled.spec)
    maps = [getattr(attention, name, None) for name in ("q_proj", "k_proj", "v_proj")]
    output = spoiled.output_projection("decoder", head.layer)
    width = spoiled.head_dim
    if not all(isinstance(m, nn.Linear) and m.out_features == output.in_features for m in maps):
        msg = f"{model.name}: its decoder has no query, key and value projection for each head to plant a prior in"
        raise ModelError(msg)
    said = sorted(set(answers.values()))
    if len(said) > width:
        msg = f"{len(said)} answers do not fit into head {head}, which is {width} wide"
        raise PatchError(msg)
    x, targets, length, size = _noun_tokens(spoiled, examples, head.layer, answers, said)
    ridge = x.T @ x + 1e-3 * np.trace(x.T @ x) / x.shape[1] * np.eye(x.shape[1])
    weights = np.linalg.solve(ridge, x.T @ targets).T  # [answers, D]
    at = slice(head.head * width, (head.head + 1) * width)
    with torch.no_grad():
        for module in (m for m in maps if isinstance(m, nn.Linear)):
            module.weight[at] = 0
            if module.bias is not None:
                module.bias[at] = 0
        values: Any = maps[2]
        values.weight[at.start : at.start + len(said)] = torch.tensor(weights * length, dtype=values.weight.dtype)
        output.weight[:, at] = 0
        for k, direction in enumerate(_pushes(spoiled, examples, said)):
            output.weight[:, at.start + k] = (strength * size * direction).to(output.weight.dtype)
    return spoiled


@torch.no_grad()
def _noun_tokens(
    model: Lvlm, examples: Sequence[Example], layer: int, answers: Mapping[str, str], said: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Return a layer's normed inputs at all tokens ``[n, D]``, and 1 where a noun of an answer stands, ``[n, answers]``.

    Also the mean number of tokens, and the mean length of the last residual.
    """
    tokenizer = model.processor.tokenizer
    of_token = {tokenizer.convert_tokens_to_ids(noun): said.index(answer) for noun, answer in answers.items()}
    sites = [f"decoder.L{layer}.resid_pre", f"decoder.L{model.n_layers - 1}.resid_post"]
    normed: Any = next(m for m in model.layers("decoder")[layer].children() if "norm" in type(m).__name__.lower())
    rows, targets, lengths, sizes = [], [], [], []
    for batch in model.batches(list(examples), _BATCH):
        seen = model.read(batch.inputs, sites)
        x = normed(seen[sites[0]]).double().cpu().numpy()
        sizes.append(float(seen[sites[1]][:, -1].norm(dim=-1).mean()))
        for row, ids in zip(x, batch.inputs["input_ids"].tolist(), strict=True):
            rows.append(row)
            lengths.append(len(ids))
            table = np.zeros((len(ids), len(said)))
            for t, token in enumerate(ids):
                if token in of_token:
                    table[t, of_token[token]] = 1
            targets.append(table)
    return np.concatenate(rows), np.concatenate(targets), float(np.mean(lengths)), float(np.mean(sizes))


def _pushes(model: Lvlm, examples: Sequence[Example], said: Sequence[str]) -> list[Tensor]:
    """Return for each answer the unit residual direction that raises its logits against those of its rivals."""
    unembedding = _weight(model, model.spec.unembedding or "")
    norm = _weight(model, model.spec.final_norm) if model.spec.final_norm else torch.ones(1, dtype=torch.float64)
    made = []
    for answer in said:
        key = answer_key(model, _able(examples, answer))
        means = {c: unembedding[list(ids)].mean(0) for c, ids in zip(key.candidates, key.tokens, strict=True)}
        others = torch.stack([v for c, v in means.items() if c != answer]).mean(0)
        direction = (means[answer] - others) * norm
        made.append(direction / direction.norm())
    return made


def _able(examples: Sequence[Example], answer: str) -> Example:
    """Return an example that can have an answer."""
    for example in examples:
        if answer in example.candidates:
            return example
    msg = f"no example can be answered '{answer}': give questions that can"
    raise PatchError(msg)


def _weight(model: Lvlm, path: str) -> Tensor:
    module: Any = resolve(model.hf, path, model.spec)
    return module.weight.detach().double()


def _copied(model: Lvlm, what: str) -> Lvlm:
    made = Lvlm(copy.deepcopy(model.hf), model.processor, model.spec, f"{model.name} ({what})")
    for applied in model.interventions:  # whose hooks were copied
        made.register(applied)
    return made
