"""Neutral questions of an example with a prefix have the length of its question, whatever the length of its prefix."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from diagnosis.pipeline import _prompt_lengths


def test_prompt_lengths_leave_out_the_prefix() -> None:
    lengths = np.array([10.0, 13.0, 14.0])
    plain: Any = SimpleNamespace(columns={"n_tokens": lengths})
    assert _prompt_lengths(plain).tolist() == [10, 13, 14]
    spans = np.array([np.zeros((0, 2), int), np.array([[10, 13]]), np.array([[10, 14]])], dtype=object)
    prefixed: Any = SimpleNamespace(columns={"n_tokens": lengths, "span:prefix": spans})
    assert _prompt_lengths(prefixed).tolist() == [10, 10, 10]
