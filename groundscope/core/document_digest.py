"""A digest inside a JSON document, so that an edited number is an error and not a different result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from groundscope.core.errors import GroundscopeError

KEY = "digest"


def document_digest(document: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a document after a round trip through JSON, with sorted keys."""
    parsed = json.loads(json.dumps({key: value for key, value in document.items() if key != KEY}))
    return hashlib.sha256(json.dumps(parsed, sort_keys=True).encode()).hexdigest()


def value_digest(value: object) -> str:
    """Return the SHA-256 of plain values as compact JSON with sorted keys; it decides splits, so its form must not change.

    Examples
    --------
    >>> from groundscope.core.document_digest import value_digest
    >>> value_digest(["image 7", 0])[:8]
    '0b684d91'
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def take_digest(document: dict[str, Any], where: str, error: type[GroundscopeError], *, required: bool) -> None:
    """Remove the digest from a document and verify it.

    Parameters
    ----------
    document
        Changed in place.
    where
        The file, for the message.
    error
        The class of the exception.
    required
        Whether a missing digest is an error; documents of earlier releases have none.

    Raises
    ------
    GroundscopeError
        An `error` if the digest does not match the content.
    """
    digest = document.pop(KEY, None)
    if digest is None and not required:
        return
    if digest != document_digest(document):
        msg = f"{where} is damaged: its content does not match its digest"
        raise error(msg)
