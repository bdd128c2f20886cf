"""Every steering method on the embedded model: effect on errors by prior, side effects, and controls.

    python benchmarks/steering_tiny_model.py [--quick] [--save] [--work DIR]

The data is synthetic. Vectors are derived from the scenes of the default run (300, seed 0), at the six heads that patching
selects there or at the method's own heads, layers or tokens. Place and strength are chosen on all questions about those
scenes with the rule of the default run; the table is measured on other scenes (500, seed 1000). The baseline is the unsteered
model. Controls move activations as far at the same strength: random directions, the method with shuffled labels, the same
directions at other heads (three draws each, 20 for the best method), and the method derived at other heads.

Methods that act on more tokens than the last, or whose vector depends on the question, need full forward passes. They are
chosen and tested on a fifth of the scenes; vsv on 40 questions of each split. Intervals are 95 % over scenes; those of
controls are of the mean over draws. CHAIR_i is measured on captions of 100 test scenes; "decaying" is with a strength that
halves with each generated token. Results of finished methods are saved in the work folder, and reused. Figures, of the method
with the fewest errors on the validation scenes:

wrong_by_prior_cut, adversarial_yes_cut
    share of the errors that steering removes; goal: at least half;
..._cut_by_CONTROL
    the same for each control; goal: less than a tenth;
neutral_change
    change of the accuracy on neutral questions; goal: at least -0.01.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from rich.table import Table

from activation_store import trace
from behavior import BehaviorResult, chair
from behavior.metrics import METRICS, compare_metric, compute_metrics
from benchmarks._harness import RESULTS, describe_device, finish, option_parser, progress, wide_console
from benchmarks._steering_methods import Method, World, methods
from circuits import patch_heads, top_heads
from concepts import scenes
from concepts.counterfactuals import balanced_pairs
from concepts.scenes import questions
from concepts.scenes.icons import NOUNS
from concepts.schema import ConceptDataset
from experiments.config import SteerConfig
from groundscope.core.errors import DataError, PatchError, SiteError
from groundscope.core.statistics import Estimate, cluster_bootstrap, ratio
from lvlm import Lvlm, load_lvlm
from mitigation import SteeringVector
from mitigation.steering.controls import match_displacement, move_to_heads
from mitigation.strength import PRIOR_ERRORS, RULE, Row, answer_under, choose_strength, cost, harm, sweep_strengths

WORK = Path("runs") / "benchmark-steering"
REPORTED_METRICS = (*PRIOR_ERRORS, "neutral: right", "typical color: right", "present: says no")
MAX_DROP = SteerConfig().max_drop
DECAY = SteerConfig().decay
BATCH = 6
"""Methods that share one run of the unsteered questions: more would keep too many answers in memory."""


@dataclass(frozen=True)
class Plan:
    """Sizes of the benchmark."""

    images: int
    """Scenes from which vectors are derived."""
    test_images: int
    draws: int
    """Draws of each control."""
    captions: int
    """Captions of test scenes."""
    scene_step: int
    """Methods that need full forward passes use every `scene_step`-th scene."""
    questions: int
    """Questions for methods whose vector depends on the question."""
    pairs: int
    """Largest number of pairs of images for a method."""
    best_draws: int
    """Draws of each control of the best method."""
    strength_step: int
    """Every `strength_step`-th strength is tried."""


FULL, QUICK = Plan(300, 500, 3, 100, 5, 240, 120, 20, 1), Plan(40, 40, 1, 10, 4, 30, 30, 2, 2)


def make_world(plan: Plan, work: Path) -> World:
    """Trace the discovery scenes and find the heads, as the default run does."""
    model = load_lvlm("tiny")
    data = scenes.dataset(plan.images, seed=0)
    questions_ = data.filter(lambda e: bool(e.candidates))
    store = trace(model, questions_, sites=["resid_post", "z", "mlp_out"], tokens=["last"], out=work / "activations")
    scores = {k: patch_heads(model, balanced_pairs(data, k, limit=60)) for k in ("object", "color", "relation")}
    return World(model, store, store.frame(), questions_, top_heads(scores, 6), plan.pairs)


def select_questions(data: ConceptDataset, method: Method, plan: Plan) -> ConceptDataset:
    """Return the questions on which a method is measured."""
    if method.late:
        return data
    if "residual" not in method.places:
        return data.filter(lambda e: int(e.group.rsplit("-", 1)[-1]) % plan.scene_step == 0)
    # The vector depends on the question: the same number of questions of every split.
    counts: dict[str, int] = {}

    def room(split: str) -> bool:
        counts[split] = counts.get(split, 0) + 1
        return counts[split] <= plan.questions // 6

    return data.filter(lambda e: room(e.split))


def answer_by_parts(
    model: Lvlm, data: ConceptDataset, method: Method, strengths: Sequence[float], *, control: bool = False
) -> dict[float, BehaviorResult]:
    """Answer questions under vectors that depend on the question, at each strength; 0 is the unsteered model."""
    results: dict[float, list[Any]] = {s: [] for s in (0.0, *strengths)}
    for few, vector in method.parts(data) if method.parts else ():
        used = None if vector is None else vector.randomized(0) if control else vector
        vectors = {str(s): used.scaled(s) if used is not None and s else None for s in results}
        for s, result in answer_under(model, few, vectors, progress=False).items():
            results[float(s)].append(result)
    order = {e.id: i for i, e in enumerate(data)}
    return {
        s: BehaviorResult(tuple(sorted((a for r in rs for a in r.answers), key=lambda a: order[a.id])), rs[0].cost)
        for s, rs in results.items()
    }


def choose_places(
    w: World, data: ConceptDataset, group: Mapping[str, Method], strength_step: int
) -> dict[str, tuple[str, Row, Row]]:
    """Return for each method the place and the row of its sweep that the rule chooses, and the row without steering."""
    vectors: dict[str, tuple[SteeringVector, Sequence[float]]] = {}
    names: dict[str, tuple[str, str]] = {}
    for name, method in group.items():
        for place, make in method.places.items():
            if make is None:
                continue
            vectors[f"{name} at {place}"] = (make(None), method.strengths[::strength_step])
            names[f"{name} at {place}"] = (name, place)
    curves = sweep_strengths(w.model, data, vectors)
    best_places: dict[str, tuple[str, Row, Row]] = {}
    for key, rows in curves.items():
        name, place = names[key]
        row = choose_strength(rows, max_drop=MAX_DROP)
        if name not in best_places or row["harm"] < best_places[name][1]["harm"]:
            best_places[name] = (place, row, rows[0])
    return best_places


def make_controls(
    w: World, method: Method, place: str, vector: SteeringVector, draws: int
) -> dict[str, list[SteeringVector]]:
    """Return every control that a method can have, each drawn so many times."""
    make_one = method.places[place] if method.labels else None
    makers = {
        "random direction": lambda seed: vector.randomized(seed),
        "shuffled labels": lambda seed: match_displacement(make_one(seed), vector, w.store) if make_one else None,
        "moved to other heads": lambda seed: move_to_heads(vector, w.others(seed), w.store),
        "derived at other heads": lambda seed: (
            match_displacement(method.elsewhere(seed), vector, w.store) if method.elsewhere else None
        ),
    }
    controls: dict[str, list[SteeringVector]] = {}
    for name, make in makers.items():
        try:
            vectors = [make(seed) for seed in range(draws if method.late else 1)]
        except (DataError, PatchError, SiteError):
            continue  # this method has no such control: another kind, or no heads
        controls[name] = [
            control_vector.scaled(vector.strength) for control_vector in vectors if control_vector is not None
        ]
    return {name: vectors for name, vectors in controls.items() if vectors}


def removed_share(before: BehaviorResult, after: Sequence[BehaviorResult], name: str) -> Estimate:
    """Return the share of an error that steering removes, mean over draws, with a paired interval over scenes."""
    metric = METRICS[name]
    indices = [i for i, a in enumerate(before.answers) if metric.applies(a)]
    base = np.array([metric.counts(before.answers[i]) for i in indices], float)
    late = np.mean([[metric.counts(r.answers[i]) for i in indices] for r in after], axis=0)
    table = np.column_stack([base - late, base])
    low, high = cluster_bootstrap(table, [before.answers[i].group for i in indices], ratio)
    return Estimate(float(table[:, 0].sum() / base.sum()) if base.any() else float("nan"), low, high, len(indices))


def report_metrics(result: BehaviorResult, data: ConceptDataset) -> dict[str, Any]:
    """Return the measures that are shown."""
    return {name: asdict(e) for name, e in compute_metrics(result, data).items() if name in REPORTED_METRICS}


def make_row(
    before: BehaviorResult,
    after: BehaviorResult,
    controls: Mapping[str, Sequence[BehaviorResult]],
    data: ConceptDataset,
) -> dict[str, Any]:
    """Return the results of a method on the test scenes."""
    changes = {name: compare_metric(before, after, name) for name in REPORTED_METRICS}
    return {
        "questions": len(data),
        "before": report_metrics(before, data),
        "test": report_metrics(after, data),
        "change": {name: asdict(c) for name, c in changes.items() if c is not None},
        "cut": {name: asdict(removed_share(before, [after], name)) for name in PRIOR_ERRORS},
        "controls": {
            control: {
                "draws": len(results),
                "cut": {name: asdict(removed_share(before, results, name)) for name in PRIOR_ERRORS},
                "neutral": float(np.mean([compute_metrics(r, data)["neutral: right"].value for r in results])),
            }
            for control, results in controls.items()
        },
    }


def score_captions(model: Lvlm, data: ConceptDataset, vector: SteeringVector | None, count: int) -> dict[str, Any]:
    """Generate captions of scenes, and return the share of invented objects and the recall."""
    firsts = list({e.group: e for e in data}.values())[:count]
    scenes: list[Any] = [e.image for e in firsts]
    scene_examples = [(s, questions.as_example(s, questions.caption(s), "caption")) for s in scenes]
    caption_data = ConceptDataset("captions", tuple(e for _, e in scene_examples))
    result = answer_under(model, caption_data, {"": vector}, progress=False)[""]
    objects = {e.id: [o.noun for o in scene.objects] for scene, e in scene_examples}
    scores = chair({a.id: a.text or "" for a in result.answers}, objects, vocabulary=NOUNS, variant="paper")
    return {"chair_i": asdict(scores.chair_i), "recall": asdict(scores.recall)}


def test_methods(
    w: World, group: Mapping[str, Method], plan: Plan, data: ConceptDataset
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Choose and test methods that share their questions, and yield a row each."""
    kind = next(iter(group.values()))
    validation, test = select_questions(w.discovery, kind, plan), select_questions(data, kind, plan)
    places = choose_places(w, validation, group, plan.strength_step)
    vectors: dict[str, SteeringVector | None] = {"before": None}
    names: dict[tuple[str, str], list[str]] = {}
    for name, (place, row, _) in places.items():
        make = group[name].places[place]
        if make is None or not row["strength"]:
            vectors[name] = None
            continue
        vector = make(None).scaled(row["strength"])
        vectors[name] = vector
        for control, control_vectors in make_controls(w, group[name], place, vector, plan.draws).items():
            names[name, control] = [f"{name}: {control} {i}" for i in range(len(control_vectors))]
            vectors.update(zip(names[name, control], control_vectors, strict=True))
    results = answer_under(w.model, test, vectors)
    for name, (place, row, start) in places.items():
        controls = {c: [results[k] for k in keys] for (n, c), keys in names.items() if n == name}
        about = {"place": place, "strength": row["strength"], "harm": [start["harm"], row["harm"]], "cost": row["cost"]}
        captions = score_captions(w.model, data, vectors[name], plan.captions)
        vector = vectors[name]
        if vector is not None and vector.decay == 1 and group[name].late:
            about["fading"] = score_captions(w.model, data, vector.decaying(DECAY), plan.captions)
        yield name, {**about, **make_row(results["before"], results[name], controls, test), **captions}


def test_by_parts(w: World, method: Method, plan: Plan, data: ConceptDataset) -> dict[str, Any]:
    """Choose and test a method whose vector belongs to a question."""
    validation, test = select_questions(w.discovery, method, plan), select_questions(data, method, plan)
    sweep: list[Row] = []
    before: dict[str, Estimate] = {}
    for s, result in answer_by_parts(w.model, validation, method, method.strengths[:: plan.strength_step]).items():
        rates = compute_metrics(result, validation)
        before = before or rates
        sweep.append({"strength": s, "harm": harm(rates), "cost": cost(rates, before)})
    row = choose_strength(sweep, max_drop=MAX_DROP)
    used = [row["strength"]] if row["strength"] else []
    results = answer_by_parts(w.model, test, method, used)
    controls = {}
    if used:
        controls["random direction"] = [answer_by_parts(w.model, test, method, used, control=True)[used[0]]]
    about = {"place": next(iter(method.places)), "strength": row["strength"], "cost": row["cost"]}
    about["harm"] = [sweep[0]["harm"], row["harm"]]
    return {**about, **make_row(results[0.0], results[used[0] if used else 0.0], controls, test)}


def run_methods(plan: Plan, work: Path) -> dict[str, dict[str, Any]]:
    """Measure the methods that have no saved results, and return the results of all."""
    with progress("tracing and patching"):
        w = make_world(plan, work)
        all_methods = methods(w)
        data = scenes.dataset(plan.test_images, seed=1000).filter(lambda e: bool(e.candidates))
        if not (work / "before.json").exists():
            (work / "before.json").write_text(json.dumps(score_captions(w.model, data, None, plan.captions)))
    paths = {name: work / f"{name.replace(' ', '-').replace(',', '')}.json" for name in all_methods}
    missing = [name for name in all_methods if not paths[name].exists()]
    late = [name for name in missing if all_methods[name].late]
    groups = [late[k : k + BATCH] for k in range(0, len(late), BATCH)]
    groups += [[name] for name in missing if not all_methods[name].late]
    for number, group in enumerate(groups, 1):
        method = all_methods[group[0]]
        with progress(f"methods {number} of {len(groups)}: {'; '.join(group)}"):
            if method.parts is not None:
                results = [(group[0], test_by_parts(w, method, plan, data))]
            else:
                results = list(test_methods(w, {name: all_methods[name] for name in group}, plan, data))
        for name, row in results:
            paths[name].write_text(json.dumps(row))
    rows = {name: json.loads(path.read_text()) for name, path in paths.items()}
    best, best_path = find_best(rows), work / "best.json"
    if not best_path.exists():
        with progress(f"controls of the best method: {best}"):
            best_path.write_text(json.dumps(draw_more_controls(w, all_methods[best], rows[best], plan, data)))
    return {**rows, best: json.loads(best_path.read_text())}


def find_best(rows: Mapping[str, dict[str, Any]]) -> str:
    """Return the method with the fewest errors on the validation scenes, of those that were asked every question."""
    most = max(r["questions"] for r in rows.values())
    return min((n for n in rows if rows[n]["questions"] == most), key=lambda n: rows[n]["harm"][1])


def draw_more_controls(
    w: World, method: Method, row: dict[str, Any], plan: Plan, data: ConceptDataset
) -> dict[str, Any]:
    """Return the row of a method with its controls drawn many times: three draws say little about a few errors."""
    make = method.places[row["place"]]
    if make is None or not row["strength"]:
        return row
    vector = make(None).scaled(row["strength"])
    controls = make_controls(w, method, row["place"], vector, plan.best_draws)
    names = {c: [f"{c} {i}" for i in range(len(vectors_))] for c, vectors_ in controls.items()}
    vectors: dict[str, SteeringVector | None] = {"before": None, "after": vector}
    vectors |= {n: v for c, vectors_ in controls.items() for n, v in zip(names[c], vectors_, strict=True)}
    results = answer_under(w.model, data, vectors)
    many = {c: [results[n] for n in names[c]] for c in names}
    return {**row, **make_row(results["before"], results["after"], many, data)}


def percent(e: Mapping[str, float]) -> str:
    """Return a rate and its interval as text, in percent."""
    return f"{100 * e['value']:.1f} [{100 * e['low']:.1f}, {100 * e['high']:.1f}]"


def print_tables(rows: Mapping[str, dict[str, Any]], before: Mapping[str, Any]) -> None:
    """Print the table of methods, and that of controls."""
    console = wide_console()
    table = Table(
        "method",
        "place",
        "strength",
        "wrong by prior %",
        "adversarial yes %",
        "neutral %",
        "CHAIR_i %",
        "CHAIR_i %, decaying",
        "n",
    )
    first = next(r for r in rows.values() if r["questions"] == max(q["questions"] for q in rows.values()))
    cells_ = [percent(first["before"][m]) if m in first["before"] else "" for m in REPORTED_METRICS[:3]]
    table.add_row("none", "", "", *cells_, percent(before["chair_i"]), "", str(first["questions"]))
    for name, row in rows.items():
        cells_ = [percent(row["test"][m]) if m in row["test"] else "" for m in REPORTED_METRICS[:3]]
        caption = percent(row["chair_i"]) if "chair_i" in row else ""
        fading = percent(row["fading"]["chair_i"]) if "fading" in row else ""
        table.add_row(name, row["place"], f"{row['strength']:g}", *cells_, caption, fading, str(row["questions"]))
    console.print(table)
    table = Table("method", "cut of", *PRIOR_ERRORS, "neutral %", "draws")
    for name, row in rows.items():
        own = 100 * row["test"]["neutral: right"]["value"]
        table.add_row(name, "itself", *(percent(row["cut"][m]) for m in PRIOR_ERRORS), f"{own:.1f}", "")
        for control, control_row in row["controls"].items():
            cells = [percent(control_row["cut"][m]) for m in PRIOR_ERRORS]
            table.add_row("", control, *cells, f"{100 * control_row['neutral']:.1f}", str(control_row["draws"]))
    console.print(table)


def make_figures(rows: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the figures of the best method (see `find_best`)."""
    best = find_best(rows)
    row = rows[best]
    figures: dict[str, dict[str, Any]] = {}

    def add(name: str, e: Mapping[str, float], goal: str, *, holds: bool) -> None:
        interval = [round(e["low"], 4), round(e["high"], 4)]
        figures[name] = {"value": round(e["value"], 4), "interval": interval, "goal": goal, "holds": holds, "n": e["n"]}

    for name, short in zip(PRIOR_ERRORS, ("wrong_by_prior", "adversarial_yes"), strict=True):
        add(f"{short}_cut", row["cut"][name], ">= 0.5", holds=row["cut"][name]["value"] >= 0.5)
        for control, control_row in row["controls"].items():
            e = control_row["cut"][name]
            add(f"{short}_cut_by_{control.replace(' ', '_')}", e, "< 0.1", holds=e["value"] < 0.1)
    drop = row["change"]["neutral: right"]
    add("neutral_change", drop, ">= -0.01", holds=drop["value"] >= -0.01)
    return {"best": {"value": best, "goal": "", "holds": True, "n": row["questions"]}, **figures}


def main() -> None:
    """Run, print tables, and as the last line one JSON object."""
    parser = option_parser(__doc__, quick="fewer scenes and draws, about a minute", save=True)
    parser.add_argument("--work", type=Path, default=WORK, help=f"folder of finished results (default: {WORK})")
    options = parser.parse_args()
    console = wide_console()
    console.print("Compares every steering method with the unsteered model and with controls of equal displacement.")
    start = time.perf_counter()
    plan = QUICK if options.quick else FULL
    work = options.work / ("quick" if options.quick else "full")
    work.mkdir(parents=True, exist_ok=True)
    rows = run_methods(plan, work)
    before = json.loads((work / "before.json").read_text())
    print_tables(rows, before)
    console.print(f"{time.perf_counter() - start:.0f} s; rule of choice: {RULE} ({MAX_DROP:g})")
    record = finish("steering_tiny_model", describe_device("torch", "numpy"), make_figures(rows))
    if options.save:
        path = RESULTS / "steering_tiny_model.json"
        path.write_text(json.dumps({**record, "captions_before": before, "methods": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
