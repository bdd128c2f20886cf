"""Methods that edit attention, against the written rules in whole uncached forwards in float64, by head and query."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import groundscope as gs
from groundscope.core.errors import ConfigError, ModelError
from lvlm import Lvlm
from mitigation.training_free.attention import AttentionMethod, image_attention
from mitigation.training_free.method import TrainingFree
from mitigation.training_free.methods.ad_hh import ADHH
from mitigation.training_free.methods.adapt_vis import AdaptVis
from mitigation.training_free.methods.middle_layers import MiddleLayers
from mitigation.training_free.methods.pai import PAI
from mitigation.training_free.methods.spin import SPIN, top_heads
from mitigation.training_free.methods.vaf import VAF
from mitigation.training_free.methods.var import VAR, redistributed, sink_dimensions
from mitigation.training_free.methods.vhr import VHR, head_factors
from tests.toys.attention_oracle import Call, by_hand, edited_scores, plain
from tests.toys.decoding_oracle import double_model, naive_steps, text_only
from tests.toys.exact_decoding import assert_exact, decoded, difference, doubled
from tests.toys.examples import example
from tests.toys.families import model
from tests.toys.float64 import float64_inside
from tests.toys.random_models import hooks_of

FAMILIES = ("llava", "qwen2_5_vl", "mistral3")
STEPS = 3


def inputs_of(batch: Any) -> list[dict[str, Tensor]]:
    return [doubled(encoding.inputs) for encoding in batch.encodings]


def assert_rule(
    family: str,
    method: TrainingFree,
    rule: Callable[[Lvlm], Any],
    combine: Any = None,
    *,
    blind: bool = False,
    weight: float = 0.0,
) -> None:
    changed: list[bool] = []

    def write(lvlm: Lvlm, _question: Any, inputs: dict[str, Tensor]) -> tuple[list[int], list[Tensor]]:
        prompts = [inputs, text_only(lvlm, inputs)] if blind else [inputs]
        contexts = [
            lambda n=inputs["input_ids"].shape[1]: by_hand(lvlm, rule(lvlm), n),
            lambda: by_hand(lvlm, plain, 0),
        ]
        tokens, expected = naive_steps(lvlm, prompts, combine or (lambda _, x: x[0]), STEPS, contexts)
        _, unchanged = naive_steps(lvlm, [inputs], lambda _, x: x[0], 1)
        changed.append(difference(unchanged[0], expected[0]) > 1e-4)
        return tokens, expected

    assert_exact(family, method, write, STEPS, weight=weight)
    assert any(changed)


@pytest.mark.parametrize("beta", [0.1, 0])
@pytest.mark.parametrize("family", FAMILIES)
def test_pai_is_the_written_rule(family: str, beta: float) -> None:
    def raised(call: Call, head: int, query: int) -> Tensor:
        w = call.scores[head, query]
        return torch.where(call.image, w + 0.4 * w.abs(), w)

    def combine(_step: int, logits: Any) -> Tensor:
        log_p, log_u = (x.log_softmax(-1) for x in logits)
        mixed = 2 * (log_p - log_u) + log_u
        return mixed.masked_fill(log_p.exp() < beta * log_p.exp().max(), -math.inf)

    # 2 to 31 of 32 is every layer of three except the first half of one: round(2 * 3 / 32) = 0.
    method = PAI(alpha=0.4, gamma=2, beta=beta)
    assert_rule(family, method, lambda _: edited_scores(raised, range(3)), combine, blind=True, weight=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_middle_layers_are_the_written_rule(family: str) -> None:
    def raised(call: Call, head: int, query: int) -> Tensor:
        w = call.scores[:, query]
        mean = sum(w[h].abs() for h in range(len(w))) / len(w)
        return torch.where(call.image, w[head] + 0.5 * mean, w[head])

    method = MiddleLayers(layers=(0, 2))
    assert_rule(family, method, lambda _: edited_scores(raised, [0, 2]))


@pytest.mark.parametrize("family", FAMILIES)
def test_vaf_is_the_written_rule(family: str) -> None:
    def multiplied(call: Call, head: int, query: int) -> Tensor:
        w = call.scores[head, query].clone()
        positions = call.image.nonzero().flatten().tolist()
        if query <= positions[-1]:
            return w
        w[positions] *= 1.5
        w[: positions[0]] *= 0.9
        return w

    method = VAF(1.5, 0.9)
    assert_rule(family, method, lambda _: edited_scores(multiplied, [1], live=False))


@pytest.mark.parametrize("family", FAMILIES)
def test_spin_is_the_written_rule(family: str) -> None:
    def rule(call: Call) -> Tensor:
        out = call.plain.clone()
        for query in call.live:
            sums = [float(call.scores[h, query][call.image].sum()) for h in range(4)]
            least = sorted(range(4), key=lambda h: sums[h])[:2]  # floor(.5 * 4) stay
            out[least, query] *= 0.3
        return out

    assert_rule(family, SPIN(0.5, 0.3), lambda _: rule)


@pytest.mark.parametrize("family", FAMILIES)
def test_ad_hh_is_the_written_rule(family: str) -> None:
    def rule(call: Call) -> Tensor:
        weights = call.scores.softmax(-1)
        end = int(call.image.nonzero().amax()) + 1
        for layer, head in ((0, 1), (2, 0), (2, 3)):
            for query in call.live:
                if call.layer == layer and weights[head, query, end:].sum() >= 0.1:
                    weights[head, query, end:] = 0
        return weights @ call.values

    assert_rule(family, ADHH(("L0.H1", "L2.H0", "L2.H3"), 0.1), lambda _: rule)


@pytest.mark.parametrize("sinks", ["all", "image"])
@pytest.mark.parametrize("family", FAMILIES)
def test_var_is_the_written_rule(family: str, sinks: Any) -> None:
    streams: dict[int, Tensor] = {}
    counts: list[int] = []
    dimensions, threshold = (3, 7), 1.2

    def rule(call: Call) -> Tensor:
        weights = call.scores.softmax(-1)
        x = streams[call.layer]
        values = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        sink = (values[:, dimensions].abs() > threshold).any(-1)
        sink = sink & call.image if sinks == "image" else sink
        new = weights.clone()
        for head in range(len(weights)):
            for query in call.live:
                w = weights[head, query]
                on_image, on_sinks = w[call.image].sum(), w[call.image & sink].sum()
                if on_image < 0.02 or on_sinks > 0.9 * on_image:
                    continue
                counts.append(query)
                new[head, query, sink] = 0.5 * w[sink]
                others = call.image & ~sink
                new[head, query, others] += 0.5 * w[sink].sum() * w[others] / w[others].sum()
        return new @ call.values

    lvlm = double_model(family)
    hooks = [
        layer.register_forward_pre_hook(
            lambda _m, args, kwargs, i=i: streams.__setitem__(i, (args[0] if args else kwargs["hidden_states"])[0]),
            with_kwargs=True,
        )
        for i, layer in enumerate(lvlm.layers("decoder"))
    ]
    try:
        assert_rule(family, VAR(0.5, 0.02, 0.9, threshold, dimensions, sinks), lambda _: rule)
    finally:
        for hook in hooks:
            hook.remove()
    assert counts


def test_weight_of_sinks_moves_to_other_image_tokens() -> None:
    weights = torch.tensor([[[[0.4, 0.1, 0.2, 0.3]], [[0.9, 0.02, 0.03, 0.05]]]])
    image = torch.tensor([False, True, True, False])[None, None, None]
    sinks = torch.tensor([True, True, False, False])[None, None, None]
    moved = redistributed(weights, image, sinks, 0.6, 0.2, 0.5)
    torch.testing.assert_close(moved[0, :, 0], torch.tensor([[0.24, 0.06, 0.4, 0.3], [0.9, 0.02, 0.03, 0.05]]))
    assert torch.equal(redistributed(weights, image, sinks, 0.6, 0.2, 0.3), weights)


def test_dimensions_of_sinks_are_those_of_the_first_token() -> None:
    lvlm = model("llava")
    encoding = lvlm.encode(example(0))
    record = lvlm.read(lvlm.collate([encoding]), ["decoder.L1.resid_pre", "decoder.L2.resid_pre"])
    values = [x[0, 0] / x[0, 0].square().mean().sqrt() for x in record.values()]
    expected = sum(v.abs() for v in values).topk(2).indices.tolist()  # type: ignore[union-attr]
    assert sink_dimensions(lvlm) == tuple(sorted(expected))


def test_a_model_that_is_too_narrow_for_sinks_is_refused_by_var() -> None:
    with pytest.raises(ModelError, match=r"VAR: no token of llava can be a sink.*sqrt\(32\) = 5\.7; set a threshold"):
        VAR().check(model("llava"))


@pytest.mark.parametrize("rows", ["last", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapt_vis_is_the_written_rule(family: str, rows: Any) -> None:
    first = inputs_of(next(double_model(family).batches([example(0), example(1)], 2)))
    with torch.no_grad(), float64_inside():
        confidences = [confidence(double_model(family), inputs) for inputs in first]
    threshold = sum(confidences) / 2
    seen: set[float] = set()

    def write(lvlm: Lvlm, _question: Any, inputs: dict[str, Tensor]) -> tuple[list[int], list[Tensor]]:
        factor = 0.5 if confidence(lvlm, inputs) < threshold else 1.5
        seen.add(factor)

        def multiplied(call: Call, _head: int, query: int) -> Tensor:
            w = call.scores[_head, query]
            inside = query == call.prompt - 1 or (rows == "all" and query < call.prompt)
            return torch.where(call.image & inside, w * factor, w)

        rule = edited_scores(multiplied, range(3), live=False)
        contexts = [lambda: by_hand(lvlm, rule, inputs["input_ids"].shape[1])]
        return naive_steps(lvlm, [inputs], lambda _, x: x[0], STEPS, contexts)

    # The factors are those of the prompts' rows, which decode without branches, so nothing is padded.
    assert_exact(family, AdaptVis(0.5, 1.5, threshold, rows), write, STEPS, forms=("cached", "whole"))
    assert seen == {0.5, 1.5}


@torch.no_grad()
def confidence(lvlm: Lvlm, inputs: dict[str, Tensor]) -> float:
    return float(lvlm.hf(**inputs, use_cache=False).logits[0, -1].softmax(-1).max())


def vhr_by_hand(blind: dict[int, Tensor], layers: list[int], method: VHR) -> Callable[[Call], Tensor]:
    power = 2 if method.norm == "square" else 1

    def rule(call: Call) -> Tensor:
        out = call.plain.clone()
        if call.layer not in layers:
            return out
        with_image, without = out[:, call.prompt - 1], blind[call.layer]
        heads = range(len(out))
        vhd = [float((with_image[h] - without[h]).square().sum()) ** (power / 2) for h in heads]
        size = [float(without[h].square().sum()) ** (power / 2) for h in heads]

        def limit(values: list[float]) -> float:
            mean = sum(values) / len(values)
            return mean + math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - method.sample_sd))

        outliers = [h for h in heads if vhd[h] > limit(vhd) and size[h] > limit(size)]
        vhd = [0.0 if h in outliers else vhd[h] for h in heads]
        middle = sorted(vhd)[1:3]
        for h in heads:
            for query in call.live if method.rows == "last" else range(out.shape[1]):
                if method.outliers == "head" and h in outliers:
                    out[h, query] = 0
                elif vhd[h] > sum(middle) / 2:
                    out[h, query] *= method.factor
        return out

    return rule


@pytest.mark.parametrize(
    "method",
    [VHR(), VHR(3, "head", "square", sample_sd=False), VHR(rows="all", layers=(0, 2))],
    ids=["default", "square", "all rows"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_vhr_is_the_written_rule(family: str, method: VHR) -> None:
    changed: list[bool] = []

    def write(lvlm: Lvlm, _question: Any, inputs: dict[str, Tensor]) -> tuple[list[int], list[Tensor]]:
        blind: dict[int, Tensor] = {}

        def read(call: Call) -> Tensor:
            blind[call.layer] = call.plain[:, -1]
            return call.plain

        with torch.no_grad(), by_hand(lvlm, read, 0):
            lvlm.hf(**text_only(lvlm, inputs), use_cache=False)
        rule = vhr_by_hand(blind, [1, 2] if method.layers is None else [0, 2], method)
        contexts = [lambda: by_hand(lvlm, rule, inputs["input_ids"].shape[1])]
        tokens, expected = naive_steps(lvlm, [inputs], lambda _, x: x[0], STEPS, contexts)
        _, unchanged = naive_steps(lvlm, [inputs], lambda _, x: x[0], 1)
        changed.append(difference(unchanged[0], expected[0]) > 1e-3)
        return tokens, expected

    # Heads are those of the prompts' rows, which decode without branches, so nothing is padded.
    assert_exact(family, method, write, STEPS, forms=("cached", "whole"))
    assert all(changed)


def test_outliers_of_vhr_are_not_chosen() -> None:
    blind = torch.zeros(1, 5, 1)
    blind[0, 4] = 9.0
    outputs = torch.tensor([0.1, 0.2, 0.3, 0.4, 20.0])[None, :, None]
    assert head_factors(outputs, blind, VHR()).tolist() == [[1.0, 1.0, 2.0, 2.0, 1.0]]
    assert head_factors(outputs, blind, VHR(outliers="head")).tolist() == [[1.0, 1.0, 2.0, 2.0, 0.0]]
    assert head_factors(outputs, blind, VHR(strict=False)).tolist() == [[1.0, 2.0, 2.0, 2.0, 1.0]]


def test_heads_with_the_highest_sums_stay() -> None:
    scores = torch.tensor([[1.0, 9.0], [2.0, -9.0], [3.0, 0.0], [-5.0, 0.0], [0.0, 0.0]])[None, :, None]
    image = torch.tensor([True, False])[None, None, None]
    assert top_heads(scores, image, 0.6)[0, :, 0].tolist() == [True, True, True, False, False]
    assert top_heads(scores, image, 0.59)[0, :, 0].tolist() == [False, True, True, False, False]


def test_attention_to_the_image_is_that_of_the_query_that_produced_the_token() -> None:
    lvlm = double_model("llava")
    batch = next(lvlm.batches([example(0), example(1)], 2))
    answers = [[5, 7], [9]]
    for row, sums in enumerate(image_attention(lvlm, batch, answers)):
        inputs = inputs_of(batch)[row]
        prompt = inputs["input_ids"].shape[1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([answers[row]])], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        weights: dict[int, Tensor] = {}

        def rule(call: Call, weights: dict[int, Tensor] = weights) -> Tensor:
            weights[call.layer] = call.scores.softmax(-1)[:, :, call.image].sum(-1)
            return call.plain

        with torch.no_grad(), by_hand(lvlm, rule, prompt):
            lvlm.hf(**inputs, use_cache=False)
        for layer in range(3):
            expected = weights[layer][:, prompt - 1 : prompt - 1 + len(answers[row])]
            torch.testing.assert_close(sums[layer], expected, atol=1e-6, rtol=0)


NEUTRAL = [
    PAI(0, 1),
    MiddleLayers(0),
    VAF(1, 1),
    SPIN(1),
    SPIN(factor=1),
    ADHH(),
    AdaptVis(1, 1),
    VAR(1, threshold=2),
    VHR(1),
]


@pytest.mark.parametrize("method", NEUTRAL, ids=lambda m: m.name)
def test_neutral_parameters_leave_the_model_alone(method: TrainingFree) -> None:
    lvlm = model("llava")
    batch = next(lvlm.batches([example(0), example(1)], 2))
    before, written = lvlm.answer_logits(batch), lvlm.generate_batch(batch, 4)
    with method.applied(lvlm):
        assert torch.equal(lvlm.answer_logits(batch), before)
        assert lvlm.generate_batch(batch, 4) == written


@pytest.mark.parametrize("method", [PAI(0, 1.0000001), MiddleLayers(1e-12), VAF(1, 1 - 1e-12)], ids=lambda m: m.label)
def test_nearly_neutral_parameters_run_the_edit_and_change_nothing(method: TrainingFree) -> None:
    lvlm = double_model("qwen2_5_vl")
    batch = next(lvlm.batches([example(0), example(1)], 2))
    plain_answers, plain_scores = decoded(lvlm, batch, TrainingFree(), STEPS)
    answers, scores = decoded(lvlm, batch, method, STEPS)
    assert answers == plain_answers
    for ours, before in zip(scores, plain_scores, strict=True):
        possible = ~ours.isinf()
        difference = ours.log_softmax(-1) - before.masked_fill(~possible, -math.inf).log_softmax(-1)
        assert difference[possible].abs().max() < 1e-5


METHODS = [PAI(), MiddleLayers(), VAF(), SPIN(), ADHH(("L1.H0",)), AdaptVis(), VAR(threshold=2), VHR()]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.label)
def test_the_model_is_unchanged_after_the_context_and_after_an_error(method: TrainingFree) -> None:
    lvlm = model("llava")
    batch = next(lvlm.batches([example(0)], 1))
    before = lvlm.attention, hooks_of(lvlm), lvlm.logits(batch.inputs)
    with method.applied(lvlm):
        lvlm.generate_batch(batch, 2)
        assert [record.name for record in lvlm.interventions] == [method.name]
        assert lvlm.unregistered_hooks == ()
    with pytest.raises(RuntimeError), method.applied(lvlm):
        raise RuntimeError
    assert (lvlm.attention, hooks_of(lvlm)) == before[:2]
    assert torch.equal(lvlm.logits(batch.inputs), before[2])
    assert lvlm.decoder is None


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.label)
def test_families_without_image_tokens_in_the_decoder_are_refused(method: TrainingFree) -> None:
    for family, reader in (("mllama", "cross-attention reads"), ("florence2", "an encoder reads")):
        with pytest.raises(ModelError, match=f"{method.label} acts on image tokens.*{reader}"):
            method.check(model(family))


def test_wrong_parameters_are_refused() -> None:
    lvlm = model("llava")
    with pytest.raises(ConfigError, match="SPIN: layer 3, but llava has layers 0-2"):
        SPIN(layers=(3,)).check(lvlm)
    with pytest.raises(ConfigError, match="AD-HH: head 9, but layers of llava have heads 0-3"):
        ADHH(("L1.H9",)).check(lvlm)
    with pytest.raises(ConfigError, match="AD-HH needs heads"):
        ADHH.derive(gs.DerivationData(lvlm, None, gs.scenes.dataset(10)))
    with pytest.raises(ConfigError, match=r"keep=1\.5: must be a number at least 0 and at most 1"):
        SPIN(1.5)
    with pytest.raises(ConfigError, match=r"gamma=0\.9: must be a number at least 1"):
        PAI(gamma=0.9)


def test_published_layers_are_scaled() -> None:
    def layers(method: AttentionMethod, depth: int) -> tuple[int, ...]:
        class Deep:
            n_layers = depth

        return method.edited_layers(Deep())  # type: ignore[arg-type]

    assert layers(PAI(), 32) == tuple(range(2, 32))
    assert layers(MiddleLayers(), 32) == tuple(range(5, 18))
    assert layers(MiddleLayers(variant="release"), 32) == tuple(range(5, 19))
    assert layers(VAF(), 32) == tuple(range(9, 15))
    assert layers(VAF(), 28) == tuple(range(8, 13))
    assert layers(SPIN(), 28) == tuple(range(28))
