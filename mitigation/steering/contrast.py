"""Contrasts: two groups of examples, or pairs of examples, that a derivation compares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from concepts.concept import Concept
from concepts.counterfactual_pair import CounterfactualPair
from groundscope.core.errors import PatchError
from groundscope.core.text import format_count
from mitigation.steering.activations import check_image_reaches, labels_of, read, run
from mitigation.steering.changes import VectorChange
from mitigation.steering.places import Key
from mitigation.steering.shuffling import shuffle_mask, swap_sides
from mitigation.steering.vector import SteeringVector

if TYPE_CHECKING:
    from activation_store import ActivationSource
    from lvlm.model import Lvlm


class Contrast(ABC):
    """Two groups of examples whose activations a derivation compares: positive and negative, or clean and corrupt.

    `from_store` groups the examples of a store by a concept or by masks. `from_pairs` runs a model on pairs of examples,
    which correspond to each other one by one.

    Examples
    --------
    >>> import numpy as np, pandas as pd
    >>> from mitigation import Contrast, derive
    >>> class Memory:
    ...     digest, provenance = "0" * 64, {"model": {"name": "m", "config": "c"}}
    ...     def frame(self):
    ...         return pd.DataFrame({"id": list("abcd"), "object:cat": [1.0, 1.0, 0.0, 0.0]})
    ...     def read(self, site, tokens, head=None, examples=None):
    ...         return np.array([[2, 0], [4, 1], [0, 0], [0, 1]], np.float32)
    >>> contrast = Contrast.from_store(Memory(), "object:cat")
    >>> contrast.positive.tolist()
    [True, True, False, False]
    >>> vector = derive.mean_difference(contrast, layers=[3])
    >>> vector.changes[3].direction.tolist()
    [1.0, 0.0]
    """

    paired: bool
    """Whether the examples of the two groups correspond to each other one by one."""

    @staticmethod
    def from_store(
        store: ActivationSource,
        concept: Concept | str | None = None,
        *,
        positive: np.ndarray | None = None,
        negative: np.ndarray | None = None,
    ) -> StoreContrast:
        """Group the examples of a store by a concept or by masks.

        In a store with answers, examples without an answer are left out; `StoreContrast.left_out` is their number.

        Parameters
        ----------
        store
            Store with the activations of the places that the vector will act on.
        concept
            Examples are positive where it is true and negative where it is false; undefined examples are excluded.
        positive, negative
            Instead of a concept: boolean masks ``[N]`` of examples; by default `negative` is the complement of `positive`.

        Raises
        ------
        PatchError
            For both a concept and masks, or neither; for a mask of another length, or masks that overlap.
        SiteError
            If the store lacks the concept.
        """
        if (concept is None) == (positive is None) or (concept is not None and negative is not None):
            msg = "give either concept=, or positive= (and optionally negative=)"
            raise PatchError(msg)
        answered = _answered(store)
        if concept is not None:
            truth = labels_of(store, str(concept))
            sides = truth == 1, truth == 0
        else:
            first = checked_mask(positive, len(answered))
            sides = first, ~first if negative is None else checked_mask(negative, len(answered))
        if (sides[0] & sides[1]).any():
            msg = (
                "the masks of positive and negative examples must not overlap; both select "
                f"{format_count(int((sides[0] & sides[1]).sum()), 'example')}"
            )
            raise PatchError(msg)
        left_out = int(((sides[0] | sides[1]) & ~answered).sum())
        name = None if concept is None else str(concept)
        return StoreContrast(store, sides[0] & answered, sides[1] & answered, name, left_out)

    @staticmethod
    def from_pairs(model: Lvlm, pairs: Sequence[CounterfactualPair]) -> PairContrast:
        """Compare the clean with the corrupt examples of counterfactual pairs.

        Parameters
        ----------
        model
            The model to steer; it is run on both examples of every pair.
        pairs
            Pairs of one kind: with ``blank``, ``blur`` or ``noise`` a direction represents the presence of any image
            content (ICT's image level, arXiv 2411.15268), with ``mask`` the presence of the object.

        Raises
        ------
        PatchError
            For no pairs.
        """
        if not pairs:
            msg = "no pairs; build them, for example with counterfactuals.pairs(data, kind='blank')"
            raise PatchError(msg)
        return PairContrast(model, tuple(pairs))

    @abstractmethod
    def read(
        self, keys: Sequence[Key], tokens: str, *, progress: bool | None = None
    ) -> Iterator[tuple[Key, np.ndarray, np.ndarray]]:
        """Yield each place with the activations of both groups, positive first, float64 ``[n, d]`` and ``[m, d]``."""

    @abstractmethod
    def read_negative(
        self, keys: Sequence[Key], tokens: str, *, progress: bool | None = None
    ) -> Iterator[tuple[Key, np.ndarray]]:
        """Yield each place with the activations of the negative or corrupt examples, float64 ``[m, d]``."""

    @abstractmethod
    def shuffled(self, seed: int) -> Self:
        """Return a control: the same examples with the two groups exchanged at random, whole images together."""

    @abstractmethod
    def build(
        self,
        changes: Mapping[Key, VectorChange],
        method: str,
        *,
        tokens: str,
        positions: str,
        strength: float,
        **details: Any,
    ) -> SteeringVector:
        """Return a vector of the contrast's model with the method, the examples and `details` in its provenance."""


@dataclass(frozen=True, eq=False)
class StoreContrast(Contrast):
    """Positive and negative examples of a store; made by `Contrast.from_store`."""

    store: ActivationSource
    positive: np.ndarray
    """Boolean ``[N]``."""
    negative: np.ndarray
    """Boolean ``[N]``."""
    concept: str | None = None
    """The concept that the examples were grouped by; None for masks."""
    left_out: int = 0
    """Examples of either group that were left out because they have no answer."""
    paired: bool = field(default=False, init=False)

    def read(
        self, keys: Sequence[Key], tokens: str, *, progress: bool | None = None
    ) -> Iterator[tuple[Key, np.ndarray, np.ndarray]]:
        """Yield each place with the activations of both groups; rows without the tokens are excluded."""
        for key in keys:
            x = read(self.store, key, tokens)
            defined = ~np.isnan(x).any(axis=1)
            yield key, x[self.positive & defined], x[self.negative & defined]

    def read_negative(
        self, keys: Sequence[Key], tokens: str, *, progress: bool | None = None
    ) -> Iterator[tuple[Key, np.ndarray]]:
        """Yield each place with the activations of the negative examples."""
        for key, _, negative in self.read(keys, tokens):
            yield key, negative

    def shuffled(self, seed: int) -> Self:
        """Return a control: labels are exchanged between images of equal size (`mitigation.steering.shuffling.shuffle_mask`)."""
        among = self.positive | self.negative
        groups = self.store.frame()["group"].tolist()
        positive = shuffle_mask(self.positive, seed, among, groups=groups)
        return replace(self, positive=positive, negative=among & ~positive)

    def build(
        self,
        changes: Mapping[Key, VectorChange],
        method: str,
        *,
        tokens: str,
        positions: str,
        strength: float,
        **details: Any,
    ) -> SteeringVector:
        """Return a vector for the model that the store was traced from."""
        provenance = {
            "method": method,
            "concept": self.concept,
            "positive": int(self.positive.sum()),
            "negative": int(self.negative.sum()),
            "tokens": tokens,
            **({"left_out": self.left_out} if self.left_out else {}),
            **details,
        }
        return from_store(self.store, changes, positions, strength, provenance)


@dataclass(frozen=True, eq=False)
class PairContrast(Contrast):
    """Clean and corrupt examples of counterfactual pairs; made by `Contrast.from_pairs`."""

    model: Lvlm
    pairs: tuple[CounterfactualPair, ...]
    paired: bool = field(default=True, init=False)

    def read(
        self, keys: Sequence[Key], tokens: str, *, progress: bool | None = None
    ) -> Iterator[tuple[Key, np.ndarray, np.ndarray]]:
        """Yield each place with the activations of the clean and the corrupt examples, in the order of the pairs.

        Raises
        ------
        ModelError
            For a place before the first layer that reads the image, if pairs differ only in the image.
        SiteError
            For a place that the model lacks, or tokens other than ``last`` and ``suffix:mean``.
        """
        check_image_reaches(self.model, self.pairs, keys)
        clean, corrupt = (
            run(self.model, examples, keys, tokens, progress=progress)
            for examples in ([p.clean for p in self.pairs], [p.corrupt for p in self.pairs])
        )
        for key in keys:
            yield key, clean[key], corrupt[key]

    def read_negative(
        self, keys: Sequence[Key], tokens: str, *, progress: bool | None = None
    ) -> Iterator[tuple[Key, np.ndarray]]:
        """Yield each place with the activations of the corrupt examples."""
        corrupt = run(self.model, [p.corrupt for p in self.pairs], keys, tokens, progress=progress)
        for key in keys:
            yield key, corrupt[key]

    def shuffled(self, seed: int) -> Self:
        """Return a control: the two sides of half of the pairs are exchanged (`mitigation.steering.shuffling.swap_sides`)."""
        return replace(self, pairs=tuple(swap_sides(self.pairs, seed)))

    def build(
        self,
        changes: Mapping[Key, VectorChange],
        method: str,
        *,
        tokens: str,
        positions: str,
        strength: float,
        **details: Any,
    ) -> SteeringVector:
        """Return a vector for the model."""
        from circuits.patching.activation import pairs_digest

        provenance = {
            "method": method,
            "tokens": tokens,
            "pairs": len(self.pairs),
            "kinds": sorted({p.kind for p in self.pairs}),
            "pairs_digest": pairs_digest(self.pairs),
            "weights": self.model.weights_hash,
            **details,
        }
        return SteeringVector(changes, positions, strength, self.model.name, self.model.config_hash, provenance)


def from_store(
    store: ActivationSource,
    changes: Mapping[Key, VectorChange],
    positions: str,
    strength: float,
    provenance: Mapping[str, Any],
) -> SteeringVector:
    """Return a vector for the model that a store was traced from."""
    model = store.provenance.get("model", {})
    name, config_hash = str(model.get("name", "")), str(model.get("config", ""))
    return SteeringVector(changes, positions, strength, name, config_hash, {**provenance, "store": store.digest})


def checked_mask(mask: object, size: int) -> np.ndarray:
    """Return a boolean mask; raises `PatchError` if it is not boolean of shape ``[size]``."""
    array = np.asarray(mask)
    if array.dtype != np.bool_ or array.shape != (size,):
        msg = f"a mask of {array.dtype} {list(array.shape)}: it must be boolean [{size}], one value per example of the store"
        raise PatchError(msg)
    return array


def _answered(store: ActivationSource) -> np.ndarray:
    """Return a boolean ``[N]``: examples with an answer; all of them in a store of open-ended examples only."""
    frame = store.frame()
    if "model_answer" not in frame.columns:
        return np.ones(len(frame), bool)
    answered = (frame["model_answer"].astype(str) != "").to_numpy()
    return answered if answered.any() else ~answered
