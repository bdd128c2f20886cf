"""Digests of a model's weights: over every byte, and the sample that earlier releases took."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lvlm.access.weights import named_weights

ALGORITHM = "sha256"
"""SHA-256 of the sorted names, types, shapes and of the SHA-256 of each `_CHUNK` of every tensor. Of the algorithms of
`hashlib` it is the fastest where processors have instructions for it: 2.0 GB/s a core against 1.4 for BLAKE2b and 0.6 for
SHA-3, and hashlib lets other threads run meanwhile."""
_CHUNK = 64 << 20
_SAMPLES = 257
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Known:
    """The digest of a module's weights, and what tells that they changed since."""

    state: tuple[object, ...]
    digest: str


_KNOWN: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


def weights_hash(module: nn.Module) -> str:
    """Return ``sha256:<hex>`` over all bytes of a module's parameters and of the buffers that its checkpoints hold.

    Computed once for the weights that are there: it is computed again where a tensor was replaced, written to in place
    (torch counts that), or has another value at one of up to 257 places. A single value changed through ``.data``, which
    torch does not count, may go unnoticed in a module whose digest is known; see `forget`.

    Parameters
    ----------
    module
        The model; weights that accelerate keeps elsewhere are read from there.

    Examples
    --------
    >>> from lvlm.weights_hash import weights_hash
    >>> import torch
    >>> layer = torch.nn.Linear(2, 2)
    >>> before = weights_hash(layer)
    >>> with torch.no_grad():
    ...     layer.weight[1, 1] += 1
    >>> weights_hash(layer) == before
    False
    """
    state = _state(module)
    known = _KNOWN.get(module)
    if known is None or known.state != state:
        known = _Known(state, f"{ALGORITHM}:{_digest(_tensors(module))}")
        _KNOWN[module] = known
    return known.digest


def forget(module: nn.Module) -> None:
    """Drop what is known of a module's weights: the next hash reads all of them."""
    _KNOWN.pop(module, None)


def sampled_weights_hash(module: nn.Module) -> str:
    """Return what earlier releases called the hash of a model's weights, to compare with what they wrote.

    SHA-256 over name, shape and up to 4,096 evenly spaced values of every parameter: of a matrix as wide as a power of two
    those are a few of its columns, so that most changes go unnoticed.
    """
    h = hashlib.sha256()
    for name, parameter in sorted(named_weights(module)):
        flat = parameter.detach().flatten()
        step = max(1, flat.numel() // 4096)
        h.update(f"{name}{tuple(parameter.shape)}".encode())
        h.update(flat[::step].float().cpu().numpy().tobytes())
    return h.hexdigest()


def is_sampled(recorded: str) -> bool:
    """Whether a recorded hash of weights is the sample of earlier releases."""
    return ":" not in recorded


def has_weights(module: nn.Module, recorded: str) -> bool:
    """Whether a module has the weights of which a hash was recorded.

    A hash that an earlier release recorded is a sample: it is compared with the sample of these weights, and a warning of
    the logger ``lvlm.weights_hash`` says how little that proves.
    """
    if not is_sampled(recorded):
        return weights_hash(module) == recorded
    same = sampled_weights_hash(module) == recorded
    if same:
        _LOG.warning(
            "the weights are compared by a hash of an earlier release, which samples some columns of each matrix: equal "
            "hashes do not prove equal weights; make the file again to be sure"
        )
    return same


def short(recorded: str) -> str:
    """Return the first digits of a recorded hash, for messages."""
    return recorded.rpartition(":")[2][:12]


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters, and the buffers that are part of a checkpoint."""
    yield from named_weights(module)
    for path, inner in module.named_modules():
        for name, buffer in inner._buffers.items():
            if buffer is not None and not buffer.is_meta and name not in inner._non_persistent_buffers_set:
                yield f"{path}.{name}".lstrip("."), buffer


def _state(module: nn.Module) -> tuple[object, ...]:
    """Return what differs when weights changed, as far as that can be known without reading them."""
    found: list[object] = []
    samples: list[Tensor] = []
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        away = tensor.is_meta
        pointer = id(tensor) if away else tensor.data_ptr()
        version = None if tensor.is_inference() else tensor._version
        found.append((name, pointer, version, tensor.dtype, tuple(tensor.shape), str(tensor.device)))
        if not away and tensor.numel() and tensor.is_contiguous() and not tensor.is_complex():
            # An odd step, so that of a matrix whose width is even all columns come in turn.
            step = tensor.numel() // _SAMPLES | 1
            samples.append(tensor.detach().reshape(-1)[::step].float())
    by_device: dict[torch.device, list[Tensor]] = {}
    for sample in samples:
        by_device.setdefault(sample.device, []).append(sample)
    h = hashlib.sha256()
    for some in by_device.values():
        h.update(torch.cat(some).cpu().numpy().tobytes())
    return (*found, h.digest())


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash all bytes, a chunk in each thread; tensors that are read from disk are let go as soon as they are hashed."""
    threads = max(1, min(torch.get_num_threads(), os.cpu_count() or 1))
    waiting = threading.Semaphore(2 * threads)
    parts: dict[str, list[Future[bytes]]] = {}
    with ThreadPoolExecutor(threads) as pool:
        for name, tensor in tensors:
            flat = tensor.detach().reshape(-1)
            size = max(1, _CHUNK // max(1, flat.element_size()))
            chunks = parts.setdefault(f"{name} {tensor.dtype} {tuple(tensor.shape)} ", [])
            for start in range(0, flat.numel(), size):
                waiting.acquire()
                future = pool.submit(_hashed, flat[start : start + size])
                future.add_done_callback(lambda _: waiting.release())
                chunks.append(future)
    h = hashlib.sha256()
    for name, chunks in sorted(parts.items()):
        h.update(name.encode())
        for future in chunks:
            h.update(future.result())
    return h.hexdigest()


def _hashed(chunk: Tensor) -> bytes:
    return hashlib.sha256(chunk.contiguous().cpu().view(torch.uint8).numpy().data).digest()
