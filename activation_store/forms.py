"""Forms of provenance: what earlier releases recorded is compared with what this one records, as far as that goes.

Version 1 (no ``version``) knew a model's weights by a sample, its processor without merges and normalizer, and neither the
attention implementation nor what was applied to the model. Version 2 records all of that, and the digests of version 1
next to it, so that stores of both can be compared.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

VERSION = 2
_SINCE_2 = ("attention", "revision", "unused-weights", "weights-sample")
_LOG = logging.getLogger(__name__)


def same_form(new: Mapping[str, Any], old: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Return a record of provenance in the form of another one, to compare the two.

    Parameters
    ----------
    new
        What is to be converted, of version 1 or 2.
    old
        What it is compared with.
    where
        Names the store with the older form in a warning of the logger ``activation_store.forms``: a version 1 holds
        samples, and equal samples do not prove equal weights. Empty for no warning.

    Returns
    -------
    dict
        `new` itself where both are of one version, or `old` is the newer.
    """
    if _version(new) < VERSION or _version(old) >= VERSION or not isinstance(new.get("model"), Mapping):
        return dict(new)
    record = {key: value for key, value in new.items() if key != "version"}
    model = {key: value for key, value in new["model"].items() if key not in _SINCE_2}
    model["weights"] = new["model"].get("weights-sample", model.get("weights"))
    before = old.get("model")
    if isinstance(before, Mapping) and isinstance(before.get("family"), Mapping):
        model["family"] = _known(model.get("family"), before["family"])
    record["model"] = model
    processor = new.get("processor")
    if isinstance(processor, Mapping):
        record["processor"] = {"class": processor.get("class"), "digest": processor.get("settings")}
    generate = new.get("generate")
    if isinstance(generate, Mapping):
        record["generate"] = {key: value for key, value in generate.items() if key not in ("ends", "left-out")}
        if generate.get("left-out"):  # which earlier releases followed, and called greedy
            record["generate"]["decoding"] = f"greedy without {', '.join(generate['left-out'])}"
    if where:
        _LOG.warning(
            "%s was written by an earlier release: it is compared by samples of the weights and of the processor's settings, "
            "and equal samples do not prove equal models; trace again into a new folder to be sure",
            where,
        )
    return record


def _version(record: Mapping[str, Any]) -> int:
    version = record.get("version", 1)
    return version if isinstance(version, int) else 1


def _known(family: Any, before: Mapping[str, Any]) -> Any:
    """Return the fields of a family that an earlier record has too."""
    if not isinstance(family, Mapping):
        return family
    inner = {key: _known(value, before[key]) for key, value in family.items() if isinstance(before.get(key), Mapping)}
    return {key: inner.get(key, value) for key, value in family.items() if key in before}
