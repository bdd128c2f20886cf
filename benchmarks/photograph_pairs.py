"""Heads selected with pairs of photographs, against heads selected with pairs of icon scenes.

    python benchmarks/photograph_pairs.py [--quick] [--pairs 60] [--save]

The data is synthetic: the photographs are icon scenes saved as JPEG files (quality 75), whose pairs are made by editing
pixels. For each kind of pair, heads of the embedded model are patched exactly on pairs of scenes (the baseline) and, for each
method of editing, on pairs of photographs of other scenes. Figures:

KIND_METHOD_correlation_share
    rank correlation of both rankings, divided by that of two disjoint halves of the scene pairs, the largest value to expect;
KIND_METHOD_best_five
    heads in common among the best five;
KIND_METHOD_first_head
    effect on photographs of the best head of the scenes; the goal is its interval on scenes.

A method with fewer than 10 pairs has a row in the table, but no figures. The table also shows how far the edit moves the margin
of the answer, and how far a placebo edit does, after which the true answer is the same.
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
from concepts.counterfactuals import METHODS, PairSet
from concepts.schema import ConceptDataset
from groundscope.core.errors import GroundscopeError
from groundscope.testing.scene_photographs import save_as_photographs
from lvlm import load_lvlm
from lvlm.answer_keys import answer_key
from lvlm.model import Lvlm

KINDS = ("object", "color", "relation")
MIN_CORRELATION = 0.9
"""Goal: correlation of photographs and scenes, as a share of the scenes' own split-half correlation."""
MIN_PAIRS = 10
"""Smallest number of pairs of photographs for figures."""
MIN_OVERLAP = {"object": 4, "color": 4, "relation": 0}
"""Goal: heads in common among the best five."""


def main() -> None:
    """Run, print a table, and as the last line one JSON object."""
    parser = option_parser(__doc__, quick="12 pairs of each kind and method", save=True)
    parser.add_argument("--pairs", type=int, default=60, help="pairs of photographs of each kind and method")
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
        first = scenes.dataset(8 * count, seed=0)
        photographs = save_as_photographs(scenes.dataset(8 * count, seed=1), folder, quality=75)
        for kind in KINDS:
            rows += measure_kind(model, kind, first, photographs, count, figures)
            advance()
    console.print(as_table(rows))
    seconds = round(time.perf_counter() - start)
    finish("photograph_pairs", describe_device("torch"), figures, save=options.save, seconds=seconds, rows=rows)


def measure_kind(
    model: Lvlm, kind: str, first: ConceptDataset, photographs: ConceptDataset, count: int, figures: dict[str, Any]
) -> list[dict[str, Any]]:
    """Measure all methods for one kind of pair: add their figures to `figures`, and return one table row per method."""
    own = patch_heads(model, counterfactuals.balanced_pairs(first, kind, limit=2 * count))
    halves = [half(own, odd) for odd in (False, True)]
    ceiling = compare(*halves, k=(5,)).rank_correlation.value
    best = own.top(1)[0]
    low, high = (bound[best.layer, best.head] for bound in own.interval())
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
        comparison = compare(own, scores, k=(5,))
        effect = float(scores.mean[best.layer, best.head])
        correlation, overlap = comparison.rank_correlation.value, 5 * comparison.overlap[5].value
        rows.append(
            {
                "kind": kind, "method": method, "pairs": scores.n_pairs, "left out": sum(pairs.left_out.values()),
                "correlation": round(correlation, 3), "halves": round(ceiling, 3), "of five": round(overlap, 1),
                "first head": str(best), "on scenes": [round(float(low), 3), round(float(high), 3)],
                "on photographs": round(effect, 3), "moved": moved(model, pairs),
                "moved by placebo": placebo_moved(model, photographs, kind, method, count),
            }
        )  # fmt: skip
        if scores.n_pairs < MIN_PAIRS:
            continue
        name = f"{kind}_{method}"
        figures[f"{name}_correlation_share"] = {
            "value": round(correlation / ceiling, 3), "goal": f">= {MIN_CORRELATION}",
            "holds": correlation >= MIN_CORRELATION * ceiling, "n": scores.n_pairs,
        }  # fmt: skip
        if MIN_OVERLAP[kind]:
            figures[f"{name}_best_five"] = {
                "value": round(overlap, 1), "goal": f">= {MIN_OVERLAP[kind]}", "holds": overlap >= MIN_OVERLAP[kind],
                "n": scores.n_pairs,
            }  # fmt: skip
        figures[f"{name}_first_head"] = {
            "value": round(effect, 3), "goal": f"in [{low:.3f}, {high:.3f}]", "holds": bool(low <= effect <= high),
            "n": scores.n_pairs,
        }  # fmt: skip
    return rows


def half(scores: HeadScores, odd: bool) -> HeadScores:
    """Return every second pair; pairs are of different scenes."""
    return scores.select(np.arange(scores.n_pairs) % 2 == int(odd))


def moved(model: Lvlm, pairs: PairSet) -> float:
    """Return the median absolute change of the log-odds of the first answer between the two images."""
    differences = []
    for pair in pairs:
        key = answer_key(model, pair.clean)
        margins = [
            float(key.margin(model.logits(model.collate([model.encode(e)])), pair.clean.answer)[0])
            for e in (pair.clean, pair.corrupt)
        ]
        differences.append(abs(margins[0] - margins[1]))
    return round(float(np.median(differences)), 3)


def placebo_moved(model: Lvlm, data: ConceptDataset, kind: str, method: str, count: int) -> float | None:
    """Return the same for placebo pairs; None without such pairs."""
    try:
        return moved(model, counterfactuals.balanced_pairs(data, kind, method=method, placebo=True, limit=count))
    except GroundscopeError:
        return None


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
