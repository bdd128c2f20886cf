"""Checks of the inputs of a diagnosis before any work starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from activation_store import ActivationStore
from concepts.schema import Example
from diagnosis.claims import Claim
from diagnosis.probe_sets import ProbeSet
from groundscope.core.errors import DataError, SiteError, StoreError
from lvlm.model import Lvlm
from lvlm.token_selection import ALL_IMAGE_TOKENS
from lvlm.weights_hash import short


def check_store(model: Lvlm, store: ActivationStore) -> None:
    """Raise `StoreError` if a store was traced from another model."""
    weights = store.provenance.get("model", {}).get("weights")
    if not isinstance(weights, str) or not model.has_weights(weights):
        msg = (
            f"the store at {store.path} was traced from weights {short(str(weights))}, but {model.name} has "
            f"{short(model.weights_hash)}; trace this model"
        )
        raise StoreError(msg)


def check_sites(store: ActivationStore, sets: Sequence[ProbeSet]) -> None:
    """Raise `SiteError`, which names every missing array and the command that traces it."""
    required = {
        (s.site.split(".")[0], s.site.split(".", 2)[-1] if s.stage != "projector" else "out", s.tokens) for s in sets
    }
    required = {w for w in required if w[2] != ALL_IMAGE_TOKENS} | {("decoder", "z", "last")}
    missing = sorted(w for w in required if not store.has(*w))
    if not missing and "model_answer" in store.columns:
        return
    traced = {(a.stack, a.component, str(a.tokens)) for a in store.arrays} | set(missing)
    sites = sorted({f"{'' if stack == 'decoder' else f'{stack}.'}{component}" for stack, component, _ in traced})
    tokens = sorted({t for _, _, t in traced})
    lacks = ", ".join(f"{a}.{b} at {t}" for a, b, t in missing) or "the answers of the model"
    msg = f"the store at {store.path} lacks {lacks}: trace(model, data, sites={sites}, tokens={tokens}, out=…)"
    raise SiteError(msg)


def check_known(answers: Sequence[Example], claims: Mapping[str, Claim]) -> None:
    """Raise `DataError` for an example that is not in the store or has no answer of the model, or for no examples."""
    unknown = [e.id for e in answers if e.id not in claims]
    if unknown or not answers:
        what = f"example '{unknown[0]}' ({len(unknown)} such)" if unknown else "no answers"
        msg = f"{what}: only examples in the store with candidate answers can be diagnosed; trace them first"
        raise DataError(msg)
