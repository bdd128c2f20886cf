"""Jobs done one after the other in a thread of their own, while the caller computes what comes next."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np


class Background:
    """Runs jobs in the order in which they are given; after one that failed, none of those that follow.

    An error of a job is raised by the next call here. Jobs that wait hold at most `limit` bytes (or are one job).
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="activation-store")
        self._waiting: deque[tuple[Future[None], int]] = deque()
        self._held = 0
        self._dropped = False

    def submit(self, job: Callable[[], None], size: int = 0) -> None:
        """Hand over a job that holds so many bytes; waits while too much is held."""
        while self._waiting and (self._waiting[0][0].done() or self._held + size > self._limit):
            self._finish_first()
        self._waiting.append((self._thread.submit(self._run, job), size))
        self._held += size

    def wait(self) -> None:
        """Return when every job is done; raises the error of the first that failed."""
        while self._waiting:
            self._finish_first()

    def stop(self) -> None:
        """Leave out what has not begun, wait for what has, and end the thread; never raises."""
        self._dropped = True
        self._waiting.clear()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _run(self, job: Callable[[], None]) -> None:
        if self._dropped:
            return
        try:
            job()
        except BaseException:
            self._dropped = True
            raise

    def _finish_first(self) -> None:
        done, size = self._waiting.popleft()
        self._held -= size
        done.result()


class Pool:
    """Arrays to be filled again: memory that is new must first be had from the system, page by page."""

    def __init__(self) -> None:
        self._free: dict[tuple[tuple[int, ...], np.dtype], list[np.ndarray]] = {}

    def take(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Return an array that nobody uses; what it holds is left from before."""
        free = self._free.setdefault((shape, dtype), [])
        return free.pop() if free else np.zeros(shape, dtype)

    def give(self, array: np.ndarray) -> None:
        """Take back an array that was given out; from any thread."""
        self._free.setdefault((array.shape, array.dtype), []).append(array)
