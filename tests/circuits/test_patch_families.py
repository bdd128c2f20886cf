"""Patches of every family against the loop of one whole forward a patch, written with plain torch hooks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from circuits import patch_heads
from lvlm import Lvlm, wrap_lvlm
from tests.toys.families import BUILDERS, model
from tests.toys.patching_oracle import naive, pair_of, projections
from tests.toys.remote_code_families import STAND_INS, build_stand_in

WHOLE = {"instructblip_t5", "florence2"}
"""Families that are patched by whole forwards: an encoder reads their prompt."""


def check(lvlm: Lvlm, modules: list[Any], tokens: Any, whole: bool) -> None:
    data = [pair_of(0), pair_of(2)]
    scores = patch_heads(lvlm, data, tokens=tokens, min_effect=0)
    assert scores.provenance["path"] == ("whole forwards" if whole else "shared prefix")
    moved = 0.0
    for k, pair in enumerate(data):
        positions = lvlm.encode(pair.clean).tokens
        first = positions.last if tokens == "last" else max(positions.image, default=-1) + 1
        patched = naive(lvlm, modules, pair, first)
        right, wrong = (lvlm.processor.tokenizer.convert_tokens_to_ids(e.answer) for e in (pair.clean, pair.corrupt))
        logits = [lvlm.logits(lvlm.encode(e).inputs)[0] for e in (pair.clean, pair.corrupt)]
        clean, corrupt = (float(x[right] - x[wrong]) for x in logits)
        ours = scores.effects[k] * (scores.clean[k] - scores.corrupt[k]) + scores.corrupt[k]
        expected = (patched[..., right] - patched[..., wrong]).numpy()
        assert scores.clean[k] == pytest.approx(clean, abs=1e-5)
        assert scores.corrupt[k] == pytest.approx(corrupt, abs=1e-5)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)
        moved = max(moved, float(np.abs(expected - corrupt).max()))
    assert moved > 1e-4


@pytest.mark.parametrize("tokens", ["last", "suffix:all"])
@pytest.mark.parametrize("family", list(BUILDERS))
def test_equals_one_forward_a_head(family: str, tokens: str) -> None:
    lvlm = model(family)
    check(lvlm, projections(lvlm, family), tokens, family in WHOLE)


@pytest.mark.parametrize("family", list(STAND_INS))
def test_families_with_code_of_their_own(family: str) -> None:
    lvlm = wrap_lvlm(*build_stand_in(family), name=family, validate=False)
    modules = [lvlm.output_projection("decoder", i) for i in range(lvlm.n_layers)]
    check(lvlm, modules, "suffix:all", whole=True)
