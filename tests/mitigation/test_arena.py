"""The arena: counts against the released measures, paired changes, controls, prices, tables, resumption and failures."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import groundscope as gs
from behavior.metrics import compare_metric, compute_metrics
from concepts import ConceptDataset
from experiments.config import SteerConfig
from groundscope.core.errors import ConfigError, DataError, ModelError
from groundscope.core.statistics import Estimate
from lvlm import Lvlm, Sampling
from mitigation.arena.caption_controls import cut_to_length, cut_to_recall
from mitigation.arena.figure import front, pareto_figure
from mitigation.arena.measures import CAPTION_INVENTED, CAPTION_WORDS, change, count_answers, improves
from mitigation.arena.price import measure_price
from mitigation.arena.result import ArenaResult
from mitigation.arena.rows import ArenaRow, control_rows, default_rows, make_row, make_rows, parse_row
from mitigation.arena.run import ArenaOptions, run_arena
from mitigation.arena.search import CONFIGURATIONS, GRIDS, choose_parameters, configurations, search_summary
from mitigation.arena.steering_rows import DECAY, DOUBT, MAX_DROP, STRENGTHS, choose_vector, derive_mitigation
from mitigation.arena.tables import as_csv, as_html, as_latex, as_text
from mitigation.protocol import ForwardCost
from mitigation.steering.activations import read
from mitigation.training_free.method import TrainingFree


@pytest.fixture(scope="module")
def model() -> Lvlm:
    return gs.load_lvlm("tiny")


@pytest.fixture(scope="module")
def data() -> ConceptDataset:
    return gs.scenes.dataset(20, seed=1000)


@pytest.fixture(scope="module")
def answers(model: Lvlm, data: ConceptDataset) -> gs.BehaviorResult:
    return gs.answer(model, data)


@dataclass(frozen=True)
class Fails(TrainingFree):
    """A method that stops while it is applied."""

    label: ClassVar[str] = "fails"

    @contextmanager
    def applied(self, model: Lvlm) -> Iterator[None]:
        msg = "no such layer"
        raise ModelError(msg)
        yield


@dataclass(frozen=True)
class Counts(TrainingFree):
    """A method that changes nothing and counts how often it was applied."""

    label: ClassVar[str] = "counts"
    control: ClassVar[bool] = True
    applications: ClassVar[list[None]] = []

    @contextmanager
    def applied(self, model: Lvlm) -> Iterator[None]:
        self.applications.append(None)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("arena")


@pytest.fixture(scope="module")
def arena(model: Lvlm, data: ConceptDataset, folder: Path) -> ArenaResult:
    derivation = gs.DerivationData(model, None, data)
    rows = [make_row("vcd", derivation), ArenaRow("fails", Fails()), ArenaRow("counts", Counts(), control=True)]
    options = ArenaOptions(price_questions=1, price_tokens=4, price_repetitions=1)
    return run_arena(model, rows, data, options, folder=folder)


def test_measures_are_those_of_the_metrics_and_of_pope(answers: gs.BehaviorResult, data: ConceptDataset) -> None:
    counted = count_answers(answers, data)
    for name, rate in compute_metrics(answers, data).items():
        assert counted.estimate(name).value == pytest.approx(rate.value, abs=1e-12)
        assert counted.estimate(name).low == pytest.approx(rate.low, abs=1e-12)
    table = {(r.split, k): v.value for r in gs.benchmark_table(answers).rows for k, v in r.figures.items()}
    names = {"accuracy": "accuracy", "precision": "precision", "recall": "recall", "f1": "F1", "yes_ratio": "yes ratio"}
    for split in ("random", "popular", "adversarial"):
        for key, name in names.items():
            assert counted.estimate(f"{split}: {name}").value == pytest.approx(table[split, key], abs=1e-12)


def test_changes_are_paired_and_wider_for_more_methods(answers: gs.BehaviorResult, data: ConceptDataset) -> None:
    rows = [replace(a, given=a.answer, correct=True) if a.split == "conflict" else a for a in answers.answers]
    after = replace(answers, answers=tuple(rows))
    before, better = count_answers(answers, data), count_answers(after, data)
    name = "conflict: wrong by prior"
    single, ten = (change(before, better, name, comparisons=n) for n in (1, 10))
    assert single is not None
    assert ten is not None
    expected = compare_metric(answers, after, name)
    assert expected is not None
    assert (single.value, single.low, single.high) == pytest.approx((expected.value, expected.low, expected.high))
    assert ten.value == single.value
    assert ten.low < single.low
    assert ten.high > single.high


def test_a_ratio_changes_by_the_ratio_of_totals(answers: gs.BehaviorResult, data: ConceptDataset) -> None:
    after = replace(
        answers, answers=tuple(replace(a, text="a dog") if a.kind == "caption" else a for a in answers.answers)
    )
    before, cut = count_answers(answers, data), count_answers(after, data)
    amount = change(before, cut, CAPTION_INVENTED)
    assert amount is not None
    (a, b), (c, d) = (x.values(CAPTION_INVENTED).sum(axis=0) for x in (before, cut))
    assert amount.value == pytest.approx(c / d - a / b)
    assert cut.estimate(CAPTION_WORDS).value == 2


@pytest.mark.parametrize(
    ("name", "amount", "expected"),
    [
        ("all: right", (0.1, 0.05, 0.2), True),
        ("all: right", (0.1, -0.05, 0.2), None),
        ("present: says no", (0.1, 0.05, 0.2), False),
        (CAPTION_INVENTED, (-0.1, -0.2, -0.05), True),
        (CAPTION_WORDS, (5.0, 4.0, 6.0), None),
        ("random: yes ratio", (0.1, 0.05, 0.2), None),
    ],
)
def test_only_changes_beyond_the_interval_count(
    name: str, amount: tuple[float, float, float], expected: bool | None
) -> None:
    assert improves(name, Estimate(*amount, 10)) is expected


def test_captions_are_cut_to_a_length_and_to_a_recall(model: Lvlm, data: ConceptDataset) -> None:
    from behavior.metrics import score_dataset_captions

    captions = ConceptDataset("captions", tuple(e for e in data if e.kind == "caption"), data.provenance)
    plain = gs.answer(model, captions)
    cut = cut_to_length(plain, captions, 6.0)
    lengths = [min(len(t.split()), cut.words) for t in plain.texts.values()]
    means = [np.mean([min(len(t.split()), n) for t in plain.texts.values()]) for n in range(1, 40)]
    assert cut.mean_words == pytest.approx(np.mean(lengths))
    assert abs(cut.mean_words - 6) == pytest.approx(min(abs(m - 6) for m in means))
    scores = score_dataset_captions(plain, captions)
    half = cut_to_recall(plain, captions, scores.recall.value / 2)
    shorter = replace(
        plain, answers=tuple(replace(a, text=" ".join((a.text or "").split()[: half.words - 1])) for a in plain.answers)
    )
    assert half.recall >= scores.recall.value / 2 > score_dataset_captions(shorter, captions).recall.value
    assert cut_to_recall(plain, captions, 1.1).recall == pytest.approx(scores.recall.value)


def test_a_failed_method_is_named_and_leaves_the_others(arena: ArenaResult) -> None:
    assert [r.name for r in arena.rows] == ["unmodified", "VCD", "fails", "counts"]
    assert arena.row("fails").problem == "ModelError: no such layer"
    assert arena.row("VCD").measures
    assert arena.row("unmodified").measures[0].change is None


def test_a_control_that_changes_nothing_is_not_a_gain(arena: ArenaResult) -> None:
    row = arena.row("counts")
    assert all(m.change is not None and m.change.value == 0 for m in row.measures)
    assert "unmodified" in arena.row("VCD").not_beaten or "counts" not in arena.row("VCD").not_beaten
    assert row.not_beaten == ()


def test_answers_are_stored_and_not_asked_again(
    model: Lvlm, data: ConceptDataset, folder: Path, arena: ArenaResult
) -> None:
    before = len(Counts.applications)
    rows = [ArenaRow("counts", Counts(), control=True)]
    repeated = run_arena(model, rows, data, ArenaOptions(price_questions=0), folder=folder)
    assert len(Counts.applications) == before
    assert [m.value for m in repeated.row("counts").measures] == [m.value for m in arena.row("counts").measures]


def test_a_result_is_read_back_and_a_damaged_one_refused(arena: ArenaResult, tmp_path: Path) -> None:
    path = tmp_path / "arena.json"
    arena.save(path)
    assert as_csv(ArenaResult.load(path)) == as_csv(arena)
    path.write_text(path.read_text().replace("VCD", "XXX"))
    with pytest.raises(DataError, match="does not match its digest"):
        ArenaResult.load(path)


def test_tables_show_every_row(arena: ArenaResult) -> None:
    lines = list(csv.DictReader(io.StringIO(as_csv(arena))))
    assert [line["method"] for line in lines] == ["unmodified", "VCD", "fails", "counts"]
    for text in (as_text(arena), as_latex(arena), as_html(arena)):
        assert all(name in text for name in ("unmodified", "VCD", "fails", "counts"))
    assert r"CHAIR\_i" in as_latex(arena)
    hostile = replace(arena, rows=(replace(arena.rows[0], name="<b>&"),))
    assert "&lt;b&gt;&amp;" in as_html(hostile)


def test_the_front_is_what_nothing_dominates(arena: ArenaResult) -> None:
    points = [(1.0, 5.0), (2.0, 5.0), (3.0, 1.0), (float("nan"), 0.0)]
    assert front(points) == [0, 2]
    figure = pareto_figure(arena)
    assert len(figure.axes) == 3


def test_the_price_counts_rows_of_prompts_and_branches(model: Lvlm, data: ConceptDataset) -> None:
    method = make_row("vcd", gs.DerivationData(model, None, data)).mitigation
    examples = [e for e in data if e.kind == "caption"][:1]
    price = measure_price(model, method, examples, new_tokens=6, repetitions=1)
    assert (price.first_rows, price.token_rows, price.tokens) == (2, 2, 6)
    alone = measure_price(model, None, examples, new_tokens=6, repetitions=1)
    assert (alone.first_rows, alone.token_rows, alone.first_ratio) == (1, 1, 1)


def test_sampled_rows_have_a_spread_over_seeds(model: Lvlm) -> None:
    data = gs.scenes.dataset(10, splits=["conflict"])
    options = ArenaOptions(regimes=("sampling",), seeds=2, sampling=Sampling(temperature=2.0), price_questions=0)
    row = run_arena(model, [], data, options).row("unmodified", "sampling")
    measure = row.measure("all: right")
    assert measure is not None
    assert measure.spread is not None
    assert measure.value.n == 12


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vdc", "unknown method 'vdc'.*did you mean vdd or vcd"),
        ("vcd(alfa=1)", "did you mean alpha"),
        ("vcd(alpha)", "must be parameter=value"),
        ("vcd(alpha=1", "is no row of an arena"),
        ("discriminant(alpha=1)", "has the parameters strength and control, not 'alpha'"),
    ],
)
def test_unknown_rows_are_refused_before_work(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_row(text)


def test_parameters_are_chosen_within_the_guard(model: Lvlm) -> None:
    validation = gs.scenes.dataset(10, seed=7, splits=["conflict", "adversarial"])
    derivation = gs.DerivationData(model, None, validation)
    row, tried = choose_parameters("vcd", derivation, validation)
    assert [dict(c.parameters) for c in tried] == configurations("vcd")
    allowed = [c for c in tried if c.allowed]
    assert row is not None
    assert row.mitigation is not None
    assert row.mitigation.parameters["alpha"] == min(allowed, key=lambda c: c.errors).parameters["alpha"]
    nothing, refused = choose_parameters("vcd", derivation, validation, max_drop=-1.0)
    assert nothing is None
    assert search_summary(refused).count("(not allowed)") == len(tried)


def test_a_method_that_needs_heads_has_a_problem_without_them(model: Lvlm, data: ConceptDataset) -> None:
    row = make_row("discriminant", gs.DerivationData(model, None, data))
    assert row.mitigation is None
    assert row.problem


@pytest.fixture(scope="module")
def steering(model: Lvlm, tmp_path_factory: pytest.TempPathFactory) -> gs.DerivationData:
    examples = gs.scenes.dataset(10, seed=0, splits=["conflict", "adversarial", "random", "caption"])
    store = gs.trace(model, examples, ["z"], ["last"], tmp_path_factory.mktemp("store") / "store", progress=False)
    return gs.DerivationData(model, store, examples, heads=["L4.H7", "L5.H0", "L4.H3"])


def test_every_derivation_is_one_row_by_its_own_name(steering: gs.DerivationData, model: Lvlm) -> None:
    names = default_rows(steering)
    assert len(set(names)) == len(names)
    assert {"discriminant", "amplify", "prior_removal", "mean_difference", "vti_vision"} <= set(names)
    assert not {"steering", "vsv"} & set(names)  # the adapter, and a derivation without the option that it needs
    assert "discriminant" not in default_rows(gs.DerivationData(model, None, steering.examples))


def test_steering_rows_have_the_defaults_of_a_run() -> None:
    run = SteerConfig()
    assert (DOUBT, DECAY, MAX_DROP, list(STRENGTHS)) == (run.doubt, run.decay, run.max_drop, run.strengths)
    assert gs.guard_limits({}, MAX_DROP) == gs.guard_limits(run.guards, run.max_drop)


def test_a_steering_row_acts_at_every_head_with_the_strength_that_a_run_chooses(steering: gs.DerivationData) -> None:
    model, questions = steering.model, steering.examples.filter(lambda e: bool(e.candidates))
    row = make_row("amplify", steering)
    vector = row.mitigation
    assert isinstance(vector, gs.SteeringVector)
    assert (len(vector.heads), vector.decay) == (3, DECAY)
    assert row.name == f"steering: amplify (3 places, strength {vector.strength:g})"

    def errors(strength: float) -> float:
        with vector.scaled(strength).applied(model):
            answers = gs.answer(model, questions).answers
        parts = [
            [a for a in answers if a.split == "conflict"],
            [a for a in answers if a.split == "adversarial" and a.answer == "no"],
        ]
        return sum(sum(not a.correct for a in part) / len(part) for part in parts) / 2

    assert errors(vector.strength) == min(errors(s) for s in (0, *STRENGTHS) if s <= vector.strength)
    assert errors(vector.strength) < errors(0)


def test_a_vector_that_a_run_would_not_apply_has_a_problem(steering: gs.DerivationData) -> None:
    vector = derive_mitigation("amplify", steering)
    assert isinstance(vector, gs.SteeringVector)
    harmful = replace(vector, changes={4: gs.AddChange(np.eye(steering.model.width)[0], sigma=90.0)})
    with pytest.raises(DataError, match=r"no strength of amplify has fewer errors.*amplify\(strength=1\)"):
        choose_vector("amplify", harmful, steering)
    row = make_row("amplify(strength=2)", steering)
    assert row.name == "steering: amplify (strength=2)"
    assert isinstance(row.mitigation, gs.SteeringVector)
    assert row.mitigation.strength == 2


def test_controls_of_a_vector_have_its_strength_and_displacement(steering: gs.DerivationData) -> None:
    texts = ["amplify", "amplify(control=derived at other heads)", "amplify(control=random direction)"]
    rows = make_rows(texts, steering)
    vector, moved, random = (row.mitigation for row in rows)
    assert [row.control for row in rows] == [False, True, True]
    assert rows[1].name == rows[0].name.replace("amplify", "amplify, derived at other heads")
    assert isinstance(vector, gs.SteeringVector)
    assert isinstance(moved, gs.SteeringVector)
    assert isinstance(random, gs.SteeringVector)
    assert (moved.strength, random.strength) == (vector.strength, vector.strength)
    assert len(moved.heads) == 3
    assert not set(moved.heads) & set(vector.heads)
    assert random.heads == vector.heads
    store: Any = steering.store

    def rms(item: gs.SteeringVector, head: gs.Head) -> float:
        added = item.changes[head].displacements(read(store, head, "last"))  # type: ignore[union-attr]
        return float(np.sqrt((added**2).sum(1).mean()))

    for mine, other in zip(vector.heads, moved.heads, strict=True):
        assert rms(moved, other) == pytest.approx(rms(vector, mine), rel=1e-4)
    with pytest.raises(ConfigError, match="unknown control 'random'; choose from random direction"):
        parse_row("amplify(control=random)")


def test_controls_of_methods_are_rows_next_to_their_methods(steering: gs.DerivationData) -> None:
    texts = default_rows(steering)
    of = [text for text in texts if "(" in text]
    assert {"random_text(of=pai)", "random_heads(of=ad_hh)", "random_layers(of=dola)"} <= set(of)
    assert {"discriminant(control=derived at other heads)", "amplify(control=random direction)"} <= set(of)
    added = control_rows(steering, ["spin", "amplify"])
    assert [text for text in added if "(" in text] == [
        "random_heads(of=spin)",
        "amplify(control=derived at other heads)",
        "amplify(control=random direction)",
    ]


def test_every_control_of_a_method_has_as_many_configurations_as_the_method(steering: gs.DerivationData) -> None:
    for text in default_rows(steering):
        name, parameters = parse_row(text)
        of = str(parameters.get("of", name))
        assert len(configurations(text)) == len(configurations(of)), text
    assert configurations("gaussian_branch") == [{"of": "vcd", **c} for c in configurations("vcd")]
    control = {"control": "random direction"}
    assert configurations("amplify(control=random direction)")[0] == {**control, "strength": 0.25}


def test_a_search_derives_a_vector_once(steering: gs.DerivationData, monkeypatch: pytest.MonkeyPatch) -> None:
    derived_names: list[str] = []

    def derive(name: str, data: gs.DerivationData) -> Any:
        derived_names.append(name)
        return derive_mitigation(name, data)

    monkeypatch.setattr("mitigation.arena.rows.derive_mitigation", derive)
    validation = gs.scenes.dataset(10, seed=7, splits=["conflict", "adversarial"])
    _, tried = choose_parameters("discriminant", steering, validation)
    assert [c.parameters["strength"] for c in tried] == [0.25, 0.5, 1.0, 1.5, 2.0]
    assert derived_names == ["discriminant"]


def test_two_rows_with_one_name_are_refused(model: Lvlm, data: ConceptDataset) -> None:
    row = make_row("vcd", gs.DerivationData(model, None, data))
    with pytest.raises(DataError, match="two rows of the arena are named 'VCD'"):
        run_arena(model, [row, row], data)


def test_provenance_is_json(arena: ArenaResult) -> None:
    parameters: dict[str, Any] = dict(arena.row("VCD").parameters)
    assert json.loads(json.dumps(parameters))["beta"] == 0.1
    assert ForwardCost().per_token == 1


def test_grids_name_parameters_and_contain_the_published_value() -> None:
    for name, (parameter, values) in GRIDS.items():
        (entry,) = [f for f in fields(gs.training_free_methods[name]) if f.name == parameter]
        assert len(set(values)) == CONFIGURATIONS
        assert entry.default is None or entry.default in values, name


def test_answers_from_elsewhere_are_a_row_without_a_price(
    model: Lvlm, data: ConceptDataset, answers: gs.BehaviorResult, folder: Path
) -> None:
    better = replace(answers, answers=tuple(replace(a, given=a.answer, correct=True) for a in answers.answers))
    rows = [ArenaRow("another checkpoint", None, answers=better)]
    arena = run_arena(model, rows, data, ArenaOptions(price_questions=0), folder=folder)
    measure = arena.row("another checkpoint").measure("all: right")
    assert measure is not None
    assert measure.value.value == 1
    assert arena.row("another checkpoint").price is None
    other = replace(better, answers=better.answers[1:])
    with pytest.raises(DataError, match="are to other questions"):
        run_arena(model, [ArenaRow("short", None, answers=other)], data)
