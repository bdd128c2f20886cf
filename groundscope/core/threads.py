"""Number of CPU threads that compute: one place for torch, OpenMP and BLAS.

Threads that wait for a small matrix product spin. On busy cores they take the time of the thread that they wait for: a product of
420 x 24 by 24 x 64 takes 20 us on one BLAS thread, and 7,900 us on two whose cores are busy. So blocks of many small operations
run on one thread (`threads_for`), whatever the number of cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol, TypeVar

from threadpoolctl import threadpool_limits

LARGE_PRODUCT = 1e8
"""Multiplications and additions in a matrix product above which several threads are faster, also when the cores are busy."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class MapFunction(Protocol):
    """A function with the signature of `map` for one iterable."""

    def __call__(self, work: Callable[[Item], Result], over: Iterable[Item], /) -> Iterator[Result]:
        """Yield the results of `work` in order."""
        ...


def set_threads(count: int | None) -> None:
    """Import torch and set its number of threads; None keeps torch's choice, the number of cores.

    Blocks under `threads_for` and `map_in_threads` use at most this number.

    Examples
    --------
    >>> import torch
    >>> from groundscope.core.threads import set_threads
    >>> before = torch.get_num_threads()
    >>> set_threads(1)
    >>> torch.get_num_threads()
    1
    >>> set_threads(before)
    """
    import torch

    if count:
        torch.set_num_threads(count)


@contextmanager
def threads_for(operations: float) -> Iterator[int]:
    """Limit torch, OpenMP and BLAS to one thread within the block, unless its matrix products are large.

    Parameters
    ----------
    operations
        Multiplications and additions in a typical matrix product of the block; above `LARGE_PRODUCT` nothing is limited.

    Yields
    ------
    int
        The number of threads of torch within the block.

    Notes
    -----
    The number of BLAS threads belongs to the process; if blocks overlap in several Python threads, only the first thread that
    limited it changes it (threadpoolctl), so the others may compute with more threads.

    Examples
    --------
    >>> import torch
    >>> from groundscope.core.threads import threads_for
    >>> before = torch.get_num_threads()
    >>> with threads_for(2 * 420 * 24 * 64) as threads:
    ...     threads, torch.get_num_threads()
    (1, 1)
    >>> torch.get_num_threads() == before
    True
    """
    import torch

    if operations > LARGE_PRODUCT:
        yield torch.get_num_threads()
        return
    before = torch.get_num_threads()
    with threadpool_limits(1, "blas"):
        try:
            if before > 1:
                torch.set_num_threads(1)
            yield 1
        finally:
            # In a thread that began within another thread's block, 1 is not the number to return to.
            if before > 1:
                torch.set_num_threads(before)


@contextmanager
def map_in_threads() -> Iterator[MapFunction]:
    """Yield a `map` that runs on as many threads as torch uses, each with one BLAS thread.

    For work in numpy that releases the interpreter's lock: numpy's other operations use one thread, and would leave cores idle.

    Examples
    --------
    >>> from groundscope.core.threads import map_in_threads
    >>> with map_in_threads() as map_blocks:
    ...     list(map_blocks(abs, [-1, 2]))
    [1, 2]
    """
    import torch

    count = torch.get_num_threads()
    with threadpool_limits(1, "blas"):
        if count == 1:
            yield map
            return
        with ThreadPoolExecutor(count) as pool:
            yield pool.map
