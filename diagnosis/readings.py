"""Margins of the truth at every place: from the store if it has one vector per example, otherwise from the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from activation_store import ActivationStore
from circuits.execution.memory import batch_rows
from concepts.schema import Example
from diagnosis.claims import Claim, objects_of
from diagnosis.fit_without_boxes import site_weight
from diagnosis.probe_sets import ProbeSet, check_width
from lvlm.encoding.encode import Encoding
from lvlm.model import Lvlm
from lvlm.sites import Site
from lvlm.token_selection import ALL_IMAGE_TOKENS, TokenSelection

_BATCH = 32


@dataclass(frozen=True, eq=False)
class Margins:
    """Margins of some claims at one place."""

    rows: tuple[int, ...]
    """Rows of the store."""
    values: tuple[np.ndarray, ...]
    """For each row the margins of the truth against each rival (one for yes or no); positive if the truth is decoded."""
    classes: np.ndarray
    """Class of each row: whether the concept is true, 1 or 0, for yes-no questions; 1 for all other questions."""


@dataclass(frozen=True, eq=False)
class TokenReadings:
    """Decisions at every image token of some images."""

    decisions: Mapping[tuple[str, str], np.ndarray]
    """By image and site, float64 ``[tokens, concepts]``."""
    objects: Mapping[tuple[str, str], Mapping[str, tuple[int, ...]]]
    """By image and stack: object id to the indices of its tokens."""
    places: Mapping[tuple[str, str], Mapping[str, int]] = field(default_factory=dict)
    """By image and site: concept of a noun to the index of the token with the largest sum of its decisions over all sites with
    as many tokens; only for probes that were fitted to whole images, or if objects have no boxes."""


def read_stored(store: ActivationStore, probes: ProbeSet, claims: Sequence[Claim]) -> Margins:
    """Return the margins of claims at a place that the store has one vector per example for."""
    used = [(c, concepts) for c in claims if (concepts := probes.concepts_for(c))]
    if not used:
        return Margins((), (), np.zeros(0))
    x = store.read(probes.site, probes.tokens, examples=np.array([c.row for c, _ in used]))
    check_width(x, probes)
    weights, intercepts = probes.weights()
    decisions = x.astype(np.float64) @ weights + intercepts
    number = {concept: k for k, concept in enumerate(probes.directions)}
    rows, values, classes = [], [], []
    for (claim, concepts), line in zip(used, decisions, strict=True):
        if np.isnan(line).any():
            continue  # the object of the question is not in this image
        rows.append(claim.row)
        at = line[[number[c] for c in concepts]]
        holds = claim.holds if concepts == (claim.named,) else claim.concept_holds
        if claim.yes_no:
            values.append(at if holds else -at)
        else:
            values.append(at[0] - at[1:])
        classes.append(holds)
    return Margins(tuple(rows), tuple(values), np.array(classes, float))


@torch.no_grad()
def read_tokens(model: Lvlm, sets: Sequence[ProbeSet], examples: Sequence[Example]) -> TokenReadings:
    """Read the image tokens of each image once; tokens before the question do not depend on it."""
    sets = [s for s in sets if s.tokens == ALL_IMAGE_TOKENS]
    images = list({e.image.identity: e for e in examples}.values()) if sets else []
    sites = list(dict.fromkeys(s.site for s in sets))
    by_site = {s.site: s for s in sets}
    decisions: dict[tuple[str, str], np.ndarray] = {}
    objects: dict[tuple[str, str], Mapping[str, tuple[int, ...]]] = {}
    everything = TokenSelection.parse(ALL_IMAGE_TOKENS)
    for batch in model.batches(images, batch_rows(model, images, _BATCH)):
        encodings = batch.encodings

        def decide(site: Site, values: Tensor, encodings: Sequence[Encoding] = encodings) -> None:
            probes = by_site[str(site)]
            weights, intercepts = probes.weights()
            for row, encoding in enumerate(encodings):
                at = encoding.tokens.positions(everything, site.stack)
                x = values[row, list(at)].double().cpu().numpy()
                check_width(x, probes)
                decisions[encoding.example.image.identity, str(site)] = x @ weights + intercepts

        model.read(batch.inputs, sites, take=decide)
        for encoding in encodings:
            for site in sites:
                stack = Site.parse(site).stack
                at = encoding.tokens.positions(everything, stack)
                key = (encoding.example.image.identity, site)
                if (key[0], stack) not in objects:
                    number = {p: i for i, p in enumerate(at)}
                    objects[key[0], stack] = {
                        name: tuple(number[p] for p in encoding.tokens.object(name, stack) if p in number)
                        for name in encoding.tokens.boxes
                    }
    identities = dict.fromkeys(identity for identity, _ in decisions)
    places = {identity: _places({s: decisions[identity, s] for s in sites}, by_site) for identity in identities}
    return TokenReadings(decisions, objects, {(i, s): at for i, of in places.items() for s, at in of.items()})


def _places(decisions: Mapping[str, np.ndarray], sets: Mapping[str, ProbeSet]) -> dict[str, dict[str, int]]:
    """Return for each site the place of each noun in one image, as `diagnosis.fit_without_boxes` places it."""
    totals: dict[tuple[int, str], np.ndarray] = {}
    for site, table in decisions.items():
        for k, (concept, direction) in enumerate(sets[site].directions.items()):
            if concept.startswith("object:"):
                weight = site_weight(direction.statistics.get("balanced_accuracy", float("nan")))
                key = (len(table), concept)
                totals[key] = totals.get(key, 0.0) + weight * table[:, k]
    at = {key: int(total.argmax()) for key, total in totals.items()}
    return {
        site: {concept: i for (n, concept), i in at.items() if n == len(table)} for site, table in decisions.items()
    }


def read_live(
    readings: TokenReadings, probes: ProbeSet, claims: Sequence[Claim], examples: Mapping[str, Example]
) -> Margins:
    """Return the margins of claims at image tokens.

    Presence of a noun: the largest difference, over tokens, between its decision and the highest decision of another noun; for
    probes that were fitted to whole images, its largest decision. Relation of two objects with boxes: the sum of differences
    between each noun's decision at its object's tokens and at the other's. Attributes and relations without boxes: the
    decision at the place of the noun (`TokenReadings.places`), or the difference of two.
    """
    number = {concept: k for k, concept in enumerate(probes.directions)}
    nouns = [k for concept, k in number.items() if concept.startswith("object:")]
    rows, values, classes = [], [], []
    for claim in claims:
        concepts = probes.concepts_for(claim)
        example = examples.get(claim.id)
        key = (example.image.identity, probes.site) if example is not None else ("", "")
        if not concepts or example is None or key not in readings.decisions:
            continue
        table = readings.decisions[key]
        if claim.level == "object":
            own = table[:, number[concepts[0]]]
            others = table[:, [k for k in nouns if k != number[concepts[0]]]]
            lead = own - (others.max(1) if others.shape[1] and not probes.pooled else 0.0)
            value, side = np.array([float(lead.max()) * (1 if claim.holds else -1)]), claim.holds
        elif concepts == claim.nouns:
            ids = objects_of(claim, example)
            tokens = [list(readings.objects[key[0], Site.parse(probes.site).stack].get(name, ())) for name in ids]
            if len(tokens) != 2 or not all(tokens):
                continue
            a, b = (number[c] for c in concepts)
            first, second = (table[t].mean(0) for t in tokens)
            value, side = np.array([float(first[a] + second[b] - first[b] - second[a])]), True
        else:
            columns = [number[c] for c in concepts]
            at = [table[readings.places[key][noun], columns] for noun in claim.nouns]
            here = at[0]
            if len(at) == 2:
                here = at[0] - at[1] + np.array([probes.directions[c].intercept for c in concepts])
            side = claim.concept_holds if claim.yes_no else True
            value = (here if side else -here) if claim.yes_no else here[0] - here[1:]
        rows.append(claim.row)
        values.append(value)
        classes.append(side)
    return Margins(tuple(rows), tuple(values), np.array(classes, float))
