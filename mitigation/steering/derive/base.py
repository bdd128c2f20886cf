"""Shared parts of derivations of steering vectors: read activations, compute means and directions, record provenance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from circuits.execution.memory import batch_rows
from concepts.schema import Concept, CounterfactualPair
from groundscope.core.errors import ConfigError, ModelError, PatchError, SiteError
from groundscope.core.progress import progress_bar
from lvlm.sites import Head, Site, parse_heads
from mitigation.steering.placement import Entry, Key, canonical, name_of, site_of
from mitigation.steering.vector import Kind, Positions, SteeringVector

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from activation_store.format.schema import ArrayInfo
    from concepts.schema import Example
    from lvlm.model import Lvlm, Place


Variant = Literal["paper", "release"]
"""The form in the paper, or the form in the authors' code where the two differ."""


class Store(Protocol):
    """The part of `ActivationStore` that derivations use."""

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Origin of the store; ``model`` contains the model's ``name`` and ``config`` hash."""
        ...

    @property
    def digest(self) -> str:
        """SHA-256 that identifies the content."""
        ...

    def read(self, site: str | Site, tokens: str, head: int | None = None, examples: Any = None) -> np.ndarray:
        """Return activations, float32 ``[n, d]``."""
        ...

    def frame(self) -> pd.DataFrame:
        """Return one row per example, with a column for each concept (NaN where undefined)."""
        ...

    def __len__(self) -> int: ...


def unit_difference(positive: np.ndarray, negative: np.ndarray, key: Key) -> Entry:
    """Return the unit difference of two means, with the standard deviation of all projections on it."""
    difference = mean(positive, key) - mean(negative, key)
    return along(difference, np.concatenate([positive, negative]), key)


def along(direction: np.ndarray, x: np.ndarray, key: Key) -> Entry:
    """Return a normalized direction ``[d]`` with the standard deviation of the projections of ``[n, d]`` on it."""
    length = float(np.linalg.norm(direction))
    unit = direction / length if length > 0 else direction
    sigma = float(np.std(x @ unit))
    if not sigma > 0:
        msg = f"at {name_of(key)} the two means are equal, so the direction is undefined"
        raise PatchError(msg)
    return Entry(unit, sigma)


def mean(x: np.ndarray, key: Key) -> np.ndarray:
    """Return the mean of rows; raises `PatchError` if there are no rows."""
    if not len(x):
        msg = f"no examples on one side at {name_of(key)}: both sides need at least one"
        raise PatchError(msg)
    return x.mean(axis=0)


def two_sides(
    store: Store, concept: Concept | str | None, positive: np.ndarray | None, negative: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return boolean masks ``[N]`` of the positive and the negative examples, from a concept or from masks.

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
    if concept is not None:
        truth = labels_of(store, str(concept))
        return truth == 1, truth == 0
    positive_mask = checked_mask(positive, len(store))
    negative_mask = ~positive_mask if negative is None else checked_mask(negative, len(store))
    if (positive_mask & negative_mask).any():
        msg = f"{int((positive_mask & negative_mask).sum())} examples are both positive and negative; the masks must not overlap"
        raise PatchError(msg)
    return positive_mask, negative_mask


def check_variant(variant: str, variants: Sequence[str] = ("paper", "release")) -> None:
    """Raise `ConfigError` for a variant that a method does not have."""
    if variant not in variants:
        msg = f"unknown variant '{variant}'; choose 'paper', or {' or '.join(map(repr, variants[1:]))} for the released code"
        raise ConfigError(msg)


def keys_of(heads: Iterable[Head | str], layers: Iterable[int], sites: Iterable[Site | str] = ()) -> tuple[Key, ...]:
    """Return heads, layers and other sites as keys of entries; raises `PatchError` if all are empty."""
    others = (Site.parse(s) if isinstance(s, str) else s for s in sites)
    keys: tuple[Key, ...] = (*parse_heads(heads), *layers, *(canonical(s) for s in others))
    if not keys:
        msg = "no heads, layers or sites to act on; pass for example heads=scores.top(8)"
        raise PatchError(msg)
    return tuple(dict.fromkeys(keys))


def labels_of(store: Store, concept: str) -> np.ndarray:
    """Return the labels of a concept, float ``[N]``, NaN where undefined."""
    frame = store.frame()
    if concept not in frame.columns:
        available = ", ".join(str(c) for c in frame.columns if ":" in str(c))
        msg = f"concept '{concept}' has no labels in the store; " + (
            f"choose from {available}" if available else "it has no concepts"
        )
        raise SiteError(msg)
    return frame[concept].to_numpy(dtype=np.float64)


def checked_mask(mask: object, size: int) -> np.ndarray:
    """Return a boolean mask; raises `PatchError` if it is not boolean of shape ``[size]``."""
    array = np.asarray(mask)
    if array.dtype != np.bool_ or array.shape != (size,):
        msg = f"a mask of {array.dtype} {list(array.shape)}: it must be boolean [{size}], one value per example of the store"
        raise PatchError(msg)
    return array


def read(store: Store, key: Key, tokens: str) -> np.ndarray:
    """Return activations in float64 ``[N, d]``, because sums over many float32 rows lose precision."""
    if isinstance(key, Head):
        site = traced_heads(store).get(key.layer, site_of(key))
        return store.read(site, tokens, head=key.head).astype(np.float64)
    return store.read(site_of(key), tokens).astype(np.float64)


def traced_heads(store: Store) -> dict[int, Site]:
    """Return the site of each layer's heads in a store: cross-attention for layers that are traced only there."""
    arrays: Sequence[ArrayInfo] = getattr(store, "arrays", ())
    self_layers, cross_layers = (
        {layer for a in arrays if (a.stack, a.component) == ("decoder", name) for layer in a.layers}
        for name in ("z", "cross.z")
    )
    site_of_layer = {layer: Site("decoder", layer, "z") for layer in self_layers}
    if self_layers:
        site_of_layer |= {layer: Site("decoder", layer, "z", cross=True) for layer in cross_layers - self_layers}
    return dict(sorted(site_of_layer.items()))


def sides(pairs: Sequence[CounterfactualPair]) -> tuple[list[Example], list[Example]]:
    """Return the clean and the corrupt examples; raises `PatchError` if there are no pairs."""
    if not pairs:
        msg = "no pairs; build them, for example with counterfactuals.pairs(data, kind='blank')"
        raise PatchError(msg)
    return [p.clean for p in pairs], [p.corrupt for p in pairs]


@dataclass(frozen=True)
class DerivationSpec:
    """Settings of a derivation that become the vector's kind, positions, strength and provenance."""

    method: str
    tokens: str
    """Token selection that activations are read at."""
    positions: Positions
    strength: float
    kind: Kind = "add"
    more: Mapping[str, Any] = field(default_factory=dict)
    """Additional provenance."""


def by_sides(
    store: Store,
    contrast: tuple[Concept | str | None, np.ndarray | None, np.ndarray | None],
    keys: Sequence[Key],
    fit: Callable[[np.ndarray, np.ndarray, Key], Entry],
    spec: DerivationSpec,
) -> SteeringVector:
    """Fit an entry at every place from the activations ``[n, d]`` of the positive and of the negative examples.

    Parameters
    ----------
    store
        Store with the activations of the places.
    contrast
        ``(concept, positive, negative)``: a concept or masks, as for `two_sides`.
    keys
        The places.
    fit
        Function from positive activations, negative activations and the place to its entry; undefined rows are excluded.
    spec
        Settings of the derivation.
    """
    positive, negative = two_sides(store, *contrast)
    entries: dict[Key, Entry] = {}
    for key in keys:
        x = read(store, key, spec.tokens)
        defined = ~np.isnan(x).any(axis=1)
        entries[key] = fit(x[positive & defined], x[negative & defined], key)
    provenance = {
        "method": spec.method,
        "concept": None if contrast[0] is None else str(contrast[0]),
        "positive": int(positive.sum()),
        "negative": int(negative.sum()),
        "tokens": spec.tokens,
        **spec.more,
    }
    return made_from_store(store, entries, spec.kind, spec.positions, spec.strength, provenance)


def by_pairs(
    model: Lvlm,
    pairs: Sequence[CounterfactualPair],
    keys: Sequence[Key],
    fit: Callable[[np.ndarray, np.ndarray, Key], Entry],
    spec: DerivationSpec,
) -> SteeringVector:
    """Fit an entry at every place from the activations of the clean and the corrupt examples, ``[n, d]`` each, paired.

    Parameters
    ----------
    model
        The model to steer.
    pairs
        At least one pair.
    keys
        The places.
    fit
        Function from clean activations, corrupt activations and the place to its entry.
    spec
        Settings of the derivation; its tokens are ``last`` or ``suffix``.
    """
    check_image_reaches(model, pairs, keys)
    clean, corrupt = (activations(model, side, keys, spec.tokens) for side in sides(pairs))
    entries = {key: fit(clean[key], corrupt[key], key) for key in keys}
    method_and_tokens = (spec.method, spec.tokens)
    return made_from_pairs(model, pairs, entries, spec.kind, spec.positions, spec.strength, method_and_tokens)


def activations(model: Lvlm, examples: Sequence[Example], keys: Sequence[Key], tokens: str) -> dict[Key, np.ndarray]:
    """Run examples and return the activations of each place, float64 ``[n, d]``: at the last token, or mean over the suffix."""
    if tokens not in ("last", "suffix"):
        msg = f"unknown tokens '{tokens}'; choose 'last' or 'suffix'"
        raise SiteError(msg)
    if any(site_of(key).stack != "decoder" for key in keys):
        msg = f"sites {', '.join(map(name_of, keys))}: tokens='{tokens}' can be read only at sites of the decoder"
        raise SiteError(msg)
    invalid = [name_of(k) for k in keys if isinstance(k, Head) and not 0 <= k.head < model.n_heads]
    if invalid:
        msg = f"heads {', '.join(invalid)}: {model.name} has {model.n_heads} heads in each layer"
        raise SiteError(msg)
    site_of_key = {key: site_in(model, key) for key in keys}
    sites = {site: model.locate(site) for site in dict.fromkeys(site_of_key.values())}
    rows: dict[Key, list[np.ndarray]] = {key: [np.empty(0)] * len(examples) for key in keys}
    with progress_bar() as bar:
        task = bar.add_task("reading activations", total=len(examples))
        for batch in model.batches(examples, batch_rows(model, examples, 32)):
            starts = [e.tokens.last if tokens == "last" else e.tokens.suffix[0] for e in batch.encodings]
            means = _means_from(model, batch.inputs, sites, starts)
            for row, number in enumerate(batch.index):
                for key in keys:
                    x = means[site_of_key[key]][row]
                    if isinstance(key, Head):
                        x = x[key.head * model.head_dim : (key.head + 1) * model.head_dim]
                    rows[key][number] = x
            bar.advance(task, len(batch.index))
    return {key: np.stack(values) for key, values in rows.items()}


def first_image_layer(model: Lvlm) -> int:
    """Return the first decoder layer that can depend on the image: 0, or the first pure cross-attention layer."""
    return next((i for i in range(model.n_layers) if model.head_site(i).cross), 0)


def check_image_reaches(model: Lvlm, pairs: Sequence[CounterfactualPair], keys: Sequence[Key]) -> None:
    """Raise `ModelError` for a place before the first layer that reads the image, if pairs differ only in the image."""
    first = first_image_layer(model)
    early = [key for key in keys if site_of(key).stack == "decoder" and site_of(key).layer < first]
    if early and pairs and all(pair.clean.question == pair.corrupt.question for pair in pairs):
        msg = (
            f"{name_of(early[0])} comes before layer {first}, the first of {model.name} ({model.spec.model_type}) whose "
            f"cross-attention reads the image, so a changed image has no effect there; choose layers >= {first}"
        )
        raise ModelError(msg)


def site_in(model: Lvlm, key: Key) -> Site:
    """Return the site of an entry in a model; heads of a pure cross-attention layer are in the cross-attention."""
    if isinstance(key, Head) and 0 <= key.layer < model.n_layers:
        return model.head_site(key.layer)
    return site_of(key)


def _means_from(
    model: Lvlm, inputs: Mapping[str, Tensor], sites: Mapping[Site, Place], starts: Sequence[int]
) -> dict[Site, np.ndarray]:
    """Run a batch and return each site's mean over the positions from `starts` to the end, float64 ``[B, D]``."""
    means: dict[Site, np.ndarray] = {}
    with ExitStack() as hooks:
        for site, place in sites.items():

            def store_mean(x: Tensor, site: Site = site) -> None:
                rows = [row[start:].detach().double().cpu().numpy() for row, start in zip(x, starts, strict=True)]
                means[site] = np.stack([row.mean(axis=0) for row in rows])

            hooks.callback(place.watch(store_mean).remove)
        model.logits(inputs)
    return means


def made_from_store(
    store: Store,
    entries: Mapping[Key, Entry],
    kind: Kind,
    positions: Positions,
    strength: float,
    provenance: Mapping[str, Any],
) -> SteeringVector:
    """Build a vector for the model that a store was traced from."""
    model = store.provenance.get("model", {})
    provenance = {**provenance, "store": store.digest}
    return SteeringVector(
        entries, kind, positions, strength, str(model.get("name", "")), str(model.get("config", "")), provenance
    )


def made_from_pairs(
    model: Lvlm,
    pairs: Sequence[CounterfactualPair],
    entries: Mapping[Key, Entry],
    kind: Kind,
    positions: Positions,
    strength: float,
    how: tuple[str, str],
) -> SteeringVector:
    """Build a vector for a model from pairs; `how` contains the method's name and the token selection."""
    from circuits.patching.activation import pairs_digest

    provenance = {
        "method": how[0],
        "tokens": how[1],
        "pairs": len(pairs),
        "kinds": sorted({p.kind for p in pairs}),
        "pairs_digest": pairs_digest(pairs),
        "weights": model.weights_hash,
    }
    return SteeringVector(entries, kind, positions, strength, model.name, model.config_hash, provenance)
