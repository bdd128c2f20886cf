"""Thread and memory settings for speed: a threaded `map`, and an allocator that keeps freed memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch
from threadpoolctl import threadpool_limits

FREED_BYTES = 31 * 2**20
"""Size of the block to free, in bytes: close to the largest size that raises glibc's threshold."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class MapFunction(Protocol):
    """A function with the signature of `map` for one iterable."""

    def __call__(self, work: Callable[[Item], Result], over: Iterable[Item], /) -> Iterator[Result]:
        """Yield the results of `work` in order."""
        ...


@contextmanager
def map_in_threads() -> Iterator[MapFunction]:
    """Yield a `map` that runs on as many threads as torch uses (`torch.set_num_threads`).

    BLAS runs single-threaded in each of them: numpy's other operations use one thread, and would leave the other cores idle.
    """
    count = torch.get_num_threads()
    if count == 1:
        yield map
        return
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(count) as pool:
        yield pool.map


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for later allocations, instead of returning pages to the system.

    Its threshold follows the largest block freed so far (mallopt(3), M_MMAP_THRESHOLD); the pages of this block are never
    touched. It saves a tenth of the time of a fit, and has no effect with another allocator.
    """
    torch.empty(FREED_BYTES, dtype=torch.uint8)
