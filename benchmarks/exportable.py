"""The vector that other software can hold, on the embedded model, over several seeds: what it corrects and what it costs.

    python benchmarks/exportable.py [--quick] [--save] [--seeds 0,1,2]

The data is synthetic. For each seed the vector is derived from one half of 300 scenes (`derive.optimize`, as in the default
run: one addition at the residual stream of the two middle layers, at every token), its strength is chosen on the other half
within the guards of the default run (captions of 150 images, with one standard error added to their losses), and it is tested
on other scenes (150, seed 1000 + seed) and captions (300 scenes, seed 2000 + seed). The baseline is the unsteered model.
Controls: additions of the same length in random directions, and a vector optimized for the answers of other questions (answers
are exchanged between questions with the same candidates). Figures are means over seeds. ``worst`` is the worst seed; a goal
holds if it holds there.

wrong_by_prior_cut, false_yes_cut
    share of the errors that the vector removes; goal: at least half;
present_denied, neutral_loss
    additional present objects denied, lost accuracy on neutral questions; goal: at most 0.015;
chair_i, caption_recall_loss
    change of the share of invented objects in captions, goal at most 0.01; lost recall, goal at most 0.02;
..._by_random_direction, ..._by_exchanged_answers
    the cuts of the controls; goal: less than half of the vector's.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from rich.table import Table

from benchmarks._harness import RESULTS, describe_device, finish, option_parser, progress, wide_console
from concepts import scenes
from concepts.schema import ConceptDataset
from experiments.config import SteerConfig
from experiments.stages.steer import CAPTIONS, CAUTION
from lvlm import load_lvlm
from mitigation import SteeringVector, derive
from mitigation.free_text_prompts import FreeTextPrompts
from mitigation.guard import guard_limits
from mitigation.guard_loss import measure_guards
from mitigation.model_outputs import ModelOutputs, combine_outputs
from mitigation.published_methods import preserved
from mitigation.strength import PRIOR_ERRORS, answer_under, choose_guarded, sweep_strengths

STRENGTHS = tuple(SteerConfig().exportable_strengths)
SHORT = {"wrong_by_prior": PRIOR_ERRORS[0], "false_yes": PRIOR_ERRORS[1]}
LOSSES = {
    "present_denied": ("recall", 0.015),
    "neutral_loss": ("neutral", 0.015),
    "chair_i": ("chair", 0.01),
    "caption_recall_loss": ("caption_recall", 0.02),
}


def halves(data: ConceptDataset) -> tuple[ConceptDataset, ConceptDataset]:
    """Divide examples by scene."""
    first = set(list(dict.fromkeys(e.group for e in data))[::2])
    return data.filter(lambda e: e.group in first), data.filter(lambda e: e.group not in first)


def exchanged(data: ConceptDataset) -> list[Any]:
    """Return questions with the true answers of other questions that have the same candidates."""
    by_candidates: dict[tuple[str, ...], list[Any]] = {}
    for example in data:
        by_candidates.setdefault(example.candidates, []).append(example)
    rng, changed = np.random.default_rng(0), []
    for members in by_candidates.values():
        answers = [members[i].answer for i in rng.permutation(len(members))]
        changed += [replace(e, answer=answer) for e, answer in zip(members, answers, strict=True)]
    return changed


def run_seed(seed: int, images: int, test_images: int, captions: int) -> dict[str, Any]:
    """Derive, choose and test the vector of one seed."""
    model, limits = load_lvlm("tiny"), guard_limits(SteerConfig().guards, SteerConfig().max_drop)
    first, second = halves(scenes.dataset(images, seed=seed))
    questions, other_questions = (part.filter(lambda e: bool(e.candidates)) for part in (first, second))
    preservation, middle = preserved(model, first), model.n_layers // 2
    layers = [middle, middle + 1]
    vector = derive.optimize(model, list(questions), **preservation, layers=layers, progress=False)
    sweep = sweep_strengths(model, other_questions, {"v": (vector, STRENGTHS)}, limits=limits, progress=False)["v"]
    _, chosen = choose_guarded(
        model,
        {"v": (vector, sweep)},
        FreeTextPrompts.of(model, second, captions=CAPTIONS),
        limits=limits,
        caution=CAUTION,
        progress=False,
    )
    vector = vector.scaled(chosen["strength"])
    control = derive.optimize(model, exchanged(questions), **preservation, layers=layers, progress=False)
    vectors: dict[str, SteeringVector | None] = {"before": None, "vector": vector}
    vectors |= {"random direction": vector.randomized(seed), "exchanged answers": control.scaled(chosen["strength"])}
    data = scenes.dataset(test_images, seed=1000 + seed).filter(lambda e: bool(e.candidates))
    results = answer_under(model, data, vectors, progress=False)
    prompts = FreeTextPrompts.of(model, scenes.dataset(captions, seed=2000 + seed), captions=captions)
    before = combine_outputs(ModelOutputs(data, results["before"]), prompts.outputs(model, None))
    after = combine_outputs(ModelOutputs(data, results["vector"]), prompts.outputs(model, vector))
    measured = measure_guards(before, after)
    errors = {run: {n: _rate(result, n) for n in PRIOR_ERRORS} for run, result in results.items()}
    return {
        "seed": seed,
        "strength": chosen["strength"],
        "errors": errors,
        "cut": {
            run: {
                n: 1 - errors[run][n] / errors["before"][n] if errors["before"][n] else float("nan")
                for n in PRIOR_ERRORS
            }
            for run in errors
            if run != "before"
        },
        "guards": {
            n: [r.before.value, r.after.value, r.loss.value, r.loss.low, r.loss.high] for n, r in measured.items()
        },
        "questions": len(data),
    }


def _rate(result: Any, name: str) -> float:
    from behavior.metrics import METRICS

    rows = [METRICS[name].counts(a) for a in result.answers if METRICS[name].applies(a)]
    return float(np.mean(rows))


def print_table(rows: list[Mapping[str, Any]]) -> None:
    """Print one line for each seed."""
    heads = ("wrong by prior %", "false yes %", "cuts %", "random, exchanged: cuts %", *LOSSES, "words", "plain text")
    table = Table("seed", "strength", *heads)
    for row in rows:
        errors, cut = row["errors"], row["cut"]
        cells = [f"{100 * errors['before'][n]:.1f} > {100 * errors['vector'][n]:.1f}" for n in PRIOR_ERRORS]
        cells.append(", ".join(f"{100 * cut['vector'][n]:.0f}" for n in PRIOR_ERRORS))
        controls = (
            ", ".join(f"{100 * cut[c][n]:.0f}" for n in PRIOR_ERRORS) for c in ("random direction", "exchanged answers")
        )
        cells.append("; ".join(controls))
        for name in (*(g for g, _ in LOSSES.values()), "caption_length", "plain_text"):
            _, _, loss, low, high = row["guards"][name]
            cells.append(f"{100 * loss:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]")
        table.add_row(str(row["seed"]), f"{row['strength']:g}", *cells)
    wide_console().print(table)


def make_figures(rows: list[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the figures: means over seeds, with the worst seed."""
    figures: dict[str, dict[str, Any]] = {}

    def add(name: str, values: list[float], goal: str, *, holds: bool, worst: float) -> None:
        figures[name] = {
            "value": round(float(np.mean(values)), 4), "goal": goal, "holds": holds, "n": len(values), "worst": round(worst, 4)
        }  # fmt: skip

    for short, name in SHORT.items():
        cuts = [row["cut"]["vector"][name] for row in rows]
        add(f"{short}_cut", cuts, ">= 0.5", holds=min(cuts) >= 0.5, worst=min(cuts))
        for control in ("random direction", "exchanged answers"):
            values = [row["cut"][control][name] for row in rows]
            less = float(np.mean(values)) < float(np.mean(cuts)) / 2
            add(
                f"{short}_cut_by_{control.replace(' ', '_')}",
                values,
                "< half of the vector's",
                holds=less,
                worst=max(values),
            )
    for short, (guard, limit) in LOSSES.items():
        values = [row["guards"][guard][2] for row in rows]
        add(short, values, f"<= {limit:g}", holds=max(values) <= limit, worst=max(values))
    return figures


def main() -> None:
    """Run, print the table, and as the last line one JSON object."""
    parser = option_parser(__doc__, quick="one seed and few scenes, about a minute", save=True)
    parser.add_argument("--seeds", default="0,1,2,3,4", help="seeds, separated by commas")
    parser.add_argument("--test-scenes", type=int, default=150, help="scenes of the test (default: 150)")
    options = parser.parse_args()
    wide_console().print(
        "Compares the exportable vector with the unsteered model, random directions and exchanged answers."
    )
    seeds = [0] if options.quick else [int(s) for s in options.seeds.split(",")]
    sizes = (80, 40, 20) if options.quick else (300, options.test_scenes, 300)
    start, rows = time.perf_counter(), []
    for seed in seeds:
        with progress(f"seed {seed}"):
            rows.append(run_seed(seed, *sizes))
        print_table(rows[-1:])
    print_table(rows)
    wide_console().print(f"{time.perf_counter() - start:.0f} s")
    record = finish("exportable", describe_device("torch", "numpy"), make_figures(rows))
    if options.save:
        (RESULTS / "exportable.json").write_text(json.dumps({**record, "seeds": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
