"""The subspace of hidden states in which hallucinated descriptions differ from correct ones, and weights without it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from concepts.nouns import PresentNouns, existence_clause
from concepts.schema import ConceptDataset
from groundscope.core import artifacts
from groundscope.core.errors import ConfigError, DataError, ModelError, StoreError
from groundscope.core.text import format_count
from lvlm.access.weights import quantized
from lvlm.family.specification import resolve
from mitigation.method_data import MAX_PAIRS
from mitigation.published_methods import demonstrations
from mitigation.steering.derive import Demonstration
from mitigation.steering.export.end_of_mlp import end_of_mlp
from mitigation.training_free.lens import at_least_float32, block_outputs
from mitigation.training_free.method import Variant
from mitigation.training_free.prompt_words import unknown_words

if TYPE_CHECKING:
    from lvlm.model import Lvlm
    from lvlm.sites import Site

KIND, VERSION = "hallucination_subspace", 1
PROMPT = "Describe the image."
"""Question before statements that are made from annotations."""


@dataclass(frozen=True, eq=False)
class HallucinationSubspace:
    """Directions at the outputs of blocks, from most to least important, for one model.

    Examples
    --------
    >>> import numpy as np
    >>> from mitigation.training_free.hallucination_subspace import HallucinationSubspace
    >>> subspace = HallucinationSubspace({5: np.eye(3, 8)}, "tiny", "c" * 64)
    >>> subspace.rank, subspace.first(2).rank
    (3, 2)
    """

    bases: Mapping[int, np.ndarray]
    """Block to orthonormal rows, float32 ``[k, D]``."""
    model: str
    """Name of the model."""
    config_hash: str
    """SHA-256 of the model's configuration."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """JSON values: variant, number and digest of the pairs."""

    def __post_init__(self) -> None:
        bases = {int(layer): np.array(basis, np.float32) for layer, basis in sorted(self.bases.items())}
        for layer, basis in bases.items():
            if basis.ndim != 2 or not np.allclose(basis @ basis.T, np.eye(len(basis)), atol=1e-4):
                msg = f"the basis of block {layer} must have orthonormal rows [k, D], not shape {list(basis.shape)}"
                raise DataError(msg)
            basis.setflags(write=False)
        object.__setattr__(self, "bases", MappingProxyType(bases))
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))

    @property
    def rank(self) -> int:
        """Largest number of directions of a block."""
        return max((len(basis) for basis in self.bases.values()), default=0)

    def first(self, rank: int) -> Self:
        """Return the subspace of the first directions."""
        return replace(self, bases={layer: basis[:rank] for layer, basis in self.bases.items()})

    def randomized(self, seed: int) -> Self:
        """Return a control: random subspaces of equal dimension."""
        rng = np.random.default_rng(seed)
        bases = {k: np.linalg.qr(rng.standard_normal(basis.shape[::-1]))[0].T for k, basis in self.bases.items()}
        return replace(self, bases=bases, provenance={**self.provenance, "control": f"random subspaces, seed {seed}"})

    def check(self, model: Lvlm) -> None:
        """Raise `ModelError` for another model."""
        if model.config_hash != self.config_hash:
            msg = f"this subspace was derived for '{self.model}', not for '{model.name}'; derive it for this model"
            raise ModelError(msg)

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file with a tensor for each block; raises `StoreError` if it cannot be written."""
        card = {"model": self.model, "config_hash": self.config_hash, "provenance": dict(self.provenance)}
        artifacts.write(Path(path), KIND, VERSION, {str(k): basis for k, basis in self.bases.items()}, card)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file written by `save`; raises `StoreError` if it is missing, damaged or of another kind."""
        tensors, card = artifacts.read(Path(path), KIND, VERSION)
        try:
            bases = {int(name): basis for name, basis in tensors.items()}
            return cls(bases, str(card["model"]), str(card["config_hash"]), dict(card["provenance"]))
        except (DataError, KeyError, TypeError, ValueError) as error:
            msg = f"{path} is a damaged {KIND} file: {error}"
            raise StoreError(msg) from error


# ---- derivation


def description_pairs(examples: ConceptDataset, limit: int = MAX_PAIRS) -> list[Demonstration]:
    """Return images with a correct and a hallucinated description.

    Written captions of annotated images, each with the last object that it names replaced by an absent one; without
    captions, the statements that an annotated object and an absent one are in the image.

    Raises
    ------
    DataError
        If no image has an annotated object, or no noun is absent from an image.
    """
    captions = demonstrations(examples, limit)
    if captions:
        return captions
    nouns = sorted({o.noun for e in examples for o in e.objects})
    pairs: list[Demonstration] = []
    for example in {e.group: e for e in examples if e.objects}.values():
        present = PresentNouns([o.noun for o in example.objects])
        absent = [noun for noun in nouns if not present.includes(noun)]
        if absent:
            correct = existence_clause(example.objects[len(pairs) % len(example.objects)].noun)
            question = replace(example, question=PROMPT, suffix="", prefix="", mentions=())
            pairs.append(Demonstration(question, correct, existence_clause(absent[len(pairs) % len(absent)])))
        if len(pairs) == limit:
            break
    if not pairs:
        msg = "Nullu needs images with annotated objects, and nouns absent from some of them; these data have none"
        raise DataError(msg)
    return pairs


def derive_subspace(
    model: Lvlm, pairs: Sequence[Demonstration], layers: Sequence[int], rank: int, variant: Variant
) -> HallucinationSubspace:
    """Return the first right singular vectors of correct minus hallucinated hidden states, for the outputs of blocks.

    Parameters
    ----------
    model
        The model.
    pairs
        Images with two descriptions.
    layers
        Blocks.
    rank
        Number of directions.
    variant
        ``paper``: hidden states at the last token of the description. ``release``: their mean over all tokens of prompt
        and description, after the final norm in the last block.

    Raises
    ------
    DataError
        For fewer pairs than directions. Pairs with words that the tokenizer does not know are left out, and counted in the
        provenance.
    """
    count = len(pairs)
    pairs = [pair for pair in pairs if not unknown_words(model, f"{pair.correct} {pair.hallucinated}")]
    if len(pairs) < rank:
        counts = f"{format_count(len(pairs), 'pair')} of descriptions for {format_count(rank, 'direction')}"
        msg = f"{counts}; use at least as many pairs, or a smaller rank"
        raise DataError(msg)
    sites = block_outputs(layers)
    sides = [[_hidden(model, pair, text, sites, variant) for pair in pairs] for text in ("correct", "hallucinated")]
    differences = np.stack(sides[0]) - np.stack(sides[1])  # [pairs, layers, D]
    bases = {layer: np.linalg.svd(differences[:, i], full_matrices=False)[2][:rank] for i, layer in enumerate(layers)}
    provenance = {
        "method": "Nullu",
        "variant": variant,
        "pairs": len(pairs),
        "left_out": count - len(pairs),
        "examples": [pair.example.id for pair in pairs[:3]],
        "weights": model.weights_hash,
    }
    return HallucinationSubspace(bases, model.name, model.config_hash, provenance)


def _hidden(model: Lvlm, pair: Demonstration, text: str, sites: Sequence[Site], variant: Variant) -> np.ndarray:
    """Return the hidden state of a description at each site, float64 ``[sites, D]``."""
    example = replace(pair.example, prefix=getattr(pair, text), answer="", candidates=(), mentions=())
    inputs = model.collate([model.encode(example)])

    def state(site: Site, x: Tensor) -> Tensor:
        if variant == "paper":
            return x[0, -1]
        if site.layer == model.n_layers - 1 and model.spec.final_norm:
            x = resolve(model.hf, model.spec.final_norm, model.spec)(x)
        return at_least_float32(x)[0].mean(0)

    values = model.read(inputs, sites, take=state)
    return np.stack([values[str(site)].double().cpu().numpy() for site in sites])


# ---- weights


def edited_layers(model: Lvlm, layers: Sequence[int]) -> dict[int, nn.Linear]:
    """Return the linear layer at the end of each block's MLP.

    Raises
    ------
    ModelError
        For weights that cannot be edited exactly (quantized, or outside of the module), and for an MLP that does not end in one
        linear layer, such as one with a norm after it.
    """
    try:
        linears = {layer: end_of_mlp(model, layer) for layer in layers}
    except ConfigError as error:
        msg = (
            f"Nullu edits the linear layer whose output the MLP adds to the residual stream, and the MLPs of {model.name} "
            f"({model.spec.model_type}) do not end in one"
        )
        raise ModelError(msg) from error
    for layer, linear in linears.items():
        if linear.weight.is_meta or quantized(linear):
            msg = (
                f"the MLP weights of block {layer} of {model.name} are quantized or offloaded, so they cannot be edited exactly; "
                "load the model without"
            )
            raise ModelError(msg)
    return linears


@torch.no_grad()
def without_subspace(weight: Tensor, basis: np.ndarray) -> Tensor:
    """Return ``(I - V V^T) W`` for a weight ``[D, d]`` and the rows of V, ``[k, D]``, in the type of the weight.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from mitigation.training_free.hallucination_subspace import without_subspace
    >>> without_subspace(torch.ones(2, 3), np.array([[1.0, 0.0]])).tolist()
    [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    """
    wide = at_least_float32(weight)
    v = torch.from_numpy(np.array(basis)).to(wide)
    return (wide - v.T @ (v @ wide)).to(weight.dtype)


@contextmanager
def edited(model: Lvlm, subspace: HallucinationSubspace) -> Iterator[dict[str, Tensor]]:
    """Edit the weights while the context is open; yield the edited ones by parameter name.

    Afterwards, even after an error, the model has its own parameters again, bit for bit.
    """
    linears = edited_layers(model, tuple(subspace.bases))
    names = {module: name for name, module in model.hf.named_modules()}
    before = {linear: linear.weight for linear in linears.values()}
    try:
        for layer, linear in linears.items():
            new = without_subspace(linear.weight.detach(), subspace.bases[layer])
            linear.weight = nn.Parameter(new, requires_grad=False)
        yield {f"{names[linear]}.weight": linear.weight.detach() for linear in before}
    finally:
        for linear, weight in before.items():
            linear.weight = weight
