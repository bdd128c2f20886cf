"""The number of threads that compute, read back from the libraries themselves."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_info, threadpool_limits

from activation_store import MemorySource
from groundscope.core.threads import LARGE_PRODUCT, map_in_threads, set_threads, threads_for
from probes import fit_grid


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Give torch and BLAS two threads, so that a limit can be seen."""
    before = torch.get_num_threads()
    with threadpool_limits(2, "blas"):
        set_threads(2)
        yield
        set_threads(before)


def blas_threads() -> set[int]:
    """Return the numbers of threads of numpy's and scipy's BLAS."""
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


def test_small_products_run_on_one_thread_and_large_ones_on_all() -> None:
    with threads_for(LARGE_PRODUCT / 2) as count:
        assert (count, torch.get_num_threads(), blas_threads()) == (1, 1, {1})
    assert (torch.get_num_threads(), blas_threads()) == (2, {2})
    with threads_for(LARGE_PRODUCT * 2) as count:
        assert (count, torch.get_num_threads(), blas_threads()) == (2, 2, {2})


def test_the_numbers_are_restored_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), threads_for(1.0):
        _ = 1 / 0
    assert (torch.get_num_threads(), blas_threads()) == (2, {2})


def test_blocks_that_overlap_in_two_threads_leave_the_numbers_as_they_were() -> None:
    opened, close = threading.Event(), threading.Event()

    def other() -> None:
        with threads_for(1.0):
            opened.set()
            close.wait(30)

    thread = threading.Thread(target=other)
    with threads_for(1.0):
        thread.start()
        assert opened.wait(30)
    close.set()
    thread.join(30)
    assert (torch.get_num_threads(), blas_threads()) == (2, {2})


def test_a_map_in_threads_keeps_the_order_and_limits_blas() -> None:
    with map_in_threads() as map_blocks:
        results = list(map_blocks(lambda i: (i, frozenset(blas_threads())), range(20)))
    assert results == [(i, frozenset({1})) for i in range(20)]
    assert blas_threads() == {2}


class Recorder(LogisticRegression):
    """A classifier that records how many threads it is fitted with."""

    counts: ClassVar[set[int]] = set()

    def fit(self, X: np.ndarray, y: np.ndarray, sample_weight: np.ndarray | None = None) -> Recorder:
        """Record, and fit."""
        self.counts.update(blas_threads(), {torch.get_num_threads()})
        super().fit(X, y, sample_weight)
        return self


def test_probes_on_heads_are_fitted_with_one_thread() -> None:
    cat = np.arange(240) // 2 % 2
    x = np.random.default_rng(0).normal(size=(240, 1, 8)) + cat[:, None, None]
    table = {"id": range(240), "group": np.arange(240) // 2, "object:cat": cat}
    store = MemorySource({"resid_post": x}, table)
    fit_grid(store, ["object:cat"], "resid_post", estimator=Recorder(), folds=2, resamples=50, control=0)
    assert Recorder.counts == {1}
