"""What methods may use to make a mitigation: model, store, examples, places and positions, and the contrasts of examples."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from concepts import counterfactuals
from concepts.counterfactual_pair import CounterfactualPair
from concepts.schema import ConceptDataset
from groundscope.core.errors import DataError
from lvlm.sites import Head
from mitigation.steering.contrast import Contrast
from mitigation.steering.places import canonical

if TYPE_CHECKING:
    from activation_store import ActivationStore
    from lvlm.model import Lvlm

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
    site: str | None = None
    """Where the vector acts instead of at `heads`: a site (``decoder.L3.resid_post``), several with commas, a component of every
    layer (``mlp_out``), or a head (``L4.H7``); not for methods with places of their own."""
    positions: str | None = None
    """Token positions that the vector acts on; None for the method's own."""

    def __post_init__(self) -> None:
        from lvlm.sites import parse_heads

        object.__setattr__(self, "heads", parse_heads(self.heads))
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))

    @property
    def places(self) -> dict[str, Any]:
        """The arguments ``heads``, ``layers`` or ``sites`` of a derivation, for `site`, or for `heads`."""
        if self.site is None:
            return {"heads": self.heads}
        if re.fullmatch(r"L\d+\.H\d+", self.site):
            return {"heads": (Head.parse(self.site),)}
        names = [name.strip() for name in self.site.split(",")]
        keys = [canonical(site) for name in names for site in self.model.sites(name)]
        return {
            "layers": [k for k in keys if isinstance(k, int)],
            "sites": [k for k in keys if not isinstance(k, int | Head)],
        }

    @property
    def where(self) -> dict[str, Any]:
        """`places`, and ``positions`` if they are set."""
        return {**self.places, **self.at}

    @property
    def at(self) -> dict[str, Any]:
        """The argument ``positions`` of a derivation, if it is set."""
        return {} if self.positions is None else {"positions": self.positions}

    def shuffle(self, contrast: Contrast) -> Contrast:
        """Return a contrast, with shuffled labels if `shuffle_seed` is set."""
        return contrast if self.shuffle_seed is None else contrast.shuffled(self.shuffle_seed)


def answer_contrast(data: DerivationData) -> Contrast:
    """Contrast the questions with the answer yes and those with the answer no, including those answered incorrectly."""
    if data.store is None:
        msg = "the contrast of yes and no needs activations; pass a store"
        raise DataError(msg)
    answers = data.store.frame()["answer"].to_numpy()
    return data.shuffle(Contrast.from_store(data.store, positive=answers == "yes", negative=answers == "no"))


def right_contrast(data: DerivationData) -> Contrast:
    """Contrast the questions that the model answers correctly with those that it answers incorrectly."""
    if data.store is None:
        msg = "the contrast of right and wrong answers needs activations; pass a store"
        raise DataError(msg)
    frame = data.store.frame()
    answered = (frame["model_answer"].astype(str) != "").to_numpy() if "model_answer" in frame else None
    right = frame["correct"].to_numpy(dtype=bool)
    wrong = ~right if answered is None else ~right & answered
    return data.shuffle(Contrast.from_store(data.store, positive=right, negative=wrong))


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


# ---- what data must have


def without_yes_or_no(examples: ConceptDataset) -> str | None:
    """Return why `answer_contrast` cannot be made from the examples; None if it can."""
    missing = {"yes", "no"} - {e.answer for e in examples}
    if not missing:
        return None
    return f"it compares yes with no, but no question has the answer {' or '.join(sorted(missing))}; use the method amplify"


def without_changes(examples: ConceptDataset) -> str | None:
    """Return why `change_contrast` cannot be made from the examples; None if it can."""
    neutral = examples.where(split="neutral")
    for kind in CHANGED_KINDS:
        with suppress(DataError):
            if counterfactuals.pairs(neutral, kind, limit=1):
                return None
    kinds = ", ".join(CHANGED_KINDS)
    return f"it needs pairs of kind {kinds}, which only icon scenes allow; use the method discriminant or amplify"
