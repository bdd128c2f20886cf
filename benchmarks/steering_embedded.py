"""What every way of steering does on the embedded model: errors by prior, what it costs, and its controls.

    python benchmarks/steering_embedded.py [--quick] [--save] [--work DIR]

Everything is synthetic. Vectors are derived on the scenes of the default run (300, seed 0) at the six heads that patching
finds there, or at heads, layers or tokens of their own. Place and strength are chosen on all questions about those scenes by
the rule of the default run; the table is of other scenes (500, seed 1000). Controls push as far at the same strength: random
directions, the rule from shuffled labels, the same directions moved to other heads, each drawn three times (20 times for the
best method), and the rule derived again at other heads. Methods that act at more than the last token, or differ from question
to question, need whole forwards; they are chosen and tested on a fifth of the scenes, vsv on 40 questions of each split.
Intervals are 95 % over scenes; those of controls are of the mean over draws. CHAIR_i is of 100 test scenes, "fading" where
the vector halves with every token written. Finished parts are in the work folder, and are not repeated.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from activation_store import trace
from behavior import BehaviorResult, chair
from behavior.metrics import METRICS, compare_metric, compute_metrics
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

RESULTS = Path(__file__).parent / "results" / "steering_embedded.json"
WORK = Path("runs") / "benchmark-steering"
SHOWN = (*PRIOR_ERRORS, "neutral: right", "typical color: right", "present: says no")
MAX_DROP = SteerConfig().max_drop
FADING = SteerConfig().decay
BATCH = 6
"""Methods that share one run of the unsteered questions: more would keep too many answers in memory."""


@dataclass(frozen=True)
class Plan:
    """How much is done."""

    images: int
    tested: int
    draws: int
    captions: int
    share: int
    """Methods that need whole forwards are asked about one scene in so many."""
    questions: int
    """Those that need some for each question are asked so many."""
    pairs: int
    """Pairs of images that a method is given at most."""
    often: int
    """How many times the controls of the best method are drawn."""
    thin: int
    """One strength in so many is tried."""


FULL, QUICK = Plan(300, 500, 3, 100, 5, 240, 120, 20, 1), Plan(40, 40, 1, 10, 4, 30, 30, 2, 2)


def world(plan: Plan, work: Path) -> World:
    """Trace the discovery scenes and find the heads, as the default run does."""
    model = load_lvlm("tiny")
    data = scenes.dataset(plan.images, seed=0)
    questions_ = data.filter(lambda e: bool(e.candidates))
    store = trace(model, questions_, sites=["resid_post", "z", "mlp_out"], tokens=["last"], out=work / "activations")
    scores = {k: patch_heads(model, balanced_pairs(data, k, limit=60)) for k in ("object", "color", "relation")}
    return World(model, store, store.frame(), questions_, top_heads(scores, 6), plan.pairs)


def part(data: ConceptDataset, method: Method, plan: Plan) -> ConceptDataset:
    """Return the questions that a method is asked."""
    if method.late:
        return data
    if "residual" not in method.places:
        return data.filter(lambda e: int(e.group.rsplit("-", 1)[-1]) % plan.share == 0)
    # A vector for each question: of every split alike.
    counts: dict[str, int] = {}

    def room(split: str) -> bool:
        counts[split] = counts.get(split, 0) + 1
        return counts[split] <= plan.questions // 6

    return data.filter(lambda e: room(e.split))


def asked_by_parts(
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


def chosen_places(
    w: World, data: ConceptDataset, group: Mapping[str, Method], thin: int
) -> dict[str, tuple[str, Row, Row]]:
    """Return for each method the place and the row of its sweep that the rule chooses, and the row without steering."""
    vectors: dict[str, tuple[SteeringVector, Sequence[float]]] = {}
    names: dict[str, tuple[str, str]] = {}
    for name, method in group.items():
        for place, make in method.places.items():
            if make is None:
                continue
            vectors[f"{name} at {place}"] = (make(None), method.strengths[::thin])
            names[f"{name} at {place}"] = (name, place)
    curves = sweep_strengths(w.model, data, vectors)
    best_places: dict[str, tuple[str, Row, Row]] = {}
    for key, rows in curves.items():
        name, place = names[key]
        row = choose_strength(rows, max_drop=MAX_DROP)
        if name not in best_places or row["harm"] < best_places[name][1]["harm"]:
            best_places[name] = (place, row, rows[0])
    return best_places


def controls_of(
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


def cut(before: BehaviorResult, after: Sequence[BehaviorResult], name: str) -> Estimate:
    """Return the share of an error that is gone, the mean over draws, with a paired interval over scenes."""
    metric = METRICS[name]
    indices = [i for i, a in enumerate(before.answers) if metric.applies(a)]
    base = np.array([metric.counts(before.answers[i]) for i in indices], float)
    late = np.mean([[metric.counts(r.answers[i]) for i in indices] for r in after], axis=0)
    table = np.column_stack([base - late, base])
    low, high = cluster_bootstrap(table, [before.answers[i].group for i in indices], ratio)
    return Estimate(float(table[:, 0].sum() / base.sum()) if base.any() else float("nan"), low, high, len(indices))


def summarized(result: BehaviorResult, data: ConceptDataset) -> dict[str, Any]:
    """Return the measures that are shown."""
    return {name: asdict(e) for name, e in compute_metrics(result, data).items() if name in SHOWN}


def row_of(
    before: BehaviorResult,
    after: BehaviorResult,
    controls: Mapping[str, Sequence[BehaviorResult]],
    data: ConceptDataset,
) -> dict[str, Any]:
    """Return what is written of a method on the test scenes."""
    changes = {name: compare_metric(before, after, name) for name in SHOWN}
    return {
        "questions": len(data),
        "before": summarized(before, data),
        "test": summarized(after, data),
        "change": {name: asdict(c) for name, c in changes.items() if c is not None},
        "cut": {name: asdict(cut(before, [after], name)) for name in PRIOR_ERRORS},
        "controls": {
            control: {
                "draws": len(results),
                "cut": {name: asdict(cut(before, results, name)) for name in PRIOR_ERRORS},
                "neutral": float(np.mean([compute_metrics(r, data)["neutral: right"].value for r in results])),
            }
            for control, results in controls.items()
        },
    }


def captioned(model: Lvlm, data: ConceptDataset, vector: SteeringVector | None, count: int) -> dict[str, Any]:
    """Let the model describe scenes, and return what of it is not there."""
    firsts = list({e.group: e for e in data}.values())[:count]
    scenes: list[Any] = [e.image for e in firsts]
    scene_examples = [(s, questions.as_example(s, questions.caption(s), "caption")) for s in scenes]
    caption_data = ConceptDataset("captions", tuple(e for _, e in scene_examples))
    result = answer_under(model, caption_data, {"": vector}, progress=False)[""]
    objects = {e.id: [o.noun for o in scene.objects] for scene, e in scene_examples}
    scores = chair({a.id: a.text or "" for a in result.answers}, objects, vocabulary=NOUNS, variant="paper")
    return {"chair_i": asdict(scores.chair_i), "recall": asdict(scores.recall)}


def tested(
    w: World, group: Mapping[str, Method], plan: Plan, data: ConceptDataset
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Choose and test methods that share their questions, and yield a row each."""
    kind = next(iter(group.values()))
    validation, test = part(w.discovery, kind, plan), part(data, kind, plan)
    places = chosen_places(w, validation, group, plan.thin)
    vectors: dict[str, SteeringVector | None] = {"before": None}
    names: dict[tuple[str, str], list[str]] = {}
    for name, (place, row, _) in places.items():
        make = group[name].places[place]
        if make is None or not row["strength"]:
            vectors[name] = None
            continue
        vector = make(None).scaled(row["strength"])
        vectors[name] = vector
        for control, control_vectors in controls_of(w, group[name], place, vector, plan.draws).items():
            names[name, control] = [f"{name}: {control} {i}" for i in range(len(control_vectors))]
            vectors.update(zip(names[name, control], control_vectors, strict=True))
    results = answer_under(w.model, test, vectors)
    for name, (place, row, start) in places.items():
        controls = {c: [results[k] for k in keys] for (n, c), keys in names.items() if n == name}
        about = {"place": place, "strength": row["strength"], "harm": [start["harm"], row["harm"]], "cost": row["cost"]}
        captions = captioned(w.model, data, vectors[name], plan.captions)
        vector = vectors[name]
        if vector is not None and vector.decay == 1 and group[name].late:
            about["fading"] = captioned(w.model, data, vector.decaying(FADING), plan.captions)
        yield name, {**about, **row_of(results["before"], results[name], controls, test), **captions}


def tested_by_parts(w: World, method: Method, plan: Plan, data: ConceptDataset) -> dict[str, Any]:
    """Choose and test a method whose vector belongs to a question."""
    validation, test = part(w.discovery, method, plan), part(data, method, plan)
    sweep: list[Row] = []
    before: dict[str, Estimate] = {}
    for s, result in asked_by_parts(w.model, validation, method, method.strengths[:: plan.thin]).items():
        rates = compute_metrics(result, validation)
        before = before or rates
        sweep.append({"strength": s, "harm": harm(rates), "cost": cost(rates, before)})
    row = choose_strength(sweep, max_drop=MAX_DROP)
    used = [row["strength"]] if row["strength"] else []
    results = asked_by_parts(w.model, test, method, used)
    controls = {}
    if used:
        controls["random direction"] = [asked_by_parts(w.model, test, method, used, control=True)[used[0]]]
    about = {"place": next(iter(method.places)), "strength": row["strength"], "cost": row["cost"]}
    about["harm"] = [sweep[0]["harm"], row["harm"]]
    return {**about, **row_of(results[0.0], results[used[0] if used else 0.0], controls, test)}


def run(plan: Plan, work: Path, console: Console) -> dict[str, dict[str, Any]]:
    """Do what is not done yet, and return every row."""
    w = world(plan, work)
    every = methods(w)
    data = scenes.dataset(plan.tested, seed=1000).filter(lambda e: bool(e.candidates))
    done = {name: work / f"{name.replace(' ', '-').replace(',', '')}.json" for name in every}
    if not (work / "before.json").exists():
        (work / "before.json").write_text(json.dumps(captioned(w.model, data, None, plan.captions)))
    todo = [name for name in every if not done[name].exists()]
    late = [name for name in todo if every[name].late]
    groups = [late[k : k + BATCH] for k in range(0, len(late), BATCH)]
    groups += [[name] for name in todo if not every[name].late]
    for number, group in enumerate(groups):
        start = time.perf_counter()
        if every[group[0]].parts is not None:
            rows = [(group[0], tested_by_parts(w, every[group[0]], plan, data))]
        else:
            rows = list(tested(w, {name: every[name] for name in group}, plan, data))
        for name, row in rows:
            done[name].write_text(json.dumps(row))
        console.print(f"{number + 1} of {len(groups)}: {'; '.join(group)}, {time.perf_counter() - start:.0f} s")
    rows = {name: json.loads(path.read_text()) for name, path in done.items()}
    best, best_path = best_of(rows), work / "best.json"
    if not best_path.exists():
        best_path.write_text(json.dumps(drawn_often(w, every[best], rows[best], plan, data)))
    return {**rows, best: json.loads(best_path.read_text())}


def best_of(rows: Mapping[str, dict[str, Any]]) -> str:
    """Return the method with the fewest errors on the validation scenes, of those that were asked every question."""
    most = max(r["questions"] for r in rows.values())
    return min((n for n in rows if rows[n]["questions"] == most), key=lambda n: rows[n]["harm"][1])


def drawn_often(w: World, method: Method, row: dict[str, Any], plan: Plan, data: ConceptDataset) -> dict[str, Any]:
    """Return the row of a method with its controls drawn many times: three draws say little about a few errors."""
    make = method.places[row["place"]]
    if make is None or not row["strength"]:
        return row
    vector = make(None).scaled(row["strength"])
    controls = controls_of(w, method, row["place"], vector, plan.often)
    names = {c: [f"{c} {i}" for i in range(len(vectors_))] for c, vectors_ in controls.items()}
    vectors: dict[str, SteeringVector | None] = {"before": None, "after": vector}
    vectors |= {n: v for c, vectors_ in controls.items() for n, v in zip(names[c], vectors_, strict=True)}
    results = answer_under(w.model, data, vectors)
    many = {c: [results[n] for n in names[c]] for c in names}
    return {**row, **row_of(results["before"], results["after"], many, data)}


def percent(e: Mapping[str, float]) -> str:
    """Return a rate and its interval as a reader wants it."""
    return f"{100 * e['value']:.1f} [{100 * e['low']:.1f}, {100 * e['high']:.1f}]"


def report(rows: Mapping[str, dict[str, Any]], before: Mapping[str, Any], console: Console) -> None:
    """Print the table of methods, and that of controls."""
    table = Table(
        "method", "place", "strength", "wrong by prior %", "adversarial yes %", "neutral %", "CHAIR_i %", "fading", "n"
    )
    first = next(r for r in rows.values() if r["questions"] == max(q["questions"] for q in rows.values()))
    cells_ = [percent(first["before"][m]) if m in first["before"] else "" for m in SHOWN[:3]]
    table.add_row("none", "", "", *cells_, percent(before["chair_i"]), "", str(first["questions"]))
    for name, row in rows.items():
        cells_ = [percent(row["test"][m]) if m in row["test"] else "" for m in SHOWN[:3]]
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


def figures_of(rows: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Hold the best method by its validation scenes, of those asked every question, against the goals."""
    best = best_of(rows)
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
    """Measure, print tables, and as the last line one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer scenes and draws, under a minute")
    parser.add_argument("--save", action="store_true", help="write the table to benchmarks/results")
    parser.add_argument("--work", type=Path, help="where finished methods are kept; runs/benchmark-steering by default")
    options = parser.parse_args()
    console = Console()
    console.print("Compares every steering method with the unsteered model and with controls of equal displacement.")
    start = time.perf_counter()
    plan = QUICK if options.quick else FULL
    work = (options.work or WORK) / ("quick" if options.quick else "full")
    work.mkdir(parents=True, exist_ok=True)
    rows = run(plan, work, console)
    before = json.loads((work / "before.json").read_text())
    report(rows, before, console)
    console.print(f"{time.perf_counter() - start:.0f} s; chosen by: {RULE} ({MAX_DROP:g})")
    device = f"{platform.machine()}, torch {torch.__version__}, numpy {np.__version__}"
    outcome = {"benchmark": "steering_embedded", "device": device, "figures": figures_of(rows)}
    if options.save:
        RESULTS.write_text(json.dumps({**outcome, "captions_before": before, "methods": rows}, indent=1) + "\n")
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
