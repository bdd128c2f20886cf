"""Heads selected with pairs of photographs, against heads selected with pairs of icon scenes.

    python benchmarks/photograph_pairs.py [--quick] [--pairs 120] [--save]

The data is synthetic: the photographs are icon scenes saved as JPEG files (quality 75), whose pairs are made by editing
pixels. For each kind of pair, heads of the embedded model are patched exactly on pairs of scenes (the baseline, twice as many
pairs) and, for each method of editing, on pairs of photographs of other scenes. `mirror` is compared with pairs of scenes for
questions about left and right, which are the only ones that it can answer. Figures:

KIND_METHOD_correlation_share
    rank correlation of both rankings, divided by that of two halves of the scene pairs, the largest value to expect (the median
    of 200 random splits; its range is in the table);
KIND_METHOD_best_five
    heads in common among the best five;
KIND_METHOD_first_head
    effect on photographs of the best head of the scenes; the goal is its interval on scenes.

A method with fewer than 10 pairs has a row in the table, but no figures. The table separates the reasons of a difference: the
same questions about the same scenes are patched with drawn pairs too, so that "drawn, same questions" differs from the baseline
by the questions, and "photographs against drawn" by the edit alone; "halves of photographs" is the agreement of the pairs of
photographs with themselves, which is low if other things that differ between two images add noise. It also shows how far the
edit moves the margin of the answer, and how far a placebo edit does, after which the true answer is the same.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from rich.table import Table

from benchmarks._harness import describe_device, finish, option_parser, progress, wide_console
from circuits import HeadScores, compare, patch_heads
from concepts import counterfactuals, scenes
from concepts.counterfactuals import METHODS
from concepts.schema import ConceptDataset, Example
from groundscope.core.errors import GroundscopeError
from groundscope.testing.scene_photographs import save_as_photographs
from lvlm import load_lvlm
from lvlm.answer_keys import answer_key
from lvlm.model import Lvlm

KINDS = ("object", "color", "relation")
MIN_CORRELATION = 0.9
"""Goal: correlation of photographs and scenes, as a share of the scenes' own split-half correlation."""
PLACEBOS = 20
"""Largest number of placebo pairs whose margins are measured."""
MIN_PAIRS = 10
"""Smallest number of pairs of photographs for figures."""
MIN_OVERLAP = {"object": 4, "color": 4, "relation": 0}
"""Goal: heads in common among the best five."""


def main() -> None:
    """Run, print a table, and as the last line one JSON object."""
    parser = option_parser(__doc__, quick="12 pairs of each kind and method", save=True)
    parser.add_argument("--pairs", type=int, default=120, help="pairs of photographs of each kind and method")
    options = parser.parse_args()
    count = 12 if options.quick else options.pairs
    console, start = wide_console(), time.perf_counter()
    console.print(
        "Compares heads selected with pairs of photographs and with pairs of icon scenes. The data is synthetic."
    )
    model = load_lvlm("tiny")
    figures: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, progress("kinds of pairs", len(KINDS)) as advance:
        first, other = (scenes.dataset(8 * count, seed=seed) for seed in (0, 1))
        photographs = save_as_photographs(other, folder, quality=75)
        for kind in KINDS:
            rows += measure_kind(model, kind, first, other, photographs, count, figures)
            advance()
    console.print(as_table(rows))
    seconds = round(time.perf_counter() - start)
    finish("photograph_pairs", describe_device("torch"), figures, save=options.save, seconds=seconds, rows=rows)


def measure_kind(
    model: Lvlm,
    kind: str,
    first: ConceptDataset,
    other: ConceptDataset,
    photographs: ConceptDataset,
    count: int,
    figures: dict[str, Any],
) -> list[dict[str, Any]]:
    """Measure all methods for one kind of pair: add their figures to `figures`, and return one table row per method."""
    baselines: dict[bool, HeadScores] = {}
    rows = []
    for method, entry in METHODS.items():
        if kind not in entry.kinds:
            continue
        try:
            pairs = counterfactuals.balanced_pairs(photographs, kind, method=method, limit=count)
            scores = patch_heads(model, pairs)
        except GroundscopeError as error:
            rows.append({"kind": kind, "method": method, "pairs": 0, "problem": str(error)[:200]})
            continue
        sides = method == "mirror"
        if sides not in baselines:
            data = first.filter(about_sides) if sides else first
            baselines[sides] = patch_heads(model, counterfactuals.balanced_pairs(data, kind, limit=2 * count))
        own = baselines[sides]
        row = {"kind": kind, "method": method, "pairs": scores.n_pairs, "left out": sum(pairs.left_out.values())}
        row |= agreement(own, scores) | drawn_agreement(model, other, own, scores, kind)
        moved_by = {
            "moved": round(float(np.median(np.abs(scores.clean - scores.corrupt))), 3),
            "moved by placebo": placebo_moved(model, photographs, kind, method, min(count, PLACEBOS)),
        }
        rows.append(row | moved_by)
        if scores.n_pairs < MIN_PAIRS:
            continue
        name, n, share = f"{kind}_{method}", scores.n_pairs, row["correlation"] / row["halves"][1]
        low, high = row["on scenes"]
        figures[f"{name}_correlation_share"] = {
            "value": round(share, 3), "goal": f">= {MIN_CORRELATION}", "holds": share >= MIN_CORRELATION, "n": n,
        }  # fmt: skip
        if MIN_OVERLAP[kind]:
            goal = MIN_OVERLAP[kind]
            figures[f"{name}_best_five"] = {
                "value": row["of five"], "goal": f">= {goal}", "holds": row["of five"] >= goal, "n": n,
            }  # fmt: skip
        figures[f"{name}_first_head"] = {
            "value": row["on photographs"], "goal": f"in [{low:.3f}, {high:.3f}]",
            "holds": bool(low <= row["on photographs"] <= high), "n": n,
        }  # fmt: skip
    return rows


def about_sides(example: Example) -> bool:
    """Whether a question is about left or right."""
    return " left of " in example.question or " right of " in example.question


def agreement(own: HeadScores, scores: HeadScores) -> dict[str, Any]:
    """Return the agreement of heads on photographs with those on scenes, and what limits it."""
    comparison, halves = compare(own, scores, k=(5,)), own.stability().rank_correlation
    best = own.top(1)[0]
    low, high = (float(bound[best.layer, best.head]) for bound in own.interval())
    return {
        "correlation": round(comparison.rank_correlation.value, 3),
        "halves": [round(value, 3) for value in (halves.low, halves.value, halves.high)],
        "halves of photographs": round(scores.stability().rank_correlation.value, 3) if scores.n_pairs > 3 else None,
        "of five": round(5 * comparison.overlap[5].value, 1),
        "first head": str(best), "on scenes": [round(low, 3), round(high, 3)],
        "on photographs": round(float(scores.mean[best.layer, best.head]), 3),
        "their difference": [
            round(-float(bound[best.layer, best.head]), 3) for bound in (comparison.high, comparison.low)
        ],
    }  # fmt: skip


def drawn_agreement(
    model: Lvlm, other: ConceptDataset, own: HeadScores, scores: HeadScores, kind: str
) -> dict[str, Any]:
    """Return the agreement of drawn pairs for the same questions with the scenes and with the photographs."""
    names = set(scores.ids)
    pairs = counterfactuals.pairs(other.filter(lambda e: e.id in names), kind)
    drawn_scores = patch_heads(model, pairs)
    same = scores.select(np.isin(scores.ids, drawn_scores.ids))
    best = own.top(1)[0]
    return {
        "drawn, same questions": round(compare(own, drawn_scores, k=(5,)).rank_correlation.value, 3),
        "photographs against drawn": round(compare(drawn_scores, same, k=(5,)).rank_correlation.value, 3),
        "first head, drawn": round(float(drawn_scores.mean[best.layer, best.head]), 3),
    }


def placebo_moved(model: Lvlm, data: ConceptDataset, kind: str, method: str, count: int) -> float | None:
    """Return the median absolute change of the log-odds in placebo pairs; None without such pairs."""
    try:
        pairs = counterfactuals.balanced_pairs(data, kind, method=method, placebo=True, limit=count)
    except GroundscopeError:
        return None
    differences = []
    for pair in pairs:
        key = answer_key(model, pair.clean)
        margins = [
            float(key.margin(model.logits(model.collate([model.encode(e)])), pair.clean.answer)[0])
            for e in (pair.clean, pair.corrupt)
        ]
        differences.append(abs(margins[0] - margins[1]))
    return round(float(np.median(differences)), 3)


def as_table(rows: list[dict[str, Any]]) -> Table:
    table = Table()
    columns = [name for name in dict.fromkeys(key for row in rows for key in row) if name != "problem"]
    for name in columns:
        table.add_column(name)
    for row in rows:
        table.add_row(*(str(row.get(name, "")) for name in columns))
    return table


if __name__ == "__main__":
    main()
