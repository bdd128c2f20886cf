"""Training-free methods: rules against the written formula with whole forwards, neutral parameters, refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import groundscope as gs
from groundscope.core.errors import ConfigError
from lvlm import Lvlm
from mitigation import training_free_methods
from mitigation.training_free.methods.vcd import VCD, kept_signal
from mitigation.training_free.plausibility import contrast, plausible
from mitigation.training_free.published_sizes import scaled_count, scaled_layers
from tests.toys.answers import assert_equal_answers
from tests.toys.rule_oracle import compare, masked

FAMILIES = ("llava", "qwen2_5_vl", "gemma3")


def test_plausible_tokens_are_strictly_below_the_threshold_excluded() -> None:
    logits = torch.tensor([0.0, math.log(0.1), math.log(0.1) - 1e-6], dtype=torch.float64)
    assert plausible(logits, 0.1).tolist() == [True, True, False]
    assert plausible(logits, 0).all()


def test_the_contrast_is_the_written_formula() -> None:
    main, other = torch.tensor([2.0, 1.0, -9.0]), torch.tensor([1.0, 3.0, -20.0])
    assert contrast(main, other, 0.5, 0.1).tolist() == [2.5, 0.0, -math.inf]


@pytest.mark.parametrize(
    ("layers", "of", "expected"), [((9, 14), 32, range(9, 15)), ((9, 14), 6, range(2, 3)), ((31, 31), 4, range(3, 4))]
)
def test_layers_are_scaled_to_the_depth(layers: tuple[int, int], of: int, expected: range) -> None:
    assert scaled_layers(*layers, of) == expected


def test_counts_are_scaled_half_up() -> None:
    assert [scaled_count(100, n) for n in (576, 49, 3)] == [100, 9, 1]


def test_the_schedule_is_that_of_the_release() -> None:
    betas = [1 / (1 + math.exp(-x)) * (0.5e-2 - 1e-5) + 1e-5 for x in np.linspace(-6, 6, 1000)]
    assert kept_signal(500) == pytest.approx(math.prod(1 - b for b in betas[:501]), rel=1e-12)


@pytest.mark.parametrize("beta", [0.1, 0])
@pytest.mark.parametrize("family", FAMILIES)
def test_vcd_is_the_written_rule(family: str, beta: float) -> None:
    import hashlib

    def noisy(_lvlm: Lvlm, question: Any, plain: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        inputs = dict(plain)
        for name, x in plain.items():
            if x.is_floating_point():
                key = f"0\0{question.id}\0{name}"
                seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
                noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
                inputs[name] = (
                    math.sqrt(kept_signal(500)) * x.float() + math.sqrt(1 - kept_signal(500)) * noise
                ).double()
        return [inputs]

    compare(VCD(beta=beta), family, noisy, lambda _, x: masked(2 * x[0] - x[1], x[0], beta))


def test_neutral_parameters_leave_the_model_alone() -> None:
    model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10)
    plain = gs.answer(model, data)
    with VCD(alpha=0, beta=0).applied(model):
        neutral = gs.answer(model, data)
    assert_equal_answers(neutral, plain)


def test_the_method_is_in_the_provenance_and_gone_afterwards() -> None:
    model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10)
    with VCD(alpha=0.5).applied(model):
        result = gs.answer(model, data)
    (record,) = result.provenance["interventions"]
    assert record["name"] == "VCD (alpha=0.5)"
    assert record["digest"]
    assert model.decoder is None
    assert model.interventions == ()


def test_unknown_methods_and_parameters_are_named_with_near_ones() -> None:
    with pytest.raises(ConfigError, match=r"did you mean .*vcd"):
        training_free_methods["vdc"]
    data = gs.DerivationData(gs.load_lvlm("tiny"), None, gs.scenes.dataset(10))
    with pytest.raises(ConfigError, match="did you mean alpha"):
        VCD.derive(data, alfa=1)
    with pytest.raises(ConfigError, match="beta=2: must be a number at least 0 and at most 1"):
        VCD(beta=2)


def test_the_guide_lists_every_method() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "guides" / "mitigations.md").read_text(encoding="utf-8")
    assert [name for name in training_free_methods if f"| `{name}` |" not in text] == []
