"""Self-judgment against whole forwards and written formulas: scores, blind forms, sentence search, statistics."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

import groundscope as gs
from concepts.image_source import NoImage
from groundscope.core.errors import ConfigError, DataError, ModelError
from lvlm import Lvlm
from lvlm.decoding.shared_prefix import logits_after_each, shares_prefixes
from mitigation import training_free_methods
from mitigation.self_judgment import EMBEDDED_TEMPLATE, Judge, Judgments, SelfJudgmentDecoding, detect, judge_sentences
from mitigation.self_judgment.detector import weighted_auc, weighted_rank_correlation
from mitigation.self_judgment.judge import AnswerScore, reading_tokens, strip_ends
from tests.toys.decoding_oracle import double_model
from tests.toys.examples import example
from tests.toys.families import model

ENDS = (",", ".", "and")
METHOD = SelfJudgmentDecoding(template=EMBEDDED_TEMPLATE, ends=ENDS)


def tiny() -> Lvlm:
    return gs.load_lvlm("tiny")


def caption(index: int = 0) -> Any:
    return gs.scenes.dataset(40, seed=3).where(kind="caption")[index]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_prompts_with_a_shared_beginning_have_the_logits_of_whole_forwards(family: str) -> None:
    lvlm = double_model(family)
    questions = ["Is there a cat?", "Is there a small dog in the image?", "Is there a cat, or a dog?"]
    rows = [lvlm.on_device(lvlm.encode(replace(example(0), question=q)).inputs) for q in questions]
    assert shares_prefixes(lvlm)
    passes: list[int] = []
    hook = lvlm.hf.register_forward_pre_hook(lambda *_: passes.append(1))
    shared = logits_after_each(lvlm, rows)
    hook.remove()
    assert len(passes) == 2
    expected = torch.cat([lvlm.logits(row) for row in rows])
    torch.testing.assert_close(shared.log_softmax(-1), expected.log_softmax(-1), atol=1e-5, rtol=0)
    assert torch.equal(logits_after_each(lvlm, rows, share=False), expected)


def test_a_model_that_reads_prompts_in_both_directions_runs_them_whole() -> None:
    assert not shares_prefixes(model("paligemma"))
    assert not shares_prefixes(model("mllama"))


def test_scores_are_the_written_formulas() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.5, *[0.0] * 20], [-9.0, -8.0, 2.0, 0.5, *[0.0] * 20]])
    rows = [[math.exp(x) for x in row] for row in logits.tolist()]
    yes, no = (0, 1), (2,)
    assert AnswerScore("logit", yes).of(logits).tolist() == [4.0, -17.0]
    expected = [math.log((p[0] + p[1]) / sum(p)) for p in rows]
    np.testing.assert_allclose(AnswerScore("logprob", yes).of(logits), expected, rtol=1e-12)
    expected = [math.log((p[0] + p[1]) / p[2]) for p in rows]
    np.testing.assert_allclose(AnswerScore("margin", yes, no).of(logits), expected, rtol=1e-12)
    # The second row's yes is not among its ten largest logits.
    assert AnswerScore("release", yes).of(logits).tolist() == [3.0, 0.0]


@pytest.mark.parametrize(
    ("score", "blind"), [("logit", "mean"), ("logit", "removed"), ("logprob", "unknown"), ("margin", "removed")]
)
def test_judgments_are_scores_of_whole_forwards(score: Any, blind: Any) -> None:
    lvlm, scene = tiny(), caption()
    vocabulary = lvlm.processor.tokenizer.get_vocab()
    sentences = ["a red apple,", "and a blue car."]
    judgments = judge_sentences(lvlm, scene, sentences, Judge(EMBEDDED_TEMPLATE, score, blind), ends=ENDS)

    def value(logits: torch.Tensor) -> float:
        x = logits.double()[0]
        yes, no = x[vocabulary["yes"]], x[vocabulary["no"]]
        return float({"logit": yes, "logprob": yes - x.logsumexp(0), "margin": yes - no}[score])

    for row, question in enumerate(["Is the apple red?", "Is the car blue?"]):
        with_image = lvlm.encode(replace(scene, question=question)).inputs
        assert judgments.image[row] == pytest.approx(value(lvlm.logits(with_image)), abs=1e-4)
        removed = lvlm.encode(replace(scene, question=question, image=NoImage())).inputs
        ids = with_image["input_ids"].clone()
        ids[ids == lvlm.content_id] = vocabulary["<unk>"]
        unknown = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        values = {"removed": value(lvlm.logits(removed)), "unknown": value(lvlm.logits(unknown))}
        expected = np.mean(list(values.values())) if blind == "mean" else values[blind]
        assert judgments.blind[row] == pytest.approx(expected, abs=1e-4)
    assert judgments.debiased(0.5).tolist() == (1.5 * judgments.image - 0.5 * judgments.blind).tolist()


def test_unknown_prompt_words_are_refused_before_work() -> None:
    lvlm = tiny()
    with pytest.raises(ModelError, match=r"cannot read the judge's prompt: not applicable: \d+ prompt words unknown"):
        SelfJudgmentDecoding().check(lvlm)
    assert "analyze" in str(SelfJudgmentDecoding().problem(lvlm, caption()))
    assert METHOD.problem(lvlm, caption()) is None
    SelfJudgmentDecoding(choice="random").check(lvlm)  # asks no judge
    with pytest.raises(DataError, match=r"does not know words of the judged text \(zebra\?\)"):
        judge_sentences(lvlm, caption(), ["a zebra"], Judge("Is there a {noun}?"))
    with pytest.raises(ModelError, match="self-judgment compares with the prompt without its image"):
        Judge(EMBEDDED_TEMPLATE).check(model("florence2"))


def test_words_that_separate_sentences_are_left_out() -> None:
    assert strip_ends(" and a red sandal and ", ENDS) == "a red sandal"
    assert strip_ends("A cat sits. ", (".",)) == "A cat sits"
    assert strip_ends("and", ENDS) == ""
    assert Judge().question("A cat.").endswith("The description is: A cat. ")
    assert Judge(EMBEDDED_TEMPLATE).question("car", ENDS) == "Is the car ?"


def naive_answer(lvlm: Lvlm, scene: Any, choice: str, limit: int) -> list[int]:
    """The sentence search with whole forwards for every token, and one judged prompt at a time."""
    tokenizer = lvlm.processor.tokenizer
    vocabulary = tokenizer.get_vocab()
    stops, end = {vocabulary[word] for word in ENDS}, vocabulary["</s>"]
    prompt = lvlm.encode(scene).inputs
    answer: list[int] = []

    def log_p(tokens: list[int]) -> torch.Tensor:
        ids = torch.cat([prompt["input_ids"], torch.tensor([tokens], dtype=torch.long)], 1)
        logits = lvlm.logits({**prompt, "input_ids": ids, "attention_mask": torch.ones_like(ids)})
        return logits[0].log_softmax(-1)

    def judged(text: str, image: bool) -> float:
        words = [word for word in text.split() if word not in ENDS] or [""]
        question = f"Is the {words[-1]} {words[-2] if len(words) > 1 else ''}?"
        source = scene.image if image else NoImage()
        logits = lvlm.logits(lvlm.encode(replace(scene, question=question, image=source)).inputs)
        return float(logits[0, vocabulary["yes"]])

    while len(answer) < limit:
        rows: list[list[int]] = [[] for _ in range(5)]
        alive, ended = [True] * 5, [False] * 5
        for _ in range(limit - len(answer)):
            counts: dict[int, int] = {}
            for k in [k for k in range(5) if alive[k]]:
                scores = log_p(answer + rows[k])
                for token, count in counts.items():
                    scores[token] -= 2.0 * count
                token = int(scores.argmax())
                counts[token] = counts.get(token, 0) + 1
                ended[k] = token == end
                rows[k] += [] if ended[k] else [token]
                alive[k] = not ended[k] and token not in stops
        if not rows[0]:
            break
        texts = [tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]
        f = [judged(text, image=True) if row else -1e9 for text, row in zip(texts, rows, strict=True)]
        blind = [judged(text, image=False) if row else 0.0 for text, row in zip(texts, rows, strict=True)]
        score = {"debiased": [2 * a - b for a, b in zip(f, blind, strict=True)], "image": f}[choice]
        answer += rows[max(range(5), key=score.__getitem__)]
        if any(ended):
            break
    return answer


@pytest.mark.parametrize(("choice", "limit"), [("debiased", 12), ("image", 5)])
def test_sentences_are_those_of_a_search_with_whole_forwards(choice: Any, limit: int) -> None:
    lvlm, scene = tiny(), caption()
    batch = next(lvlm.batches([scene], 1))
    with replace(METHOD, choice=choice).applied(lvlm):
        assert lvlm.decoder is not None
        answer = lvlm.decoder.generate(lvlm, batch, limit)[0]
    assert answer == naive_answer(lvlm, scene, choice, limit)


def test_one_candidate_without_diversity_is_the_greedy_answer() -> None:
    lvlm, data = tiny(), gs.scenes.dataset(40, seed=3).where(kind="caption")
    greedy = [a.text for a in gs.answer(lvlm, data).answers]
    with replace(METHOD, candidates=1).applied(lvlm):
        assert [a.text for a in gs.answer(lvlm, data).answers] == greedy
    assert lvlm.decoder is None


def test_controls_choose_among_the_same_candidates() -> None:
    lvlm, data = tiny(), gs.scenes.dataset(40, seed=3).where(kind="caption")[:1]
    texts = {}
    for name in ("likelihood", "random", "blind"):
        with replace(METHOD, choice=name).applied(lvlm):
            texts[name] = gs.answer(lvlm, data).answers[0].text
    assert all(texts.values())
    with replace(METHOD, choice="random").applied(lvlm):
        assert gs.answer(lvlm, data).answers[0].text == texts["random"]


def test_parameters_are_checked() -> None:
    for problem, options in {
        "it has no place for the sentence": {"template": "Is it true?"},
        "unknown choice 'best'; choose from debiased": {"choice": "best"},
        "unknown score 'p'; choose from logit": {"score": "p"},
        "candidates=0: must be a number at least 1": {"candidates": 0},
        "ends='.': give the texts of tokens": {"ends": "."},
    }.items():
        with pytest.raises(ConfigError, match=problem):
            SelfJudgmentDecoding(**options)
    with pytest.raises(ModelError, match=r"no token of .* reads 'zebra'"):
        replace(METHOD, ends=("zebra",)).check(tiny())
    assert training_free_methods["dsgd"] is SelfJudgmentDecoding
    assert reading_tokens(tiny(), "yes") == (tiny().processor.tokenizer.get_vocab()["yes"],)


# ---- the detector


def test_statistics_of_weights_are_those_of_repeated_rows() -> None:
    rng = np.random.default_rng(0)
    score, other = rng.integers(0, 6, 40).astype(float), rng.normal(size=40).round(1)
    truth = rng.random(40) < 0.5
    weights = rng.integers(0, 4, (7, 40)).astype(float)
    areas, correlations = weighted_auc(score, truth, weights), weighted_rank_correlation(score, other, weights)
    for draw in range(7):
        rows = np.repeat(np.arange(40), weights[draw].astype(int))
        assert areas[draw] == pytest.approx(roc_auc_score(truth[rows], score[rows]), abs=1e-12)
        assert correlations[draw] == pytest.approx(spearmanr(score[rows], other[rows])[0], abs=1e-12)


def test_the_detector_has_the_values_of_scikit_learn_and_intervals_by_image() -> None:
    rng = np.random.default_rng(1)
    truth = rng.random(120) < 0.5
    groups = [f"image {i // 4}" for i in range(120)]
    blind = rng.normal(size=120)
    judgments = Judgments(truth + blind + 0.5 * rng.normal(size=120), blind)
    result = detect(judgments, truth, groups, alphas=[1.0], resamples=200)
    f, bias, debiased = result.rows
    assert [row.score for row in result.rows] == ["f", "f_blind", "S alpha=1"]
    assert f.auc.value == pytest.approx(roc_auc_score(truth, judgments.image))
    assert debiased.auc.value == pytest.approx(roc_auc_score(truth, 2 * judgments.image - blind))
    assert f.rank_correlation.value == pytest.approx(spearmanr(judgments.image, truth)[0])
    assert result.text_bias.value == pytest.approx(spearmanr(judgments.image, blind)[0])
    assert bias.auc.low < 0.5 < bias.auc.high
    assert f.auc.low < f.auc.value < f.auc.high
    pairs = [
        (judgments.image[i], judgments.image[j])
        for i in range(120)
        for j in range(120)
        if groups[i] == groups[j] and truth[i] and not truth[j]
    ]
    assert f.auc_within.n == len(pairs)
    assert f.auc_within.value == pytest.approx(np.mean([a > b for a, b in pairs]))
    assert len(result.frame()) == 3


def test_ends_of_intervals_stay_within_the_range_of_their_statistic() -> None:
    rng = np.random.default_rng(0)
    truth = np.tile([True, False, True, False], 6)
    score = truth + 0.45 * rng.random(24)
    score[3] = 3.0  # one error in six images: the correction for few images passes 1
    groups = [f"image {i // 4}" for i in range(24)]
    for judgments in (Judgments(score, -score), Judgments(-score, score)):
        result = detect(judgments, truth, groups)
        for row in result.rows:
            for estimate in (row.auc, row.auc_within):
                assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
            assert -1 <= row.rank_correlation.low <= row.rank_correlation.high <= 1
        assert (result.rows[0].auc.high == 1) != (result.rows[0].auc.low == 0)
        assert -1 <= result.text_bias.low <= result.text_bias.high <= 1


def test_labels_of_one_class_are_refused() -> None:
    judgments = Judgments(np.zeros(2), np.zeros(2))
    with pytest.raises(DataError, match="all 2 sentences have the label True"):
        detect(judgments, [True, True], ["a", "b"])
    with pytest.raises(DataError, match="2 judged sentences, 1 label and 2 groups"):
        detect(judgments, [True], ["a", "b"])
