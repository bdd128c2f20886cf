"""Controls against written definitions, and compositions of mitigations."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import groundscope as gs
from groundscope.core.errors import ConfigError, DataError, ModelError
from lvlm.decoding.decoder import AnswerRule, Step
from lvlm.decoding.loop import generate
from mitigation import Mitigation
from mitigation.training_free.branch_methods import BranchDecoder
from mitigation.training_free.composition import compose
from mitigation.training_free.controls.cut_answers import CutGreedy, cut_text, length_for_mean, length_for_recall
from mitigation.training_free.controls.random_branches import GaussianBranch, OtherImageBranch, _GaussianRule
from mitigation.training_free.controls.random_places import other_heads, other_layers
from mitigation.training_free.controls.rules import APCOnly, YesNoBias, choose_bias
from mitigation.training_free.methods.m3id import M3ID
from mitigation.training_free.methods.pai import PAI
from mitigation.training_free.methods.skip_newline import SkipNewline
from mitigation.training_free.methods.vaf import VAF
from mitigation.training_free.methods.vdd import VDD
from tests.toys.decoding_oracle import double_model, naive_steps
from tests.toys.examples import example
from tests.toys.families import model
from tests.toys.random_models import hooks_of
from tests.toys.rule_oracle import doubled, masked

# ---- rules


def test_only_implausible_tokens_are_excluded() -> None:
    logits = torch.tensor([[0.6, 0.3, 0.1], [0.9, 0.05, 0.05]]).log()
    out = APCOnly(0.2)._combine(Step(0, logits), None)
    assert out.isinf().tolist() == [[False, False, True], [False, True, True]]
    assert torch.equal(out[~out.isinf()], logits[~out.isinf()])


def test_the_bias_has_the_highest_accuracy_of_all_constants() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        truth = rng.random(15) < 0.4
        scores = rng.normal(size=15).round(1) + truth

        def accuracy(bias: float, scores: np.ndarray = scores, truth: np.ndarray = truth) -> int:
            return sum((s + bias > 0 and t) or (s + bias < 0 and not t) for s, t in zip(scores, truth, strict=True))

        bias = choose_bias(scores.tolist(), truth.tolist())
        grid = [accuracy(b) for b in np.linspace(-6, 6, 2401)]
        assert accuracy(bias) == max(grid)


def test_no_bias_is_chosen_where_none_helps() -> None:
    assert choose_bias([1.0, 2.0, -1.0], [True, True, False]) == 0


def test_the_bias_is_added_to_yes_in_the_first_token_of_yes_no_questions() -> None:
    lvlm = gs.load_lvlm("tiny")
    data = gs.scenes.dataset(10, splits=["conflict"])
    plain, biased = gs.answer(lvlm, data), None
    with YesNoBias(1.5).applied(lvlm):
        biased = gs.answer(lvlm, data)
    for before, after in zip(plain.answers, biased.answers, strict=True):
        shift = {"yes": 1.5, "no": -1.5}.get(before.answer, 0.0)
        assert after.margin == pytest.approx(before.margin + shift, abs=1e-4)  # type: ignore[operator]
    state = [(1,)]
    logits = torch.zeros(1, 3)
    assert torch.equal(YesNoBias(1.5)._combine(Step(1, logits), state), logits)


def test_a_bias_needs_yes_no_questions() -> None:
    data = gs.scenes.dataset(10).where(kind="what_color")
    with pytest.raises(DataError, match="the data have none"):
        YesNoBias.derive(gs.DerivationData(gs.load_lvlm("tiny"), None, data))


# ---- random branches


class Subtract(AnswerRule):
    def combine(self, step: Step) -> Tensor:
        return 2 * step.logits - step.branches[0]


def test_gaussian_branches_have_the_deviation_of_the_branch() -> None:
    draw = torch.Generator().manual_seed(0)
    main = torch.randn(2, 20_000, generator=draw)
    other = main + torch.randn(2, 20_000, generator=draw) * torch.tensor([[0.5], [3.0]]) + 7
    step = Step(3, main, (other,))
    out = _GaussianRule(Subtract(), ["a", "b"], 0).combine(step)
    change = main - out  # l' - l
    assert change.std(-1).tolist() == pytest.approx([0.5, 3.0], rel=0.03)
    assert change.mean(-1).abs().max() < 0.1
    assert torch.equal(out, _GaussianRule(Subtract(), ["a", "b"], 0).combine(step))
    alone = _GaussianRule(Subtract(), ["b"], 0).combine(Step(3, main[1:], (other[1:],)))
    assert torch.equal(alone[0], out[1])
    for changed in (
        _GaussianRule(Subtract(), ["a", "b"], 1).combine(step),
        _GaussianRule(Subtract(), ["a", "b"], 0).combine(replace(step, number=4)),
    ):
        assert not torch.equal(changed, out)


def test_another_image_is_contrasted_with_the_rule_of_the_method() -> None:
    lvlm = double_model("llava")
    pool = tuple(example(n).image for n in (0, 3))
    control = OtherImageBranch(VDD(alpha=0.5), images=pool)
    batch = next(lvlm.batches([example(0), example(1)], 2))
    decoder = control._enter(lvlm, None)  # type: ignore[arg-type]
    answers = generate(lvlm, batch, decoder.start(lvlm, batch), 3, ends=False)  # type: ignore[union-attr]
    assert control._other_images(example(0)) == [pool[1]]
    for row, question in enumerate((example(0), example(1))):
        (image,) = control._other_images(question)
        text = lvlm.prompt(question.question)
        inputs = [doubled(lvlm.encode_prompt(text, [x.load()])[0]) for x in (question.image, image)]
        tokens, _ = naive_steps(lvlm, inputs, lambda _, x: masked(1.5 * x[0] - 0.5 * x[1], x[0], 0.1), 3)
        assert answers[row] == tokens


def test_a_control_of_a_method_without_branches_is_refused() -> None:
    lvlm = gs.load_lvlm("tiny")
    with pytest.raises(ConfigError, match="compares with no branch"), GaussianBranch(VAF()).applied(lvlm):
        pass
    with GaussianBranch(APCOnly()).applied(lvlm), pytest.raises(ConfigError, match="the method has none"):
        gs.answer(lvlm, gs.scenes.dataset(10, splits=["conflict"]))
    with pytest.raises(ConfigError, match=r"two or more images, or make the control with derive"):
        OtherImageBranch().check(lvlm)


# ---- greedy, cut


def test_the_mean_length_of_cut_texts_is_nearest_to_that_of_the_method() -> None:
    rng = np.random.default_rng(0)
    texts = ["w " * int(n) for n in rng.integers(1, 30, 40)]
    lengths = [len(t.split()) for t in texts]
    for mean in (2.0, 7.3, 100.0):
        words = length_for_mean(texts, mean)
        errors = [abs(np.mean(np.minimum(lengths, n)) - mean) for n in range(1, 60)]
        assert errors[words - 1] == pytest.approx(min(errors))


def test_the_cut_has_at_least_the_recall() -> None:
    lvlm = gs.load_lvlm("tiny")
    data = gs.scenes.dataset(40).where(kind="caption")
    answers = gs.answer(lvlm, data, generate=True)
    whole = length_for_recall(answers, data, 2.0)
    assert whole == max(len((a.text or "").split()) for a in answers.answers)
    from behavior.chair import score_captions

    def recall(words: int) -> float:
        rows = tuple(replace(a, text=cut_text(a.text or "", words)) for a in answers.answers)
        return score_captions(replace(answers, answers=rows), data).recall.value

    target = recall(whole) / 2
    words = length_for_recall(answers, data, target)
    assert recall(words) >= target > recall(words - 1)


def test_a_cut_of_no_words_is_refused() -> None:
    with pytest.raises(ConfigError, match="words=0: must be an integer of at least 1"):
        CutGreedy(0)


def test_random_heads_and_layers_are_others() -> None:
    lvlm = gs.load_lvlm("tiny")
    heads = other_heads(lvlm, ["L3.H1", "L4.H7"], seed=2)
    assert len(set(heads)) == 2
    assert not {str(h) for h in heads} & {"L3.H1", "L4.H7"}
    assert heads == other_heads(lvlm, ["L3.H1", "L4.H7"], seed=2)
    assert {other_layers(lvlm, [0, 1], seed=s) for s in range(20)} > {other_layers(lvlm, [0, 1])}
    assert all(not {0, 1} & set(other_layers(lvlm, [0, 1], seed=s)) for s in range(20))
    with pytest.raises(ConfigError, match="choose at most half"):
        other_layers(lvlm, [0, 1, 2, 3])


# ---- compositions


def vector_of(lvlm: gs.Lvlm) -> gs.SteeringVector:
    direction = np.random.default_rng(0).normal(size=(1, lvlm.width))[0]
    return gs.SteeringVector(
        {1: gs.AddChange(direction / np.linalg.norm(direction), sigma=1.0)},
        "last+generated",
        2.0,
        lvlm.name,
        lvlm.config_hash,
    )


def test_a_vector_and_a_decoder_act_together() -> None:
    lvlm = double_model("llava")
    vector, method = vector_of(lvlm), VDD(beta=0)
    batch = next(lvlm.batches([example(0)], 1))
    both = compose(vector, method)
    assert isinstance(both, Mitigation)
    before = lvlm.logits(batch.inputs)
    with both.applied(lvlm):
        logits = lvlm.answer_logits(batch)
    with vector.applied(lvlm):
        main = lvlm.logits(batch.inputs)
        ids = batch.inputs["input_ids"][batch.inputs["input_ids"] != lvlm.content_id][None]
        blind = lvlm.logits({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    torch.testing.assert_close(logits, 2 * main - blind, atol=1e-5, rtol=0)
    assert not torch.allclose(main, before)
    assert torch.equal(lvlm.logits(batch.inputs), before)


def test_names_parameters_and_costs_are_combined() -> None:
    lvlm = model("llava")
    both = compose(vector_of(lvlm), VDD(blind="mean"))
    assert both.name == f"{vector_of(lvlm).name} + VDD (blind=mean)"
    assert [part["name"] for part in both.parameters["parts"]] == [vector_of(lvlm).name, "VDD (blind=mean)"]
    assert both.forward_cost == gs.ForwardCost(per_token=3, prompts=2)
    assert compose(both, VAF()).name.count(" + ") == 2


def test_an_attention_method_and_a_decoder_are_combined() -> None:
    lvlm = gs.load_lvlm("tiny")
    data = gs.scenes.dataset(10, splits=["conflict"])
    with compose(VAF(), M3ID()).applied(lvlm):
        composed = gs.answer(lvlm, data)
    with VAF().applied(lvlm), M3ID().applied(lvlm):
        nested = gs.answer(lvlm, data)
    assert composed.answers == nested.answers


@pytest.mark.parametrize("second", [M3ID(), PAI(), SkipNewline("paragraph")])
def test_two_decoders_are_refused_before_work(second: gs.TrainingFree) -> None:
    lvlm = gs.load_lvlm("tiny")
    hooks, forwards = hooks_of(lvlm), []
    handle = lvlm.hf.register_forward_pre_hook(lambda *_: forwards.append(1))
    try:
        both = compose(VDD(), second)
        with pytest.raises(ModelError, match=r"VDD and .* both choose the next token, so they cannot be combined"):
            both.check(lvlm)
        with pytest.raises(ModelError, match="both choose the next token"), both.applied(lvlm):
            pass
        nested = pytest.raises(ModelError, match=r"chooses the next token, and so does VDD; apply one of them")
        with VDD().applied(lvlm), nested, second.applied(lvlm):
            pass
    finally:
        handle.remove()
    assert not forwards
    assert (lvlm.decoder, lvlm.interventions, hooks_of(lvlm)) == (None, (), hooks)


def test_nothing_to_combine_is_refused() -> None:
    with pytest.raises(ConfigError, match="there is nothing to combine"):
        compose()


def test_rules_follow_beams() -> None:
    lvlm = gs.load_lvlm("tiny")
    batch = next(lvlm.batches(list(gs.scenes.dataset(10, splits=["conflict"]))[:2], 2))
    rule = BranchDecoder(YesNoBias(math.pi)).start(lvlm, batch)
    before = rule.state  # type: ignore[attr-defined]
    rule.select([1, 1])
    assert rule.state == (before[1], before[1])  # type: ignore[attr-defined]
