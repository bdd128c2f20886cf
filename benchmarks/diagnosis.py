"""Accuracy of diagnoses on planted causes, and the time of diagnosing 200 wrong answers.

    python benchmarks/diagnosis.py [--quick] [--only CAUSE] [--folder PATH] [--save]

Four causes are planted in the embedded model (`groundscope.testing.planted_failures`): the vision tower encodes every object
in one color (not seen); color is removed from the projector's output (lost at the projector); tokens after the image cannot
attend to it (not integrated); two heads of the last layer promote one answer for each noun (overridden by the prior). Answers
are diagnosed that are right without the cause and wrong with it; for the planted heads, also right with the heads in place at
strength 0. The baseline is the planted cause. The planted heads answer from the noun of the question, but need not determine
the answer about a blank image, so "overridden by the prior" and "overridden late" are both correct for them. The unchanged
model is included without a goal: the causes of its errors are unknown.

Probes are fitted on the changed model, as for any model under diagnosis, and on other images than those of the diagnosed
answers. The first two causes only affect color, so only questions about color are asked; for the others questions of every
kind, with an equal limit for each kind. Figures:

CAUSE
    share of the diagnosed answers whose verdict is correct for the planted cause, with all verdicts by level, kind and split of
    the questions;
seconds_for_200
    time of `diagnosis.diagnose` for 200 answers, without tracing and fitting, the largest over the causes.

With ``--folder`` traces and answers are saved and reused; with ``--save`` figures are written after each cause.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.table import Table

from activation_store import ActivationStore, trace
from benchmarks._harness import (
    RESULTS,
    Figure,
    describe_device,
    figure,
    option_parser,
    progress,
    save_record,
    wide_console,
)
from benchmarks._planted_causes import (
    CAUSES,
    COLOR,
    CORRECT,
    SITES,
    SPLITS,
    UNCHANGED,
    correct_ids,
    plant_cause,
    sample_by_kind,
    shuffle_examples,
)
from concepts import scenes
from concepts.schema import ConceptDataset, Example
from diagnosis import Diagnoses, diagnose, fit_directions
from diagnosis.results import LOST, NOT_SEEN, OVERRIDDEN, VERDICTS
from lvlm import Lvlm, load_lvlm

MIN_SHARE, MAX_SECONDS = 0.9, 120.0
"""Goals: share of answers with the planted cause as verdict, and seconds for `COUNT` answers."""
COUNT = 200
"""Answers that are diagnosed, if all questions are about color."""
IMAGES, COLOR_IMAGES, QUICK_IMAGES = 600, 300, 240
"""Images for questions of every kind (probes of nouns need this number), for questions about color, and with ``--quick``."""
COUNT_PER_KIND = 60
"""Answers that are diagnosed for each kind of question, if every kind is asked."""


def find_correct(model: Lvlm, data: ConceptDataset, cache: Path) -> set[str]:
    """Return the ids of the questions that a model answers correctly; `cache` is read if it exists, otherwise written."""
    if cache.is_file():
        return set(json.loads(cache.read_text()))
    correct = correct_ids(model, data)
    cache.write_text(json.dumps(sorted(correct)))
    return correct


def sample_wrong(wrong: list[Example], every_kind: bool) -> list[Example]:
    """Return a random sample of the wrong answers: up to `COUNT_PER_KIND` of each kind, or `COUNT` in all."""
    return sample_by_kind(wrong, COUNT_PER_KIND) if every_kind else shuffle_examples(wrong)[:COUNT]


def diagnose_model(
    model: Lvlm, data: ConceptDataset, before: set[str] | None, folder: Path, every_kind: bool
) -> tuple[Diagnoses, float]:
    """Trace a spoiled model, fit its probes and diagnose what became wrong (all that is, without `before`); and seconds."""
    if not (folder / "manifest.json").is_file():
        trace(model, data, sites=SITES, tokens=["last", "object:mean"], out=folder, progress=False, batch_size=64)
    store = ActivationStore(folder)
    frame = store.frame()
    directions = fit_directions(store, (frame["split"] == "neutral").to_numpy())
    training_groups = {g for d in directions for g in d.train_groups}
    correct = dict(zip(frame["id"], frame["correct"], strict=True))
    free = [e for e in data if e.group not in training_groups]
    wrong = [e for e in free if (before is None or e.id in before) and not correct[e.id]]
    answers: list[Example] = sample_wrong(wrong, every_kind) + [e for e in free if correct[e.id]]
    with progress("diagnosing"):
        start = time.perf_counter()
        diagnoses = diagnose(model, store, directions, answers, progress=False)
        return diagnoses, time.perf_counter() - start


def count_verdicts(diagnoses: Diagnoses, *by: str) -> dict[str, dict[str, int]]:
    """Return the number of wrong answers with each verdict, grouped by fields of the question."""
    counts: dict[str, dict[str, int]] = {}
    for diagnosis in diagnoses.wrong:
        row = counts.setdefault(" ".join(diagnosis.example[name] for name in by), dict.fromkeys(VERDICTS, 0))
        row[str(diagnosis.verdict)] += 1
    return dict(sorted(counts.items()))


def make_figure(diagnoses: Diagnoses, cause: str, data: ConceptDataset, seconds: float) -> Figure:
    """Return the figure of a cause, with its verdicts in detail."""
    counts = Counter(str(diagnosis.verdict) for diagnosis in diagnoses.wrong)
    n = len(diagnoses.wrong)
    entry: Figure = {"n": n}
    if cause != UNCHANGED:
        entry = figure(sum(counts[verdict] for verdict in CORRECT[cause]) / max(1, n), f">= {MIN_SHARE}", n)
    return entry | {
        "threads": torch.get_num_threads(),
        "images": len({e.group for e in data}),
        "kinds": sorted({e.kind for e in data}),
        "verdicts": {verdict: counts[verdict] for verdict in VERDICTS},
        "by_level": count_verdicts(diagnoses, "level"),
        "by_kind": count_verdicts(diagnoses, "level", "kind"),
        "by_split": count_verdicts(diagnoses, "level", "split"),
        "with_lean": sum(diagnosis.offset > 0 for diagnosis in diagnoses.wrong),
        "correct_with_verdict": sum(
            d.verdict is not None for d in diagnoses.examples if d.model_answer == d.example["truth"]
        ),
        "correct": len(diagnoses) - n,
        "reasons_of_other": dict(Counter(d.reason for d in diagnoses.wrong if d.reason)),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    """Run, print the confusion matrix, and as the last line one JSON object."""
    parser = option_parser(__doc__, quick="fewer images, and only questions about color, about a minute", save=True)
    parser.add_argument("--seed", type=int, default=1007, help="seed of the scenes; thresholds were chosen with seed 7")
    parser.add_argument("--only", choices=CAUSES, help="run one cause; with --save, figures of the others are kept")
    parser.add_argument("--folder", type=Path, help="folder in which traces and answers are saved, and reused")
    options = parser.parse_args()
    wide_console().print("Compares the verdicts on answers that became wrong with the planted cause.")
    causes = [options.only] if options.only else [c for c in CAUSES if c != UNCHANGED or not options.quick]
    figures: dict[str, Figure] = {}
    record: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for cause in causes:
            figures[cause.replace(" ", "_")] = run_cause(cause, options, options.folder or Path(temporary))
            record = make_record(figures, options)
            if options.save:
                save_record(record)
    print_verdicts(figures)
    print(json.dumps(record))


def run_cause(cause: str, options: argparse.Namespace, folder: Path) -> Figure:
    """Plant a cause, diagnose the answers that became wrong, and return the figure."""
    folder.mkdir(parents=True, exist_ok=True)
    every_kind = not options.quick and cause not in (NOT_SEEN, LOST)
    images = IMAGES if every_kind else QUICK_IMAGES if options.quick else COLOR_IMAGES
    data = scenes.dataset(images, options.seed, splits=SPLITS)
    data = data if every_kind else data.filter(lambda e: e.kind in COLOR)
    model, seed = load_lvlm("tiny"), options.seed + 91
    name = f"{images}-{options.seed}{'' if every_kind else '-color'}"
    with progress(f"{cause}: answers without the cause"):
        before = None if cause == UNCHANGED else find_correct(model, data, folder / f"before-{name}.json")
        if cause == OVERRIDDEN and before is not None:
            before &= find_correct(plant_cause(model, cause, 0.0, seed), data, folder / f"silent-{name}.json")
    with progress(f"{cause}: planting"):
        changed = plant_cause(model, cause, seed=seed)
    store = folder / f"{cause.replace(' ', '-')}-{name}"
    diagnoses, seconds = diagnose_model(changed, data, before, store, every_kind)
    return make_figure(diagnoses, cause, data, seconds)


def make_record(figures: dict[str, Figure], options: argparse.Namespace) -> dict[str, Any]:
    """Return the record, with saved figures of causes that were not run.

    The time of 200 answers is only updated if all causes were run.
    """
    path = RESULTS / "diagnosis.json"
    saved = json.loads(path.read_text())["figures"] if options.save and path.is_file() else {}
    merged = {**saved, **figures}
    if not options.only:
        seconds, n = max((entry["seconds"] * COUNT / max(1, entry["n"]), entry["n"]) for entry in figures.values())
        merged["seconds_for_200"] = figure(seconds, f"<= {MAX_SECONDS}", n)
    return {"benchmark": "diagnosis", "device": describe_device("torch"), "figures": merged}


def print_verdicts(figures: dict[str, Figure]) -> None:
    """Print verdicts by cause and kind of question."""
    table = Table("planted cause", "questions", *VERDICTS, "wrong", "share that is correct")
    for name, entry in figures.items():
        cause = name.replace("_", " ")
        for kind, counts in {"all": entry["verdicts"], **entry["by_kind"]}.items():
            total = sum(counts.values())
            right = sum(counts[verdict] for verdict in CORRECT.get(cause, ()))
            share = f"{right / max(1, total):.3f}" if cause in CORRECT else ""
            table.add_row(cause, kind, *(str(counts[verdict]) for verdict in VERDICTS), str(total), share)
    wide_console().print(table)


if __name__ == "__main__":
    main()
