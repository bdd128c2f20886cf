"""Diagnoses: rules against a table, calibration against scikit-learn and scipy, causes that were planted, bad input."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from sklearn.linear_model import LogisticRegression

from activation_store import ActivationStore, ConceptDirection, trace
from behavior import answer
from concepts import scenes
from concepts.scenes.distributions import COLOR_NAMES
from concepts.scenes.scene import Scene
from concepts.schema import ConceptDataset, Example
from diagnosis import Diagnoses, diagnose, fit_directions
from diagnosis.calibration import calibrate
from diagnosis.causal_check import answer_offsets
from diagnosis.claims import Claim, claims_of, opposites_of
from diagnosis.probe_sets import ProbeSet
from diagnosis.readings import read_stored
from diagnosis.results import STAGES, UNEXPLAINED, VERDICTS, Diagnosis, Place
from diagnosis.verdicts import judge, stage_state, state_of
from groundscope.core.errors import DataError, PatchError, ProbeError, SiteError, StoreError
from groundscope.testing import planted_failures
from groundscope.testing.planted_circuits import Planted, plant
from lvlm import Lvlm, load_lvlm

SITES = [
    "vision.L3.resid_post", "projector.out", "decoder.L4.resid_post", "decoder.L5.resid_post", "z",
]  # fmt: skip


# ---- rules -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("states", "corrected", "verdict"),
    [
        ("other other other other", False, "not seen"),
        ("gone gone gone gone", True, "not seen"),
        ("truth other other other", True, "lost at the projector"),
        ("truth gone gone gone", False, "lost at the projector"),
        ("truth unknown gone gone", False, "lost at the projector"),
        ("truth truth truth other", True, "not integrated"),
        ("truth truth truth gone", False, "not integrated"),
        ("unknown truth unclear unclear", False, "not integrated"),
        ("truth truth truth truth", True, "overridden by the prior"),
        ("unknown unknown unknown truth", True, "overridden by the prior"),
        ("truth truth truth truth", False, "other"),
        ("truth truth truth unknown", False, "not readable"),
        ("truth unknown unknown unknown", False, "not readable"),
        ("unclear other other other", False, "not seen"),
        ("unknown unknown unknown unknown", True, "not readable"),
        ("unknown unknown other other", False, "not readable"),
    ],
)
def test_the_verdict_is_where_the_truth_was_last_known(states: str, corrected: bool, verdict: str) -> None:
    named = dict(zip(STAGES, states.split(), strict=True))
    belief = {"truth": 0.9, "other": 0.1, "gone": 0.05, "unclear": 0.5, "unknown": 0.5}
    result, confidence, reason = judge(named, {s: belief[v] for s, v in named.items()}, corrected=corrected)
    assert result == verdict
    assert bool(reason) == (verdict in UNEXPLAINED)
    assert (confidence > 0) == (verdict not in UNEXPLAINED)


def place(stage: str, *, readable: bool, threshold: float = 0.0) -> Place:
    accuracy = 0.9 if readable else 0.5
    low, high = accuracy - 0.1, accuracy + 0.1
    return Place("k", stage, f"{stage}.x", "last", 0, 50, accuracy, low, high, 1.0, threshold, readable, True)


def test_probes_at_chance_are_evidence_only_if_all_later_ones_are_at_chance() -> None:
    chance, good = place("vision", readable=False), place("last", readable=True)
    assert stage_state([], [chance, place("last", readable=False)], "vision") == "gone"
    assert stage_state([], [chance, good], "vision") == "unknown"
    assert stage_state(["other", "truth"], [good], "last") == "truth"
    assert state_of(place("last", readable=True, threshold=1.0), 0.7) == (0.7, "unclear")
    assert state_of(good, -0.7) == (-0.7, "other")
    assert math.isnan(state_of(chance, 5.0)[0])


# ---- calibration -------------------------------------------------------------------------------------------------------


def test_log_odds_are_those_of_a_logistic_fit_with_one_more_wrong() -> None:
    rng = np.random.default_rng(0)
    margins = rng.normal(1.0, 1.5, 200)
    calibration = calibrate(
        [np.array([m]) for m in margins], np.ones(200), [f"g{i}" for i in range(200)], margins > -9, 1
    )
    every = np.append(margins, -np.abs(margins).mean())
    best = minimize_scalar(lambda k: np.logaddexp(0, -k * every).sum(), bounds=(0, 10), method="bounded")
    assert calibration.slope == pytest.approx(best.x, rel=1e-3)
    assert calibration.accuracy == pytest.approx((margins > 0).mean())
    # The threshold, at equal distance from 0 on both sides: the 10th smallest of 200, 1 in 20 of 201 places for a new value.
    assert calibration.threshold == pytest.approx(-sorted(calibration.slope * margins)[9])


@pytest.mark.parametrize("n", [20, 30, 45])
def test_a_new_right_answer_is_beyond_the_threshold_in_1_of_20_at_most(n: int) -> None:
    rng = np.random.default_rng(3)
    beyond = []
    for _ in range(300):
        margins, new = rng.normal(0.5, 1.0, n), rng.normal(0.5, 1.0, 200)
        calibration = calibrate(
            [np.array([m]) for m in margins], np.ones(n), [f"g{i}" for i in range(n)], margins > -9, 1
        )
        if calibration.slope:  # otherwise the place is not readable
            beyond.append(np.mean([calibration.log_odds(m, 1.0) < -calibration.threshold for m in new]))
    assert len(beyond) > 280
    assert np.mean(beyond) < 0.05


def test_two_sides_get_an_offset() -> None:
    rng = np.random.default_rng(1)
    side = rng.random(400) < 0.3
    x = np.where(side, 2.0, 0.5) + rng.normal(size=400)  # what is read lies too high for both
    margins = np.where(side, x, -x)
    calibration = calibrate(
        [np.array([m]) for m in margins], side.astype(float), [f"g{i}" for i in range(400)], side, 1
    )
    weight = np.where(side, 0.5 / side.sum(), 0.5 / (~side).sum()) * 400
    oracle = LogisticRegression(C=1e6, tol=1e-10).fit(x[:, None], side, sample_weight=weight)
    assert calibration.slope == pytest.approx(float(oracle.coef_[0, 0]), rel=0.05)
    assert calibration.offset == pytest.approx(float(oracle.intercept_[0]), rel=0.1)
    read = np.array([calibration.log_odds(m, s) > 0 for m, s in zip(margins, side, strict=True)])
    assert calibration.accuracy == pytest.approx((read[side].mean() + read[~side].mean()) / 2)


def test_probes_at_chance_or_with_few_examples_are_not_readable() -> None:
    rng = np.random.default_rng(2)
    margins = rng.normal(size=300)
    groups = [f"g{i // 3}" for i in range(300)]
    assert not calibrate([np.array([m]) for m in margins], np.ones(300), groups, margins > 0, 3).readable
    assert calibrate([np.array([m + 2]) for m in margins], np.ones(300), groups, margins > 0, 3).readable
    few = calibrate([np.array([9.0])] * 14, np.ones(14), groups[:14], np.ones(14, bool), 1)
    assert not few.readable
    assert math.isnan(few.accuracy)


# ---- planted causes ----------------------------------------------------------------------------------------------------


@cache
def intact() -> Lvlm:
    return load_lvlm("tiny")


@cache
def questions(cause: str) -> ConceptDataset:
    """Questions about color: of the embedded model, or of one whose circuit was put there by hand, which is faster."""
    if cause in VERDICTS[:2]:
        data = scenes.dataset(260, 7, splits=("neutral",)).filter(lambda e: e.kind in {"color", "what_color"})
        # Without labels of nouns and sizes, which no question is about, no probes are fitted to them.
        about = {f"attribute:{value}" for value in (*COLOR_NAMES, "named")}
        lean = [replace(e, labels={c: v for c, v in e.labels.items() if c in about}) for e in data]
        return ConceptDataset("colors", tuple(lean))
    examples = [
        replace(e, labels={f"attribute:{c}": e.answer == c for c in e.candidates}) for e in by_hand().examples(300, 5)
    ]
    return ConceptDataset("squares", tuple(examples))


@cache
def by_hand() -> Planted:
    return plant(0)


@cache
def spoiled(cause: str) -> Lvlm:
    if cause == "not seen":
        return planted_failures.make_color_blind(intact())
    if cause == "lost at the projector":
        return planted_failures.erase_color(intact(), scenes.dataset(120, 98))
    if cause == "not integrated":
        return planted_failures.cut_image(by_hand().model, 0)
    prior = by_hand().prior
    assert prior is not None
    return planted_failures.amplify_head(by_hand().model, prior, 8.0)


@cache
def right_before(cause: str) -> frozenset[str]:
    model = intact() if cause in VERDICTS[:2] else by_hand().model
    return frozenset(a.id for a in answer(model, questions(cause), batch_size=64, progress=False).answers if a.correct)


@dataclass(frozen=True)
class Found:
    model: Lvlm
    store: ActivationStore
    diagnoses: Diagnoses


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Found]:
    """Diagnose the answers that a planted failure made wrong, together with those that stayed right."""

    @cache
    def make(cause: str) -> Found:
        model, out = spoiled(cause), tmp_path_factory.mktemp("store") / "s"
        sites = SITES if cause in VERDICTS[:2] else ["vision.resid_post", "projector.out", "resid_post", "z"]
        tokens, data = ["last", "object:mean"], questions(cause)
        store = trace(model, data, sites=sites, tokens=tokens, out=out, progress=False, batch_size=64)
        frame = store.frame()
        directions = fit_directions(store, (frame["split"] == "neutral").to_numpy())
        training_groups = {g for d in directions for g in d.train_groups}
        correct = dict(zip(frame["id"], frame["correct"], strict=True))
        free = [e for e in data if e.group not in training_groups]
        wrong = [e for e in free if not correct[e.id] and e.id in right_before(cause)][:40]
        answers = wrong + [e for e in free if correct[e.id]]
        return Found(model, store, diagnose(model, store, directions, answers, with_sources=False, progress=False))

    return make


@pytest.mark.parametrize("cause", VERDICTS[:4])
def test_the_verdict_names_the_planted_failure(planted: Callable[[str], Found], cause: str) -> None:
    diagnoses = planted(cause).diagnoses
    counts = Counter(diagnosis.verdict for diagnosis in diagnoses.wrong)
    assert len(diagnoses.wrong) >= 15
    assert counts[cause] >= 0.9 * len(diagnoses.wrong), (counts, Counter(o.reason for o in diagnoses.wrong))
    right = [diagnosis for diagnosis in diagnoses.examples if diagnosis.model_answer == diagnosis.example["truth"]]
    assert right
    assert all(diagnosis.verdict is None for diagnosis in right)
    assert len(right) + len(diagnoses.wrong) == len(diagnoses)


@pytest.mark.parametrize("cause", VERDICTS[:4])
def test_a_diagnosis_has_text_tables_and_a_file(planted: Callable[[str], Found], cause: str, tmp_path: Path) -> None:
    diagnoses = planted(cause).diagnoses
    index, diagnosis = next((i, o) for i, o in enumerate(diagnoses.examples) if o.verdict == cause)
    text = diagnoses.text(index)
    assert text.startswith(
        f"Asked '{diagnosis.example['question']}', the model says '{diagnosis.model_answer}'; right is"
    )
    assert f"Verdict: {cause} (" in text
    clue = {
        "not seen": "Neither the vision tower nor any later stage shows whether the",
        "lost at the projector": "This is no longer decodable after the projector.",
        "not integrated": "At the last token, it is decodable in no layer.",
        "overridden by the prior": "with its mean output, the answer would be right",
    }[cause]
    several = "with their mean outputs, the answer would be right"
    assert any(clue in str(o) or several in str(o) for o in diagnoses.wrong if o.verdict == cause)
    path = diagnoses.save(tmp_path / "d.json")
    loaded = Diagnoses.load(path)
    assert loaded.save(tmp_path / "e.json").read_bytes() == path.read_bytes()
    table = loaded.table("kind")
    assert table["n"].sum() == len(diagnoses.wrong)
    assert (table["low"] <= table["share"]).all()
    assert (loaded.frame()["verdict"].notna()).sum() == len(diagnoses.wrong)
    assert set(loaded.calibration()["stage"]) == set(STAGES)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(StoreError, match="invalid JSON"):
        Diagnoses.load(path)


@torch.no_grad()
def test_planted_failures_change_the_stated_stage() -> None:
    model = intact()
    before = [p.clone() for p in model.hf.parameters()]
    first, second = (e for e in scenes.dataset(20, 3).examples[:40:30] if e.candidates)
    cut = planted_failures.cut_image(model, 0)
    logits = [cut.logits(cut.encode(replace(first, image=e.image)).inputs) for e in (first, second)]
    torch.testing.assert_close(logits[0], logits[1])
    whole = [model.logits(model.encode(replace(first, image=e.image)).inputs) for e in (first, second)]
    assert not torch.allclose(whole[0], whole[1])
    blind = planted_failures.make_color_blind(model)
    moved: dict[str, list[float]] = {"own": [], "blind": []}
    for example in {e.group: e for e in scenes.dataset(20, 3)}.values():
        scene, noun = example.image, example.objects[0].noun
        assert isinstance(scene, Scene)
        recolored = [replace(example, image=scene.recolored(noun, color)) for color in ("yellow", "blue")]
        for name, network in (("own", model), ("blind", blind)):
            a, b = (network.encode(e).inputs["pixel_values"] for e in recolored)
            moved[name].append(float((a - b).abs().mean()))
    assert np.mean(moved["blind"]) < 0.3 * np.mean(moved["own"])
    assert all(torch.equal(a, b) for a, b in zip(before, model.hf.parameters(), strict=True))


def test_no_linear_reader_finds_an_erased_color() -> None:
    erased = spoiled("lost at the projector")
    scores = []
    pictures = {e.image.identity: e for e in scenes.dataset(120, 98)}
    for model in (intact(), erased):
        rows, colors = [], []
        for batch in model.batches(list(pictures.values())):
            out = model.read(batch.inputs, ["projector.out"])["projector.out"]
            for row, encoding in enumerate(batch.encodings):
                for thing in encoding.example.objects:
                    rows.append(out[row, list(encoding.tokens.object(thing.id, "projector"))].mean(0).numpy())
                    colors.append(thing.attributes["color"])
        half = len(rows) // 2
        reader = LogisticRegression(C=0.01, max_iter=2000).fit(np.stack(rows[:half]), colors[:half])
        scores.append(reader.score(np.stack(rows[half:]), colors[half:]))
    assert scores[0] > 0.9
    assert scores[1] < 0.35


def test_an_output_bias_is_an_override_without_a_responsible_head(tmp_path: Path) -> None:
    data = scenes.dataset(300, 7, splits=("neutral",)).filter(lambda e: e.kind == "existence")
    model = planted_failures.bias_answer(intact(), data, "yes", 1.5)
    assert intact().hf.lm_head.bias is None
    before = {a.id: a for a in answer(intact(), data, batch_size=64, progress=False).answers}
    store = trace(
        model, data, sites=["decoder.L5.resid_post", "z"], tokens=["last"], out=tmp_path / "s", progress=False
    )
    frame = store.frame().set_index("id")
    for diagnosis in before.values():  # the plant is what it says
        assert diagnosis.margin is not None
        assert frame.margin[diagnosis.id] == pytest.approx(
            diagnosis.margin + (1.5 if diagnosis.answer == "yes" else -1.5), abs=1e-3
        )
    learn = np.array([int(g.split("-")[1]) % 4 > 0 for g in frame["group"]])
    directions = fit_directions(store, learn)
    training_groups = {g for d in directions for g in d.train_groups}
    examples = [e for e in data if e.group not in training_groups]
    diagnoses = diagnose(model, store, directions, examples, with_sources=False, progress=False)
    assert len(diagnoses.wrong) >= 8
    assert Counter(o.verdict for o in diagnoses.wrong)["overridden by the prior"] >= 0.9 * len(diagnoses.wrong)
    # Over all answers, right and wrong: means over right ones alone are cut off at 0.
    yes, no = (frame.margin[frame.answer == truth].mean() for truth in ("yes", "no"))
    leant = [o for o in diagnoses.wrong if not math.isnan(o.offset)]
    assert leant
    alone = [diagnosis for diagnosis in leant if not diagnosis.corrected_by]
    assert len(alone) >= 0.5 * len(diagnoses.wrong)
    for diagnosis in alone:
        assert diagnosis.model_answer == "yes"
        assert diagnosis.offset == pytest.approx((yes - no) / 2, abs=1e-4)
        assert diagnosis.offset + diagnosis.log_odds > 0
        assert (
            f"an offset of {diagnosis.offset:.1f} logits towards 'yes': without it, the answer would be right"
            in str(diagnosis)
        )
    with pytest.raises(PatchError, match="no example has the candidate 'maybe'"):
        planted_failures.bias_answer(intact(), data, "maybe", 1.0)


def test_a_value_without_a_label_is_read_by_its_only_alternative(tmp_path: Path) -> None:
    data = scenes.dataset(10, 4, splits=("neutral",)).filter(lambda e: e.kind in ("size", "color"))
    store = trace(intact(), data, sites=["projector.out"], tokens=["object:mean"], out=tmp_path / "s", progress=False)
    assert opposites_of(data, store.labels) == {"small": "big"}
    first = ConceptDirection("projector.out", "object:mean", "attribute:big", np.eye(192)[0])
    read = ProbeSet("projector", first.site, first.tokens, "", {first.concept: first})
    sized = [c for c in claims_of(store, {"small": "big"}) if c is not None and c.kind == "attribute size"]
    margins = read_stored(store, read, sized)
    assert len(margins.rows) == len(sized) >= 8
    x = store.read("projector.out", "object:mean", examples=np.array([c.row for c in sized]))[:, 0]
    for claim, example, value, side, mean in zip(
        sized, [e for e in data if e.kind == "size"], margins.values, margins.classes, x, strict=True
    ):
        thing = example.named_object()
        assert thing is not None
        big = thing.attributes["size"] == "big"
        size = "small" if "small" in example.question else "big"
        assert (claim.concept, claim.question_concept) == ("attribute:big", f"attribute:{size}")
        assert side == big
        assert value[0] == pytest.approx(mean if big else -mean, abs=1e-5)


def test_a_bias_is_the_mean_margin_over_both_truths_and_keeps_right_answers() -> None:
    def claim(truth: str, margin: float, kind: str = "object existence") -> Claim:
        answer_ = truth if margin > 0 else {"yes": "no", "no": "yes"}[truth]
        return Claim(0, "i", "g", kind, "object", "object:bell", truth == "yes", True, truth, answer_, (), (), margin)

    sure = [claim("yes", 7.0 + i % 2) for i in range(30)]
    unsure = [claim("no", 1.0 + i % 3) for i in range(15)] + [claim("no", -9.0)] * 40
    # (7.5 + (40 * 9 - 15 * 2) / 55) / 2: wrong answers have weight 1.
    assert answer_offsets([*sure, *unsure], ["object existence"]) == {"object existence": {"no": -6.75, "yes": 6.75}}
    assert answer_offsets([*sure, *unsure[:15]], ["object existence"]) == {
        "object existence": {"no": -2.75, "yes": 2.75}
    }
    assert answer_offsets([*sure, *unsure[:14]], ["object existence"]) == {}  # too few of one truth
    # A bias that leaves no right "no" is measured all the same.
    bias = [claim("no", -3.0)] * 40
    assert answer_offsets([*sure, *bias], ["object existence"]) == {"object existence": {"no": -5.25, "yes": 5.25}}
    # Taking 2.5 away would turn all right answers of one truth wrong, half of all.
    split = [claim("yes", 1.0)] * 25 + [claim("yes", 20.0)] * 10 + [claim("no", 1.0)] * 20
    assert answer_offsets(split, ["object existence"]) == {}
    assert answer_offsets([claim("yes", 3.0, "a b")] * 20, ["a b"]) == {}


# ---- what pushes an answer ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_head_effect_equals_a_plain_forward_without_the_head(planted: Callable[[str], Found]) -> None:
    """Put a head's output to its mean over right answers by a hook of our own."""
    case = planted(VERDICTS[3])
    model, store = case.model, case.store
    diagnosis = next(o for o in case.diagnoses.wrong if any(".H" in p.part for p in o.pushes))
    example = next(e for e in questions(VERDICTS[3]) if e.id == diagnosis.example["id"])
    push = next(p for p in diagnosis.pushes if ".H" in p.part)
    layer, head = (int(n[1:]) for n in push.part.split("."))
    frame = store.frame()
    rows = frame[(frame["kind"] == example.kind) & (frame["level"] == example.level) & (frame["correct"] == 1)]
    z = store.read(f"decoder.L{layer}.z", "last")
    mean = np.mean([z[list(part.index)].mean(0) for _, part in rows.groupby("answer")], axis=0)
    at = slice(head * model.head_dim, (head + 1) * model.head_dim)

    def replace_head(_module: object, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x = args[0].clone()
        x[:, -1, at] = torch.tensor(mean[at], dtype=x.dtype)
        return (x, *args[1:])

    def odds() -> float:
        ids = {w: model.processor.tokenizer.convert_tokens_to_ids(w) for w in example.candidates}
        logits = model.hf(**model.encode(example).inputs).logits[0, -1]
        return float(logits[ids[example.answer]] - max(logits[i] for w, i in ids.items() if w != example.answer))

    before = odds()
    hook = model.hf.model.language_model.layers[layer].self_attn.o_proj.register_forward_pre_hook(replace_head)
    try:
        after = odds()
    finally:
        hook.remove()
    assert diagnosis.log_odds == pytest.approx(before, abs=1e-4)
    assert push.effect == pytest.approx(after - before, abs=1e-3)


# ---- bad input ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[ActivationStore, list[Example]]:
    data = scenes.dataset(10, 4, splits=("neutral",)).filter(lambda e: e.kind == "color")
    out = tmp_path_factory.mktemp("small") / "s"
    store = trace(intact(), data, sites=["projector.out"], tokens=["object:mean"], out=out, progress=False)
    return store, list(data)


def direction(site: str = "projector.out", tokens: str = "object:mean", **more: object) -> ConceptDirection:
    width = 128 if site.startswith("vision") else 192
    return ConceptDirection(site, tokens, "attribute:red", np.eye(width)[0], **more)


def test_bad_input_is_named(small: tuple[ActivationStore, list[Example]]) -> None:
    store, data = small
    with pytest.raises(
        SiteError, match=r"lacks decoder\.z at last: trace\(model, data, sites=\['projector\.out', 'z'\]"
    ):
        diagnose(intact(), store, [direction()], data)
    with pytest.raises(SiteError, match=r"decoder\.z at last, vision\.resid_post at object:mean"):
        diagnose(intact(), store, [direction("vision.L3.resid_post")], data)
    with pytest.raises(ProbeError, match="was fitted on weights 0000"):
        diagnose(intact(), store, [direction(provenance={"weights": "0" * 64})], data)
    with pytest.raises(ProbeError, match="was fitted on store abc"):
        diagnose(intact(), store, [direction(provenance={"store": "abc"})], data)
    with pytest.raises(ProbeError, match="two directions for 'attribute:red'"):
        diagnose(intact(), store, [direction(), direction()], data)
    with pytest.raises(ProbeError, match="no directions"):
        diagnose(intact(), store, [], data)
    with pytest.raises(StoreError, match="was traced from weights"):
        diagnose(load_lvlm("tiny-unbiased"), store, [direction()], data)


def test_answers_must_be_in_the_store(tmp_path: Path) -> None:
    data = scenes.dataset(10, 4, splits=("neutral",)).filter(lambda e: e.kind == "color")
    store = trace(
        intact(), data, sites=["projector.out", "z"], tokens=["object:mean", "last"], out=tmp_path / "s", progress=False
    )
    stranger = replace(data[0], id="stranger")
    with pytest.raises(DataError, match="example 'stranger'"):
        diagnose(intact(), store, [direction()], [stranger])
    with pytest.raises(DataError, match="no answers"):
        diagnose(intact(), store, [direction()], [])
    with pytest.raises(DataError, match="'stranger' is not among the answers"):
        diagnose(intact(), store, [direction()], [data[0]], compare_ids=["stranger"])
    claims = claims_of(store)
    for claim, example in zip(claims, data, strict=True):
        assert claim is not None
        words = example.question.rstrip("?").split()
        assert claim.concept == f"attribute:{words[-1]}"
        assert claim.holds == (example.answer == "yes")


def test_a_right_answer_is_described_as_right() -> None:
    about = {
        "id": "a",
        "group": "g",
        "level": "object",
        "split": "s",
        "kind": "existence",
        "question": "Is it?",
        "truth": "no",
    }
    assert (
        str(Diagnosis(about, "no", "object:bell", None, math.nan))
        == "Asked 'Is it?', the model says 'no', which is right."
    )
