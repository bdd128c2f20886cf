"""Pairs and heads on icons pasted on real photographs, over backgrounds faded towards gray.

    python benchmarks/composite_photographs.py [--quick] [--scenes 120] [--pairs 40] [--save]

The icons are pasted on parts of photographs that scikit-learn and scikit-image ship
(`groundscope.testing.composite_photographs`), saved as JPEG files (quality 75) of three sizes, with annotations as in GQA and
VAW, and read by the loaders; all images are put on one canvas. The embedded model has only seen drawn backgrounds: a first table
shows how often it answers right at each share of gray. Its heads on pairs of these images are compared with its heads on pairs of
other scenes (the baseline, twice as many pairs; for relations about left and right, as `mirror` makes no others). Figures, at the
share of gray of `REPORTED`:

KIND_correlation_share
    rank correlation of both rankings, divided by that of two halves of the scene pairs (the median of 200 random splits);
KIND_best_five
    heads in common among the best five;
KIND_first_head
    effect on composites of the best head of the scenes; the goal is its interval on scenes;
KIND_placebo
    effect of that head in placebo pairs, on the same scale.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from behavior import answer
from benchmarks._harness import describe_device, finish, option_parser, progress, wide_console
from benchmarks.photograph_pairs import about_sides, as_table
from circuits import HeadScores, compare, pair_outcomes, patch_heads
from concepts import counterfactuals, scenes
from concepts.schema import ConceptDataset
from groundscope.core.errors import GroundscopeError
from groundscope.testing.annotation_files import write_annotations
from groundscope.testing.composite_photographs import save_composites
from lvlm import load_lvlm
from lvlm.model import Lvlm

SHARES = (0.0, 0.5, 0.8)
REPORTED = 0.8
"""Share of gray of the figures: the background is as strong as the embedded model can bear."""
KINDS = {"object": "gqa", "color": "vaw", "relation": "gqa"}
"""Kind of pair to the format of the annotations: VAW has outlines."""
MIN_CORRELATION, MIN_OVERLAP = 0.9, 4


def main() -> None:
    """Run, print two tables, and as the last line one JSON object."""
    parser = option_parser(__doc__, quick="40 scenes, 10 pairs of each kind", save=True)
    parser.add_argument("--scenes", type=int, default=120, help="composites of each share of gray")
    parser.add_argument("--pairs", type=int, default=40, help="pairs of each kind and share of gray")
    options = parser.parse_args()
    n_scenes, n_pairs = (40, 10) if options.quick else (options.scenes, options.pairs)
    console, start = wide_console(), time.perf_counter()
    console.print("Icons on real photographs against drawn scenes. Objects are synthetic, backgrounds are photographs.")
    model = load_lvlm("tiny")
    drawn_scenes = scenes.dataset(8 * n_pairs, seed=0)
    own = {}
    for kind in KINDS:
        of_kind = drawn_scenes.filter(about_sides) if kind == "relation" else drawn_scenes
        own[kind] = patch_heads(model, counterfactuals.balanced_pairs(of_kind, kind, limit=2 * n_pairs))
    icon_scenes = scenes.dataset(n_scenes, seed=1)
    figures: dict[str, Any] = {}
    accuracy = [accuracies(model, icon_scenes, "drawn")]
    rows: list[dict[str, Any]] = []
    with progress("shares of gray", len(SHARES)) as advance:
        for share in SHARES:
            with tempfile.TemporaryDirectory() as folder:
                composites = save_composites(icon_scenes, Path(folder) / "seen" / "images", gray_share=share)
                accuracy.append(accuracies(model, composites, f"gray {share:.1f}"))
                for kind, source in KINDS.items():
                    place = Path(folder) / kind
                    saved = save_composites(icon_scenes, place / "images", gray_share=share)
                    data = write_annotations(saved, place, source).load()
                    row = measure(model, kind, counterfactuals.on_canvas(data, (224, 224)), own[kind], n_pairs)
                    rows.append({"gray": share, **row})
                    if share == REPORTED and "correlation" in row:
                        figures |= figures_of(kind, row, own[kind])
            advance()
    console.print(as_table(accuracy))
    console.print(as_table(rows))
    seconds = round(time.perf_counter() - start)
    finish(
        "composite_photographs", describe_device("torch"), figures, save=options.save, seconds=seconds,
        accuracy=accuracy, rows=rows,
    )  # fmt: skip


def accuracies(model: Lvlm, data: ConceptDataset, name: str) -> dict[str, Any]:
    """Return the accuracy of neutral yes-no questions by kind."""
    row: dict[str, Any] = {"images": name}
    for kind in ("existence", "color", "relation"):
        part = data.where(kind=kind, split="neutral")
        result = answer(model, part, progress=False)
        row[kind] = round(sum(bool(a.correct) for a in result.answers) / len(part), 3)
    return row


def measure(model: Lvlm, kind: str, data: ConceptDataset, own: HeadScores, limit: int) -> dict[str, Any]:
    """Return the comparison of heads on pairs of composites with those of scenes, as a row."""
    try:
        method = "mirror" if kind == "relation" else None
        pairs = counterfactuals.balanced_pairs(data, kind, method=method, limit=limit)
        every = patch_heads(model, pairs)
        outcomes = pair_outcomes(model, pairs)
        scores = outcomes.select(every)
    except GroundscopeError as error:
        return {"kind": kind, "problem": str(error)[:200]}
    best = own.top(1)[0]
    comparison = compare(own, scores, k=(5,))
    row: dict[str, Any] = {
        "kind": kind, "method": pairs.method, "pairs": len(pairs), **outcomes.counts, "used": scores.n_pairs,
        "correlation": round(comparison.rank_correlation.value, 3),
        "halves": round(own.stability().rank_correlation.value, 3), "of five": round(5 * comparison.overlap[5].value),
        "first head": str(best), "effect": round(float(scores.mean[best.layer, best.head]), 3),
    }  # fmt: skip
    try:
        placebos = counterfactuals.balanced_pairs(data, kind, method=pairs.method, placebo=True, limit=limit)
        control = patch_heads(model, placebos, scale=every.scale)
        row["placebo"] = round(float(control.mean[best.layer, best.head]), 3)
    except GroundscopeError as error:
        row["problem"] = str(error)[:200]
    return row


def figures_of(kind: str, row: dict[str, Any], own: HeadScores) -> dict[str, Any]:
    """Return the figures of one kind."""
    best = own.top(1)[0]
    low, high = (float(bound[best.layer, best.head]) for bound in own.interval())
    n = row["used"]
    result = {
        f"{kind}_correlation_share": {
            "value": round(row["correlation"] / row["halves"], 3), "goal": f">= {MIN_CORRELATION}",
            "holds": row["correlation"] >= MIN_CORRELATION * row["halves"], "n": n,
        },
        f"{kind}_first_head": {
            "value": row["effect"], "goal": f"in [{low:.3f}, {high:.3f}]", "holds": low <= row["effect"] <= high, "n": n,
        },
    }  # fmt: skip
    if kind != "relation":
        goal = {"goal": f">= {MIN_OVERLAP}", "holds": row["of five"] >= MIN_OVERLAP, "n": n}
        result[f"{kind}_best_five"] = {"value": row["of five"], **goal}
    if "placebo" in row:
        goal = {"goal": "<= half of the effect", "holds": abs(row["placebo"]) <= row["effect"] / 2, "n": n}
        result[f"{kind}_placebo"] = {"value": row["placebo"], **goal}
    return result


if __name__ == "__main__":
    main()
