"""Controls at random text tokens, heads and layers, against the written rules in whole uncached forwards in float64."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import groundscope as gs
from groundscope.core.errors import ConfigError, ModelError
from lvlm import Lvlm
from lvlm.decoding.row_layout import RowLayout
from mitigation.training_free.controls.random_heads import RandomHeads
from mitigation.training_free.controls.random_layers import RandomLayers
from mitigation.training_free.controls.random_text_tokens import RandomText, text_layout
from mitigation.training_free.method import TrainingFree
from mitigation.training_free.methods.ad_hh import ADHH
from mitigation.training_free.methods.adapt_vis import AdaptVis
from mitigation.training_free.methods.deco import DeCo
from mitigation.training_free.methods.dola import DoLa
from mitigation.training_free.methods.middle_layers import MiddleLayers
from mitigation.training_free.methods.pai import PAI
from mitigation.training_free.methods.spin import SPIN
from mitigation.training_free.methods.vaf import VAF
from mitigation.training_free.methods.vcd import VCD
from tests.toys.attention_oracle import Call, Rule, by_hand, edited_scores, plain
from tests.toys.decoding_oracle import double_model, text_only
from tests.toys.examples import example
from tests.toys.families import model
from tests.toys.method_oracle import Combine, Run, answers_of, assert_decodes, main_logits
from tests.toys.random_models import hooks_of

FAMILIES = ("llava", "qwen2_5_vl")


def draw(*names: object) -> np.random.Generator:
    digest = hashlib.sha256("\0".join(map(str, names)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big") // 2)


def chosen_text(call: Call, seed: int) -> list[int]:
    """The text tokens of the prompt that stand for the image."""
    text = [j for j in range(call.prompt) if not call.image[j]]
    count = int(call.image.sum())
    return [
        text[i] for i in draw(seed, "text tokens", len(text), count).choice(len(text), min(count, len(text)), False)
    ]


def assert_control(
    family: str, control: TrainingFree, rule: Rule, combine: Combine = main_logits, *, blind: bool = False
) -> None:
    def runs(lvlm: Lvlm, inputs: dict[str, Tensor]) -> list[Run]:
        main: Run = (inputs, lambda: by_hand(lvlm, rule, inputs["input_ids"].shape[1]))
        return [main, (text_only(lvlm, inputs), lambda: by_hand(lvlm, plain, 0))] if blind else [main]

    assert_decodes(family, control, runs, combine)


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_pai_at_random_text_tokens_is_the_written_rule(family: str, seed: int) -> None:
    def raised(call: Call, head: int, query: int) -> Tensor:
        w = call.scores[head, query].clone()
        for j in chosen_text(call, seed):
            w[j] = w[j] + 0.4 * w[j].abs()
        return w

    def combine(_step: int, logits: Any) -> Tensor:
        log_p, log_u = (x.log_softmax(-1) for x in logits)
        return (2 * log_p - log_u).masked_fill(log_p.exp() < 0.1 * log_p.exp().max(), -math.inf)

    control = RandomText(PAI(alpha=0.4, gamma=2), seed)
    assert_control(family, control, edited_scores(raised, range(3)), combine, blind=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_vaf_at_random_text_tokens_suppresses_what_is_before_the_image(family: str) -> None:
    def multiplied(call: Call, head: int, query: int) -> Tensor:
        w = call.scores[head, query].clone()
        image = call.image.nonzero().flatten().tolist()
        if query > image[-1]:
            chosen = chosen_text(call, 0)
            for j in range(len(w)):
                w[j] *= 1.5 if j in chosen else 0.9 if j < image[0] else 1
        return w

    assert_control(family, RandomText(VAF(1.5, 0.9)), edited_scores(multiplied, [1], live=False))


@pytest.mark.parametrize("family", FAMILIES)
def test_spin_at_random_heads_scales_as_many(family: str) -> None:
    def rule(call: Call) -> Tensor:
        out = call.plain.clone()
        for query in call.live:
            stays = draw(2, "heads", call.layer, query - call.prompt + 1).choice(4, 2, False).tolist()
            for head in range(4):
                out[head, query] *= 1.0 if head in stays else 0.3
        return out

    assert_control(family, RandomHeads(SPIN(0.5, 0.3), seed=2), rule)


def assert_equal_answers(control: TrainingFree, method: TrainingFree) -> None:
    lvlm = double_model("llava")
    batch = next(lvlm.batches([example(0), example(1)], 2))
    (ours, scores), (theirs, written) = (answers_of(lvlm, batch, item) for item in (control, method))
    assert ours == theirs
    assert all(torch.equal(a, b) for a, b in zip(scores, written, strict=True))


def test_ad_hh_acts_on_as_many_other_heads() -> None:
    lvlm, own = double_model("llava"), ("L0.H1", "L2.H0", "L2.H3")
    control = RandomHeads(ADHH(own, 0.01), seed=1)
    others = [str(h) for h in gs.circuits.random_heads((lvlm.n_layers, lvlm.n_heads), 3, exclude=own, seed=1)]
    assert not set(others) & set(own)
    assert_equal_answers(control, ADHH(tuple(others), 0.01))


@pytest.mark.parametrize(
    ("method", "moved"),
    [(DeCo(layers=(1,)), DeCo), (DoLa(layers=(0,)), DoLa), (MiddleLayers(layers=(2,)), MiddleLayers)],
    ids=["DeCo", "DoLa", "middle layers"],
)
def test_a_method_at_random_layers_is_the_method_at_those_layers(method: Any, moved: Any) -> None:
    lvlm, control = double_model("llava"), RandomLayers(method, seed=4)
    (layer,) = control.used_parameters(lvlm)["layers"]
    assert layer in {0, 1, 2} - set(method.layers)
    assert_equal_answers(control, moved(layers=(layer,)))


def test_all_text_tokens_are_chosen_if_the_image_has_more_tokens() -> None:
    image = torch.tensor([[False, True, True, True, False, False], [True, True, False, False, False, False]])
    valid = torch.tensor([[True] * 6, [True] * 6])
    chosen = text_layout(RowLayout(torch.tensor([0, 0]), image, valid, prompt=5), 0).image
    assert chosen[0].tolist() == [True, False, False, False, True, False]
    assert (int(chosen[1].sum()), bool(chosen[1, 5]), bool((chosen & image).any())) == (2, False, False)


def test_controls_that_do_not_fit_a_method_are_refused_before_work() -> None:
    lvlm = gs.load_lvlm("tiny")
    data = gs.DerivationData(lvlm, None, gs.scenes.dataset(10))
    with pytest.raises(ConfigError, match=r"random text tokens is no control of 'pia'; choose from .*did you mean pai"):
        RandomText.derive(data, of="pia")
    with pytest.raises(ConfigError, match=r"PAI has no parameter 'alfa'|no parameter 'alfa'.*did you mean alpha"):
        RandomText.derive(data, of="pai", alfa=1)
    with pytest.raises(ConfigError, match="AdaptVis does not edit attention to image tokens"):
        RandomText(AdaptVis()).check(lvlm)
    with pytest.raises(ConfigError, match="VCD acts on no layers that could be replaced"):
        RandomLayers(VCD()).check(lvlm)
    with pytest.raises(ConfigError, match="DeCo chooses no heads"):
        RandomHeads(DeCo()).check(lvlm)
    with pytest.raises(
        ModelError, match=r"DeCo \(layers=\(0, 1, 2, 3\)\): the control needs 4 other layers, .* only 6 in all"
    ):
        RandomLayers(DeCo(layers=(0, 1, 2, 3))).check(lvlm)


@pytest.mark.parametrize("control", [RandomText(), RandomHeads(), RandomLayers()], ids=lambda c: c.label)
def test_the_model_is_unchanged_after_the_context(control: TrainingFree) -> None:
    lvlm = model("llava")
    batch = next(lvlm.batches([example(0)], 1))
    before = lvlm.attention, hooks_of(lvlm), lvlm.logits(batch.inputs)
    with control.applied(lvlm):
        lvlm.generate_batch(batch, 2)
        assert [record.name for record in lvlm.interventions] == [control.name]
    assert (lvlm.attention, hooks_of(lvlm)) == before[:2]
    assert torch.equal(lvlm.logits(batch.inputs), before[2])


def test_parameters_of_the_method_and_of_the_control_are_in_the_name_and_the_provenance() -> None:
    data = gs.DerivationData(gs.load_lvlm("tiny"), None, gs.scenes.dataset(10))
    control = RandomText.derive(data, of="vaf", enhance=1.5, seed=2)
    assert control.name == "random text tokens in VAF (enhance=1.5) (seed=2)"
    assert control.parameters["of_parameters"]["enhance"] == 1.5
    assert control.control
