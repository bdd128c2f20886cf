"""Verdicts follow from the evidence: wide intervals, concepts without probes, biases, priors, data without boxes, rare nouns."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from activation_store import ConceptDirection, trace
from concepts import scenes
from concepts.scenes.icons import NOUNS
from concepts.schema import ConceptDataset
from diagnosis import Diagnoses, diagnose, fit_directions
from diagnosis.causal_check import Correction, _smallest_correction
from diagnosis.claims import Claim
from diagnosis.fit import CALIBRATION_SHARE
from diagnosis.pipeline import _judge_answer, _stages
from diagnosis.probe_sets import ProbeSet
from diagnosis.readings import Margins
from diagnosis.results import STAGES, VERDICTS, Diagnosis, Place
from diagnosis.verdicts import (
    ConceptAccuracy,
    belief,
    concept_accuracy,
    judge,
    place_of_concept,
    prior_suggests,
    stage_state,
)
from experiments.report.sections import diagnoses as report
from groundscope.core.document_digest import value_digest
from groundscope.core.errors import ProbeError, StoreError
from groundscope.testing import planted_failures
from groundscope.testing.planted_circuits import HEAD_DIM, Planted, plant
from lvlm import Head, Lvlm
from probes import fit_grid
from probes.protocol.tasks import split_possible, split_rows

KIND = "object existence"


# ---- what a place says -------------------------------------------------------------------------------------------------


def place(stage: str, n: int, accuracy: float, low: float, high: float, *, readable: bool = False) -> Place:
    return Place(KIND, stage, f"{stage}.x", "image:all", 0, n, accuracy, low, high, 1.0, 0.0, readable, True)


@pytest.mark.parametrize(
    ("n", "low", "high", "verdict", "confidence"),
    [
        (15, 0.16, 1.0, "not readable", 0.0),
        (60, 0.30, 0.80, "not readable", 0.0),
        (400, 0.46, 0.54, "not seen", 0.92),  # at most a share 2 * .54 - 1 of the cases is known
        (4000, 0.49, 0.505, "not seen", 0.98),
    ],
)
def test_a_place_at_chance_shows_absence_only_where_its_interval_is_narrow(
    n: int, low: float, high: float, verdict: str, confidence: float
) -> None:
    places = [place(stage, n, 0.5, low, high) for stage in STAGES]
    states = {s: stage_state(["unreadable"], places, s) for s in STAGES}
    sure = {s: belief([], states[s], places, s) for s in STAGES}
    got, how_sure, reason = judge(states, sure, corrected=False)
    assert (got, how_sure) == (verdict, pytest.approx(confidence))
    assert ("the vision tower" in reason) == (verdict == "not readable")


def test_a_concept_without_examples_uses_no_examples_of_other_concepts() -> None:
    chance, good = place("vision", 400, 0.5, 0.46, 0.54), place("vision", 400, 0.9, 0.87, 0.93, readable=True)
    assert place_of_concept(chance, ConceptAccuracy(4, 0.5, 4)) is None
    assert place_of_concept(chance, ConceptAccuracy(20, 0.55, 20)) == chance
    assert place_of_concept(good, ConceptAccuracy(0, math.nan, 0)) == good
    # 25 of 25: Wilson [.867, 1], above what all concepts together reach; 10 of 20: [.299, .701], below it.
    readable_place = place_of_concept(chance, ConceptAccuracy(25, 1.0, 25))
    assert readable_place is not None
    assert readable_place.readable
    assert (readable_place.low, readable_place.high) == (pytest.approx(0.8668, abs=1e-4), pytest.approx(1.0))
    lost = place_of_concept(good, ConceptAccuracy(20, 0.5, 20))
    assert lost is not None
    assert not lost.readable
    assert (lost.low, lost.high) == (pytest.approx(0.2993, abs=1e-4), pytest.approx(0.7007, abs=1e-4))


def test_examples_of_a_concept_count_by_side_and_by_image() -> None:
    read = np.array([1.0, 1.0, 1.0, 0.0, 0.5])
    sides = np.array([1.0, 1.0, 1.0, 0.0, 0.0])
    own = concept_accuracy(read, sides, list("abcde"), two=True)
    assert (own.n, own.accuracy) == (5, pytest.approx((1 + 0.25) / 2))
    assert own.effective_n == pytest.approx(4 / (1 / 3 + 1 / 2))
    assert concept_accuracy(read, sides, list("aabbb"), two=True).effective_n == 2
    assert math.isnan(concept_accuracy(read[:3], sides[:3], list("abc"), two=True).accuracy)
    # "What color is it?": probes that read red everywhere are right of all that is red, and see nothing.
    assert math.isnan(concept_accuracy(read[:3], sides[:3], list("abc"), two=False).accuracy)


def claim(row: int, noun: str, truth: str, answer: str, probed: Sequence[str]) -> Claim:
    concept = f"object:{noun}" if noun in probed else ""
    margin = 1.0 if truth == answer else -1.0
    return Claim(
        row, f"e{row}", f"g{row}", KIND, "object", concept, truth == "yes", True, truth, answer, (), (), margin
    )


def direction(concept: str, site: str, tokens: str) -> ConceptDirection:
    return ConceptDirection(site, tokens, concept, np.eye(4, dtype=np.float32)[0])


@pytest.mark.parametrize(("n", "images"), [(16, 4), (400, 200)])
def test_two_probed_nouns_are_no_evidence_about_eleven_others(n: int, images: int) -> None:
    """As on photographs: probes of two nouns, at chance, and wrong answers about other nouns."""
    probed = ("dog", "car")
    claims = {i: claim(i, probed[i % 2], ("yes", "no")[i // 2 % 2], "yes", probed) for i in range(n)}
    claims = {i: replace(c, group=f"g{i * images // n}") for i, c in claims.items()}
    others = {n + i: claim(n + i, f"noun{i}", "no", "yes", probed) for i in range(11)}
    sites = {"vision": "vision.L1.resid_post", "projector": "projector.out", "image": "decoder.L1.resid_post"}
    sets = [
        ProbeSet(
            stage, site, "image:all", "", {f"object:{c}": direction(f"object:{c}", site, "image:all") for c in probed}
        )
        for stage, site in sites.items()
    ]
    holds = np.array([c.holds for c in claims.values()], float)
    margins = {
        id(s): Margins(tuple(claims), tuple(np.array([(-1.0) ** (i * images // n)]) for i in claims), holds)
        for s in sets
    }  # every second image is read right: chance
    stages = _stages(KIND, sets, margins, {**claims, **others})
    named = dict.fromkeys(("id", "group", "level", "split", "kind", "question", "truth"), "")
    about = Diagnosis(named, "yes", "", None, math.nan, without_image="yes")
    verdicts = [_judge_answer(about, c, stages, Correction(-1.0, (), (), math.nan, math.nan)) for c in others.values()]
    assert {v.verdict for v in verdicts} == {"not readable"}
    assert all(v.unread == STAGES and not v.readings and v.confidence == 0 for v in verdicts)
    assert "the vision tower, the projector and the image's tokens" in verdicts[0].reason
    # A probed noun: so many examples at chance show that the tower does not carry it, so few do not.
    wrong = next(c for c in claims.values() if not c.right)
    assert _judge_answer(about, wrong, stages, None).verdict == ("not seen" if images > 4 else "not readable")


# ---- what undoes an answer, and whether that is a prior ----------------------------------------------------------------


def test_an_offset_is_preferred_to_a_component_and_counts_as_one() -> None:
    tried = [((), -2.0), (("L1.H0",), -1.0), (("L1.H0", "L2.H3"), 0.5)]
    assert _smallest_correction(tried, 0.0)[:2] == (("L1.H0", "L2.H3"), 0.5)
    assert math.isnan(_smallest_correction(tried, 0.0)[2])
    assert _smallest_correction(tried, 2.5) == ((), 0.5, 2.5)
    assert _smallest_correction(tried, 1.5) == (("L1.H0",), 0.5, 1.5)  # two either way: the offset first
    assert _smallest_correction(tried, 0.5)[:2] == (("L1.H0", "L2.H3"), 0.5)  # three with the offset
    parts, odds, offset = _smallest_correction(tried[:2], 0.5)
    assert parts == ()
    assert math.isnan(odds)
    assert math.isnan(offset)


def test_a_prior_needs_words_on_the_wrong_side() -> None:
    assert prior_suggests(-2.3, -1.3)  # the image favors the truth
    assert not prior_suggests(0.2, -1.0)  # the words favor the truth
    assert not prior_suggests(-0.27, -0.84)  # the image opposes it more than the words
    assert prior_suggests(-0.6, -0.9)
    assert not prior_suggests(math.nan, -1.0)
    states = dict.fromkeys(STAGES, "truth")
    sure = dict.fromkeys(STAGES, 0.96)
    assert judge(states, sure, corrected=True, prior=True) == ("overridden by the prior", 0.96, "")
    assert judge(states, sure, corrected=True, prior=False) == ("overridden late", 0.96, "")


@cache
def by_hand(*, prior: bool) -> Planted:
    return plant(6, prior=prior)


def late_head(planted: Planted) -> Head:
    """Return a head of the last layer that has no part in the circuit."""
    layer = planted.model.n_layers - 1
    assert planted.answering.layer < layer
    return next(Head(layer, h) for h in range(planted.model.n_heads) if Head(layer, h) not in planted.decoys)


@torch.no_grad()
def inverted_late(planted: Planted) -> Lvlm:
    """Add a head in the last layer that pushes the other color where the square is in the left half: not by a prior."""
    model = planted_failures.amplify_head(planted.model, Head(0, 0), 1.0)  # a copy
    hf: Any = model.hf.model
    grounding = planted.grounding
    assert grounding is not None
    vision = getattr(hf.vision_tower, "vision_model", hf.vision_tower)
    linear = hf.multi_modal_projector.linear_1.weight
    rows = hf.language_model.layers[grounding.layer].self_attn
    answer = model.hf.lm_head.weight[model.processor.tokenizer.convert_tokens_to_ids("red")]
    answer = answer / answer.norm()
    square, red = (linear[:, k] / linear[:, k].norm() for k in (2, 0))
    # What marks the left half is written to a direction that nothing else reads.
    rng = torch.Generator().manual_seed(0)
    mark = torch.randn(len(answer), generator=rng)
    for used in (answer, square, red):
        mark -= (mark @ used) * used
    mark /= mark.norm()
    left_half = [1 + cell for cell in range(16) if cell % 4 < 2]
    vision.embeddings.position_embedding.weight[left_half, 6] = 1.0
    vision.embeddings.position_embedding.weight[left_half, 7] = -1.0
    linear[:, 6], linear[:, 7] = mark / 2, -mark / 2
    head = late_head(planted)
    target = hf.language_model.layers[head.layer].self_attn
    start, old = head.head * HEAD_DIM, grounding.head * HEAD_DIM
    at, source = slice(start, start + HEAD_DIM), slice(old, old + HEAD_DIM)
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(target, name).weight[at] = getattr(rows, name).weight[source].clone()
    size = rows.k_proj.weight[old + 3] @ square
    target.k_proj.weight[start + 3] = size * (0.45 * square + 0.45 * mark)
    target.o_proj.weight[:, at] = 0
    target.o_proj.weight[:, start] = -2.0 * answer
    return model


def questions(planted: Planted, count: int) -> ConceptDataset:
    examples = [
        replace(e, labels={f"attribute:{c}": e.answer == c for c in e.candidates}) for e in planted.examples(count, 5)
    ]
    return ConceptDataset("squares", tuple(examples))


def diagnosed(model: Lvlm, data: ConceptDataset, out: Path, *, boxes: bool = True, sources: bool = False) -> Diagnoses:
    if not boxes:
        data = ConceptDataset("squares", tuple(replace(e, objects=(), subject=None) for e in data))
    sites = [*(["vision.resid_post", "projector.out"] if boxes else []), "resid_post", "z"]
    tokens = ["last", "object:mean"] if boxes else ["last"]
    store = trace(model, data, sites=sites, tokens=tokens, out=out, progress=False, batch_size=64)
    directions = fit_directions(store, np.array([e.id.endswith(("0", "2", "4", "6", "8")) for e in data]))
    training_groups = {g for d in directions for g in d.train_groups}
    free = [e for e in data if e.group not in training_groups]
    return diagnose(model, store, directions, free, with_sources=sources, progress=False)


def test_a_planted_output_bias_is_an_offset_and_no_head_is_blamed(tmp_path: Path) -> None:
    data = questions(by_hand(prior=True), 160)
    model = planted_failures.bias_answer(by_hand(prior=True).model, data, "red", 10.0)
    diagnoses = diagnosed(model, data, tmp_path / "s")
    assert not [
        o for o in diagnoses.examples if o.verdict is None and o.model_answer == "blue"
    ]  # no right "blue" is left
    counts = Counter(o.verdict for o in diagnoses.wrong)
    assert len(diagnoses.wrong) >= 15
    assert counts["overridden by the prior"] == len(diagnoses.wrong)
    alone = [o for o in diagnoses.wrong if not o.corrected_by]
    assert len(alone) >= 0.9 * len(diagnoses.wrong)
    assert all(o.offset == pytest.approx(10.0, abs=1.0) and o.corrected_log_odds > 0 for o in alone)
    assert all("common offset" in str(o) or "have an offset" in str(o) for o in diagnoses.wrong)


def test_an_override_that_no_prior_explains_is_late(tmp_path: Path) -> None:
    planted = by_hand(prior=False)
    diagnoses = diagnosed(inverted_late(planted), questions(planted, 160), tmp_path / "s", sources=True)
    counts = Counter(o.verdict for o in diagnoses.wrong)
    assert len(diagnoses.wrong) >= 15
    assert counts["overridden late"] >= 0.9 * len(diagnoses.wrong), counts
    assert all(
        o.sources["image"] < min(0.0, sum(o.sources[s] for s in ("lean", "form", "knowledge"))) for o in diagnoses.wrong
    )
    assert any(o.corrected_by == (str(late_head(planted)),) for o in diagnoses.wrong)


def test_a_verdict_without_boxes_names_the_stages_that_were_not_read(tmp_path: Path) -> None:
    planted = by_hand(prior=True)
    assert planted.prior is not None
    model = planted_failures.amplify_head(planted.model, planted.prior, 8.0)
    diagnoses = diagnosed(model, questions(planted, 160), tmp_path / "s", boxes=False)
    assert len(diagnoses.wrong) >= 15
    assert {o.verdict for o in diagnoses.wrong} == {"overridden by the prior"}
    for diagnosis in diagnoses.wrong:
        assert diagnosis.unread == ("vision", "projector", "image")
        assert "Not read: the vision tower, the projector and the image's tokens" in str(diagnosis)
    assert diagnoses.frame().dropna(subset=["verdict"])["unread"].unique().tolist() == ["vision projector image"]
    # Written and read again; what version 2 wrote stays readable, what no version knows is refused.
    path = diagnoses.save(tmp_path / "d.json")
    assert Diagnoses.load(path).wrong[0].unread == ("vision", "projector", "image")
    document = json.loads(path.read_text())
    assert document.pop("digest")
    assert document["version"] == 6
    path.write_text(json.dumps({**document, "version": 2}))
    assert len(Diagnoses.load(path)) == len(diagnoses)
    document["version"], document["diagnoses"][0]["verdict"] = 2, "overridden"
    path.write_text(json.dumps(document))
    with pytest.raises(StoreError, match="unknown verdict 'overridden'; choose from not seen"):
        Diagnoses.load(path)
    assert VERDICTS[3:5] == ("overridden by the prior", "overridden late")


def test_the_report_names_unreachable_verdicts() -> None:
    def make_diagnosis(kind: str, **stages: str) -> Diagnosis:
        about = dict.fromkeys(("id", "group", "split", "question", "truth"), "x") | {"level": "object", "kind": kind}
        return Diagnosis(
            about, "yes", "", "overridden late", 0.9, stages={**dict.fromkeys(STAGES, "unknown"), **stages}
        )

    diagnoses = (
        make_diagnosis("a", last="truth"),
        make_diagnosis("a", last="truth", vision="other"),
        make_diagnosis("b", last="truth"),
        make_diagnosis("c", last="truth"),
    )
    model = Diagnoses(diagnoses, (), "m", "c", "w")
    between, all_of_it = report.unread_stages(model)
    assert between.startswith(
        "No readable probe at the projector and the image's tokens for wrong answers of kind object a (2)."
    )
    assert between.endswith("This excludes the verdicts lost at the projector, not integrated.")
    assert (
        "the vision tower, the projector and the image's tokens for wrong answers of kind object b (1), object c (1)."
        in all_of_it
    )
    assert all_of_it.endswith("This excludes the verdicts not seen, lost at the projector, not integrated.")
    assert (
        report.unread_stages(Diagnoses((make_diagnosis("a", **dict.fromkeys(STAGES, "truth")),), (), "m", "c", "w"))
        == []
    )
    assert set(report.MEANINGS) == set(VERDICTS)


@pytest.mark.parametrize(
    ("n", "sentence"),
    [(1, "Without a cause: 1 of 1 answer (1 other)."), (2, "Without a cause: 2 of 2 answers (2 other).")],
)
def test_the_report_counts_one_answer_in_the_singular(n: int, sentence: str) -> None:
    about = dict.fromkeys(("id", "group", "split", "question", "truth"), "x") | {"level": "object", "kind": "a"}
    unexplained = Diagnosis(about, "yes", "", "other", 0.0, stages=dict.fromkeys(STAGES, "unknown"))
    assert report.without_cause(Diagnoses((unexplained,) * n, (), "m", "c", "w")) == [sentence]


# ---- concepts that no split can place ----------------------------------------------------------------------------------


def placed(labels: np.ndarray, groups: np.ndarray, fold: np.ndarray, folds: int) -> bool:
    """Check by counting that both classes are in two held-out groups and in two folds."""
    for value in (0.0, 1.0):
        held_out = {g for g, y, f in zip(groups, labels, fold, strict=True) if y == value and f < 0}
        dealt = {f for y, f in zip(labels, fold, strict=True) if y == value and f >= 0}
        if len(held_out) < 2 or len(dealt & set(range(folds))) < 2:
            return False
    return True


@pytest.mark.parametrize(("seed", "noun"), [(6, "object:balloon"), (11, "object:butterfly")])
def test_the_noun_that_a_split_cannot_place_is_left_out_alone(seed: int, noun: str) -> None:
    """What each noun's probes of the default run are split by: one question about each object, images 4 of 5."""
    subjects, groups = subjects_of(seed)
    counts = Counter(subjects)
    nouns = [f"object:{n}" for n in NOUNS if counts[n] >= 7]
    labels = np.stack([subjects == n.partition(":")[2] for n in nouns], 1).astype(float)
    ids = np.arange(len(groups)).astype(str)
    table = split_rows(ids, groups, labels, 2, 0.3, 0)
    assert not placed(labels[:, nouns.index(noun)], groups, table.fold, 2)  # the fault: one noun stopped all
    used, left_out = split_possible(ids, groups, labels, nouns, 2, 0.3, 0)
    assert list(left_out) == [noun]
    assert "held-out groups" in left_out[noun]
    assert [nouns[k] for k in used] == [n for n in nouns if n != noun]
    table = split_rows(ids, groups, labels[:, used], 2, 0.3, 0)
    assert all(placed(labels[:, k], groups, table.fold, 2) for k in used)


def subjects_of(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the subject and group of the rows that probes of nouns learn from."""
    data = scenes.dataset(300, seed=seed, splits=("neutral",)).filter(lambda e: bool(e.candidates))
    groups = dict.fromkeys(e.group for e in data)
    held_out = {g for g in groups if int(value_digest([g, "kept", 0])[:8], 16) / 0xFFFFFFFF < CALIBRATION_SHARE}
    rows: dict[tuple[str, str], None] = {}
    for example in data:
        thing = example.named_object()
        if thing is not None and example.group not in held_out:
            rows[example.group, thing.noun] = None
    return np.array([noun for _, noun in rows]), np.array([group for group, _ in rows])


@pytest.mark.parametrize("seed", range(12))
def test_for_every_seed_the_others_are_placed(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(60), 3).astype(str)
    rare = (np.array([7, 8, 9, 30]) / 60)[None]
    labels = (rng.random((60, 4)) < rare).repeat(3, 0).astype(float)
    names = ["a", "b", "c", "d"]
    used, left_out = split_possible(groups, groups, labels, names, 3, 0.3, seed)
    assert "d" not in left_out
    assert sorted([names[k] for k in used] + list(left_out)) == names
    fold = split_rows(groups, groups, labels[:, used], 3, 0.3, seed).fold
    assert all(placed(labels[:, k], groups, fold, 3) for k in used)


def test_a_grid_leaves_out_what_cannot_be_placed_where_that_is_asked_for(tmp_path: Path) -> None:
    data = questions(by_hand(prior=True), 60)
    rare = [
        replace(e, labels={**e.labels, "attribute:rare": i < 2, "attribute:never": False}) for i, e in enumerate(data)
    ]
    store = trace(
        by_hand(prior=True).model, ConceptDataset("rare", tuple(rare)), sites=["decoder.L3.resid_post"], tokens=["last"],
        out=tmp_path / "s", progress=False,
    )  # fmt: skip
    concepts = ["attribute:rare", "attribute:red", "attribute:never"]
    options: dict[str, Any] = {"folds": 3, "control": 0, "resamples": 1, "progress": False}
    with pytest.raises(ProbeError, match="class 1 of 'attribute:rare' is in 2 groups"):
        fit_grid(store, concepts, "resid_post", **options)
    grid = fit_grid(store, concepts, "resid_post", skip_unplaceable=True, **options)
    assert grid.concepts == ("attribute:red",)
    assert list(grid.provenance["left_out"]) == ["attribute:rare", "attribute:never"]
    whole = fit_grid(store, ["attribute:red"], "resid_post", **options)
    np.testing.assert_array_equal(grid.weights, whole.weights)
    with pytest.raises(ProbeError, match="no concept can be fitted: class 1 of 'attribute:rare'"):
        fit_grid(store, ["attribute:rare"], "resid_post", skip_unplaceable=True, **options)
    directions = fit_directions(store, np.ones(60, bool))
    assert {d.concept for d in directions} == {"attribute:red", "attribute:blue"}
    assert all(name.startswith("attribute:") for name in directions.left_out)
