"""What a diagnosis is given, checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from activation_store import ActivationStore
from concepts.schema import Example
from diagnosis.claims import Claim
from diagnosis.probe_sets import EVERY, ProbeSet
from groundscope.core.errors import DataError, SiteError, StoreError
from lvlm.model import Lvlm
from lvlm.weights_hash import short


def check_store(model: Lvlm, store: ActivationStore) -> None:
    """Raise `StoreError` where a store was traced from another model."""
    weights = store.provenance.get("model", {}).get("weights")
    if not isinstance(weights, str) or not model.has_weights(weights):
        msg = (
            f"the store at {store.path} was traced from weights {short(str(weights))}, {model.name} has "
            f"{short(model.weights_hash)}: trace this model"
        )
        raise StoreError(msg)


def check_sites(store: ActivationStore, sets: Sequence[ProbeSet]) -> None:
    """Raise `SiteError` naming every array that is missing and the command that traces it."""
    wanted = {
        (s.site.split(".")[0], s.site.split(".", 2)[-1] if s.stage != "projector" else "out", s.tokens) for s in sets
    }
    wanted = {w for w in wanted if w[2] != EVERY} | {("decoder", "z", "last")}
    missing = sorted(w for w in wanted if not store.has(*w))
    if not missing and "model_answer" in store.columns:
        return
    have = {(a.stack, a.component, str(a.tokens)) for a in store.arrays} | set(missing)
    sites = sorted({f"{'' if stack == 'decoder' else f'{stack}.'}{component}" for stack, component, _ in have})
    tokens = sorted({t for _, _, t in have})
    lacks = ", ".join(f"{a}.{b} at {t}" for a, b, t in missing) or "the model's own answers"
    msg = f"the store at {store.path} lacks {lacks}: trace(model, data, sites={sites}, tokens={tokens}, out=…)"
    raise SiteError(msg)


def check_known(answers: Sequence[Example], claims: Mapping[str, Claim]) -> None:
    """Raise `DataError` naming an answer that is not in the store, or where there are none."""
    unknown = [e.id for e in answers if e.id not in claims]
    if unknown or not answers:
        what = f"example '{unknown[0]}' ({len(unknown)} such)" if unknown else "no answers"
        msg = f"{what}: a diagnosis is of examples in the store that have answers to choose from; trace them first"
        raise DataError(msg)
