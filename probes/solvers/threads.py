"""What the processor and its memory are best given: work side by side, and pages that are not given back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch
from threadpoolctl import threadpool_limits

KEPT = 31 * 2**20
"""Bytes: nearly the largest block of which glibc takes note."""

Given = TypeVar("Given")
Made = TypeVar("Made")


class Each(Protocol):
    """What `map` does."""

    def __call__(self, work: Callable[[Given], Made], over: Iterable[Given], /) -> Iterator[Made]:
        """Yield the work's results in order."""
        ...


@contextmanager
def side_by_side() -> Iterator[Each]:
    """Give a `map` that works on as many threads as torch uses (`torch.set_num_threads`).

    Each multiplies matrices on one thread: numpy's other operations know one only, and would leave the rest idle.
    """
    count = torch.get_num_threads()
    if count == 1:
        yield map
        return
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(count) as pool:
        yield pool.map


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for what comes next, where it would give pages back and fetch them anew.

    Its threshold for that follows the largest block freed so far (mallopt(3), M_MMAP_THRESHOLD); none of this one's pages
    is ever touched. A tenth of the time of a fit; nothing, where another allocator is used.
    """
    torch.empty(KEPT, dtype=torch.uint8)
