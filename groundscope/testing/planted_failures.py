"""Planted failures: modified models that answer wrongly for a known reason; ground truth for diagnoses.

Each function takes a model and returns a copy with one impaired part: a vision tower that is blind to color, color erased
from the projector's output, no attention from text to the image in the decoder, a head that answers from the question's
noun only (planted, or an existing one amplified), or a bias to one answer. The original model does not change. They serve
to validate a diagnosis of *your* model: the answers that become wrong have the planted cause.
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
from groundscope.core.text import format_count
from lvlm.active_interventions import ActiveIntervention, mark_intervention, mark_observer
from lvlm.answer_keys import answer_key
from lvlm.family.specification import resolve
from lvlm.intervention_digest import digest_of
from lvlm.model import Lvlm
from lvlm.sites import Head

__all__ = ["amplify_head", "bias_answer", "cut_image", "erase_color", "make_color_blind", "plant_prior_head"]

_BATCH = 32
_VIVID = 0.35
"""Least saturation, (largest - smallest channel) / largest, of a colored pixel; pastel backgrounds are below."""
_NEAR = 7
"""Side, in pixels, of the square around a colored pixel that is painted too."""
_PAINT = (220, 50, 50)
"""Color of painted pixels: red, green and blue."""


def make_color_blind(model: Lvlm) -> Lvlm:
    """Return a model whose vision tower sees every colored pixel in the same color: shapes remain, colors are lost.

    Gray values would not suffice: yellow is light and blue is dark.

    Examples
    --------
    >>> import groundscope as gs
    >>> from groundscope.testing.planted_failures import make_color_blind
    >>> make_color_blind(gs.load_lvlm("tiny")).name
    'tiny (color blind)'
    """
    processor = copy.copy(model.processor)
    processor.image_processor = _OneColorProcessor(model.processor.image_processor)
    return Lvlm(model.hf, processor, model.spec, f"{model.name} (color blind)")


class _OneColorProcessor:
    """An image processor that first paints every colored pixel in one color."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __call__(self, images: Sequence[Image.Image], **options: Any) -> Any:
        return self._inner(images=[_repaint(image) for image in images], **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # copy looks these up before `_inner` exists
        return getattr(self._inner, name)


def _repaint(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image.convert("RGB")).astype(int)
    vivid = pixels.max(-1) - pixels.min(-1) >= _VIVID * np.maximum(pixels.max(-1), 1)
    # Paint outlines and highlights too, since they reveal the brightness of an object's color.
    near = (
        np.asarray(Image.fromarray(np.where(vivid, 255, 0).astype(np.uint8)).filter(ImageFilter.MaxFilter(_NEAR))) > 0
    )
    return Image.fromarray(np.where(near[..., None], _PAINT, pixels).astype(np.uint8))


def erase_color(model: Lvlm, examples: Sequence[Example], kind: str = "color", rounds: int = 3) -> Lvlm:
    """Return a model whose projector output no longer encodes the color of objects.

    The last linear map of the projector is composed with the affine map that changes tokens least and removes all linear
    information on color (LEACE: Belrose et al. 2023, arXiv 2306.03819).

    Parameters
    ----------
    model
        A model whose projector ends in a linear map.
    examples
        Pictures with objects of known attributes; the map is fitted to their tokens.
    kind
        Kind of attribute to erase.
    rounds
        Number of times that the map is fitted, each to the remaining information.

    Raises
    ------
    ModelError
        If the projector does not end in a linear map.
    PatchError
        If the pictures have fewer than two values of the attribute.
    """
    modified = _copy_of(model, "color erased")
    place = modified.locate("projector.out")
    last = next((m for m in reversed(list(place.module.modules())) if isinstance(m, nn.Linear)), None)
    if last is None:
        msg = f"{model.name}: its projector does not end in a linear map, so '{kind}' cannot be erased"
        raise ModelError(msg)
    for _ in range(rounds):
        tokens, values = _object_tokens(modified, examples, kind)
        if len(set(values)) < 2:
            msg = f"the pictures have fewer than two values of '{kind}'; pass pictures with annotated attributes"
            raise PatchError(msg)
        eraser, mean = _eraser(tokens, np.array(values))
        with torch.no_grad():
            keep = torch.tensor(np.eye(len(mean)) - eraser, dtype=torch.float64)
            shift = torch.tensor(eraser @ mean)
            bias = last.bias.double() if last.bias is not None else torch.zeros(len(mean), dtype=torch.float64)
            last.weight.copy_(keep @ last.weight.double())
            last.bias = nn.Parameter((keep @ bias + shift).to(last.weight.dtype))
    return modified


def _object_tokens(model: Lvlm, examples: Sequence[Example], kind: str) -> tuple[np.ndarray, list[str]]:
    """Return projector outputs at object tokens, and their means per object, with the objects' attribute values."""
    pictures = list({e.image.identity: e for e in examples}.values())
    rows, values = [], []
    for batch in model.batches(pictures, _BATCH):
        outputs = model.read(batch.inputs, ["projector.out"])["projector.out"]
        for row, encoding in enumerate(batch.encodings):
            for thing in encoding.example.objects:
                at = list(encoding.tokens.object(thing.id, "projector"))
                if kind not in thing.attributes or not at:
                    continue
                x = outputs[row, at].double().cpu().numpy()
                # Include means, since probes read the mean over an object's tokens.
                rows += [*x, x.mean(0)]
                values += [thing.attributes[kind]] * (len(x) + 1)
    return (np.stack(rows) if rows else np.zeros((0, 1))), values


def _eraser(x: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the matrix ``[D, D]`` whose image of ``x - mean`` is subtracted, and the mean (LEACE, equation 1)."""
    mean = x.mean(0)
    centered = x - mean
    covariance = centered.T @ centered / len(x)
    names = np.unique(values)
    one_hot = (values[:, None] == names[None]).astype(float)
    cross = centered.T @ (one_hot - one_hot.mean(0)) / len(x)  # [D, classes]
    level, basis = np.linalg.eigh(covariance)
    nonzero = level > 1e-8 * level.max()
    whiten = (basis[:, nonzero] / np.sqrt(level[nonzero])) @ basis[:, nonzero].T
    unwhiten = (basis[:, nonzero] * np.sqrt(level[nonzero])) @ basis[:, nonzero].T
    vectors, size, _ = np.linalg.svd(whiten @ cross, full_matrices=False)
    vectors = vectors[:, size > 1e-8 * max(float(size.max()), 1e-30)]
    return unwhiten @ vectors @ vectors.T @ whiten, mean


def cut_image(model: Lvlm, first: int) -> Lvlm:
    """Return a model in which, from a decoder layer on, no token after the image attends to it.

    Its weights are the same; permanent hooks change the mask of the layers.

    Examples
    --------
    >>> import groundscope as gs
    >>> from groundscope.testing.planted_failures import cut_image
    >>> [item.name for item in cut_image(gs.load_lvlm("tiny"), first=2).interventions]
    ['image cut from layer 2']
    """
    modified = _copy_of(model, f"image cut from layer {first}")
    image = modified.content_id
    inputs: dict[str, Tensor] = {}

    @mark_observer
    def store_ids(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs["ids"] = kwargs["input_ids"] if "input_ids" in kwargs else args[0]

    @mark_intervention
    def cut(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        ids = inputs["ids"]
        if hidden.shape[1] != ids.shape[1]:
            return args, kwargs  # a resumed suffix, whose recorded mask already has the cut
        is_image = ids == image  # [B, T]
        after = is_image.flip(1).cumsum(1).flip(1) == 0
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = torch.ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool, device=hidden.device).tril()[
                None, None
            ]
        block = (after[:, :, None] & is_image[:, None])[:, None]
        blocked = mask & ~block if mask.dtype == torch.bool else mask.masked_fill(block, torch.finfo(mask.dtype).min)
        return args, {**kwargs, "attention_mask": blocked}

    modified.register(
        ActiveIntervention(
            "planted cause", f"image cut from layer {first}", lambda: digest_of(["image cut", first, image])
        )
    )
    modified.hf.register_forward_pre_hook(store_ids, with_kwargs=True)
    for layer in modified.layers("decoder")[first:]:
        layer.register_forward_pre_hook(cut, with_kwargs=True)
    return modified


def amplify_head(model: Lvlm, head: Head, factor: float) -> Lvlm:
    """Return a model with one head's output multiplied by `factor`, so that a prior head overrides the image.

    Examples
    --------
    >>> import groundscope as gs
    >>> from groundscope.testing.planted_failures import amplify_head
    >>> amplify_head(gs.load_lvlm("tiny"), gs.Head(3, 1), factor=4).name
    'tiny (L3.H1 times 4)'
    """
    modified = _copy_of(model, f"{head} times {factor:g}")
    output = modified.output_projection("decoder", head.layer)
    with torch.no_grad():
        output.weight[:, head.head * modified.head_dim : (head.head + 1) * modified.head_dim] *= factor
    return modified


def bias_answer(model: Lvlm, examples: Sequence[Example], answer: str, logits: float) -> Lvlm:
    """Return a model with a constant bias to one answer, independent of question and image.

    Parameters
    ----------
    model
        A model whose unembedding is a linear layer.
    examples
        Questions; at least one must have the answer among its candidates.
    answer, logits
        The answer, and the bias in logits.

    Raises
    ------
    PatchError
        If no example has the answer among its candidates.
    ModelError
        If the unembedding is not linear.
    """
    modified = _copy_of(model, f"leaning to {answer}")
    head: Any = resolve(modified.hf, modified.spec.unembedding or "", modified.spec)
    if not isinstance(head, nn.Linear):
        msg = f"{model.name}: its unembedding is a {type(head).__name__}; a bias needs a linear layer"
        raise ModelError(msg)
    key = answer_key(modified, _example_with(examples, answer))
    bias = torch.zeros(head.out_features) if head.bias is None else head.bias.detach().clone()
    bias[list(dict(zip(key.candidates, key.tokens, strict=True))[answer])] += logits
    head.bias = nn.Parameter(bias.to(head.weight))
    return modified


def plant_prior_head(
    model: Lvlm, examples: Sequence[Example], head: Head, answers: Mapping[str, str], strength: float
) -> Lvlm:
    """Return a model with a head that promotes an answer for each noun, independent of the image.

    The head attends to all tokens equally; its values detect the question's nouns (a ridge regression on the inputs of its
    layer at all tokens of `examples`), and its output raises the answer's logits relative to its rivals.

    Parameters
    ----------
    model
        A model with separate query, key, value and output projections, and one key head per head.
    examples
        Questions; the head's values are fitted to their tokens.
    head
        The head to replace.
    answers
        Promoted answer by noun.
    strength
        Strength, in units of the mean length of the residual stream before the final norm.

    Raises
    ------
    ModelError
        If the decoder's projections are not separate, or heads share keys.
    PatchError
        If there are more answers than head dimensions, or no example has an answer among its candidates.
    """
    modified = _copy_of(model, "prior head")
    attention = resolve(modified.layers("decoder")[head.layer], modified.spec.decoder.attention, modified.spec)
    projections = [getattr(attention, name, None) for name in ("q_proj", "k_proj", "v_proj")]
    output = modified.output_projection("decoder", head.layer)
    width = modified.head_dim
    if not all(isinstance(m, nn.Linear) and m.out_features == output.in_features for m in projections):
        msg = f"{model.name}: a prior head needs separate query, key and value projections for each head"
        raise ModelError(msg)
    pushed_answers = sorted(set(answers.values()))
    if len(pushed_answers) > width:
        msg = f"head {head} has {width} dimensions, too few for {format_count(len(pushed_answers), 'answer')}"
        raise PatchError(msg)
    x, targets, length, size = _noun_tokens(modified, examples, head.layer, answers, pushed_answers)
    ridge = x.T @ x + 1e-3 * np.trace(x.T @ x) / x.shape[1] * np.eye(x.shape[1])
    weights = np.linalg.solve(ridge, x.T @ targets).T  # [answers, D]
    at = slice(head.head * width, (head.head + 1) * width)
    with torch.no_grad():
        for module in (m for m in projections if isinstance(m, nn.Linear)):
            module.weight[at] = 0
            if module.bias is not None:
                module.bias[at] = 0
        values: Any = projections[2]
        values.weight[at.start : at.start + len(pushed_answers)] = torch.tensor(
            weights * length, dtype=values.weight.dtype
        )
        output.weight[:, at] = 0
        for k, direction in enumerate(_push_directions(modified, examples, pushed_answers)):
            output.weight[:, at.start + k] = (strength * size * direction).to(output.weight.dtype)
    return modified


@torch.no_grad()
def _noun_tokens(
    model: Lvlm, examples: Sequence[Example], layer: int, answers: Mapping[str, str], pushed_answers: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Return a layer's normed inputs at all tokens ``[n, D]``, and indicators of the answers' nouns, ``[n, answers]``.

    Also return the mean number of tokens, and the mean length of the last residual.
    """
    tokenizer = model.processor.tokenizer
    of_token = {tokenizer.convert_tokens_to_ids(noun): pushed_answers.index(answer) for noun, answer in answers.items()}
    sites = [f"decoder.L{layer}.resid_pre", f"decoder.L{model.n_layers - 1}.resid_post"]
    normed: Any = next(m for m in model.layers("decoder")[layer].children() if "norm" in type(m).__name__.lower())
    rows, targets, lengths, sizes = [], [], [], []
    for batch in model.batches(list(examples), _BATCH):
        values = model.read(batch.inputs, sites)
        x = normed(values[sites[0]]).double().cpu().numpy()
        sizes.append(float(values[sites[1]][:, -1].norm(dim=-1).mean()))
        for row, ids in zip(x, batch.inputs["input_ids"].tolist(), strict=True):
            rows.append(row)
            lengths.append(len(ids))
            table = np.zeros((len(ids), len(pushed_answers)))
            for t, token in enumerate(ids):
                if token in of_token:
                    table[t, of_token[token]] = 1
            targets.append(table)
    return np.concatenate(rows), np.concatenate(targets), float(np.mean(lengths)), float(np.mean(sizes))


def _push_directions(model: Lvlm, examples: Sequence[Example], answers: Sequence[str]) -> list[Tensor]:
    """Return for each answer the unit residual direction that raises its logits relative to its rivals."""
    unembedding = _weight(model, model.spec.unembedding or "")
    norm = _weight(model, model.spec.final_norm) if model.spec.final_norm else torch.ones(1, dtype=torch.float64)
    directions = []
    for answer in answers:
        key = answer_key(model, _example_with(examples, answer))
        means = {c: unembedding[list(ids)].mean(0) for c, ids in zip(key.candidates, key.tokens, strict=True)}
        others = torch.stack([v for c, v in means.items() if c != answer]).mean(0)
        direction = (means[answer] - others) * norm
        directions.append(direction / direction.norm())
    return directions


def _example_with(examples: Sequence[Example], answer: str) -> Example:
    """Return an example that has an answer among its candidates."""
    for example in examples:
        if answer in example.candidates:
            return example
    msg = f"no example has the candidate '{answer}'; pass questions with this candidate"
    raise PatchError(msg)


def _weight(model: Lvlm, path: str) -> Tensor:
    module: Any = resolve(model.hf, path, model.spec)
    return module.weight.detach().double()


def _copy_of(model: Lvlm, what: str) -> Lvlm:
    result = Lvlm(copy.deepcopy(model.hf), model.processor, model.spec, f"{model.name} ({what})")
    for applied in model.interventions:  # their hooks are in the copy
        result.register(applied)
    return result
