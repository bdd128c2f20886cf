"""A digest inside a JSON document, so that a changed number in it is an error and not another result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from groundscope.core.errors import GroundscopeError

KEY = "digest"


def document_digest(document: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a document as it is after writing and reading: JSON with sorted keys."""
    plain = json.loads(json.dumps({key: value for key, value in document.items() if key != KEY}))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def take_digest(document: dict[str, Any], where: str, error: type[GroundscopeError], *, required: bool) -> None:
    """Remove the digest from a document that was read, and compare it.

    Parameters
    ----------
    document
        Changed in place.
    where
        The file, for the message.
    error
        The class of the exception.
    required
        Whether a document without a digest is damaged; those of earlier releases have none.

    Raises
    ------
    GroundscopeError
        An `error` where the digest is not that of the rest.
    """
    digest = document.pop(KEY, None)
    if digest is None and not required:
        return
    if digest != document_digest(document):
        msg = f"{where}: damaged: its content does not have the digest that it states"
        raise error(msg)
