"""Convert provenance to the version of an earlier release, to compare stores of both releases.

Version 1 (no ``version``) recorded a digest of a sample of the weights, the processor without merges and normalizer, and
neither the attention implementation nor interventions on the model. Version 2 records all of these, and also the digests of
version 1, so that stores of both versions can be compared.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

VERSION = 2
_SINCE_2 = ("attention", "revision", "unused-weights", "weights-sample")
_LOG = logging.getLogger(__name__)


def convert_provenance(new: Mapping[str, Any], old: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Return a provenance record in the version of another one, to compare the two.

    Parameters
    ----------
    new
        The record to convert, of version 1 or 2.
    old
        The record to compare with.
    where
        Names the store of the older version in a warning of this module's logger: version 1 holds digests of samples, and
        equal samples do not prove equal weights. Empty for no warning.

    Returns
    -------
    dict
        `new` unchanged if both have the same version, or `old` is newer.
    """
    if _version(new) < VERSION or _version(old) >= VERSION or not isinstance(new.get("model"), Mapping):
        return dict(new)
    record = {key: value for key, value in new.items() if key != "version"}
    model = {key: value for key, value in new["model"].items() if key not in _SINCE_2}
    model["weights"] = new["model"].get("weights-sample", model.get("weights"))
    old_model = old.get("model")
    if isinstance(old_model, Mapping) and isinstance(old_model.get("family"), Mapping):
        model["family"] = _select_shared_fields(model.get("family"), old_model["family"])
    record["model"] = model
    processor = new.get("processor")
    if isinstance(processor, Mapping):
        record["processor"] = {"class": processor.get("class"), "digest": processor.get("settings")}
    generate = new.get("generate")
    if isinstance(generate, Mapping):
        record["generate"] = {key: value for key, value in generate.items() if key not in ("ends", "left-out")}
        if generate.get("left-out"):  # rules that earlier releases applied and still recorded as greedy
            record["generate"]["decoding"] = f"greedy without {', '.join(generate['left-out'])}"
    if where:
        _LOG.warning(
            "%s was written by an earlier release: only samples of the weights and of the processor's settings are compared, "
            "and equal samples do not prove equal models; trace again into a new folder to be certain",
            where,
        )
    return record


def _version(record: Mapping[str, Any]) -> int:
    version = record.get("version", 1)
    return version if isinstance(version, int) else 1


def _select_shared_fields(family: Any, old_family: Mapping[str, Any]) -> Any:
    """Return the fields of a family record that the old record also has."""
    if not isinstance(family, Mapping):
        return family
    inner = {
        key: _select_shared_fields(value, old_family[key])
        for key, value in family.items()
        if isinstance(old_family.get(key), Mapping)
    }
    return {key: inner.get(key, value) for key, value in family.items() if key in old_family}
