"""VTI, visual and textual intervention: stabilize features in the vision tower and in the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from circuits.execution.memory import batch_rows
from groundscope.core.errors import DataError, ModelError, PatchError, SiteError
from groundscope.core.progress import progress_bar
from groundscope.core.text import format_count
from lvlm.family.specification import resolve
from lvlm.sites import Site
from mitigation.steering.changes import AddChange, VectorChange
from mitigation.steering.derive.base import Variant, check_variant
from mitigation.steering.places import Key
from mitigation.steering.vector import SteeringVector

if TYPE_CHECKING:
    from torch import Tensor

    from concepts.schema import Example
    from lvlm.model import Lvlm

SHARE = 0.1
"""VTI's fixed factor: length of the addition at strength 1, relative to the length of x."""


@dataclass(frozen=True)
class Demonstration:
    """An image with a correct description, and the same description with absent objects added.

    Examples
    --------
    >>> import groundscope as gs
    >>> example = gs.scenes.dataset(10)[0]
    >>> demonstration = gs.derive.Demonstration(example, "there is an apple", "there is an apple and a car")
    >>> gs.derive.vti_text(gs.load_lvlm("tiny"), [demonstration], layers=[2])
    SteeringVector(add at decoder.L2.mlp_out; all, strength 0.8, for 'tiny')
    """

    example: Example
    """Image and question."""
    correct: str
    """Correct description."""
    hallucinated: str
    """The same description with absent objects added."""


def vti_text(
    model: Lvlm,
    demonstrations: Sequence[Demonstration],
    *,
    layers: Sequence[int] | None = None,
    strength: float = 0.8,
    variant: Variant = "paper",
) -> SteeringVector:
    """Return VTI's textual vector: at every layer's MLP output, ``x <- |x| unit(unit(x) + 0.1 alpha unit(D))``.

    Liu et al. 2024 (arXiv 2410.15778): D = PC1 + mean, over N = 50 demonstrations, of the residual stream after the layer
    at the last token of the correct caption minus that of the hallucinated caption; alpha = 0.8. The sign of a principal
    direction is arbitrary; here it is that of its product with the mean.

    Parameters
    ----------
    model
        The model to steer.
    demonstrations
        At least one demonstration; with a single one, D is its difference.
    layers
        Layers of the decoder; all by default.
    strength
        alpha.
    variant
        ``paper``: one principal direction per layer. ``release`` (github.com/shengliu66/VTI): one for the concatenation of
        all layers, including the embeddings and the final norm's output, with the sign of the largest score.

    Raises
    ------
    PatchError
        For no demonstrations, or a layer with equal activations for correct and hallucinated captions.
    SiteError
        For a layer that the model lacks.
    DataError
        If a caption is empty or has tokens that the tokenizer does not know.

    Examples
    --------
    >>> import groundscope as gs
    >>> example = gs.scenes.dataset(10)[0]
    >>> demonstration = gs.derive.Demonstration(example, "there is an apple", "there is an apple and a car")
    >>> vector = gs.derive.vti_text(gs.load_lvlm("tiny"), [demonstration], layers=[2])
    >>> vector.positions, vector.norm
    ('all', 'relative')
    """
    check_variant(variant)
    selected = tuple(range(model.n_layers) if layers is None else layers)
    sites = [Site("decoder", i, "resid_post") for i in range(model.n_layers)]
    for layer in selected:
        model.locate(Site("decoder", layer, "mlp_out"))
    if not demonstrations:
        msg = "no demonstrations; give images with a correct and a hallucinated caption each"
        raise PatchError(msg)
    correct, hallucinated = (
        _after_captions(model, [replace(d.example, answer=a, candidates=()) for d, a in captions], sites, variant)
        for captions in ([(d, d.correct) for d in demonstrations], [(d, d.hallucinated) for d in demonstrations])
    )
    differences = correct - hallucinated  # [N, 1 + layers, D]
    if variant == "paper":
        directions = np.stack([_mean_and_first(differences[:, i + 1], flip="mean") for i in range(model.n_layers)])
    else:
        joint = _mean_and_first(differences.reshape(len(differences), -1), flip="score")
        directions = joint.reshape(differences.shape[1:])[1:]
    changes: dict[Key, VectorChange] = {}
    for layer in selected:
        length = float(np.linalg.norm(directions[layer]))
        if not length > 0:
            msg = f"at L{layer} correct and hallucinated captions have equal activations, so the direction is undefined"
            raise PatchError(msg)
        changes[Site("decoder", layer, "mlp_out")] = AddChange(directions[layer] / length, SHARE)
    provenance = {
        "method": f"VTI text ({variant})",
        "demonstrations": len(demonstrations),
        "weights": model.weights_hash,
    }
    return SteeringVector(changes, "all", strength, model.name, model.config_hash, provenance, norm="relative")


def vti_vision(
    model: Lvlm,
    examples: Sequence[Example],
    *,
    layers: Sequence[int] | None = None,
    copies: int = 50,
    ratio: float = 0.99,
    strength: float = 0.9,
    seed: int = 0,
    variant: Variant = "paper",
) -> SteeringVector:
    """Return VTI's visual vector, one direction for each layer and token of the vision tower.

    Liu et al. 2024 (arXiv 2410.15778): D = PC1 + mean, over images, of the mean over m = 50 masked copies minus the clean
    image; in a copy, 99 % of the patches are set to the image's mean. Applied at MLP outputs as in `vti_text`; alpha = 0.9.

    Parameters
    ----------
    model
        Model with a vision tower that takes ``pixel_values [1, 3, H, W]``: one view of fixed size.
    examples
        Only their images are used. All differences stay in memory: examples x layers x tokens x width x 4 bytes.
    layers
        Layers of the vision tower; all by default.
    copies, ratio
        m, and the share of masked patches in a copy.
    strength
        alpha.
    seed
        Seed of the choice of patches.
    variant
        ``paper``, or ``release`` (github.com/shengliu66/VTI): layers and tokens are reshaped without a transposition, so
        principal directions mix tokens of different layers; the sign of each is that of its largest score.

    Raises
    ------
    PatchError
        For no examples, fewer than one copy, or a ratio outside (0, 1].
    ModelError
        For a vision tower with other inputs or several views of an image.
    SiteError
        For a layer that the vision tower lacks.

    Examples
    --------
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> vector = gs.derive.vti_vision(model, gs.scenes.dataset(10)[:2], layers=[0], copies=2)
    >>> vector.changes[gs.Site.parse("vision.L0.mlp_out")].by_token
    True
    """
    check_variant(variant)
    if not examples or copies < 1 or not 0 < ratio <= 1:
        msg = (
            f"{format_count(len(examples), 'example')}, copies={copies}, ratio={ratio}: examples and copies must be at "
            "least 1, ratio in (0, 1]"
        )
        raise PatchError(msg)
    sites = [Site("vision", i, "resid_post") for i in range(model.n_vision_layers)]
    selected = tuple(range(model.n_vision_layers) if layers is None else layers)
    for layer in selected:
        model.locate(Site("vision", layer, "mlp_out"))
    if not sites:
        msg = f"{model.name} has no vision layers to steer{': ' + model.spec.lacks if model.spec.lacks else ''}"
        raise ModelError(msg)
    rng = np.random.default_rng(seed)
    rows: list[np.ndarray] = []
    with progress_bar() as bar:
        for example in bar.track(examples, description="masking images"):
            inputs = model.collate([model.encode(example)])
            _check_one_view(model, inputs["pixel_values"])
            clean = _tower(model, inputs, sites)[0]  # [layers, tokens, D]
            masked = _masked(inputs["pixel_values"], _patch(model), copies, ratio, rng)
            masked_sum = np.zeros_like(clean, np.float64)
            for part in masked.split(10):
                masked_sum += _tower(model, {**inputs, "pixel_values": part}, sites).sum(axis=0, dtype=np.float64)
            rows.append((masked_sum / copies - clean).astype(np.float32))
    differences = np.stack(rows)  # [N, layers, tokens, D]
    n, depth, tokens, width = differences.shape
    if variant == "paper":
        flat = differences.reshape(n, depth * tokens, width)
        directions = np.stack([_mean_and_first(flat[:, k], flip="mean") for k in range(flat.shape[1])])
    else:
        flat = differences.reshape(n, tokens, depth * width)
        directions = np.stack([_mean_and_first(flat[:, k], flip="score") for k in range(tokens)])
    directions = directions.reshape(depth, tokens, width)
    lengths = np.linalg.norm(directions, axis=-1, keepdims=True)
    # A token that no mask changes has a row of zeros: it is not steered.
    units = np.divide(directions, lengths, out=np.zeros_like(directions), where=lengths > 0)
    changes: dict[Key, VectorChange] = {Site("vision", i, "mlp_out"): AddChange(units[i], SHARE) for i in selected}
    provenance = {
        "method": f"VTI vision ({variant})",
        "images": n,
        "copies": copies,
        "ratio": ratio,
        "seed": seed,
        "weights": model.weights_hash,
    }
    return SteeringVector(changes, "all", strength, model.name, model.config_hash, provenance, norm="relative")


def _mean_and_first(x: np.ndarray, *, flip: str) -> np.ndarray:
    """Return the mean plus the unit first principal direction of rows ``[n, d]``, float64; the mean if all rows are equal."""
    x = x.astype(np.float64)
    mean = x.mean(axis=0)
    centered = x - mean
    # From the Gram matrix of the rows, because there are few rows and many columns.
    eigenvalues, eigenvectors = np.linalg.eigh(centered @ centered.T)
    if not eigenvalues[-1] > 1e-18 * max(1.0, float((x**2).sum())):
        return mean
    first = eigenvectors[:, -1] @ centered
    first /= np.linalg.norm(first)
    scores = centered @ first
    negate = first @ mean < 0 if flip == "mean" else scores[np.abs(scores).argmax()] < 0
    return mean - first if negate else mean + first


def _after_captions(model: Lvlm, examples: Sequence[Example], sites: Sequence[Site], variant: Variant) -> np.ndarray:
    """Return activations at the last token of each example's answer, ``[N, 1 + layers, D]``: embeddings, then every layer."""
    import torch

    from activation_store.tracing.continuation import append_answers

    empty = next((e.id for e in examples if not e.answer.strip()), None)
    if empty is not None:
        msg = f"demonstration '{empty}': a caption is empty; give text"
        raise DataError(msg)
    rows = [np.empty(0)] * len(examples)
    first = Site("decoder", 0, "resid_pre")
    with progress_bar() as bar:
        task = bar.add_task("reading captions", total=len(examples))
        for batch in model.batches(examples, batch_rows(model, examples, 32)):
            continued = append_answers(model, batch)
            ends = torch.tensor([(tokens.generated or (tokens.last,))[-1] for tokens in continued.tokens])

            def at_end(_site: Site, x: Tensor, ends: Tensor = ends) -> Tensor:
                return x[torch.arange(len(ends), device=x.device), ends.to(x.device)]

            activations = model.read(continued.inputs, [first, *sites], take=at_end)  # [rows, D]
            for row, number in enumerate(batch.index):
                hidden_states = [activations[str(site)][row] for site in (first, *sites)]
                if variant == "release" and model.spec.final_norm:  # the last hidden state in transformers
                    with torch.no_grad():
                        hidden_states[-1] = resolve(model.hf, model.spec.final_norm, model.spec)(hidden_states[-1])
                rows[number] = np.stack([x.double().cpu().numpy() for x in hidden_states])
            bar.advance(task, len(batch.index))
    return np.stack(rows)


class _TowerFinished(Exception):  # a signal, not an error
    """The vision tower has run; the rest of the forward pass is not needed."""


def _tower(model: Lvlm, inputs: dict[str, Tensor], sites: Sequence[Site]) -> np.ndarray:
    """Run the vision tower and return its layers' outputs, float32 ``[rows, layers, tokens, D]``."""
    outputs: list[np.ndarray] = []

    def record(x: Tensor) -> None:
        if x.dim() != 3 or x.shape[0] != inputs["pixel_values"].shape[0]:
            msg = (
                f"{model.name}: its vision tower returns {list(x.shape)}, but VTI needs one view [rows, tokens, width]"
            )
            raise ModelError(msg)
        outputs.append(x.detach().float().cpu().numpy())
        if len(outputs) == len(sites):
            raise _TowerFinished

    rows = inputs["pixel_values"].shape[0]
    repeated = {k: v if k == "pixel_values" else v.expand(rows, *v.shape[1:]) for k, v in inputs.items()}
    with ExitStack() as hooks:
        for site in sites:
            hooks.callback(model.locate(site).watch(record).remove)
        try:
            model.logits(repeated)
        except _TowerFinished:
            return np.stack(outputs, axis=1)
    msg = f"{model.name}: a forward pass does not run all {len(sites)} layers of its vision tower"
    raise SiteError(msg)


def _patch(model: Lvlm) -> int:
    """Return the side of a patch in pixels; raises `ModelError` if the configuration does not contain it."""
    size = getattr(getattr(model.hf.config, "vision_config", None), "patch_size", None)
    if not isinstance(size, int):
        msg = f"{model.name}: its configuration has no vision patch_size, so patches cannot be masked"
        raise ModelError(msg)
    return size


def _check_one_view(model: Lvlm, pixels: Tensor) -> None:
    """Raise `ModelError` unless the model takes an image as one view of fixed size."""
    if pixels.dim() != 4 or pixels.shape[0] != 1 or not model.image_encoding.separable:
        msg = (
            f"{model.name} ({model.spec.model_type}) takes an image as pixel_values {list(pixels.shape)}, in packed patches or "
            "several views; VTI's visual vector needs one view [1, channels, height, width]"
        )
        raise ModelError(msg)


def _masked(pixels: Tensor, patch: int, copies: int, ratio: float, rng: np.random.Generator) -> Tensor:
    """Return copies of preprocessed pixels ``[1, 3, H, W]`` with a share of patches set to the image's mean."""
    rows, columns = pixels.shape[2] // patch, pixels.shape[3] // patch
    masked = pixels.repeat(copies, 1, 1, 1)
    mean = pixels.mean(dim=(2, 3))[0]  # [channels]
    for copy in range(copies):
        for index in rng.permutation(rows * columns)[: int(ratio * rows * columns)]:
            y, x = int(index) // columns * patch, int(index) % columns * patch
            masked[copy, :, y : y + patch, x : x + patch] = mean[:, None, None]
    return masked
