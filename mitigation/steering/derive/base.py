"""What every derivation of a steering vector is made of: reading activations, means, directions, where it came from."""

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
"""The form that a paper gives, or that of its authors' code where it departs from it."""


class Store(Protocol):
    """What is needed of an `ActivationStore`."""

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Where it came from; ``model`` holds the model's ``name`` and ``config`` hash."""
        ...

    @property
    def digest(self) -> str:
        """SHA-256 that identifies its content."""
        ...

    def read(self, site: str | Site, tokens: str, head: int | None = None, examples: Any = None) -> np.ndarray:
        """Return activations, float32 ``[n, d]``."""
        ...

    def frame(self) -> pd.DataFrame:
        """Return one row an example, with a column for each concept (NaN where undefined)."""
        ...

    def __len__(self) -> int: ...


def unit_difference(positive: np.ndarray, negative: np.ndarray, key: Key) -> Entry:
    """Return the unit difference of two means, with the standard deviation of all projections on it."""
    difference = mean(positive, key) - mean(negative, key)
    return along(difference, np.concatenate([positive, negative]), key)


def along(direction: np.ndarray, x: np.ndarray, key: Key) -> Entry:
    """Return a direction ``[d]``, made unit, with the standard deviation of the projections of ``[n, d]`` on it."""
    length = float(np.linalg.norm(direction))
    unit = direction / length if length > 0 else direction
    sigma = float(np.std(x @ unit))
    if not sigma > 0:
        msg = f"at {name_of(key)} the two means coincide: there is no direction"
        raise PatchError(msg)
    return Entry(unit, sigma)


def mean(x: np.ndarray, key: Key) -> np.ndarray:
    """Return the mean of rows; raises `PatchError` where there are none."""
    if not len(x):
        msg = f"no examples on one side at {name_of(key)}: both sides need at least one"
        raise PatchError(msg)
    return x.mean(axis=0)


def two_sides(
    store: Store, concept: Concept | str | None, positive: np.ndarray | None, negative: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return boolean masks ``[N]`` of the positive and the negative examples: of a concept, or as they were given.

    Raises
    ------
    PatchError
        For both or neither, a mask of another length, or masks that overlap.
    SiteError
        Where the store lacks the concept.
    """
    if (concept is None) == (positive is None) or (concept is not None and negative is not None):
        msg = "say either which concept, or which examples are positive (and which negative)"
        raise PatchError(msg)
    if concept is not None:
        truth = labels_of(store, str(concept))
        return truth == 1, truth == 0
    right = checked_mask(positive, len(store))
    wrong = ~right if negative is None else checked_mask(negative, len(store))
    if (right & wrong).any():
        msg = f"{int((right & wrong).sum())} examples are both positive and negative"
        raise PatchError(msg)
    return right, wrong


def check_variant(variant: str, variants: Sequence[str] = ("paper", "release")) -> None:
    """Raise `ConfigError` for a variant that a method does not have."""
    if variant not in variants:
        msg = f"variant='{variant}': choose 'paper', or {' or '.join(map(repr, variants[1:]))} for a form of the released code"
        raise ConfigError(msg)


def keys_of(heads: Iterable[Head | str], layers: Iterable[int], sites: Iterable[Site | str] = ()) -> tuple[Key, ...]:
    """Return heads, layers and other sites as keys of entries; raises `PatchError` where there are none."""
    others = (Site.parse(s) if isinstance(s, str) else s for s in sites)
    keys: tuple[Key, ...] = (*parse_heads(heads), *layers, *(canonical(s) for s in others))
    if not keys:
        msg = "no heads and no layers to act on: pass heads=scores.top(8), say"
        raise PatchError(msg)
    return tuple(dict.fromkeys(keys))


def labels_of(store: Store, concept: str) -> np.ndarray:
    """Return the labels of a concept, float ``[N]``, NaN where undefined."""
    frame = store.frame()
    if concept not in frame.columns:
        there = ", ".join(str(c) for c in frame.columns if ":" in str(c))
        msg = f"concept '{concept}' has no labels in the store: there are {there or 'none'}"
        raise SiteError(msg)
    return frame[concept].to_numpy(dtype=np.float64)


def checked_mask(mask: object, size: int) -> np.ndarray:
    """Return a boolean mask; raises `PatchError` where it is not one of `size` examples."""
    array = np.asarray(mask)
    if array.dtype != np.bool_ or array.shape != (size,):
        msg = f"a mask of {array.dtype} {list(array.shape)}: it must be boolean [{size}], one for each example of the store"
        raise PatchError(msg)
    return array


def read(store: Store, key: Key, tokens: str) -> np.ndarray:
    """Return activations in float64 ``[N, d]``: sums over many float32 rows would lose digits."""
    if isinstance(key, Head):
        site = traced_heads(store).get(key.layer, site_of(key))
        return store.read(site, tokens, head=key.head).astype(np.float64)
    return store.read(site_of(key), tokens).astype(np.float64)


def traced_heads(store: Store) -> dict[int, Site]:
    """Return by layer where a store holds its heads: in cross-attention for layers traced there and not in ``z``."""
    arrays: Sequence[ArrayInfo] = getattr(store, "arrays", ())
    own, cross = (
        {layer for a in arrays if (a.stack, a.component) == ("decoder", name) for layer in a.layers}
        for name in ("z", "cross.z")
    )
    found = {layer: Site("decoder", layer, "z") for layer in own}
    if own:
        found |= {layer: Site("decoder", layer, "z", cross=True) for layer in cross - own}
    return dict(sorted(found.items()))


def sides(pairs: Sequence[CounterfactualPair]) -> tuple[list[Example], list[Example]]:
    """Return the clean and the corrupt examples; raises `PatchError` where there are none."""
    if not pairs:
        msg = "no pairs: counterfactuals.pairs(data, kind='blank') makes them"
        raise PatchError(msg)
    return [p.clean for p in pairs], [p.corrupt for p in pairs]


@dataclass(frozen=True)
class Made:
    """What becomes of the entries that a derivation fits."""

    method: str
    tokens: str
    """Token selection the activations were read at."""
    positions: Positions
    strength: float
    kind: Kind = "add"
    more: Mapping[str, Any] = field(default_factory=dict)
    """Further provenance."""


def by_sides(
    store: Store,
    told: tuple[Concept | str | None, np.ndarray | None, np.ndarray | None],
    keys: Sequence[Key],
    fit: Callable[[np.ndarray, np.ndarray, Key], Entry],
    made: Made,
) -> SteeringVector:
    """Fit every place to the activations ``[n, d]`` of the positive and of the negative examples.

    Parameters
    ----------
    store
        With the places' activations.
    told
        Concept, or else masks of the positive and the negative examples, as `two_sides` takes them.
    keys
        The places.
    fit
        From both sides' activations to what is done there. Rows that are undefined are left out before.
    made
        What the vector is.
    """
    right, wrong = two_sides(store, *told)
    entries: dict[Key, Entry] = {}
    for key in keys:
        x = read(store, key, made.tokens)
        there = ~np.isnan(x).any(axis=1)
        entries[key] = fit(x[right & there], x[wrong & there], key)
    about = {
        "method": made.method,
        "concept": None if told[0] is None else str(told[0]),
        "positive": int(right.sum()),
        "negative": int(wrong.sum()),
        "tokens": made.tokens,
        **made.more,
    }
    return made_from_store(store, entries, made.kind, made.positions, made.strength, about)


def by_pairs(
    model: Lvlm,
    pairs: Sequence[CounterfactualPair],
    keys: Sequence[Key],
    fit: Callable[[np.ndarray, np.ndarray, Key], Entry],
    made: Made,
) -> SteeringVector:
    """Fit every place to what the clean and the corrupt side of pairs leave there, ``[n, d]`` each, pair by pair.

    Parameters
    ----------
    model
        The model to steer.
    pairs
        At least one.
    keys
        The places.
    fit
        From both sides' activations to what is done there.
    made
        What the vector is; its tokens are ``last`` or ``suffix``.
    """
    check_image_reaches(model, pairs, keys)
    clean, corrupt = (activations(model, side, keys, made.tokens) for side in sides(pairs))
    entries = {key: fit(clean[key], corrupt[key], key) for key in keys}
    how = (made.method, made.tokens)
    return made_from_pairs(model, pairs, entries, made.kind, made.positions, made.strength, how)


def activations(model: Lvlm, examples: Sequence[Example], keys: Sequence[Key], tokens: str) -> dict[Key, np.ndarray]:
    """Run examples and return what is at each head or layer, float64 ``[n, d]``: at the last token, or mean over the suffix."""
    if tokens not in ("last", "suffix"):
        msg = f"tokens='{tokens}': choose 'last' or 'suffix'"
        raise SiteError(msg)
    if any(site_of(key).stack != "decoder" for key in keys):
        msg = f"sites {', '.join(map(name_of, keys))}: tokens='{tokens}' are read in the decoder"
        raise SiteError(msg)
    wrong = [name_of(k) for k in keys if isinstance(k, Head) and not 0 <= k.head < model.n_heads]
    if wrong:
        msg = f"heads {', '.join(wrong)}: {model.name} has {model.n_heads} heads in each layer"
        raise SiteError(msg)
    where = {key: site_in(model, key) for key in keys}
    sites = {site: model.locate(site) for site in dict.fromkeys(where.values())}
    rows: dict[Key, list[np.ndarray]] = {key: [np.empty(0)] * len(examples) for key in keys}
    with progress_bar() as bar:
        task = bar.add_task("reading activations", total=len(examples))
        for batch in model.batches(examples, batch_rows(model, examples, 32)):
            starts = [e.tokens.last if tokens == "last" else e.tokens.suffix[0] for e in batch.encodings]
            seen = _seen(model, batch.inputs, sites, starts)
            for row, number in enumerate(batch.index):
                for key in keys:
                    x = seen[where[key]][row]
                    if isinstance(key, Head):
                        x = x[key.head * model.head_dim : (key.head + 1) * model.head_dim]
                    rows[key][number] = x
            bar.advance(task, len(batch.index))
    return {key: np.stack(values) for key, values in rows.items()}


def first_image_layer(model: Lvlm) -> int:
    """Return the first decoder layer that can depend on the image: 0, or the first of cross-attention alone."""
    return next((i for i in range(model.n_layers) if model.head_site(i).cross), 0)


def check_image_reaches(model: Lvlm, pairs: Sequence[CounterfactualPair], keys: Sequence[Key]) -> None:
    """Raise `ModelError` for a place before the first layer that reads the image, where pairs differ in the image alone."""
    first = first_image_layer(model)
    early = [key for key in keys if site_of(key).stack == "decoder" and site_of(key).layer < first]
    if early and pairs and all(pair.clean.question == pair.corrupt.question for pair in pairs):
        msg = (
            f"{name_of(early[0])} comes before layer {first}, the first of {model.name} ({model.spec.model_type}) whose "
            f"cross-attention reads the image, so a changed image changes nothing there: choose layers from {first} on"
        )
        raise ModelError(msg)


def site_in(model: Lvlm, key: Key) -> Site:
    """Return the site of an entry in a model: heads of a layer of cross-attention alone are in that."""
    if isinstance(key, Head) and 0 <= key.layer < model.n_layers:
        return model.head_site(key.layer)
    return site_of(key)


def _seen(
    model: Lvlm, inputs: Mapping[str, Tensor], sites: Mapping[Site, Place], starts: Sequence[int]
) -> dict[Site, np.ndarray]:
    """Run a batch and return each site's mean from a position of each row on, float64 ``[B, D]``."""
    seen: dict[Site, np.ndarray] = {}
    with ExitStack() as hooks:
        for site, place in sites.items():

            def see(x: Tensor, site: Site = site) -> None:
                rows = [row[start:].detach().double().cpu().numpy() for row, start in zip(x, starts, strict=True)]
                seen[site] = np.stack([row.mean(axis=0) for row in rows])

            hooks.callback(place.watch(see).remove)
        model.logits(inputs)
    return seen


def made_from_store(
    store: Store,
    entries: Mapping[Key, Entry],
    kind: Kind,
    positions: Positions,
    strength: float,
    about: Mapping[str, Any],
) -> SteeringVector:
    """Make a vector for the model that a store was traced from."""
    origin = store.provenance.get("model", {})
    provenance = {**about, "store": store.digest}
    return SteeringVector(
        entries, kind, positions, strength, str(origin.get("name", "")), str(origin.get("config", "")), provenance
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
    """Make a vector for a model from pairs; `how` names the method and the tokens read."""
    from circuits.patching.activation import pairs_digest

    about = {
        "method": how[0],
        "tokens": how[1],
        "pairs": len(pairs),
        "kinds": sorted({p.kind for p in pairs}),
        "pairs_digest": pairs_digest(pairs),
        "weights": model.weights_hash,
    }
    return SteeringVector(entries, kind, positions, strength, model.name, model.config_hash, about)
