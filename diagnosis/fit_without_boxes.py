"""Probes for data without boxes, read at image tokens: nouns, and attributes and relations where their nouns are.

At each site, probes of nouns are fitted to labels of whole images (`diagnosis.noun_probes`). The token with the highest
decision of a noun, summed over sites, is its place (`place_of`): attributes are fitted to the activation there, relations to the
difference of the activations at the places of their two nouns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from activation_store import ArrayInfo, ConceptDirection
from diagnosis.calibration import MIN_ACCURACY
from diagnosis.claims import Names, presence_noun
from diagnosis.image_tokens import read_image_tokens, read_picked_tokens
from diagnosis.noun_probes import VALIDATION_SHARE, NounProbes, Presence, fit_nouns
from groundscope.core.document_digest import value_digest
from lvlm.sites import Site
from lvlm.token_selection import ALL_IMAGE_TOKENS

if TYPE_CHECKING:
    import pandas as pd

    from activation_store import ActivationStore
    from concepts.schema import Example
    from lvlm import Lvlm

MAX_LAYERS = 8
"""Largest number of layers of a stack that are read at image tokens, evenly spaced."""
MAX_IMAGES = 400
"""Largest number of images that the probes are fitted to."""
MIN_POSITIVE = 3
"""Smallest number of images with a noun for a separate probe; rarer nouns use the shared probe."""
UNLABELLED = 3
"""Images without a label that count as images without the noun, for each image with the noun."""
POOLING = "pooling"
"""Key in the provenance of a direction that is read at the image token with its largest decision."""
PLACED = "placed"
"""Statistic of a direction that is read where a noun is: estimated share of the places that are right (`placed_share`)."""
_COMPONENTS = (("vision", "resid_post"), ("projector", "out"), ("decoder", "resid_post"))
_TOKENS = "object:mean"
"""Selection by which the located activations are read from `LocatedSource`."""


def presence_labels(frame: pd.DataFrame, rows: np.ndarray) -> list[tuple[int, str, bool]]:
    """Return row, noun and truth of every label of a noun in some rows.

    An existence question without such a label has one by its answer; a question about an attribute or a relation presupposes
    its objects.
    """
    nouns = [str(c) for c in frame if str(c).startswith("object:") and c != "object:named"]
    table = frame[nouns].to_numpy(float)
    labels = []
    for row in np.flatnonzero(rows & (frame["level"] == "object").to_numpy()):
        defined = np.flatnonzero(~np.isnan(table[row]))
        labels += [(int(row), nouns[k].partition(":")[2], bool(table[row, k])) for k in defined]
        answer, noun = frame["answer"].iloc[row], presence_noun(str(frame["question"].iloc[row]))
        if not len(defined) and noun is not None and answer in ("yes", "no"):
            labels.append((int(row), noun, answer == "yes"))
    names = Names({noun for _, noun, _ in labels}, numbers=True)
    for row in np.flatnonzero(rows & frame["level"].isin(["attribute", "relation"]).to_numpy()):
        labels += [(int(row), noun, True) for noun in dict.fromkeys(names.find(str(frame["question"].iloc[row])))]
    return labels


def add_unlabelled(labels: Mapping[tuple[int, int], bool], n_images: int, seed: int) -> dict[tuple[int, int], bool]:
    """Return labels by image and noun with additional images as negative ones, `UNLABELLED` for each positive one.

    A noun that no question about an image names is seldom in it; where it is, the label is wrong.
    """
    rng = np.random.default_rng(seed)
    out = dict(labels)
    for noun in sorted({noun for _, noun in labels}):
        count = UNLABELLED * sum(holds for (_, other), holds in labels.items() if other == noun)
        free = [image for image in range(n_images) if (image, noun) not in labels]
        out.update(((int(image), noun), False) for image in rng.permutation(free)[:count])
    return out


@dataclass(frozen=True, eq=False)
class LocatedProbes:
    """Directions of nouns at image tokens, and the activations where the nouns of attributes and relations are."""

    nouns: tuple[ConceptDirection, ...]
    source: LocatedSource | None
    accuracy: Mapping[str, float]
    """Site to the largest held-out accuracy of the nouns that place its tokens."""


def placed_share(nouns: float, relations: float) -> float:
    """Return the share of right places that held-out accuracies of nouns and relations imply, at least.

    An accuracy of (1 + c) / 2 is that of a concept which is known in a share c of the cases. A noun is known where its place is
    right; a relation where the places of both its nouns are, c = h ** 2.

    >>> from diagnosis.fit_without_boxes import placed_share
    >>> placed_share(0.75, 0.5), placed_share(0.5, 0.68), placed_share(0.4, float("nan"))
    (0.5, 0.6, 0.0)
    """
    shares = [2 * nouns - 1, max(0.0, 2 * relations - 1) ** 0.5]
    return round(max([0.0, *(s for s in shares if not np.isnan(s))]), 6)


def site_weight(accuracy: float) -> float:
    """Return the weight of a site in the sum of decisions that places a noun, from its held-out accuracy."""
    return 0.0 if np.isnan(accuracy) else max(1e-3, accuracy - 0.5)


class LocatedSource:
    """A store whose attributes and relations have the activation at the place of their noun, or a difference of two."""

    def __init__(self, store: ActivationStore, frame: pd.DataFrame, values: Mapping[str, np.ndarray]) -> None:
        self._store, self._frame, self._values = store, frame, values
        layers: dict[tuple[str, str], list[int]] = {}
        for site in values:
            place = Site.parse(site)
            layers.setdefault((place.stack, place.component), []).append(max(0, place.layer))
        width = {Site.parse(s).stack: x.shape[1] for s, x in values.items()}
        self.arrays: Sequence[ArrayInfo] = [
            ArrayInfo(stack, component, _TOKENS, len(at), width[stack], layers=tuple(at))
            for (stack, component), at in layers.items()
        ]

    @property
    def digest(self) -> str:
        """Digest of the store."""
        return self._store.digest

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Provenance of the store."""
        return self._store.provenance

    def frame(self) -> pd.DataFrame:
        """Return the example table."""
        return self._frame

    def read(self, site: str, tokens: str, head: int | None = None, examples: Any = None) -> np.ndarray:
        """Return located activations, NaN for rows whose noun has no probe."""
        del tokens, head
        values = self._values[str(site)]
        return values if examples is None else values[examples]


def token_sites(store: ActivationStore) -> list[str]:
    """Return the sites of a store at which image tokens are read: at most `MAX_LAYERS` layers of each stack."""
    sites = []
    for stack, component in _COMPONENTS:
        layers = sorted({k for a in store.arrays if (a.stack, a.component) == (stack, component) for k in a.layers})
        chosen = np.unique(np.linspace(0, len(layers) - 1, min(MAX_LAYERS, len(layers))).round().astype(int))
        sites += [stack + (".out" if stack == "projector" else f".L{layers[i]}.{component}") for i in chosen]
    return sites


def locate(
    model: Lvlm,
    store: ActivationStore,
    frame: pd.DataFrame,
    examples: Mapping[str, Example],
    rows: np.ndarray,
    seed: int,
    left_out: dict[str, str],
) -> LocatedProbes:
    """Fit probes of nouns at image tokens, and return the activations at their places.

    Parameters
    ----------
    model, store
        The model and a store of it.
    frame
        Table of the store, with the labels to use.
    examples
        Examples of the store by id; rows without an example are not used.
    rows
        Rows that probes may be fitted to.
    seed
        Seed of the choice of images and of the validation images.
    left_out
        Gets nouns without a probe, with the reason.
    """
    ids = frame["id"].to_numpy()
    images = _choose_images(frame, ids, examples, rows, seed)
    rows = rows & np.array([i in examples and examples[i].image.identity in images for i in ids])
    labels = presence_labels(frame, rows)
    nouns = sorted({noun for _, noun, _ in presence_labels(frame, np.ones(len(frame), bool))})
    sites = token_sites(store)
    if not labels or not sites:
        return LocatedProbes((), None, {})
    number = {identity: i for i, identity in enumerate(images)}
    at = {noun: k for k, noun in enumerate(nouns)}
    stated = {(number[examples[ids[row]].image.identity], at[noun]): holds for row, noun, holds in labels}
    presence = _as_presence(add_unlabelled(stated, len(images), seed))
    counts = np.stack([np.bincount(presence.noun[presence.holds == h], minlength=len(nouns)) for h in (False, True)])
    frequent = counts.min(0) >= MIN_POSITIVE
    share = {g: int(value_digest([g, "validation", seed])[:8], 16) / 0xFFFFFFFF for g in set(frame["group"])}
    group_of = {examples[i].image.identity: g for i, g in zip(ids[rows], frame["group"][rows], strict=True)}
    validation = np.array([share[group_of[identity]] < VALIDATION_SHARE for identity in images])
    embeddings = None if frequent.all() else embed_words(model, nouns)
    train_groups = tuple(sorted(set(group_of.values())))
    subjects = _subjects(frame, rows, nouns)
    directions: list[ConceptDirection] = []
    accuracy: dict[str, float] = {}
    totals: dict[int, np.ndarray] = {}  # number of tokens to the sum of decisions [images, T, nouns]
    length: dict[str, int] = {}
    unseen: list[float] = []
    with_probe = np.zeros(len(nouns), bool)
    for tokens in read_image_tokens(model, list(images.values()), sites):
        own = presence.where(frequent[presence.noun])
        probes, usable = NounProbes(np.zeros((0, 0)), np.zeros(0), float("nan")), np.zeros(len(nouns), bool)
        if len(own):
            probes, usable = fit_nouns(tokens, own, len(nouns), validation), frequent.copy()
        if embeddings is not None:
            shared = fit_nouns(tokens, presence, len(nouns), validation, embeddings)
            unseen.append(shared.accuracy)
            if shared.accuracy >= MIN_ACCURACY:
                probes, usable = _with_shared(probes, shared, usable), np.ones(len(nouns), bool)
        if not usable.any():
            continue
        accuracy[tokens.site], length[tokens.site] = probes.accuracy, tokens.mask.shape[1]
        with_probe |= usable
        statistics = {"balanced_accuracy": probes.accuracy, "validation": probes.accuracy}
        provenance = {
            "store": store.digest,
            "weights": model.weights_hash,
            "method": "labels of whole images, log-sum-exp over image tokens",
            POOLING: "max",
            "seed": seed,
        }
        directions += [
            ConceptDirection.from_weights(
                tokens.site, ALL_IMAGE_TOKENS, f"object:{nouns[k]}", weights, intercept=float(probes.intercepts[k]),
                statistics=statistics, provenance={**provenance, "shared": not frequent[k]}, train_groups=train_groups,
            )
            for k in np.flatnonzero(usable)
            if np.any(weights := tokens.widen(probes.weights[:, k]))
        ]  # fmt: skip
        decisions = np.where(usable, probes.decide(tokens), -np.inf)
        if subjects:
            added = site_weight(probes.accuracy) * decisions
            totals[decisions.shape[1]] = totals.get(decisions.shape[1], 0) + np.where(np.isnan(added), -np.inf, added)
    best = max((a for a in unseen if not np.isnan(a)), default=float("nan"))
    reason = f"fewer than {MIN_POSITIVE} images with it"
    if not np.isnan(best):
        reason += (
            f", and the probe that all nouns share reads other nouns with accuracy {best:.2f}, below {MIN_ACCURACY:g}"
        )
    left_out.update({f"object:{noun}": reason for noun, has in zip(nouns, with_probe, strict=True) if not has})
    for direction in directions:
        left_out.pop(direction.concept, None)
    places = {n: total.argmax(1) for n, total in totals.items()}  # [images, nouns]
    subjects = {row: at for row, at in subjects.items() if with_probe[list(at)].all()}
    of_length = {n: max(a for s, a in accuracy.items() if length[s] == n) for n in places}
    read = {site: of_length[n] for site, n in length.items() if n in places}
    if not subjects or not read:
        return LocatedProbes(tuple(directions), None, {})
    image_and_nouns = {row: (number[examples[ids[row]].image.identity], at) for row, at in subjects.items()}
    picked = {site: {image: places[length[site]][image] for image in range(len(images))} for site in read}
    values = read_picked_tokens(model, list(images.values()), picked)
    located = {site: _differences(values[site], image_and_nouns, len(ids)) for site in read}
    return LocatedProbes(tuple(directions), LocatedSource(store, frame, located), read)


def _differences(values: np.ndarray, image_and_nouns: Mapping[int, tuple[int, tuple[int, ...]]], n: int) -> np.ndarray:
    """Return ``[n, D]``: for each row the activation at its noun's place, or the difference of two; NaN for other rows.

    `values` are activations ``[images, nouns, D]``; `image_and_nouns` has the image and the nouns of each row.
    """
    out = np.full((n, values.shape[2]), np.nan, dtype=np.float32)
    for row, (image, nouns) in image_and_nouns.items():
        parts = values[image, list(nouns)]
        out[row] = parts[0] if len(parts) == 1 else parts[0] - parts[1]
    return out


def _as_presence(labels: Mapping[tuple[int, int], bool]) -> Presence:
    images, nouns = zip(*labels, strict=True)
    return Presence(np.array(images), np.array(nouns), np.array(list(labels.values()), bool))


def _choose_images(
    frame: pd.DataFrame, ids: np.ndarray, examples: Mapping[str, Example], rows: np.ndarray, seed: int
) -> dict[str, Example]:
    """Return at most `MAX_IMAGES` images of some rows by identity, in an order that depends only on group and seed."""
    del frame
    usable = [examples[i] for i in ids[rows] if i in examples]
    by_identity = {e.image.identity: e for e in usable}
    if len(by_identity) <= MAX_IMAGES:
        return by_identity
    order = sorted(by_identity, key=lambda identity: value_digest([by_identity[identity].group, identity, seed]))
    return {identity: by_identity[identity] for identity in order[:MAX_IMAGES]}


def _subjects(frame: pd.DataFrame, rows: np.ndarray, nouns: Sequence[str]) -> dict[int, tuple[int, ...]]:
    """Return the nouns of each row about an attribute (one) or a relation (two), as indices; other rows are missing."""
    names, at = Names(nouns, numbers=True), {noun: k for k, noun in enumerate(nouns)}
    subjects = {}
    for row in np.flatnonzero(rows):
        level = frame["level"].iloc[row]
        if level in ("attribute", "relation"):
            indices = tuple(dict.fromkeys(at[name] for name in names.find(str(frame["question"].iloc[row]))))
            if level == "attribute" and indices:
                subjects[int(row)] = indices[:1]
            elif len(indices) == 2:
                subjects[int(row)] = indices
    return subjects


def _with_shared(own: NounProbes, shared: NounProbes, has_own: np.ndarray) -> NounProbes:
    """Return own probes where they exist, and the shared probe for other nouns."""
    if not has_own.any():
        return shared
    return NounProbes(
        np.where(has_own, own.weights, shared.weights),
        np.where(has_own, own.intercepts, shared.intercepts),
        own.accuracy,
    )


def embed_words(model: Lvlm, words: Sequence[str]) -> np.ndarray:
    """Return the mean input embedding of the tokens of each word, float64 ``[words, E]``."""
    tokenizer, table = model.processor.tokenizer, model.hf.get_input_embeddings()
    rows = []
    with torch.no_grad():
        for word in words:
            ids = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
            rows.append(table(torch.tensor(ids, device=model.device)).double().mean(0).cpu().numpy())
    return np.stack(rows)


def fit_located(
    probes: LocatedProbes, concepts: Mapping[str, Sequence[str]], fit: Any, rows: np.ndarray
) -> Iterator[ConceptDirection]:
    """Yield directions of attributes and relations at the places of their nouns.

    Parameters
    ----------
    probes
        Result of `locate`.
    concepts
        Level to its concepts.
    fit
        Function of source, concepts, site, token selection and rows that yields directions (`diagnosis.fit`).
    rows
        Rows that probes may be fitted to.
    """
    if probes.source is None:
        return
    frame = probes.source.frame()
    directions: list[tuple[str, ConceptDirection]] = []
    for level, names in concepts.items():
        rows_of_level = rows & (frame["level"] == level).to_numpy()
        for info in probes.source.arrays:
            site = f"{info.stack}.{info.component}"
            directions += [(level, d) for d in fit(probes.source, names, site, _TOKENS, rows_of_level)]
    relations: dict[str, list[float]] = {}
    for level, direction in directions:
        if level == "relation":
            relations.setdefault(direction.site, []).append(direction.statistics["balanced_accuracy"])
    # Places are those of all sites together, so the best site shows how often they are right.
    best = max((float(np.mean(values)) for values in relations.values()), default=float("nan"))
    for _, direction in directions:
        share = placed_share(probes.accuracy[direction.site], best)
        yield replace(direction, tokens=ALL_IMAGE_TOKENS, statistics={**direction.statistics, PLACED: share})
