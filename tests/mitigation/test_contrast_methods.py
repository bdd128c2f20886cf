"""ICD, VDD, LCD, M3ID and RITUAL against the written rules with whole uncached forwards in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import groundscope as gs
from groundscope.core.errors import ConfigError, DataError, ModelError
from lvlm import Lvlm
from lvlm.decoding.decoder import Step
from mitigation.training_free.branch_methods import BranchMethod, BranchRule
from mitigation.training_free.methods.icd import ICD, SYSTEM
from mitigation.training_free.methods.lcd import LCD
from mitigation.training_free.methods.m3id import M3ID
from mitigation.training_free.methods.ritual import RITUAL
from mitigation.training_free.methods.vdd import VDD, VDDCalibration
from tests.toys.decoding_oracle import double_model, text_only
from tests.toys.examples import example
from tests.toys.families import model
from tests.toys.random_models import hooks_of
from tests.toys.rule_oracle import compare, doubled, masked

FAMILIES = ("llava", "qwen2_5_vl", "gemma3")
CASES = pytest.mark.parametrize(
    ("family", "beta"), [*((family, 0.1) for family in FAMILIES), ("llava", 0), ("qwen2_5_vl", 0)]
)
"""Families, with and without the restriction to plausible tokens."""


def blind(lvlm: Lvlm, _question: Any, plain: dict[str, Tensor]) -> list[dict[str, Any]]:
    return [text_only(lvlm, plain)]


# ---- rules


@CASES
def test_icd_after_the_image_is_the_written_rule(family: str, beta: float) -> None:
    sentence = "You see nothing."

    def disturbed(lvlm: Lvlm, question: Any, _plain: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        text = lvlm.prompt(f"{sentence} {question.question}")
        return [doubled(lvlm.encode_prompt(text, [question.image.load()])[0])]

    method = ICD(place="after image", instruction=sentence, alpha=0.7, beta=beta)
    compare(method, family, disturbed, lambda _, x: masked(1.7 * x[0] - 0.7 * x[1], x[0], beta))


SYSTEM_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] if m['content'] is string else "
    "m['content'][0]['text'] }} {% else %}USER: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %} {% endif %}{% endfor %}ASSISTANT:"
)


def test_icd_replaces_the_system_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    lvlm = model("llava")
    monkeypatch.setattr(lvlm.processor, "chat_template", SYSTEM_TEMPLATE, raising=False)
    ICD().check(lvlm)
    batch = next(lvlm.batches([replace(example(0), system="Look at the image.")], 1))
    (branch,) = ICD()._branches(lvlm, batch, None)
    (group,) = branch.prompts
    expected, _ = lvlm.encode_prompt(lvlm.prompt(example(0).question, system=SYSTEM), [example(0).image.load()])
    assert torch.equal(group.inputs["input_ids"], expected["input_ids"])
    assert group.inputs["input_ids"].shape != batch.inputs["input_ids"].shape


def test_icd_without_a_system_prompt_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"ICD replaces the system prompt.*tiny.*place='after image'"):
        ICD().check(gs.load_lvlm("tiny"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["no image", "unknown", "single unknown", "mean"])
def test_vdd_is_the_written_rule_for_each_blind_form(family: str, form: Any) -> None:
    lvlm = double_model(family)
    unknown = lvlm.processor.tokenizer.unk_token_id
    if unknown is None and form != "no image":
        with pytest.raises(ModelError, match="no token for unknown words"):
            VDD(blind=form).check(lvlm)
        return

    def filled(plain: dict[str, Tensor], *, single: bool) -> dict[str, Any]:
        text: list[int] = []
        for token in plain["input_ids"][0].tolist():
            if token != lvlm.content_id:
                text.append(token)
            elif not (single and text[-1] == unknown):
                text.append(unknown)
        ids = torch.tensor([text])
        zeros = {n: torch.zeros_like(ids) for n in ("mm_token_type_ids", "token_type_ids") if n in plain}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **zeros}

    def branches(lvlm: Lvlm, _question: Any, plain: dict[str, Tensor]) -> list[dict[str, Any]]:
        removed = text_only(lvlm, plain)
        if form == "no image":
            return [removed]
        return [*([removed] if form == "mean" else []), filled(plain, single=form == "single unknown")]

    def rule(_: int, x: Sequence[Tensor]) -> Tensor:
        return masked(2 * x[0] - sum(x[1:]) / len(x[1:]), x[0], 0.1)

    compare(VDD(blind=form), family, branches, rule)


@CASES
def test_lcd_is_the_written_rule(family: str, beta: float) -> None:
    def rule(_: int, x: Sequence[Tensor]) -> Tensor:
        p, q = x[0].softmax(-1), x[1].softmax(-1)
        w = 2 / -(q * q.log()).sum()
        return masked((1 + w) * p.log() - w * q.log(), x[0], beta)

    compare(LCD(beta=beta), family, blind, rule)


def test_lcd_of_a_certain_blind_answer_is_finite_or_excluded() -> None:
    step = Step(0, torch.tensor([[1.0, 0.5, 0.0]]), (torch.tensor([[0.0, 1e4, 0.0]]),))
    logits = LCD(beta=0)._combine(step, None)
    assert not logits.isnan().any()
    assert logits.argmax().item() == 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", ["paper", "avisc", "ritual"])
def test_m3id_is_the_written_rule(family: str, variant: Any) -> None:
    def rule(number: int, x: Sequence[Tensor]) -> Tensor:
        log_c, log_u = x[0].log_softmax(-1), x[1].log_softmax(-1)
        t = number if variant == "ritual" else number + 1
        g = math.exp(-0.3 * (t + 2))
        weight = (1 - g) / g
        if variant == "paper":
            return log_c + (weight if float(log_c.exp().max()) < 0.05 else 0) * (log_c - log_u)
        return masked(log_c + weight * (log_c - log_u), x[0], 0.1)

    compare(M3ID(decay=0.3, offset=2, threshold=0.05, variant=variant), family, blind, rule)


def test_the_threshold_of_m3id_is_strict() -> None:
    blind = torch.tensor([[0.0, 3.0]], dtype=torch.float64)
    main = torch.zeros(1, 2, dtype=torch.float64)
    at = M3ID(decay=1, threshold=0.5)._combine(Step(0, main, (blind,)), None)
    above = M3ID(decay=1, threshold=0.5 + 1e-9)._combine(Step(0, main, (blind,)), None)
    torch.testing.assert_close(at, main.log_softmax(-1))
    assert not torch.allclose(above, main.log_softmax(-1))


def test_m3id_of_ritual_leaves_the_first_token_to_the_model() -> None:
    main, other = torch.randn(2, 9, generator=torch.Generator().manual_seed(0)).split(1)
    logits = M3ID(variant="ritual")._combine(Step(0, main, (other,)), None)
    finite = ~logits.isinf()
    torch.testing.assert_close(logits[finite], main.log_softmax(-1)[finite])


@CASES
def test_ritual_is_the_written_rule(family: str, beta: float) -> None:
    def flipped(lvlm: Lvlm, question: Any, _plain: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        from PIL import ImageOps

        text = lvlm.prompt(question.question)
        return [doubled(lvlm.encode_prompt(text, [ImageOps.mirror(question.image.load())])[0])]

    method = RITUAL(transform="horizontal flip", kappa=3, beta=beta)
    compare(method, family, flipped, lambda _, x: masked(x[0] + 3 * x[1], x[0], beta), weight=3)


def test_the_transform_of_ritual_depends_on_seed_and_question_only() -> None:
    def draws(method: RITUAL) -> list[str]:
        return [image.identity for n in range(12) for image in method._transformed(example(n))]

    assert draws(RITUAL()) == draws(RITUAL())
    assert draws(RITUAL()) != draws(RITUAL(seed=1))
    assert len({text.split("kind=")[1].split("'")[1] for text in draws(RITUAL())}) >= 3


def test_calibration_divides_the_probabilities_of_candidates() -> None:
    lvlm = model("llava")
    batch = next(lvlm.batches([example(0), example(1)], 2))
    rule = BranchRule(VDDCalibration(), lvlm, batch)
    main, other = lvlm.logits(batch.inputs), lvlm.logits(text_only_batch(lvlm, batch.inputs))
    logits = rule.combine(Step(0, main, (other,)))
    key = gs.answer_key(lvlm, example(0))
    for row in range(2):
        tokens = [ids[-1] for ids in key.tokens]
        p, q = main[row].double().softmax(-1)[tokens], other[row].double().softmax(-1)[tokens]
        expected = (p / q) / (p / q).sum()
        torch.testing.assert_close(logits[row].softmax(-1)[tokens].double(), expected, atol=1e-6, rtol=0)
        assert int((~logits[row].isinf()).sum()) == 2
    assert torch.equal(rule.combine(Step(1, main, (other,))), main)


def test_the_mean_form_of_the_calibration_averages_probabilities() -> None:
    lvlm = model("llava")
    batch = next(lvlm.batches([example(0)], 1))
    rule = BranchRule(VDDCalibration(blind="mean", spelling="as written"), lvlm, batch)
    main, first, second = torch.randn(
        3, 1, lvlm.logits(batch.inputs).shape[-1], generator=torch.Generator().manual_seed(1)
    )
    tokens = [ids[0] for ids in gs.answer_key(lvlm, example(0)).tokens]
    p, q = main[0].softmax(-1)[tokens], (first[0].softmax(-1) + second[0].softmax(-1))[tokens] / 2
    logits = rule.combine(Step(0, main, (first, second)))
    torch.testing.assert_close(logits[0].softmax(-1)[tokens], (p / q) / (p / q).sum(), atol=1e-6, rtol=0)


def text_only_batch(lvlm: Lvlm, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    ids = torch.stack([row[row != lvlm.content_id] for row in inputs["input_ids"]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


# ---- neutral parameters, refusals, hooks


@pytest.mark.parametrize(
    "method",
    [
        ICD(alpha=0, beta=0, place="after image"), VDD(alpha=0, beta=0), LCD(alpha=0, beta=0), M3ID(decay=0),
        M3ID(threshold=0), RITUAL(kappa=0, beta=0),
    ],
)  # fmt: skip
def test_neutral_parameters_add_no_decoder_and_their_rule_is_plain(method: BranchMethod) -> None:
    lvlm = model("llava")
    with method.applied(lvlm):
        assert lvlm.decoder is None
    main, other = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0))
    logits = method._combine(Step(2, main, (other,)), None)
    torch.testing.assert_close(logits.log_softmax(-1), main.log_softmax(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["blip2_opt", "instructblip_t5"])
def test_a_family_that_needs_its_image_is_refused_by_name(family: str) -> None:
    for method in (VDD(), LCD(), M3ID(), VDDCalibration()):
        with pytest.raises(ModelError, match=family):
            method.check(model(family))


def test_wrong_parameters_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown blind 'nothing'; choose from no image"):
        VDD(blind="nothing")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="unknown variant 'release'; choose from paper, avisc, ritual"):
        M3ID(variant="release")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="unknown transform 'mirror'; choose from random"):
        RITUAL(transform="mirror")


def test_ask_decodes_with_the_method_and_a_bare_prompt_has_no_question() -> None:
    lvlm = gs.load_lvlm("tiny")
    scene = gs.scenes.dataset(10)[0]
    hooks = hooks_of(lvlm)
    method = RITUAL(transform="vertical flip", kappa=50, beta=0)
    with method.applied(lvlm):
        text = lvlm.ask(scene.image, scene.question)
        (row,) = gs.answer(lvlm, gs.ConceptDataset("one", (scene,)), generate=True).answers
        assert text == row.text
        with pytest.raises(DataError, match=r"Lvlm.generate receives none; use Lvlm.ask"):
            lvlm.generate(scene.image, lvlm.prompt(scene.question))
    assert hooks_of(lvlm) == hooks
    assert lvlm.decoder is None


def test_an_error_inside_a_context_restores_the_model() -> None:
    lvlm = gs.load_lvlm("tiny")
    hooks = hooks_of(lvlm)
    with pytest.raises(ZeroDivisionError), VDD().applied(lvlm):
        print(1 / 0)
    assert (lvlm.decoder, lvlm.interventions, hooks_of(lvlm)) == (None, (), hooks)
