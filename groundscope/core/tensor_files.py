"""Read and write safetensors result files: regular files only, with a digest of all numbers."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping

import numpy as np

from groundscope.core.errors import DataError, GroundscopeError
from groundscope.core.user_files import read_bytes

MAX_TENSOR_BYTES = 1 << 36
"""Limit of `read_tensors`."""
_DIGEST = "sha256"


def encode_tensors(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """Return the bytes of a safetensors file; its metadata entry ``sha256`` is the digest of tensors and metadata."""
    from safetensors.numpy import save

    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    return _sort_metadata(save(contiguous, metadata={**metadata, _DIGEST: _digest(contiguous, metadata)}))


def _sort_metadata(data: bytes) -> bytes:
    """Return the same file with the entries of its metadata in order: safetensors writes them in a random one."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def read_tensors(
    path: str | os.PathLike[str], *, limit: int = MAX_TENSOR_BYTES, error: type[GroundscopeError] = DataError
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read a safetensors file.

    Parameters
    ----------
    path
        The file.
    limit
        Largest accepted size in bytes.
    error
        The class of the exception.

    Returns
    -------
    (tensors, metadata)
        Writable arrays by name, and the text entries of the header without the digest.

    Raises
    ------
    GroundscopeError
        An `error` if the path is not a regular file, too large, not a safetensors file, or if its digest does not match its
        content. Files without a digest, of earlier releases and other programs, are read without this check.
    OSError
        If the file is missing or cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    data = read_bytes(path, limit=limit, error=error)
    try:
        # Copies: safetensors' own arrays are views into the file's bytes.
        tensors = {name: np.array(array) for name, array in load(data).items()}
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = {str(name): str(text) for name, text in (header.get("__metadata__") or {}).items()}
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as reason:
        msg = f"{path} is damaged, or not a safetensors file: {reason}"
        raise error(msg) from reason
    digest = metadata.pop(_DIGEST, None)
    if digest is not None and digest != _digest(tensors, metadata):
        msg = f"{path} is damaged: its content does not match its digest"
        raise error(msg)
    return tensors, metadata


def _digest(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        values = np.ascontiguousarray(tensors[name])
        digest.update(json.dumps([name, values.dtype.str, list(values.shape)]).encode())
        digest.update(values.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
