"""Directions grouped by the place that they read, and the concepts that decide a claim there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from activation_store import ActivationStore, ConceptDirection
from diagnosis.claims import Claim
from diagnosis.fit_without_boxes import PLACED, POOLING
from groundscope.core.errors import ProbeError, SiteError
from lvlm.model import Lvlm
from lvlm.sites import Site
from lvlm.token_selection import ALL_IMAGE_TOKENS, IMAGE_MEAN, TokenSelection
from lvlm.weights_hash import short

TRANSFER_ACCURACY = 0.75
"""Probes that were fitted on another store, and are at least this accurate there, show no absence where they are at chance."""


@dataclass(frozen=True, eq=False)
class ProbeSet:
    """Directions that read one place."""

    stage: str
    site: str
    tokens: str
    kind: str
    """Level and kind of the questions that they were fitted to; empty for all."""
    directions: Mapping[str, ConceptDirection]
    """By concept."""

    @property
    def layer(self) -> int:
        """Number of the layer."""
        return max(0, Site.parse(self.site).layer)

    @cached_property
    def train_groups(self) -> frozenset[str]:
        """Groups of the training examples, which must not calibrate the directions."""
        return frozenset[str]().union(*{d.train_groups for d in self.directions.values()})

    @property
    def pooled(self) -> bool:
        """Whether presence of a noun is its largest decision over all image tokens, as its probe was fitted."""
        return self.tokens == ALL_IMAGE_TOKENS and any(d.provenance.get(POOLING) for d in self.directions.values())

    def shows_absence(self, claim: Claim, store: str, *, readable: bool) -> bool:
        """Return whether chance accuracy on a concept is evidence that activations do not carry it.

        Parameters
        ----------
        claim
            The claim that is read.
        store
            Digest of the store with the answers.
        readable
            Whether the place is readable for all concepts of the kind of question together.

        Notes
        -----
        The mean over the image dilutes what few tokens carry, so it never shows absence. A probe of single tokens shows it if a
        control is readable there: for a noun the other nouns, for an attribute or relation the places of nouns, whose share of
        right ones widens the interval (`placed_share`). Probes of another store show it if they are at chance there too;
        otherwise the data may differ.
        """
        if self.tokens == IMAGE_MEAN:
            return False
        used = [self.directions[c] for c in self.concepts_for(claim)]
        statistics = [
            d.statistics.get("balanced_accuracy", 0.5) for d in used if d.provenance.get("store", store) != store
        ]
        if any(not accuracy < TRANSFER_ACCURACY for accuracy in statistics):
            return False
        return self.placed_share(claim) > 0 and (readable or not any(d.provenance.get(POOLING) for d in used))

    def placed_share(self, claim: Claim) -> float:
        """Return the estimated share of right places of the nouns of a claim; 1 if the place is known."""
        shares = [self.directions[c].statistics.get(PLACED, 1.0) for c in self.concepts_for(claim)]
        return min(shares, default=1.0)

    def weights(self) -> tuple[np.ndarray, np.ndarray]:
        """Return weights float64 ``[D, concepts]`` and intercepts ``[concepts]``."""
        directions = self.directions.values()
        return np.stack([d.scale * d.vector.astype(float) for d in directions], 1), np.array(
            [d.intercept for d in directions]
        )

    def validation(self, concepts: Sequence[str]) -> float:
        """Return the mean validation accuracy of some concepts on training folds, without the held-out examples."""
        statistics = [self.directions[c].statistics for c in concepts if c in self.directions]
        values = [s.get("validation", s.get("balanced_accuracy", 0.5)) for s in statistics]
        return float(np.mean([0.5 if np.isnan(v) else v for v in values])) if values else 0.0

    def concepts_for(self, claim: Claim) -> tuple[str, ...]:
        """Return the concepts whose directions decide a claim here; empty if the directions cannot decide it."""
        if self.kind not in ("", claim.kind):
            return ()
        if self.stage == "last":
            if claim.yes_no:
                concept = claim.named if claim.named in self.directions else claim.concept
                return (concept,) if concept in self.directions else ()
            return self._choice(claim)
        if self.tokens == ALL_IMAGE_TOKENS:
            if claim.level == "object" and claim.yes_no:
                return (claim.concept,) if claim.concept in self.directions else ()
            if not claim.nouns or not all(n in self.directions for n in claim.nouns):
                return ()
            if claim.level == "relation" and claim.concept not in self.directions:
                return claim.nouns
            if claim.yes_no:
                return (claim.concept,) if claim.concept in self.directions else ()
            return self._choice(claim)
        if claim.level == "object" and not self.tokens.startswith("image"):
            return ()  # an absent object has no tokens
        if claim.yes_no:
            return (claim.concept,) if claim.concept in self.directions else ()
        return self._choice(claim)

    def _choice(self, claim: Claim) -> tuple[str, ...]:
        rivals = tuple(r for r in claim.rivals if r in self.directions)
        return (claim.concept, *rivals) if rivals and claim.concept in self.directions else ()


def probe_sets(directions: Sequence[ConceptDirection]) -> list[ProbeSet]:
    """Group directions by place, in the order of the forward pass; raises `ProbeError` for none, or two for one concept."""
    if not directions:
        msg = "no directions; fit them with diagnosis.fit_directions(store), or use grid.direction(concept, layer)"
        raise ProbeError(msg)
    groups: dict[tuple[str, str, str], dict[str, ConceptDirection]] = {}
    for d in directions:
        if d.head is not None:
            msg = (
                f"direction '{d.concept}' at {d.site} reads head {d.head}, but a diagnosis reads whole layers; fit probes on "
                "resid_post"
            )
            raise ProbeError(msg)
        here = groups.setdefault((d.site, d.tokens, d.kind), {})
        if d.concept in here:
            msg = (
                f"two directions for '{d.concept}' at {d.site}, {d.tokens}; pass one, or set the kind of question that each "
                "was fitted to"
            )
            raise ProbeError(msg)
        here[d.concept] = d
    sets = [ProbeSet(_stage(site, tokens), site, tokens, kind, here) for (site, tokens, kind), here in groups.items()]
    order = ("vision", "projector", "image", "last")
    return sorted(sets, key=lambda s: (order.index(s.stage), s.tokens, s.kind, s.layer))


def check_origin(model: Lvlm, store: ActivationStore, directions: Sequence[ConceptDirection]) -> None:
    """Raise `ProbeError` if a direction was fitted on another model; `check_store` checks the store."""
    recorded = {str(d.provenance["weights"]) for d in directions if d.provenance.get("weights")}
    same = {weights for weights in recorded if model.has_weights(weights)}
    for d in directions:
        weights, digest = d.provenance.get("weights"), d.provenance.get("store")
        other = str(weights) not in same if weights else bool(digest) and digest != store.digest
        if other:
            of = f"weights {short(str(weights))}" if weights else f"store {str(digest)[:12]}"
            here = short(model.weights_hash) if weights else store.digest[:12]
            msg = (
                f"direction '{d.concept}' at {d.site} was fitted on {of}, but {model.name} has {here}; fit probes on a "
                "store of this model"
            )
            raise ProbeError(msg)


def check_width(x: np.ndarray, probes: ProbeSet) -> None:
    """Raise `SiteError` if activations have another width than the directions."""
    width = len(next(iter(probes.directions.values())).vector)
    if x.shape[-1] != width:
        msg = f"{probes.site} at {probes.tokens} has width {x.shape[-1]}, but its directions have {width}; fit them on this store"
        raise SiteError(msg)


def _stage(site: str, tokens: str) -> str:
    stack, role = Site.parse(site).stack, TokenSelection.parse(tokens).role
    if stack in ("vision", "projector"):
        return stack
    if role in ("image", "object"):
        return "image"
    if role == "last":
        return "last"
    msg = (
        f"direction at {site}, tokens '{tokens}': a diagnosis reads the decoder at image, object or last tokens (such as "
        "image:mean, object:mean, last); fit the probe at one of these"
    )
    raise ProbeError(msg)
