"""DSR against a tree that is grown with whole forwards: answers, their scores, and the pairs of the best and the worst."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import groundscope as gs
from groundscope.core.errors import ConfigError, DataError, ModelError
from lvlm import Lvlm
from mitigation.self_judgment import EMBEDDED_TEMPLATE, Judge, ScoredAnswer, SentenceTree, grow_tree, judged_preferences
from mitigation.self_judgment.sentence_tree import select_paths
from tests.toys.decoding_oracle import double_model
from tests.toys.examples import example
from tests.toys.judge_oracle import naive_score

ENDS = ("and", "is", ".", "dog")
TREE = SentenceTree(
    Judge("Is there {sentence} in the image?", alpha=0.5), ends=ENDS, sentence_tokens=3, max_new_tokens=7
)
EMBEDDED = SentenceTree(Judge(EMBEDDED_TEMPLATE), ends=(",", ".", "and"), max_new_tokens=12)


def next_log_p(lvlm: Lvlm, inputs: Any, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities after a prompt and tokens, by one whole forward."""
    row = {**inputs, "input_ids": torch.cat([inputs["input_ids"], torch.tensor([tokens], dtype=torch.long)], 1)}
    row["attention_mask"] = torch.ones_like(row["input_ids"])
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in row:
            row[name] = torch.cat([row[name], torch.zeros(1, len(tokens), dtype=row[name].dtype)], 1)
    with torch.no_grad():
        return lvlm.hf(**row, use_cache=False).logits[0, -1].log_softmax(-1)


def naive_sentences(
    lvlm: Lvlm, inputs: Any, path: list[int], stops: set[int], end: int
) -> list[tuple[list[int], bool]]:
    """The five diverse continuations of a path, in steps over all of them; each with whether it ended."""
    rows: list[list[int]] = [[] for _ in range(5)]
    alive, ended = [True] * 5, [False] * 5
    for _ in range(min(3, 7 - len(path))):
        tokens_so_far: list[int] = []
        for k in range(5):
            if not alive[k]:
                continue
            scores = next_log_p(lvlm, inputs, path + rows[k])
            for token in tokens_so_far:
                scores[token] -= 3.0
            token = int(scores.argmax())
            tokens_so_far.append(token)
            ended[k] = token in (end, lvlm.content_id)
            alive[k] = not ended[k] and token not in stops
            rows[k] += [] if ended[k] else [token]
    return list(zip(rows, ended, strict=True))


def naive_tree(lvlm: Lvlm, scene: Any) -> tuple[dict[tuple[int, ...], list[float]], list[int]]:
    """The scores of the sentences of each complete answer, and the number of running paths at each depth."""
    tokenizer = lvlm.processor.tokenizer
    vocabulary = tokenizer.get_vocab()
    stops = {vocabulary[word] for word in ENDS}
    inputs = lvlm.encode(scene).inputs
    complete: dict[tuple[int, ...], list[float]] = {}
    running: list[tuple[list[int], list[float]]] = [([], [])]
    sizes = []
    while running:
        following: dict[tuple[int, ...], list[float]] = {}
        for path, scores in running:
            for row, ended in naive_sentences(lvlm, inputs, path, stops, vocabulary["</s>"]):
                text = tokenizer.decode(row, skip_special_tokens=True).strip()
                if not text:
                    if path:
                        complete.setdefault(tuple(path), scores)
                    continue
                longer = (*path, *row)
                value = [*scores, naive_score(lvlm, scene, f"Is there {text} in the image?", 0.5)]
                (complete if ended or len(longer) == 7 else following).setdefault(longer, value)
        sizes.append(len(following))
        ordered = sorted(following.items(), key=lambda item: -sum(item[1]))  # equal numbers of sentences
        if len(ordered) >= 5:
            ordered = [ordered[0], ordered[-2], ordered[-1]]
        running = [(list(path), scores) for path, scores in ordered]
    return complete, sizes


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_the_answers_are_those_of_a_tree_grown_with_whole_forwards(family: str) -> None:
    lvlm, scene = double_model(family), example(0)
    expected, sizes = naive_tree(lvlm, scene)
    assert max(sizes) >= 5  # paths were left out
    answers = grow_tree(lvlm, scene, TREE)
    assert {answer.tokens for answer in answers} == set(expected)
    for answer in answers:
        assert answer.scores == pytest.approx(expected[answer.tokens], abs=1e-4)
    pair = judged_preferences(lvlm, [scene], TREE)[0]
    means = {path: float(np.mean(scores)) for path, scores in expected.items()}
    assert pair.provenance["chosen_score"] == pytest.approx(max(means.values()), abs=1e-4)
    assert pair.provenance["rejected_score"] == pytest.approx(min(means.values()), abs=1e-4)
    decode = lvlm.processor.tokenizer.decode
    near = {
        end: {decode(list(p), skip_special_tokens=True).strip() for p, m in means.items() if abs(m - value) < 1e-4}
        for end, value in (("chosen", max(means.values())), ("rejected", min(means.values())))
    }
    assert pair.chosen in near["chosen"]
    assert pair.rejected in near["rejected"]


def test_the_best_and_the_two_worst_of_a_depth_are_continued() -> None:
    def paths(*scores: float) -> list[ScoredAnswer]:
        return [ScoredAnswer((i,), (score, score + 2)) for i, score in enumerate(scores)]

    def chosen(*scores: float) -> list[int]:
        return [path.tokens[0] for path in select_paths(paths(*scores), TREE)]

    assert chosen(1.0, 4.0, 2.0, 0.0, 3.0) == [1, 0, 3]
    assert chosen(0.0, 0.0, 0.0, 0.0, 0.0, 1.0) == [5, 3, 4]
    assert chosen(1.0, 4.0, 2.0, 0.0) == [0, 1, 2, 3]  # fewer than the candidates
    assert chosen() == []


def test_pairs_are_the_best_and_the_worst_answers_of_the_embedded_model() -> None:
    lvlm, data = gs.load_lvlm("tiny"), gs.scenes.dataset(40, seed=3).where(kind="caption")[:3]
    pairs = judged_preferences(lvlm, data, EMBEDDED)
    assert 0 < len(pairs) <= 3
    assert pairs.provenance["method"] == "assembled from CSR"
    assert pairs.provenance["left_out"] == {"questions whose answers do not differ": 3 - len(pairs)}
    assert pairs.provenance["tree"]["judge"]["template"] == EMBEDDED_TEMPLATE
    for pair in pairs:
        scene = next(e for e in data if e.id == pair.id)
        answers = grow_tree(lvlm, scene, EMBEDDED)
        texts = {lvlm.processor.tokenizer.decode(list(a.tokens)).strip(): a.score for a in answers}
        assert texts[pair.chosen] == max(texts.values())
        assert texts[pair.rejected] == min(texts.values())
        assert pair.source == "self_judgment"
        assert pair.provenance["candidates"] == len(answers)


def test_options_and_data_are_checked() -> None:
    for problem, options in {
        "candidates=0: must be a whole number": {"candidates": 0},
        "best=3 and worst=3 are more than the 5 candidates": {"best": 3, "worst": 3},
        "diversity=-1: must be a number at least 0": {"diversity": -1},
        "ends='.': give the texts of tokens": {"ends": "."},
    }.items():
        values: Any = options
        with pytest.raises(ConfigError, match=problem):
            SentenceTree(**values)
    lvlm = gs.load_lvlm("tiny")
    with pytest.raises(ModelError, match="cannot read the judge's prompt"):
        judged_preferences(lvlm, gs.scenes.dataset(10)[:1])
    with pytest.raises(DataError, match="no questions to answer"):
        judged_preferences(lvlm, [], EMBEDDED)
    narrow = SentenceTree(EMBEDDED.judge, ends=EMBEDDED.ends, candidates=2, diversity=0.0, worst=1, max_new_tokens=6)
    captions = gs.scenes.dataset(10).where(kind="caption")[:1]
    assert len(grow_tree(lvlm, captions[0], narrow)) == 1  # equal continuations are one
    with pytest.raises(DataError, match="the answers to none of the 1 questions differ in score"):
        judged_preferences(lvlm, captions, narrow)
