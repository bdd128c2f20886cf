"""A hash of a model's configuration that does not depend on where, how and with which release the model was loaded."""

from __future__ import annotations

import hashlib
import json
from typing import Any

_INCIDENTAL = {"_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype"}
"""Configuration fields that depend on where, how and with which release a model was loaded."""


def config_hash(config: Any) -> str:
    """Return the SHA-256 of a Hugging Face configuration without incidental fields, in hexadecimal digits.

    Examples
    --------
    >>> import groundscope as gs
    >>> from lvlm.config_hash import config_hash
    >>> model = gs.load_lvlm("tiny")
    >>> config_hash(model.hf.config) == model.config_hash
    True
    """
    text = json.dumps(_without(config.to_dict(), _INCIDENTAL), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _without(value: object, names: set[str]) -> object:
    if isinstance(value, dict):
        return {k: _without(v, names) for k, v in value.items() if k not in names}
    return value
