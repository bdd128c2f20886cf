"""Conversion of an addition at a head to the residual stream: exact, or the export refuses with the reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from groundscope.core.errors import ConfigError
from lvlm import Head, Lvlm, Site
from mitigation import SteeringVector
from mitigation.steering.changes import AddChange
from mitigation.steering.export import exports
from mitigation.steering.export.baked import apply, baked
from mitigation.steering.export.residual_conversion import to_residual
from tests.toys.examples import example
from tests.toys.families import FAMILY, model

NORMED = {"gemma3", "paligemma2", "glm4v", "florence2"}
"""Families in which a norm stands between a head's projection and the residual stream."""


def pushed(lvlm: Lvlm, key: Head | Site, positions: str = "all") -> SteeringVector:
    width = lvlm.head_dim if isinstance(key, Head) else lvlm.width
    d = np.random.default_rng(0).standard_normal(width)
    entry = AddChange(d / np.linalg.norm(d), 2.0)
    return SteeringVector({key: entry}, positions, 1.0, lvlm.name, lvlm.config_hash)  # pyright: ignore[reportArgumentType]


def gained(lvlm: Lvlm, vector: SteeringVector, site: str) -> np.ndarray:
    """What a site gains at each token, float64 ``[T, D]``."""
    inputs = lvlm.collate([lvlm.encode(example())])
    before = lvlm.read(inputs, [site])[site]
    with vector.applied(lvlm):
        after = lvlm.read(inputs, [site])[site]
    return (after - before)[0].detach().double().numpy()


@FAMILY
def test_additions_at_heads_are_exact_in_the_residual_stream_or_refused(family: str) -> None:
    lvlm = model(family)
    for layer in (0, 1):
        head = Head(layer, 1)
        vector = pushed(lvlm, head)
        cross = "cross." if family == "mllama" and layer == 1 else ""
        arrives = gained(lvlm, vector, f"decoder.L{layer}.{cross}attn_out")
        if family in NORMED:
            with pytest.raises(ConfigError, match=r"followed by a norm|normalizes the stream"):
                to_residual(vector, lvlm)
            if len(arrives) > 1:  # no one vector would do: it differs from token to token
                assert np.ptp(arrives, axis=0).max() > 1e-3
            continue
        moved = to_residual(vector, lvlm)
        entry = moved.changes[layer]
        np.testing.assert_allclose(arrives, np.tile(entry.sigma * entry.direction, (len(arrives), 1)), atol=1e-5)
        assert "gate W_O d" in moved.provenance["conversion"]


@pytest.mark.parametrize("family", ["gemma3", "glm4v", "paligemma2"])
def test_outputs_after_the_norm_are_carried(family: str) -> None:
    """``attn_out`` and ``mlp_out`` are what the residual stream gains, so nothing stands between."""
    lvlm = model(family)
    for component in ("attn_out", "mlp_out"):
        vector = pushed(lvlm, Site("decoder", 1, component))
        moved = to_residual(vector, lvlm).changes[1]
        arrives = gained(lvlm, vector, "decoder.L1.resid_mid" if component == "attn_out" else "decoder.L1.resid_post")
        np.testing.assert_allclose(arrives, np.tile(moved.sigma * moved.direction, (len(arrives), 1)), atol=1e-5)


@pytest.mark.parametrize("family", ["gemma3", "glm4v", "mllama", "llava"])
def test_baked_heads_are_exact_whatever_follows(family: str, tmp_path: Path) -> None:
    lvlm = model(family)
    inputs = lvlm.collate([lvlm.encode(example())])
    vector = pushed(lvlm, Head(1, 2))
    with vector.applied(lvlm):
        want = lvlm.logits(inputs)
    plain = lvlm.logits(inputs)
    undo = apply(lvlm.hf, baked(vector, tmp_path / "b.safetensors", lvlm))
    try:
        torch.testing.assert_close(lvlm.logits(inputs), want, atol=1e-5, rtol=1e-5)
    finally:
        undo()
    assert (want - plain).abs().max() > 1e-3


@pytest.mark.parametrize("form", ["vllm", "gguf", "steering_vectors"])
def test_converting_exports(form: str, tmp_path: Path) -> None:
    """Every format that carries heads to the residual stream refuses where a norm follows; at the projection none does."""
    lvlm = model("gemma3")
    both = pushed(lvlm, Head(1, 2))
    entries = {
        **both.changes,
        Site("decoder", 2, "attn_out"): pushed(lvlm, Site("decoder", 2, "attn_out")).changes[
            Site("decoder", 2, "attn_out")
        ],
    }
    mixed = SteeringVector(entries, "all", 1.0, lvlm.name, lvlm.config_hash)
    with pytest.raises(ConfigError, match="followed by a norm"):
        exports[form].write(mixed, tmp_path / "x", lvlm, convert=True)
