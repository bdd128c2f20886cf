"""Read activations for derivations: from a store, or by running a model on examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np

from circuits.execution.memory import batch_rows
from concepts.counterfactual_pair import CounterfactualPair
from groundscope.core.errors import ModelError, PatchError, SiteError
from groundscope.core.progress import progress_bar
from lvlm.sites import Head, Site
from lvlm.token_selection import TokenSelection
from mitigation.steering.places import Key, name_of, site_of

if TYPE_CHECKING:
    from torch import Tensor

    from activation_store import ActivationSource
    from activation_store.format.schema import ArrayInfo
    from concepts.schema import Example
    from lvlm.model import HookPoint, Lvlm


def read(store: ActivationSource, key: Key, tokens: str) -> np.ndarray:
    """Return activations in float64 ``[N, d]``, because sums over many float32 rows lose precision."""
    if isinstance(key, Head):
        site = traced_heads(store).get(key.layer, site_of(key))
        return store.read(site, tokens, head=key.head).astype(np.float64)
    return store.read(site_of(key), tokens).astype(np.float64)


def traced_heads(store: ActivationSource) -> dict[int, Site]:
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


def labels_of(store: ActivationSource, concept: str) -> np.ndarray:
    """Return the labels of a concept, float ``[N]``, NaN where undefined."""
    frame = store.frame()
    if concept not in frame.columns:
        available = ", ".join(str(c) for c in frame.columns if ":" in str(c))
        msg = f"concept '{concept}' has no labels in the store; " + (
            f"choose from {available}" if available else "it has no concepts"
        )
        raise SiteError(msg)
    return frame[concept].to_numpy(dtype=np.float64)


def mean(x: np.ndarray, key: Key) -> np.ndarray:
    """Return the mean of rows; raises `PatchError` if there are no rows."""
    if not len(x):
        msg = f"no examples on one side at {name_of(key)}: both sides need at least one"
        raise PatchError(msg)
    return x.mean(axis=0)


def run(
    model: Lvlm, examples: Sequence[Example], keys: Sequence[Key], tokens: str, *, progress: bool | None = None
) -> dict[Key, np.ndarray]:
    """Run examples and return the activations of each place, float64 ``[n, d]``: at the last token, or mean over the suffix."""
    TokenSelection.parse(tokens, allowed=("last", "suffix:mean"))
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
    with progress_bar(progress) as bar:
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
    """Return the site of a place in a model; heads of a pure cross-attention layer are in the cross-attention."""
    if isinstance(key, Head) and 0 <= key.layer < model.n_layers:
        return model.head_site(key.layer)
    return site_of(key)


def _means_from(
    model: Lvlm, inputs: Mapping[str, Tensor], sites: Mapping[Site, HookPoint], starts: Sequence[int]
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
