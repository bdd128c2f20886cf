"""Causes in the model: balance of attention, ability gap, debated explanations, and what is forgotten in training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import groundscope as gs
from behavior import Answer, BehaviorResult, Cost
from concepts.schema import ConceptDataset
from diagnosis import Explanation, ModelProfile, ability_gap, attention_balance, course_of_profiles
from diagnosis.attention_shares import PARTS, part_of_tokens
from diagnosis.debated_explanations import TESTS, compare_explanations
from groundscope.core.errors import ConfigError, DataError
from groundscope.core.statistics import Estimate
from groundscope.testing.planted_failures import make_color_blind
from lvlm import Lvlm


@pytest.fixture(scope="module")
def model() -> Lvlm:
    return gs.load_lvlm("tiny")


@pytest.fixture(scope="module")
def questions() -> ConceptDataset:
    return gs.scenes.dataset(20, seed=2).filter(lambda e: len(e.candidates) > 1)


def test_shares_are_sums_of_the_attention_pattern(model: Lvlm, questions: ConceptDataset) -> None:
    chosen = questions.examples[::7][:6]
    balance = attention_balance(model, chosen, batch_size=4, progress=False)
    np.testing.assert_allclose(balance.shares.sum(axis=-1), 1, atol=1e-5)
    for i, example in enumerate(chosen):
        encoding = model.encode(example)
        inputs = model.collate([encoding])
        for layer in (0, model.n_layers - 1):
            pattern = model.read(inputs, [f"decoder.L{layer}.pattern"], quiet=True)[f"decoder.L{layer}.pattern"]
            last = pattern[0, :, -1].numpy()  # [heads, keys]
            tokens = encoding.tokens
            image = list(tokens.image)
            inside = list(tokens.object(example.subject)) if example.subject else []
            expected = {
                "first": last[:, 0],
                "object": last[:, inside].sum(axis=1),
                "background": last[:, [p for p in image if p not in inside]].sum(axis=1),
                "question": last[:, list(encoding.tokens.question)].sum(axis=1),
            }
            for name, values in expected.items():
                np.testing.assert_allclose(balance.shares[i, layer, :, PARTS.index(name)], values, atol=1e-5)


def test_differences_are_within_kinds_of_questions(model: Lvlm, questions: ConceptDataset) -> None:
    balance = attention_balance(model, questions.examples[:3], progress=False)
    rng = np.random.default_rng(0)
    n, kinds = 40, ["a", "b"] * 20
    shares = rng.random((n, 1, 1, len(PARTS))).astype(np.float32)
    shares[::2, 0, 0, 0] += 5  # kinds differ, answers do not
    margins = np.where(np.arange(n) % 4 < 3, 1.0, -1.0).astype(np.float32)  # all wrong answers are of kind b
    ids = tuple(map(str, range(n)))
    made = replace(
        balance, shares=shares, token_shares=np.full((n, len(PARTS)), 1 / 6, np.float32), margins=margins, ids=ids,
        groups=ids, kinds=tuple(kinds),
    )  # fmt: skip
    row = made.frame().iloc[0]
    of_b = shares[1::2, 0, 0, 0].astype(float)
    wrong = margins[1::2] < 0
    assert row["difference"] == pytest.approx(of_b[wrong].mean() - of_b[~wrong].mean(), abs=1e-6)
    assert row["low"] < row["difference"] < row["high"]
    assert row["wrong"] == pytest.approx(of_b[wrong].mean(), abs=1e-6)
    none = replace(made, margins=np.ones(n, np.float32)).frame()
    assert none[["wrong", "difference", "low"]].isna().all(axis=None)


def test_cut_connections_are_those_of_a_mask_given_to_the_model(model: Lvlm, questions: ConceptDataset) -> None:
    example = next(e for e in questions if e.kind == "color")
    encoding = model.encode(example)
    length, tokens = encoding.tokens.length, encoding.tokens
    part = part_of_tokens(tokens)
    (batch,) = list(model.batches([example]))
    rows = {"irrelevant image tokens": list(tokens.suffix), "summary tokens": [tokens.last]}
    keys = {
        "irrelevant image tokens": np.flatnonzero(part == PARTS.index("background")),
        "summary tokens": np.flatnonzero(part[:-1] == PARTS.index("template")),
    }
    for name, queries in rows.items():
        mask = torch.full((length, length), float("-inf")).triu(1)
        for query in queries:
            for key in keys[name]:
                if key != query:
                    mask[query, key] = float("-inf")
        inner = model.hf.get_submodule("model")
        inputs = model.collate([encoding])
        embedded = inner.get_input_embeddings()(inputs["input_ids"]).clone()
        features = model.read(inputs, ["projector.out"])["projector.out"]
        embedded[0, list(tokens.image)] = features[0]
        with torch.no_grad():
            hidden = inner.language_model(inputs_embeds=embedded, attention_mask=mask[None, None], use_cache=False)
            expected = model.hf.get_submodule("lm_head")(hidden.last_hidden_state[:, -1])
        with torch.no_grad(), TESTS[name].change(model, batch, np.random.default_rng(0)):
            changed = model.logits(batch.inputs)
        assert (changed - model.logits(batch.inputs)).abs().max() > 1e-3
        torch.testing.assert_close(changed, expected, atol=1e-4, rtol=1e-4)


def test_controls_cut_as_many_tokens(model: Lvlm, questions: ConceptDataset) -> None:
    example = next(e for e in questions if e.kind == "color")
    (batch,) = list(model.batches([example]))
    with TESTS["irrelevant image tokens"].control(model, batch, np.random.default_rng(0)):
        pattern = model.read(batch.inputs, ["decoder.L1.pattern"], quiet=True)["decoder.L1.pattern"][0]
    tokens = batch.encodings[0].tokens
    cut = (pattern[:, tokens.last, list(tokens.image)] == 0).all(dim=0)
    assert int(cut.sum()) == int((part_of_tokens(tokens) == PARTS.index("background")).sum())


def test_verdicts_need_correlation_and_intervention() -> None:
    def row(odds: tuple[float, float], change: tuple[float, float]) -> str:
        effect = Estimate(sum(change) / 2, *change, 30)
        return Explanation("x", "", "", 60, 30, Estimate(1.0, *odds, 60), effect, effect, effect, 0.0).verdict

    assert row((0.4, 0.9), (0.1, 0.5)) == "supported"
    assert row((0.4, 1.1), (0.1, 0.5)) == "intervention only"
    assert row((0.4, 0.9), (-0.1, 0.5)) == "correlation only"
    assert row((1.1, 2.0), (-0.5, -0.1)) == "not supported"


def test_wrong_input_is_refused(model: Lvlm, questions: ConceptDataset) -> None:
    with pytest.raises(DataError, match="each explanation needs 15 wrong"):
        compare_explanations(model, questions.examples[:4], progress=False)
    with pytest.raises(ConfigError, match="repeats=0"):
        compare_explanations(model, questions.examples[:4], repeats=0)
    with pytest.raises(DataError, match="examples is empty"):
        attention_balance(model, [])


def test_a_color_blind_tower_loses_ability_at_attributes(
    model: Lvlm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diagnosis.level_ability.MIN_GROUPS", 1)  # few images suffice here
    data = gs.scenes.dataset(120, seed=4, splits=("neutral",)).where(kind="color")
    towers = {}
    for name, of in (("own", model), ("blind", make_color_blind(model))):
        store = gs.trace(
            of, data, ["vision.resid_post"], ["object:mean"], tmp_path / name, unembedding=False, progress=False
        )
        (ability,) = ability_gap(of, data, store, progress=False)
        assert ability.gap.value == pytest.approx(ability.text.value - ability.tower.value)
        assert ability.n == len(data)
        assert ability.model.value == pytest.approx(float(np.mean(store.columns["correct"])))
        towers[name] = ability.tower
    assert towers["own"].low > 0.75 > towers["blind"].value


def make_profile(name: str, answers: Mapping[str, bool]) -> ModelProfile:
    about = ("image", "neutral", "object", "existence", "Is it?", "yes", ("yes", "no"))
    given = tuple(Answer(i, *about, "yes" if right else "no", right) for i, right in answers.items())
    return ModelProfile(name, BehaviorResult(given, Cost(None, None, len(given))))


def test_the_course_of_training_counts_what_is_forgotten() -> None:
    courses = {"a": (True, True, True), "b": (True, False, False), "c": (False, True, False), "d": (False, False, True)}
    profiles = [make_profile(f"step {i}", {q: c[i] for q, c in courses.items()}) for i in range(3)]
    aligned = {"step 0": {"cka": (0.1, 30)}, "step 2": {"cka": (0.4, 30)}}
    course = course_of_profiles(profiles, alignment=aligned)
    assert dict(zip(course.questions["id"], course.questions["course"], strict=True)) == {
        q: " ".join("right" if r else "wrong" for r in c) for q, c in courses.items()
    }
    assert course.forgotten()[["id", "last_right"]].values.tolist() == [["b", "step 0"], ["c", "step 1"]]
    table = course.frame().set_index("measure")
    assert table.loc["all: right", ["step 0", "step 1", "step 2"]].tolist() == [0.5, 0.5, 0.5]
    assert table.loc["cka: best layer", "step 2"] == 0.4
    assert np.isnan(table.loc["cka: best layer", "step 1"])
    assert [c.second for c in course.comparisons] == ["step 1", "step 2"]
    assert "once right and now wrong: 2 questions (object 2)" in course.text()
    with pytest.raises(DataError, match="'step 0' is named twice"):
        course_of_profiles([profiles[0], profiles[0]])
