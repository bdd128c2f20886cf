"""How much of the whole difference the scores of edges add up to: reported, and warned about."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from circuits import Graph, attribution
from concepts.counterfactual_pair import CounterfactualPair
from lvlm import Lvlm
from tests.toys.families import model
from tests.toys.patching_oracle import pair_of
from tests.toys.random_models import layers_of, pairs, random_model


def share_along_the_path(lvlm: Lvlm, layer: Any, pair: CounterfactualPair, steps: int) -> float:
    """Gradients of the answer's log-odds by what the first layer is given, at k / steps of the way, times the way."""
    inputs_: dict[str, torch.Tensor] = {}
    ids = [lvlm.processor.tokenizer.convert_tokens_to_ids(e.answer) for e in (pair.clean, pair.corrupt)]
    inputs = [lvlm.encode(e).inputs for e in (pair.clean, pair.corrupt)]

    def odds(which: int, value: torch.Tensor | None) -> torch.Tensor:
        def before(_m: Any, args: Any, kwargs: Any) -> Any:
            inputs_["x"] = args[0].detach()
            return ((args[0] if value is None else value, *args[1:]), kwargs)

        hook = layer.register_forward_pre_hook(before, with_kwargs=True)
        logits = lvlm.hf(**inputs[which], use_cache=False).logits[0, -1]
        hook.remove()
        return logits[ids[0]] - logits[ids[1]]

    clean = odds(0, None).detach()
    source = inputs_["x"]
    corrupt = odds(1, None).detach()
    start = inputs_["x"]
    total = 0.0
    for k in range(1, steps + 1):
        at = (start + k / steps * (source - start)).requires_grad_()
        (slope,) = torch.autograd.grad(odds(1, at), at)
        total += float((slope * (source - start)).sum()) / steps
    return total / float(clean - corrupt)


def test_the_sum_is_reported_and_warned_about(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    for lvlm, pair, steps, fits in (
        (random_model(), next(p for p in pairs("blank") if p.clean.answer != p.corrupt.answer), 2, False),
        (model("llava"), pair_of(0), 20, True),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "circuits.attribution"):
            graph = attribution.edges(lvlm, [pair], steps=steps, min_effect=0, progress=False)
        want = share_along_the_path(lvlm, layers_of(lvlm)[0], pair, steps)
        assert graph.explained == pytest.approx(want, abs=1e-3)
        assert graph.provenance["explained"]["lowest"] == graph.provenance["explained"]["highest"]
        assert ("use more steps" in caplog.text) != fits
        assert (abs(want - 1) <= 0.1) == fits
    graph.save(tmp_path / "g.safetensors")
    assert Graph.load(tmp_path / "g.safetensors").explained == pytest.approx(graph.explained)
    assert attribution.edges(model("llava"), [pair_of(0)], point="run", min_effect=0).explained is None
