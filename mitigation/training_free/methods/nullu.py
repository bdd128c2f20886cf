"""Nullu: remove the directions of hallucinated descriptions from what MLPs write."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from groundscope.core.errors import ModelError
from mitigation.training_free.hallucination_subspace import (
    HallucinationSubspace,
    derive_subspace,
    description_pairs,
    edited,
    edited_layers,
)
from mitigation.training_free.lens import check_blocks, check_depth
from mitigation.training_free.method import (
    Category,
    TrainingFree,
    Variant,
    check_choice,
    check_count,
    check_parameters,
)
from mitigation.training_free.published_sizes import scaled_layers

if TYPE_CHECKING:
    from lvlm.decoding.decoder import Decoder
    from lvlm.model import Lvlm
    from mitigation.method_data import DerivationData


@dataclass(frozen=True, eq=False)
class Nullu(TrainingFree):
    """Project weights to the null space of hallucinations: ``W_down <- (I - V V^T) W_down`` in late blocks.

    V are the first `rank` right singular vectors of the differences of hidden states between a correct and a
    hallucinated description of the same image, at the output of the block and the last token of the description. The
    MLP then writes nothing along V. A bias of the layer stays. Yang et al. 2024, arXiv 2412.13817.

    ``variant="release"`` (github.com/Ziwei-Zheng/Nullu) takes the mean of the hidden states over all tokens of the
    prompt and the description, and in the last block those after the final norm.

    `derive` makes the pairs from captions of annotated images, of which the last object is replaced by an absent one
    (the paper uses the descriptions of LURE); without captions, from the statements that an annotated and an absent
    object are in the image. Signs of the differences do not matter, so shuffled sides are no control: `randomized` has
    random directions. Published blocks are 16 to 31 of 32, scaled to the depth of the model.

    The edit costs nothing while answers are written, and can be exported: `mitigation.training_free.weight_export`.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.methods.nullu import Nullu
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(60)
    >>> method = Nullu.derive(gs.DerivationData(model, None, data))
    >>> with method.applied(model):
    ...     answers = gs.answer(model, data.where(split="conflict"))
    >>> method.used_parameters(model)["layers"], method.name
    ((3, 4, 5), 'Nullu')
    """

    label: ClassVar[str] = "Nullu"
    category: ClassVar[Category] = "weights"
    source: ClassVar[str] = "arXiv 2412.13817"
    needs: ClassVar[tuple[str, ...]] = ("examples",)

    rank: int = 4
    """Number of directions; 0 leaves the model unchanged."""
    layers: tuple[int, ...] | None = None
    """Blocks that are edited; None for 16 to 31 of 32, scaled."""
    variant: Variant = "paper"
    subspace: HallucinationSubspace | None = None
    """The directions; made by `derive`."""

    def __post_init__(self) -> None:
        check_count("rank", self.rank, 0)
        check_blocks(self.layers)
        check_choice("variant", self.variant, ("paper", "release"))

    @classmethod
    def derive(cls, data: DerivationData, **parameters: Any) -> Self:
        """Return the method for a model, from images with descriptions or annotated objects.

        Raises
        ------
        DataError
            If the data have no annotated objects, or fewer pairs than directions.
        """
        check_parameters(cls, parameters)
        method = cls(**parameters)
        check_depth(method.layers, data.model.n_layers, cls.label, data.model)
        layers, rank = method._layers(data.model), method.rank
        edited_layers(data.model, layers)
        subspace = derive_subspace(data.model, description_pairs(data.examples), layers, rank, method.variant)
        return cls(**{"subspace": subspace, **parameters})

    @property
    def name(self) -> str:
        """Name and settings that differ from their defaults."""
        changed = [f"rank={self.rank}"] if self.rank != 4 else []
        changed += [f"layers={self.layers}"] if self.layers is not None else []
        changed += [f"variant={self.variant}"] if self.variant != "paper" else []
        control = self.subspace.provenance.get("control") if self.subspace else None
        changed += [str(control)] if control else []
        return f"{self.label} ({', '.join(changed)})" if changed else self.label

    @property
    def parameters(self) -> Mapping[str, Any]:
        """JSON values: settings, and the provenance of the directions."""
        provenance = dict(self.subspace.provenance) if self.subspace else None
        return {"rank": self.rank, "layers": self.layers, "variant": self.variant, "subspace": provenance}

    def used_parameters(self, model: Lvlm) -> Mapping[str, Any]:
        """Return the parameters with the blocks that are edited."""
        return {**self.parameters, "layers": self._layers(model)}

    def randomized(self, seed: int) -> Self:
        """Return a control: as many random directions."""
        subspace = self.required_subspace().randomized(seed)
        return type(self)(rank=self.rank, layers=self.layers, variant=self.variant, subspace=subspace)

    def required_subspace(self) -> HallucinationSubspace:
        """Return the directions; raises `ModelError` if they have not been derived."""
        if self.subspace is None:
            msg = "Nullu has no directions yet; make it with Nullu.derive(gs.DerivationData(model, None, examples))"
            raise ModelError(msg)
        return self.subspace.first(self.rank)

    def _layers(self, model: Lvlm) -> tuple[int, ...]:
        if self.subspace is not None:
            return tuple(self.subspace.bases)
        return tuple(scaled_layers(16, 31, model.n_layers)) if self.layers is None else self.layers

    def _check(self, model: Lvlm) -> None:
        subspace = self.required_subspace()
        subspace.check(model)
        edited_layers(model, tuple(subspace.bases))

    def _enter(self, model: Lvlm, stack: ExitStack) -> Decoder | None:
        if self.rank:
            stack.enter_context(edited(model, self.required_subspace()))
        return None
