"""Metrics of patching that users write: equal to built-in metrics, stored by name, refused with a reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from circuits import HeadScores, attribution, metrics, patch, patch_heads, patch_paths
from concepts.counterfactual_pair import CounterfactualPair
from groundscope.core.errors import ConfigError, PatchError
from lvlm.model import Lvlm
from tests.toys.random_models import pairs, shared_model

CALLS: list[tuple[tuple[int, ...], str]] = []


def first_token_difference(logits: torch.Tensor, pair: CounterfactualPair) -> torch.Tensor:
    """The logit difference of two answers of one token each."""
    CALLS.append((tuple(logits.shape), pair.clean.id))
    tokenizer = shared_model().processor.tokenizer
    right, wrong = (tokenizer.convert_tokens_to_ids(side.answer) for side in (pair.clean, pair.corrupt))
    return logits[:, right] - logits[:, wrong]


SCORES: dict[str, Callable[[Lvlm, Any], Any]] = {
    "heads": lambda m, metric: patch_heads(m, pairs("color")[:2], metric=metric, min_effect=0),
    "sites": lambda m, metric: patch(m, pairs("color")[:2], "resid_post", metric=metric, min_effect=0),
    "paths": lambda m, metric: patch_paths(m, pairs("color")[:1], ["L1.H2"], ["L3.H0"], metric=metric, min_effect=0),
    "attributed heads": lambda m, metric: attribution.heads(m, pairs("color")[:2], metric=metric, min_effect=0),
    "attributed queries": lambda m, metric: attribution.inputs(m, pairs("color")[:1], "q", metric=metric, min_effect=0),
    "edges": lambda m, metric: attribution.edges(m, pairs("color")[:1], metric=metric, steps=1, min_effect=0),
}


@pytest.mark.parametrize("kind", SCORES)
def test_a_function_equal_to_a_built_in_metric_gives_bitwise_its_scores(kind: str) -> None:
    CALLS.clear()
    built_in, own = (SCORES[kind](shared_model(), metric) for metric in ("logit_difference", first_token_difference))
    for name in ("scores",) if kind == "edges" else ("effects", "clean", "corrupt"):
        np.testing.assert_array_equal(getattr(own, name), getattr(built_in, name))
    assert (built_in.metric, own.metric) == ("logit_difference", f"{__name__}.first_token_difference")
    assert {len(shape) for shape, _ in CALLS} == {2}
    assert len({shape[1] for shape, _ in CALLS}) == 1
    assert {name for _, name in CALLS} <= {pair.clean.id for pair in pairs("color")}


def test_a_registered_metric_is_used_by_name_and_its_file_is_read_without_it(tmp_path: Path) -> None:
    metrics.register("first token", first_token_difference)
    try:
        scores = SCORES["heads"](shared_model(), "first token")
    finally:
        metrics.unregister("first token")
    assert scores.metric == "first token"
    read = HeadScores.load(scores.save(tmp_path / "scores.safetensors"))
    assert read.metric == "first token"
    np.testing.assert_array_equal(read.effects, SCORES["heads"](shared_model(), "logit_difference").effects)
    with pytest.raises(ConfigError, match="unknown metric 'first token'"):
        SCORES["heads"](shared_model(), "first token")


def test_invalid_metrics_are_refused() -> None:
    model = shared_model()
    with pytest.raises(ConfigError, match=r"unknown metric .logit_diference.; .*did you mean logit_difference"):
        SCORES["heads"](model, "logit_diference")
    with pytest.raises(ConfigError, match="neither a name nor a function"):
        SCORES["heads"](model, 3)
    for metric in ("kl", "log_probability"):
        with pytest.raises(ConfigError, match=f"metric '{metric}' needs several positions or the clean run"):
            SCORES["attributed heads"](model, metric)
    for wrong in (lambda logits, _: logits, lambda logits, _: float(logits[0, 0]), lambda logits, _: logits.argmax(-1)):
        with pytest.raises(PatchError, match="must return one floating-point number per run"):
            SCORES["heads"](model, wrong)
    with pytest.raises(ConfigError, match="the metric 'number' is invalid: it must be a function"):
        metrics.register("number", 3)  # pyright: ignore[reportArgumentType]  # a user's mistake


def test_pairs_with_equal_answers_may_be_patched_with_a_function() -> None:
    from dataclasses import replace

    pair = pairs("color")[0]
    same = replace(pair, corrupt=replace(pair.corrupt, answer=pair.clean.answer))
    with pytest.raises(PatchError, match="same answer"):
        patch_heads(shared_model(), [same], min_effect=0)
    scores = patch_heads(shared_model(), [same], metric=lambda logits, _: logits[:, 3], min_effect=0)
    assert scores.n_pairs == 1
