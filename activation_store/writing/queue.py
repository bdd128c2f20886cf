"""Run jobs in order in a background thread, while the caller continues."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np


class Background:
    """Runs jobs in the order of submission; after a job fails, no later job runs.

    The error of a job is raised by the next call. Pending jobs hold at most `limit` bytes, or are a single job.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="activation-store")
        self._pending: deque[tuple[Future[None], int]] = deque()
        self._pending_bytes = 0
        self._stopped = False

    def submit(self, job: Callable[[], None], size: int = 0) -> None:
        """Submit a job that holds `size` bytes; wait while the limit is exceeded."""
        while self._pending and (self._pending[0][0].done() or self._pending_bytes + size > self._limit):
            self._finish_first()
        self._pending.append((self._thread.submit(self._run, job), size))
        self._pending_bytes += size

    def wait(self) -> None:
        """Wait until all jobs are done; raise the error of the first failed job."""
        while self._pending:
            self._finish_first()

    def stop(self) -> None:
        """Cancel jobs that have not started, wait for the running one, and end the thread; never raise."""
        self._stopped = True
        self._pending.clear()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _run(self, job: Callable[[], None]) -> None:
        if self._stopped:
            return
        try:
            job()
        except BaseException:
            self._stopped = True
            raise

    def _finish_first(self) -> None:
        future, size = self._pending.popleft()
        self._pending_bytes -= size
        future.result()


class Pool:
    """A pool of reusable arrays: new memory would cost page faults on first use."""

    def __init__(self) -> None:
        self._free: dict[tuple[tuple[int, ...], np.dtype], list[np.ndarray]] = {}

    def take(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Return an unused array; its contents are undefined."""
        free = self._free.setdefault((shape, dtype), [])
        return free.pop() if free else np.zeros(shape, dtype)

    def release(self, array: np.ndarray) -> None:
        """Return an array to the pool; can be called from any thread."""
        self._free.setdefault((array.shape, array.dtype), []).append(array)
