"""DeCo, DoLa and ReVisiT against the written formulas, with whole uncached forwards in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import groundscope as gs
from groundscope.core.errors import ConfigError, ModelError
from lvlm import Lvlm
from lvlm.decoding.beam import Beams, beam_search
from lvlm.decoding.loop import DecodingRun, prompts_of
from mitigation.training_free.lens import jensen_shannon, reverse_jensen_shannon
from mitigation.training_free.methods.deco import DeCo, corrected, truncated
from mitigation.training_free.methods.dola import DoLa, bucket_layers, layer_contrast, penalized
from mitigation.training_free.methods.revisit import ReVisiT, with_image_token
from tests.toys.answers import assert_equal_answers
from tests.toys.decoding_oracle import double_model
from tests.toys.exact_decoding import EXACT, assert_exact, decoded, difference
from tests.toys.examples import example
from tests.toys.families import model
from tests.toys.float64 import float64_inside
from tests.toys.hidden_state_oracle import Pass, naive_answer, norm_and_head

FAMILIES = ("llava", "qwen2_5_vl", "gemma3")
STEPS = 4


def assert_equal_to_oracle(family: str, method: Any, rule: Any) -> None:
    """Decode two prompts in one batch, and each alone with whole forwards under the written rule."""

    def write(lvlm: Lvlm, _question: Any, inputs: Any) -> tuple[list[int], list[Tensor]]:
        return naive_answer(lvlm, inputs, lambda step, p: rule(lvlm, step, p), STEPS)

    assert_exact(family, method, write, STEPS)


def lens_of(lvlm: Any, p: Pass, number: int, *, norm: bool = True, row: int = -1) -> Tensor:
    final, head = norm_and_head(lvlm)
    x = p.streams[number][row]
    logits = head(final(x) if norm else x)
    cap = getattr(lvlm.hf.config.get_text_config(), "final_logit_softcapping", None)
    return torch.tanh(logits / cap) * cap if cap and norm else logits


# ---- DeCo


@pytest.mark.parametrize("family", FAMILIES)
def test_deco_is_the_written_rule(family: str) -> None:
    def rule(lvlm: Any, _step: int, p: Pass) -> Tensor:
        probabilities = p.logits.softmax(-1)
        plausible, total = [], 0.0
        for token in probabilities.argsort(descending=True).tolist()[:20]:
            plausible.append(token)
            total += float(probabilities[token])
            if total >= 0.9:
                break
        inner = {layer: lens_of(lvlm, p, layer + 1) for layer in (0, 1)}
        best = max(
            ((float(x.softmax(-1)[token]), layer) for layer, x in inner.items() for token in plausible),
            key=lambda b: b[0],
        )
        scores = torch.full_like(p.logits, -math.inf)
        for token in plausible:
            scores[token] = p.logits[token] + 0.6 * best[0] * inner[best[1]][token]
        return scores

    assert_equal_to_oracle(family, DeCo(layers=(0, 1)), rule)


def test_the_token_that_crosses_the_probability_stays_a_candidate() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert truncated(logits, 4, 0.79).tolist() == [[True, True, False, False]]
    assert truncated(logits, 4, 0.81).tolist() == [[True, True, True, False]]
    assert truncated(logits, 1, 0.99).tolist() == [[True, False, False, False]]


def test_deco_adds_the_layer_that_is_most_confident_about_a_candidate() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    inner = torch.tensor(
        [[[0.0, 0.0, 9.0], [3.0, 0.0, 0.0]]]
    )  # the first layer is sure of a token that is no candidate
    candidates = torch.tensor([[True, True, False]])
    p = math.exp(3) / (math.exp(3) + 2)
    expected = torch.tensor([[2 + 0.6 * p * 3, 1.0, -math.inf]])
    torch.testing.assert_close(corrected(logits, inner, candidates, 0.6), expected)


# ---- DoLa


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bucket", ["low", "high"])
def test_dola_is_the_written_rule_for_each_answer(family: str, bucket: Any) -> None:
    numbers = {"low": (0, 1), "high": (1, 2)}[bucket]

    def rule(lvlm: Any, _step: int, p: Pass) -> Tensor:
        last = p.logits.log_softmax(-1)
        distances = []
        for number in numbers:
            inner = lens_of(lvlm, p, number).log_softmax(-1)
            mean = ((last.exp() + inner.exp()) / 2).log()
            distances.append(0.5 * (last.exp() * (last - mean)).sum() + 0.5 * (inner.exp() * (inner - mean)).sum())
        premature = lens_of(lvlm, p, numbers[int(torch.stack(distances).argmax())]).log_softmax(-1)
        scores = last - premature
        scores[last.exp() < 0.1 * last.exp().max()] = -math.inf
        return scores

    assert_equal_to_oracle(family, DoLa(layers=numbers), rule)


@pytest.mark.parametrize("family", FAMILIES)
@float64_inside()
def test_dola_of_the_release_is_the_written_rule_for_one_answer(family: str) -> None:
    lvlm = double_model(family)
    batch = next(lvlm.batches([example(1)], 1))

    def rule(_step: int, p: Pass) -> Tensor:
        last = p.logits.log_softmax(-1)
        distances = []
        for number in (0, 1, 2):
            inner = lens_of(lvlm, p, number, norm=False).log_softmax(-1)
            mean = (last.exp() + inner.exp()) / 2
            kl = torch.nn.functional.kl_div
            distances.append(
                0.5 * kl(last, mean, reduction="none").mean() + 0.5 * kl(inner, mean, reduction="none").mean()
            )
        premature = lens_of(lvlm, p, int(torch.stack(distances).argmax()), norm=False).log_softmax(-1)
        scores = last - premature
        scores[last.exp() < 0.1 * last.exp().max()] = -math.inf
        for token in set(p.tokens.tolist()):
            scores[token] = scores[token] * 1.2 if scores[token] < 0 else scores[token] / 1.2
        return scores

    method = DoLa(layers=(0, 1, 2), variant="release")
    tokens, scores = naive_answer(lvlm, batch.encodings[0].inputs, rule, STEPS)
    for form in ("cached", "padded", "whole"):
        answers, ours = decoded(lvlm, batch, method, STEPS, form)
        assert answers == [tokens]
        assert all(difference(got[0], expected) < EXACT for got, expected in zip(ours, scores, strict=True))


def test_the_release_of_dola_takes_one_layer_for_the_batch() -> None:
    torch.manual_seed(0)
    logits, inner = torch.randn(6, 9), 3 * torch.randn(6, 4, 9)
    log_p, log_q = logits.log_softmax(-1), inner.log_softmax(-1)
    chosen = [
        [float((a - s).abs().max()) < 1e-5 for a in (p - q)]
        for p, q, s in zip(log_p, log_q, layer_contrast(logits, inner, 0, "release"), strict=True)
    ]
    layers = {row.index(True) for row in chosen}
    assert len(layers) == 1
    own = [int(np.argmax([float(jensen_shannon(p, x)) for x in q])) for p, q in zip(log_p, log_q, strict=True)]
    assert len(set(own)) > 1
    for row, layer in enumerate(own):
        torch.testing.assert_close(
            layer_contrast(logits, inner, 0, "paper")[row], log_p[row] - log_q[row, layer], atol=1e-5, rtol=0
        )


@pytest.mark.parametrize(
    ("bucket", "depth", "tied", "expected"),
    [
        ("low", 32, False, range(0, 16, 2)),
        ("high", 32, False, range(16, 32, 2)),
        ("low", 40, True, range(2, 20, 2)),
        ("low", 48, False, range(0, 20, 2)),
        ("high", 48, False, range(28, 48, 2)),
        ("low", 3, True, [2]),
        ("low", 1, False, [0]),
    ],
)
def test_buckets_are_those_of_the_release(bucket: Any, depth: int, tied: bool, expected: Any) -> None:
    assert bucket_layers(bucket, depth, tied=tied) == tuple(expected)


def test_buckets_of_a_model_whose_unembedding_is_the_embedding_begin_at_two() -> None:
    assert DoLa().used_parameters(model("gemma3"))["layers"] == (2,)
    assert DoLa().used_parameters(model("llava"))["layers"] == (0,)


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    torch.manual_seed(0)
    scores, tokens = torch.randn(3, 7), torch.tensor([[0, 1, 1], [2, 2, 2], [6, 5, 0]])
    expected = RepetitionPenaltyLogitsProcessor(1.2)(tokens, scores.clone())  # type: ignore[arg-type]
    torch.testing.assert_close(penalized(scores, tokens, 1.2), expected)


# ---- ReVisiT


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", ["paper", "release"])
def test_revisit_is_the_written_rule(family: str, variant: Any) -> None:
    first: dict[int, Tensor] = {}

    def rule(lvlm: Any, step: int, p: Pass) -> Tensor:
        columns = (p.tokens == lvlm.content_id).nonzero().flatten().tolist()
        image = torch.stack([lens_of(lvlm, p, len(p.streams) - 1, row=column) for column in columns])
        if step == 0:
            first[len(first)] = image
        image = list(first.values())[-1]
        last = p.logits.log_softmax(-1)
        plausible = [v for v in range(len(last)) if last[v] - last.max() >= math.log(1e-5)]
        p_own = (last[plausible].exp() / last[plausible].exp().sum()).log()
        best, nearest = math.inf, p_own
        for x in image:
            q = x[plausible].log_softmax(-1)
            mean = (p_own.exp() + q.exp()) / 2
            if variant == "paper":
                divergence = 0.5 * (p_own.exp() * (p_own - mean.log())).sum() + 0.5 * (q.exp() * (q - mean.log())).sum()
            else:
                divergence = 0.5 * ((mean * (mean.log() - p_own)).mean() + (mean * (mean.log() - q)).mean())
            if divergence < best:
                best, nearest = float(divergence), q
        scores = torch.full_like(last, -math.inf)
        scores[plausible] = p_own + nearest
        return scores

    assert_equal_to_oracle(family, ReVisiT(variant=variant), rule)


def test_revisit_takes_the_nearest_image_token_among_candidates_only() -> None:
    logits = torch.tensor([4.0, 3.0, -20.0])
    image = torch.tensor([[0.0, 5.0, 0.0], [4.0, 3.0, 90.0]])  # equal on the candidates, far off on another token
    scores = with_image_token(logits, image, 1e-5, "paper")
    own = torch.tensor([4.0, 3.0]).log_softmax(-1)
    torch.testing.assert_close(scores, torch.tensor([*(2 * own).tolist(), -math.inf]))


def test_revisit_refuses_a_family_without_image_tokens() -> None:
    with pytest.raises(ModelError, match="ReVisiT acts on image tokens of the decoder, and in mllama"):
        ReVisiT().check(model("mllama"))


@pytest.mark.parametrize("method", [DeCo(layers=(0, 1)), DoLa(layers=(0, 1), repetition_penalty=1.3), ReVisiT()])
def test_beams_of_a_batch_are_those_of_each_answer_alone(method: Any) -> None:
    """Beams change their parents, so a rule that remembers something of each answer must follow them."""
    lvlm = double_model("llava")
    batches = [
        *lvlm.batches([example(0), example(1)], 2),
        *lvlm.batches([example(0)], 1),
        *lvlm.batches([example(1)], 1),
    ]
    with method.applied(lvlm):
        batched, *alone = (
            beam_search(lvlm, prompts_of(b), lvlm.decoder.start(lvlm, b), 5, names=list(b.images), beams=Beams(3))  # type: ignore[union-attr]
            for b in batches
        )
    assert batched == [answer for (answer,) in alone]


def test_image_tokens_follow_the_answers_of_a_search() -> None:
    lvlm = double_model("llava")
    batch = next(lvlm.batches([example(0), example(1)], 2))
    with ReVisiT().applied(lvlm):
        rule = lvlm.decoder.start(lvlm, batch)  # type: ignore[union-attr]
    run = DecodingRun(lvlm, prompts_of(batch), rule)
    first = run.start()
    run.select([1, 1, 0])
    logits = run.next(first.argmax(-1)[[1, 1, 0]])
    torch.testing.assert_close(logits[0], logits[1])
    plain = DecodingRun(lvlm, prompts_of(batch), type(rule)(ReVisiT(), lvlm))
    expected = plain.next(plain.start().argmax(-1))
    torch.testing.assert_close(logits, expected[[1, 1, 0]], atol=1e-5, rtol=0)


# ---- divergences, parameters, neutral values


def test_divergences_are_those_of_scipy() -> None:
    from scipy.spatial.distance import jensenshannon
    from scipy.stats import entropy

    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(5)), rng.dirichlet(np.ones(5))
    log_p, log_q = torch.tensor(p).log(), torch.tensor(q).log()
    assert float(jensen_shannon(log_p, log_q)) == pytest.approx(jensenshannon(p, q) ** 2, rel=1e-12)
    m = (p + q) / 2
    expected = (entropy(m, p) + entropy(m, q)) / 2 / 5
    assert float(reverse_jensen_shannon(log_p, log_q)) == pytest.approx(expected, rel=1e-12)


def test_deco_with_weight_zero_is_the_model_alone() -> None:
    lvlm, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10)[:20]
    plain = gs.answer(lvlm, data)
    with DeCo(alpha=0).applied(lvlm):
        assert_equal_answers(gs.answer(lvlm, data), plain)
    batch = next(lvlm.batches(data.examples, 4))
    with DeCo(alpha=1e-9, layers=(2,)).applied(lvlm):
        forced = lvlm.answer_logits(batch)
    assert forced.argmax(-1).tolist() == lvlm.logits(batch.inputs).argmax(-1).tolist()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DeCo(alpha=-1), "alpha=-1: must be a number at least 0"),
        (lambda: DeCo(top_k=0), "top_k=0: must be a whole number of at least 1"),
        (lambda: DeCo(top_p=0), "top_p=0: must be a number above 0"),
        (lambda: DeCo(layers=()), r"layers=\(\): must be None or a tuple"),
        (lambda: DoLa(bucket="mid"), "unknown bucket 'mid'"),  # type: ignore[arg-type]
        (lambda: DoLa(variant="code"), "unknown variant 'code'"),  # type: ignore[arg-type]
        (lambda: DoLa(layers=(1, 1)), "layers=.*different layer numbers"),
        (lambda: ReVisiT(beta=2), "beta=2: must be a number at least 0 and at most 1"),
    ],
)
def test_parameters_out_of_range_are_named(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("method", [DeCo(layers=(7,)), DoLa(layers=(6,))])
def test_layers_that_the_model_lacks_are_refused_before_work(method: Any) -> None:
    lvlm = gs.load_lvlm("tiny")
    with pytest.raises(ConfigError, match="tiny has layers 0-5"), method.applied(lvlm):
        pass
    assert lvlm.decoder is None


@pytest.mark.parametrize("family", ["mllama", "blip2_opt", "florence2", "idefics3"])
@pytest.mark.parametrize("method", [DeCo(), DoLa(), DoLa(variant="release")])
def test_methods_of_layers_run_in_families_that_need_full_forwards(family: str, method: Any) -> None:
    lvlm = model(family)
    batch = next(lvlm.batches([example(0)], 1))
    with method.applied(lvlm):
        assert len(lvlm.decoder.generate(lvlm, batch, 2)) == 1  # type: ignore[union-attr]
