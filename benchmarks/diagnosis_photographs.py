"""Verdicts on photographs without boxes, for answers that a planted cause made wrong.

    python benchmarks/diagnosis_photographs.py [--quick] [--seeds 1007,2007,3007] [--only CAUSE] [--save]

Icon scenes are saved as JPEG files, and their questions keep only the labels that a table of questions has: whether the noun of
an existence question is in the image, the attribute values of the object of a question, and the relations of its two objects.
There are no boxes, no objects, and no labels of other nouns. Probes are fitted to the split ``neutral`` of the same files, or
with ``other`` to photographs of other scenes that have boxes. The causes are those of ``benchmarks/diagnosis.py``; the baseline
is the planted cause. The heads that are planted as a cause answer from the noun of the question, but need not determine the
answer about a blank image, so both verdicts of an override are correct for them, and both are counted. Figures, over all seeds:

CAUSE
    share of the diagnosed answers whose verdict is correct for the planted cause;
without_cause
    share of the answers to the planted causes with the verdicts "other" or "not readable"; for the unchanged model apart;
right_beyond_threshold
    share of readings of right answers that are beyond the threshold on the wrong side. Thresholds are set on one half of the
    images and this share is measured on the other half.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
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
)
from concepts import scenes
from concepts.nouns import asked_noun
from concepts.schema import ConceptDataset, Example
from diagnosis import DirectionSet, diagnose, fit_directions
from diagnosis.calibration import calibrate
from diagnosis.claims import claims_of
from diagnosis.probe_sets import probe_sets
from diagnosis.readings import read_live, read_stored, read_tokens
from diagnosis.results import LOST, NOT_SEEN, OVERRIDDEN, UNEXPLAINED, VERDICTS
from groundscope.core.document_digest import value_digest
from groundscope.testing.scene_photographs import save_as_photographs
from lvlm import Lvlm, load_lvlm
from lvlm.token_selection import ALL_IMAGE_TOKENS

TOKENS = ["last", "image:mean", "object:mean"]
IMAGES = 240
"""Images of a seed; two fifths are of the split ``neutral``. With half of them most answers are "not readable"."""
COUNT_PER_KIND = 30
"""Answers that are diagnosed for each kind of question and seed."""
MIN_SHARE, MAX_WITHOUT, MAX_BEYOND = 0.9, 0.2, 0.05
"""Goals: share with the planted cause, share without a cause, share of readings of right answers beyond the threshold."""


@dataclass
class Tally:
    """Counts of one setting and cause over the seeds."""

    verdicts: Counter[str] = field(default_factory=Counter)
    by_kind: dict[str, Counter[str]] = field(default_factory=dict)
    by_seed: list[float] = field(default_factory=list)
    beyond: int = 0
    right: int = 0


def without_boxes(example: Example) -> Example:
    """Return a question without objects, with the labels that follow from its answer and the annotation of its object."""
    if example.level == "object":
        truth = example.answer == "yes"
        labels = {f"object:{asked_noun(example.question)}": truth, "object:named": truth}
    else:
        labels = {name: value for name, value in example.labels.items() if not name.startswith("object:")}
        if "attribute:big" in labels:
            labels["attribute:small"] = not labels["attribute:big"]
    return replace(example, labels=labels, objects=(), subject=None)


def photographs(images: int, seed: int, folder: Path) -> ConceptDataset:
    """Return the questions about scenes that are saved as JPEG files of quality 75, with boxes."""
    return save_as_photographs(scenes.dataset(images, seed, splits=SPLITS), folder / f"{images}-{seed}", quality=75)


def run_seed(cause: str, setting: str, seed: int, images: int, folder: Path, tally: Tally) -> None:
    """Plant a cause, diagnose the answers that became wrong, and add the counts of one seed."""
    with progress(f"{cause}, {setting}, seed {seed}"):
        boxes = photographs(images, seed, folder)
        data = ConceptDataset(boxes.name, tuple(without_boxes(e) for e in boxes))
        model = load_lvlm("tiny")
        before = correct_ids(model, data)
        if cause == OVERRIDDEN:
            before &= correct_ids(plant_cause(model, cause, 0.0, seed + 91), data)
        changed = plant_cause(model, cause, seed=seed + 91)
        with tempfile.TemporaryDirectory() as temporary:
            store = trace(changed, data, SITES, TOKENS, Path(temporary) / "store", progress=False, batch_size=64)
            if setting == "own":
                directions = fit_directions(store, model=changed, data=data)
            else:
                other_data = photographs(images, seed + 500, folder)
                other = trace(
                    changed, other_data, SITES, TOKENS, Path(temporary) / "other", progress=False, batch_size=64
                )
                rows = np.ones(len(other_data), bool)
                directions = fit_directions(other, rows, model=changed, data=other_data, without_boxes=True)
            frame = store.frame()
            correct = dict(zip(frame["id"], frame["correct"], strict=True))
            free = [e for e in data if e.group not in directions.train_groups]
            wrong = [e for e in free if not correct[e.id] and (cause == UNCHANGED or e.id in before)]
            if cause in (NOT_SEEN, LOST):  # the cause concerns color only
                wrong = [e for e in wrong if e.kind in COLOR]
            wrong = sample_by_kind(wrong, COUNT_PER_KIND)
            others = [e for e in free if not correct[e.id]]
            right = [e for e in free if correct[e.id]]
            diagnoses = diagnose(
                changed, store, directions, [*wrong, *right], with_sources=False, calibrate_on=others, progress=False
            )
            beyond, n = beyond_threshold(changed, store, directions, right)
    counts = Counter(str(d.verdict) for d in diagnoses.wrong)
    for d in diagnoses.wrong:
        tally.by_kind.setdefault(f"{d.example['level']} {d.example['kind']}", Counter())[str(d.verdict)] += 1
    tally.verdicts += counts
    tally.by_seed.append(sum(counts[v] for v in CORRECT.get(cause, ())) / max(1, len(diagnoses.wrong)))
    tally.beyond += beyond
    tally.right += n


def beyond_threshold(
    model: Lvlm, store: ActivationStore, directions: DirectionSet, right: Sequence[Example]
) -> tuple[int, int]:
    """Return how many readings of right answers at readable places are beyond the threshold, and their number.

    Places are calibrated on the images of one half, and readings are counted on those of the other.
    """
    sets = probe_sets(directions)
    claims = {c.id: c for c in claims_of(store, {}, [d.concept for d in directions]) if c is not None}
    chosen = [right[int(i)] for i in np.random.default_rng(1).permutation(len(right))[:300]]
    tokens, example_of = read_tokens(model, sets, chosen), {e.id: e for e in chosen}
    of_chosen = [claims[e.id] for e in chosen]
    by_row = {c.row: c for c in of_chosen}
    beyond = total = 0
    for s in sets:
        live = s.tokens == ALL_IMAGE_TOKENS
        margins = read_live(tokens, s, of_chosen, example_of) if live else read_stored(store, s, of_chosen)
        for kind in {by_row[row].kind for row in margins.rows}:
            at = [i for i, row in enumerate(margins.rows) if by_row[row].kind == kind]
            first = np.array([int(value_digest([by_row[margins.rows[i]].group])[:4], 16) % 2 == 0 for i in at])
            fit = [i for i, use in zip(at, first, strict=True) if use]
            test = [i for i, use in zip(at, first, strict=True) if not use]
            groups = [by_row[margins.rows[i]].group for i in fit]
            calibration = calibrate(
                [margins.values[i] for i in fit], margins.classes[fit], groups, np.ones(len(fit), bool), 1
            )
            if calibration.readable:
                odds = [calibration.log_odds(float(margins.values[i].mean()), margins.classes[i]) for i in test]
                beyond += sum(o < -calibration.threshold for o in odds)
                total += len(odds)
    return beyond, total


def make_figures(tallies: dict[tuple[str, str], Tally]) -> dict[str, Figure]:
    """Return the figures of all settings and causes."""
    figures: dict[str, Figure] = {}
    for setting in dict.fromkeys(setting for setting, _ in tallies):
        planted = {cause: tally for (s, cause), tally in tallies.items() if s == setting}
        for cause, tally in planted.items():
            n = tally.verdicts.total()
            right = sum(tally.verdicts[v] for v in CORRECT.get(cause, ()))
            entry: Figure = {"n": n} if cause == UNCHANGED else figure(right / max(1, n), f">= {MIN_SHARE}", n)
            figures[f"{setting}_{cause}".replace(" ", "_")] = entry | {
                "verdicts": {verdict: tally.verdicts[verdict] for verdict in VERDICTS},
                "by_kind": {kind: dict(counts) for kind, counts in sorted(tally.by_kind.items())},
                "by_seed": [round(share, 3) for share in tally.by_seed],
            }
        for name, causes in (
            ("without_cause", [c for c in planted if c != UNCHANGED]),
            ("unchanged_without_cause", [c for c in planted if c == UNCHANGED]),
        ):
            counts = sum((planted[c].verdicts for c in causes), Counter[str]())
            if counts:
                share = sum(counts[v] for v in UNEXPLAINED) / counts.total()
                figures[f"{setting}_{name}"] = figure(share, f"<= {MAX_WITHOUT}", counts.total())
        n = sum(t.right for t in planted.values())
        share = sum(t.beyond for t in planted.values()) / max(1, n)
        figures[f"{setting}_right_beyond_threshold"] = figure(share, f"<= {MAX_BEYOND}", n)
    return figures


def main() -> None:
    """Run, print the verdicts by cause and kind of question, and as the last line one JSON object."""
    parser = option_parser(__doc__, quick="one seed, one cause, probes of the same photographs", save=True)
    parser.add_argument("--seeds", default="1007,2007,3007", help="seeds of the scenes")
    parser.add_argument(
        "--settings", default="own,other", help="probes of the same files (own), or of others with boxes (other)"
    )
    parser.add_argument("--only", choices=CAUSES, help="run one cause")
    options = parser.parse_args()
    wide_console().print("Compares verdicts without boxes, on answers that became wrong, with the planted cause.")
    seeds = [int(seed) for seed in options.seeds.split(",")][: 1 if options.quick else None]
    causes = [options.only] if options.only else [LOST] if options.quick else list(CAUSES)
    settings = ["own"] if options.quick else options.settings.split(",")
    tallies: dict[tuple[str, str], Tally] = {}
    record: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for setting in settings:
            for cause in causes:
                tally = tallies[setting, cause] = Tally()
                for seed in seeds:
                    run_seed(cause, setting, seed, IMAGES, Path(temporary), tally)
                record = make_record(make_figures(tallies), options, seeds)
                if options.save:
                    save_record(record)
    print_verdicts(tallies)
    print(json.dumps(record))


def make_record(figures: dict[str, Figure], options: argparse.Namespace, seeds: Sequence[int]) -> dict[str, Any]:
    """Return the record, with saved figures of causes and settings that were not run."""
    path = RESULTS / "diagnosis_photographs.json"
    saved = json.loads(path.read_text())["figures"] if options.save and path.is_file() else {}
    merged = {**saved, **figures}
    return {
        "benchmark": "diagnosis_photographs", "device": describe_device("torch"), "seeds": list(seeds), "figures": merged
    }  # fmt: skip


def print_verdicts(tallies: dict[tuple[str, str], Tally]) -> None:
    """Print verdicts by setting, cause and kind of question."""
    table = Table("probes", "planted cause", "questions", *VERDICTS, "wrong", "correct by seed")
    for (setting, cause), tally in tallies.items():
        for kind, counts in {"all": tally.verdicts, **dict(sorted(tally.by_kind.items()))}.items():
            seeds = " ".join(f"{share:.2f}" for share in tally.by_seed) if kind == "all" and cause != UNCHANGED else ""
            table.add_row(setting, cause, kind, *(str(counts[v]) for v in VERDICTS), str(counts.total()), seeds)
    wide_console().print(table)


if __name__ == "__main__":
    main()
