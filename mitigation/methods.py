"""Named methods that make a mitigation for a model, and the controls that a steering vector is compared with.

`mitigations` is an open table: a package adds a method with ``mitigations.register(name, MitigationMethod(make))`` or an entry
point of the group ``groundscope.mitigations``, and runs use it with ``steer.method=name``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from circuits import random_heads
from concepts import counterfactuals
from concepts.schema import ConceptDataset, CounterfactualPair
from groundscope.core.errors import DataError
from groundscope.core.registry import Registry
from lvlm.sites import Head
from mitigation.steering import derive
from mitigation.steering.contrast import Contrast
from mitigation.steering.controls import match_displacement, move_to_heads
from mitigation.steering.vector import SteeringVector

if TYPE_CHECKING:
    from activation_store import ActivationStore
    from lvlm.model import Lvlm
    from mitigation.protocol import Mitigation

CHANGED_KINDS = ("object", "color", "relation")
"""Kinds of pairs whose images differ in one object, attribute or relation; only icon scenes can be drawn again."""
MAX_PAIRS = 200
"""Largest number of pairs that a vector is derived from."""


@dataclass(frozen=True, eq=False)
class DerivationData:
    """What a method may use to make a mitigation; none of it should be used to test the mitigation.

    Examples
    --------
    >>> import groundscope as gs
    >>> data = gs.DerivationData(gs.load_lvlm("tiny"), None, gs.scenes.dataset(10), heads=["L3.H1"])
    >>> data.heads
    (Head(layer=3, head=1),)
    """

    model: Lvlm
    store: ActivationStore | None
    """Activations of the examples; None for methods that run the model themselves."""
    examples: ConceptDataset
    heads: Sequence[Head | str] = ()
    """Heads to act on, such as those that patching ranks highest; stored as `Head`."""
    shuffle_seed: int | None = None
    """For a control: seed with which labels, or the sides of pairs, are exchanged at random; None for the true labels."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of single methods, such as ``doubt`` of ``discriminant``."""

    def __post_init__(self) -> None:
        from lvlm.sites import parse_heads

        object.__setattr__(self, "heads", parse_heads(self.heads))
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))

    def shuffle(self, contrast: Contrast) -> Contrast:
        """Return a contrast as it is, or shuffled if `shuffle_seed` is set."""
        return contrast if self.shuffle_seed is None else contrast.shuffled(self.shuffle_seed)


@dataclass(frozen=True)
class MitigationMethod:
    """A named way to make a mitigation, an entry of `mitigations`.

    Examples
    --------
    >>> import groundscope as gs
    >>> gs.mitigations["prior_removal"].unit
    -0.5
    """

    make: Callable[[DerivationData], Mitigation]
    """Make the mitigation. Methods whose result can be swept over strengths return a `SteeringVector`."""
    unit: float = 1.0
    """Strength that corresponds to 1 in a list of strengths for several methods; negative for methods that remove."""
    problem: Callable[[ConceptDataset], str | None] = lambda _: None
    """Return why a method cannot be applied to a dataset, with the fix; None if it can. Called before any work starts."""


def answer_contrast(data: DerivationData) -> Contrast:
    """Contrast the questions with the answer yes and those with the answer no, including those answered incorrectly."""
    if data.store is None:
        msg = "the contrast of yes and no needs activations; pass a store"
        raise DataError(msg)
    answers = data.store.frame()["answer"].to_numpy()
    return data.shuffle(Contrast.from_store(data.store, positive=answers == "yes", negative=answers == "no"))


def blank_contrast(data: DerivationData) -> Contrast:
    """Contrast images with blank images, in at most `MAX_PAIRS` pairs that are spread over the images."""
    neutral = data.examples.where(split="neutral")
    pairs = counterfactuals.pairs(neutral if len(neutral) else data.examples, "blank")
    # One pair per question would use only the first few images.
    step = max(1, len(pairs) // MAX_PAIRS)
    return data.shuffle(Contrast.from_pairs(data.model, pairs[::step][:MAX_PAIRS]))


def change_contrast(data: DerivationData) -> Contrast:
    """Contrast images with images in which the answer is different."""
    neutral = data.examples.where(split="neutral")
    pairs: list[CounterfactualPair] = []
    for kind in CHANGED_KINDS:
        with suppress(DataError):  # these data have no pairs of this kind
            candidates = counterfactuals.pairs(neutral, kind)
            pairs += candidates[:: max(1, 3 * len(candidates) // MAX_PAIRS)][: MAX_PAIRS // 3]
    if not pairs:
        msg = f"no question allows a pair of kind {', '.join(CHANGED_KINDS)}; only icon scenes can be drawn again"
        raise DataError(msg)
    return data.shuffle(Contrast.from_pairs(data.model, pairs))


def _without_yes_or_no(examples: ConceptDataset) -> str | None:
    missing = {"yes", "no"} - {e.answer for e in examples}
    if not missing:
        return None
    return f"it compares yes with no, but no question has the answer {' or '.join(sorted(missing))}; use the method amplify"


def _without_changes(examples: ConceptDataset) -> str | None:
    neutral = examples.where(split="neutral")
    for kind in CHANGED_KINDS:
        with suppress(DataError):
            if counterfactuals.pairs(neutral, kind, limit=1):
                return None
    kinds = ", ".join(CHANGED_KINDS)
    return f"it needs pairs of kind {kinds}, which only icon scenes allow; use the method discriminant or amplify"


def _discriminant(data: DerivationData) -> SteeringVector:
    doubt = data.options.get("doubt", 0.0)
    return derive.discriminant(answer_contrast(data), heads=data.heads, doubt=doubt)


def _check(entry: MitigationMethod) -> str | None:
    if not isinstance(entry, MitigationMethod) or not callable(entry.make):
        return "it must be a mitigation.MitigationMethod with a function that makes a mitigation"
    return None


mitigations: Registry[MitigationMethod] = Registry(
    "mitigation method",
    {
        "discriminant": MitigationMethod(_discriminant, problem=_without_yes_or_no),
        "amplify": MitigationMethod(lambda data: derive.amplification(blank_contrast(data), heads=data.heads)),
        # Strength -1 removes the whole component.
        "prior_removal": MitigationMethod(
            lambda data: derive.prior_removal(blank_contrast(data), heads=data.heads), unit=-0.5
        ),
        "pair_difference": MitigationMethod(
            lambda data: derive.mean_difference(change_contrast(data), heads=data.heads), problem=_without_changes
        ),
    },
    group="groundscope.mitigations",
    check=_check,
)
"""Methods by name."""


# ---- controls


def make_vector(method: MitigationMethod, data: DerivationData) -> SteeringVector:
    """Return the steering vector of a method; raises `DataError` for a method that makes another mitigation."""
    vector = method.make(data)
    if not isinstance(vector, SteeringVector):
        msg = f"the method made '{vector.name}', which is no steering vector and has no strength to choose"
        raise DataError(msg)
    return vector


def other_heads(data: DerivationData, seed: int = 0) -> tuple[Head, ...]:
    """Return as many random heads that are not among the selected ones."""
    shape = (data.model.n_layers, data.model.n_heads)
    return random_heads(shape, len(data.heads), exclude=data.heads, seed=seed)


def _random_direction(vector: SteeringVector, _method: MitigationMethod, _data: DerivationData) -> SteeringVector:
    return vector.randomized(0)


def _shuffled_labels(vector: SteeringVector, method: MitigationMethod, data: DerivationData) -> SteeringVector:
    control = make_vector(method, replace(data, shuffle_seed=0)).decaying(vector.decay)
    return match_displacement(control, vector, _store_of(data))


def _moved(vector: SteeringVector, _method: MitigationMethod, data: DerivationData) -> SteeringVector:
    return move_to_heads(vector, other_heads(data), _store_of(data))


def _derived_elsewhere(vector: SteeringVector, method: MitigationMethod, data: DerivationData) -> SteeringVector:
    control = make_vector(method, replace(data, heads=other_heads(data))).decaying(vector.decay)
    return match_displacement(control, vector, _store_of(data))


def _store_of(data: DerivationData) -> ActivationStore:
    if data.store is None:
        msg = "a control with the same displacement needs activations; pass a store"
        raise DataError(msg)
    return data.store


Control = Callable[[SteeringVector, MitigationMethod, DerivationData], SteeringVector]
"""From a vector, its method and the data that it was made from to a control."""
CONTROLS: Mapping[str, Control] = MappingProxyType(
    {
        "random direction": _random_direction,
        "shuffled labels": _shuffled_labels,
        "moved to other heads": _moved,
        "derived at other heads": _derived_elsewhere,
    }
)
"""Controls with the displacement of the vector: random directions; the method with labels without information; the same
directions at heads that were not selected; and the method at those heads, which shows how much depends on the selection."""
