"""Hashes of a model's weights: over every byte, and over the sample of earlier releases."""

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
"""SHA-256 of the sorted names, types and shapes, and of the SHA-256 of each chunk of `_CHUNK` bytes of every tensor. It is the
fastest algorithm of `hashlib` on processors with instructions for it: 2.0 GB/s per core, compared with 1.4 for BLAKE2b and 0.6
for SHA-3, and hashlib releases the interpreter lock."""
_CHUNK = 64 << 20
_SAMPLES = 257
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class _CachedHash:
    """The hash of a module's weights, and the state that shows later changes."""

    state: tuple[object, ...]
    digest: str


_CACHE: WeakKeyDictionary[nn.Module, _CachedHash] = WeakKeyDictionary()


def weights_hash(module: nn.Module) -> str:
    """Return ``sha256:<hex>`` over all bytes of a module's parameters and of the buffers in its checkpoints.

    The hash is cached, and recomputed if a tensor was replaced, was written to in place (torch counts writes), or has another
    value at one of up to 257 sampled positions. A write through ``.data``, which torch does not count, to a position that is not
    sampled is not noticed; see `forget`.

    Parameters
    ----------
    module
        The model; weights that accelerate keeps outside the module are included.

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
    cached = _CACHE.get(module)
    if cached is None or cached.state != state:
        cached = _CachedHash(state, f"{ALGORITHM}:{_digest(_tensors(module))}")
        _CACHE[module] = cached
    return cached.digest


def forget(module: nn.Module) -> None:
    """Remove a module's cached hash, so that the next hash reads all weights."""
    _CACHE.pop(module, None)


def sampled_weights_hash(module: nn.Module) -> str:
    """Return the weights hash of earlier releases, for comparison with their files.

    SHA-256 over name, shape and up to 4,096 evenly spaced values of every parameter. In a matrix whose width is a power of two,
    these are in a few columns, so most changes are not noticed.
    """
    h = hashlib.sha256()
    for name, parameter in sorted(named_weights(module)):
        flat = parameter.detach().flatten()
        step = max(1, flat.numel() // 4096)
        h.update(f"{name}{tuple(parameter.shape)}".encode())
        h.update(flat[::step].float().cpu().numpy().tobytes())
    return h.hexdigest()


def is_sampled(recorded: str) -> bool:
    """Whether a recorded hash is a sampled hash of earlier releases."""
    return ":" not in recorded


def has_weights(module: nn.Module, recorded: str) -> bool:
    """Whether a module's weights have a recorded hash.

    A sampled hash of an earlier release is compared with the sampled hash of these weights, with a warning of the logger
    ``lvlm.weights_hash`` that equal samples are weak evidence.
    """
    if not is_sampled(recorded):
        return weights_hash(module) == recorded
    same = sampled_weights_hash(module) == recorded
    if same:
        _LOG.warning(
            "the weights are compared by a hash of an earlier release, which samples some columns of each matrix: equal "
            "hashes do not prove equal weights; recreate the file to be sure"
        )
    return same


def short(recorded: str) -> str:
    """Return the first 12 digits of a recorded hash, for messages."""
    return recorded.rpartition(":")[2][:12]


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and persistent buffers with their names."""
    yield from named_weights(module)
    for path, inner in module.named_modules():
        for name, buffer in inner._buffers.items():
            if buffer is not None and not buffer.is_meta and name not in inner._non_persistent_buffers_set:
                yield f"{path}.{name}".lstrip("."), buffer


def _state(module: nn.Module) -> tuple[object, ...]:
    """Return a key that changes with the weights, as far as possible without reading all of them."""
    entries: list[object] = []
    samples: list[Tensor] = []
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        offloaded = tensor.is_meta
        pointer = id(tensor) if offloaded else tensor.data_ptr()
        version = None if tensor.is_inference() else tensor._version
        entries.append((name, pointer, version, tensor.dtype, tuple(tensor.shape), str(tensor.device)))
        if not offloaded and tensor.numel() and tensor.is_contiguous() and not tensor.is_complex():
            # With an odd step, samples of a matrix of even width are in all columns.
            step = tensor.numel() // _SAMPLES | 1
            samples.append(tensor.detach().reshape(-1)[::step].float())
    by_device: dict[torch.device, list[Tensor]] = {}
    for sample in samples:
        by_device.setdefault(sample.device, []).append(sample)
    h = hashlib.sha256()
    for device_samples in by_device.values():
        h.update(torch.cat(device_samples).cpu().numpy().tobytes())
    return (*entries, h.digest())


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash all bytes, chunks in parallel; tensors that are read from disk are released once hashed."""
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
                future = pool.submit(_hash_chunk, flat[start : start + size])
                future.add_done_callback(lambda _: waiting.release())
                chunks.append(future)
    h = hashlib.sha256()
    for name, chunks in sorted(parts.items()):
        h.update(name.encode())
        for future in chunks:
            h.update(future.result())
    return h.hexdigest()


def _hash_chunk(chunk: Tensor) -> bytes:
    return hashlib.sha256(chunk.contiguous().cpu().view(torch.uint8).numpy().data).digest()
