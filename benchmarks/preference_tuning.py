"""Preference tuning on the embedded model: diagnose, tune on the overridden answers, and see what changed inside.

    python benchmarks/preference_tuning.py [--quick] [--save] [--seeds 0,1,2] [--folder FOLDER]

The data is synthetic. For each seed, answers about 240 scenes (seed s) are diagnosed, and a pair is made of each wrong answer
that was overridden (`preference_pairs`): the truth is chosen, the model's answer rejected. Four models are tuned on them with the
same options, the epoch chosen on a fifth of the images, and tested on other scenes (120, seed 1000 + s) against the model before:

dpo               pairs of overridden answers, and as many of right answers (anchors);
dpo, no anchors   pairs of overridden answers only;
exchanged         control: the pairs of `dpo`, half of them with the opposite preference;
sft               control: cross-entropy of the chosen answers of `dpo`, without the rejected ones.

Then `compare_profiles` compares the model before with `dpo` and with `exchanged` on 60 of the test scenes: probes (fitted again
on each model), heads (patching), verdicts and answers. Figures are means over seeds; ``worst`` is the worst seed.

wrong_by_prior_cut, false_yes_cut
    share of the errors that `dpo` removes; goal: at least half;
..._cut_by_<other>
    the same for the others; the goal of `exchanged` is less than half of the cut of `dpo`;
neutral_loss, present_denied
    lost accuracy on neutral questions, and additional present objects denied; goal: at most 0.015; also of the others;
chair_i
    change of the share of invented objects in captions, which are not tuned; goal: at most 0.01;
probes_changed, heads_changed
    share of the probes (held-out accuracy) and heads (patching effect) whose 95 % interval of the difference excludes 0; about
    0.05 are expected if nothing changed; also of `exchanged`;
last_token_probes
    mean change of the held-out accuracy of probes of the stream at the last token, over layers and concepts;
overridden_corrected
    share of the overridden answers of the test scenes that are right after `dpo`.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from rich.table import Table

from activation_store import trace
from behavior import answer, compute_metrics
from benchmarks._harness import RESULTS, describe_device, finish, option_parser, progress, wide_console
from concepts import scenes
from concepts.schema import ConceptDataset
from diagnosis import compare_profiles, diagnose, fit_directions, preference_pairs, profile_model, training_rows
from diagnosis.compare_models import SITES, TOKENS
from diagnosis.comparison import ModelComparison
from diagnosis.preference_pairs import OVERRIDES
from diagnosis.results import RIGHT
from lvlm import Lvlm, load_lvlm
from mitigation import PreferenceData, TuneOptions, tune

OPTIONS = TuneOptions()
ERRORS = {"wrong_by_prior": "conflict: wrong by prior", "false_yes": "adversarial absent: says yes"}
COSTS = {"neutral_loss": ("neutral: right", -1), "present_denied": ("present: says no", 1)}
VARIANTS = ("dpo", "dpo, no anchors", "exchanged", "sft")


def diagnosed_pairs(
    model: Lvlm, data: ConceptDataset, seed: int
) -> tuple[PreferenceData, PreferenceData, dict[str, int]]:
    """Return the pairs with and without anchors, and the number of wrong answers of each verdict."""
    questions = data.filter(lambda e: len(e.candidates) > 1)
    with tempfile.TemporaryDirectory() as folder:
        store = trace(model, questions, sites=SITES, tokens=TOKENS, out=Path(folder) / "store", progress=False)
        directions = fit_directions(store, training_rows(store, seed=seed), model=model, data=questions, seed=seed)
        examples = [e for e in questions if e.group not in directions.train_groups]
        diagnoses = diagnose(model, store, directions, examples, with_sources=False, seed=seed, progress=False)
    counts: dict[str, int] = {}
    for diagnosis in diagnoses.wrong:
        counts[str(diagnosis.verdict)] = counts.get(str(diagnosis.verdict), 0) + 1
    pairs = [preference_pairs(diagnoses, examples, anchors=anchors, seed=seed) for anchors in (1.0, 0.0)]
    return pairs[0], pairs[1], counts


def tuned_models(model: Lvlm, pairs: Sequence[PreferenceData], seed: int) -> tuple[dict[str, Lvlm], dict[str, Any]]:
    """Return the tuned model of each variant, and how it was chosen."""
    from dataclasses import replace

    options = replace(OPTIONS, seed=seed)
    data = {"dpo": pairs[0], "dpo, no anchors": pairs[1], "exchanged": pairs[0].exchanged(seed=seed), "sft": pairs[0]}
    models, records = {}, {}
    for name in VARIANTS:
        start = time.perf_counter()
        tuning = tune(model, data[name], replace(options, loss="sft") if name == "sft" else options, progress=False)
        models[name] = tuning.adapter.merged(model)
        records[name] = {
            "pairs": list(tuning.pairs),
            "epoch": tuning.epoch,
            "validation_loss": [round(e.validation_loss, 4) for e in tuning.history],
            "validation_accuracy": [round(e.validation_accuracy, 4) for e in tuning.history],
            "seconds": round(time.perf_counter() - start, 1),
        }
    return models, records


def summary_of(comparison: ModelComparison) -> dict[str, Any]:
    """Return what changed inside, in numbers."""
    probes: Any = comparison.frame("probes")
    stream = probes[probes["grid"] == "decoder.resid_post@last"]
    verdicts: Any = comparison.frame("verdicts")
    heads: Any = comparison.frame("heads")
    overridden = verdicts[verdicts["first"].isin(OVERRIDES)]
    corrected = overridden[overridden["second"] == RIGHT]
    return {
        "probes_changed": len(comparison.changed("probes")) / len(probes),
        "probes": len(probes),
        "mean_absolute_probe_change": float(probes["difference"].abs().mean()),
        "last_token_probes": float(stream["difference"].mean()),
        "heads_changed": len(comparison.changed("heads")) / len(heads),
        "heads": len(heads),
        "ranking": {r["kind"]: round(r["rank_correlation"], 4) for r in comparison.frame("ranking").to_dict("records")},
        "strongest_heads": {
            str(kind): part.assign(size=part["first"].abs())
            .nlargest(5, "size")[["name", "first", "second", "low", "high"]]
            .round(4)
            .to_dict("records")
            for kind, part in heads.groupby("kind")
        },
        "overridden": int(overridden["n"].sum()),
        "overridden_corrected": float(corrected["n"].sum() / max(1, overridden["n"].sum())),
        "verdicts": verdicts.to_dict("records"),
        "answers": comparison.frame("answers").round(4).to_dict("records"),
        "notes": list(comparison.notes),
    }


def run_seed(seed: int, images: int, test_images: int, profiled: int) -> dict[str, Any]:
    """Diagnose, tune, test and compare with one seed."""
    model = load_lvlm("tiny")
    *pairs, verdicts = diagnosed_pairs(model, scenes.dataset(images, seed=seed), seed)
    models, tunings = tuned_models(model, pairs, seed)
    test = scenes.dataset(test_images, seed=1000 + seed)
    rates = {}
    for name, lvlm in {"before": model, **models}.items():
        metrics = compute_metrics(answer(lvlm, test, batch_size=64, progress=False), test)
        rates[name] = {n: [round(e.value, 5), round(e.low, 5), round(e.high, 5), e.n] for n, e in metrics.items()}
    small = scenes.dataset(profiled, seed=1000 + seed)
    profiles = {
        name: profile_model(lvlm, small, pairs=30, seed=seed, progress=False)
        for name, lvlm in {"before": model, "dpo": models["dpo"], "exchanged": models["exchanged"]}.items()
    }
    inside = {
        name: summary_of(compare_profiles(profiles["before"], profiles[name], seed=seed))
        for name in ("dpo", "exchanged")
    }
    return {"seed": seed, "verdicts": verdicts, "tunings": tunings, "rates": rates, "inside": inside}


def cut(row: Mapping[str, Any], variant: str, metric: str) -> float:
    """Return the share of a kind of error that a variant removes."""
    before, after = (row["rates"][name][metric][0] for name in ("before", variant))
    return 1 - after / before if before else float("nan")


def make_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the figures: means over seeds, with the worst seed."""
    figures: dict[str, dict[str, Any]] = {}

    def add(name: str, values: Sequence[float], goal: str, *, holds: bool, worst: float) -> None:
        value = round(float(np.mean(values)), 4)
        figures[name] = {"value": value, "goal": goal, "holds": holds, "n": len(values), "worst": round(worst, 4)}

    for short, metric in ERRORS.items():
        own = [cut(row, "dpo", metric) for row in rows]
        add(f"{short}_cut", own, ">= 0.5", holds=float(np.mean(own)) >= 0.5, worst=min(own))
        for variant in VARIANTS[1:]:
            values = [cut(row, variant, metric) for row in rows]
            less = float(np.mean(values)) < float(np.mean(own)) / 2
            goal = "< half of dpo's" if variant == "exchanged" else ""
            name = f"{short}_cut_by_{variant.replace(', ', '_').replace(' ', '_')}"
            add(name, values, goal, holds=less if goal else True, worst=max(values) if goal else min(values))
    for short, (metric, sign) in COSTS.items():
        for variant in VARIANTS:
            values = [sign * (row["rates"][variant][metric][0] - row["rates"]["before"][metric][0]) for row in rows]
            name = short if variant == "dpo" else f"{short}_by_{variant.replace(', ', '_').replace(' ', '_')}"
            add(name, values, "<= 0.015", holds=float(np.mean(values)) <= 0.015, worst=max(values))
    chair = [name for name in rows[0]["rates"]["before"] if "CHAIR_i" in name]
    for name in chair[:1]:
        values = [row["rates"]["dpo"][name][0] - row["rates"]["before"][name][0] for row in rows]
        add("chair_i", values, "<= 0.01", holds=float(np.mean(values)) <= 0.01, worst=max(values))
    for name in ("probes_changed", "heads_changed", "last_token_probes"):
        for variant in ("dpo", "exchanged"):
            values = [row["inside"][variant][name] for row in rows]
            add(name if variant == "dpo" else f"{name}_by_exchanged", values, "", holds=True, worst=max(values))
    for variant in ("dpo", "exchanged"):
        values = [row["inside"][variant]["overridden_corrected"] for row in rows]
        name = "overridden_corrected" if variant == "dpo" else "overridden_corrected_by_exchanged"
        goal = ">= 0.5" if variant == "dpo" else ""
        add(name, values, goal, holds=float(np.mean(values)) >= 0.5 if goal else True, worst=min(values))
    return figures


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rates of every variant for each seed."""
    names = [*ERRORS.values(), *(metric for metric, _ in COSTS.values())]
    table = Table("seed", "model", "pairs", "epoch", *names)
    for row in rows:
        for variant in ("before", *VARIANTS):
            tuning = row["tunings"].get(variant, {})
            cells = [f"{100 * row['rates'][variant][n][0]:.1f}" for n in names]
            table.add_row(
                str(row["seed"]), variant, str(sum(tuning.get("pairs", []))), str(tuning.get("epoch", "")), *cells
            )
    wide_console().print(table)


def main() -> None:
    """Run, print the table, and as the last line one JSON object."""
    parser = option_parser(__doc__, quick="one seed and few scenes, about a minute", save=True)
    parser.add_argument("--seeds", default="0,1,2", help="seeds, separated by commas")
    parser.add_argument("--folder", type=Path, help="keep the results of finished seeds here, and read them again")
    options = parser.parse_args()
    wide_console().print("Compares DPO on overridden answers with the model before, exchanged preferences, and SFT.")
    seeds = [0] if options.quick else [int(s) for s in options.seeds.split(",")]
    sizes = (80, 40, 24) if options.quick else (240, 120, 60)
    start, rows = time.perf_counter(), []
    for seed in seeds:
        file = None if options.folder is None else options.folder / f"seed-{seed}.json"
        if file is not None and file.is_file():
            rows.append(json.loads(file.read_text()))
        else:
            with progress(f"seed {seed}"):
                rows.append(run_seed(seed, *sizes))
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(rows[-1], indent=1))
        print_table(rows[-1:])
        sys.stdout.flush()
    seconds = time.perf_counter() - start
    wide_console().print(f"{seconds:.0f} s")
    record = finish("preference_tuning", describe_device("torch", "numpy"), make_figures(rows))
    if options.save:
        (RESULTS / "preference_tuning.json").write_text(json.dumps({**record, "seeds": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
