"""Heads of the embedded model that carry visual information to the answer, by patching, ablation, and scores without patching.

    python benchmarks/heads_tiny_model.py [--quick] [--save]

The data is synthetic. Intervals are 95 % over scenes; those of random heads also over random sets. Figures, for each level:

LEVEL, heads at TOKENS
    pairs of neutral questions are divided into two halves of different scenes. Heads are selected by patching in the first
    half; their effects are compared with those in the second half (rank correlation, overlap of the best five), and the best
    5 % are ablated on questions about the scenes of the second half, against 5 % at random (loss of margin and of accuracy);
agreement with patching, LEVEL, METHOD
    rank correlation and overlap of scores that need no patching, such as attention to the image, with patching on the same
    pairs;
knockout, LEVEL, TARGET from SOURCE, window N
    relative change of the answer's probability when attention from the target to the source tokens is removed in N layers, by
    layer.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from rich.table import Table

from benchmarks._harness import describe_device, finish, option_parser, progress, wide_console
from circuits import HeadSet, ablate, attention_knockout, compare, head_table, patch_heads
from circuits.head_screening.table import CAUSAL, CORRELATIONAL
from concepts import counterfactuals, scenes
from concepts.concept import LEVELS
from concepts.counterfactual_pair import CounterfactualPair
from concepts.schema import ConceptDataset, Example
from groundscope.core.statistics import Estimate, cluster_bootstrap, draws_interval
from lvlm import load_lvlm
from lvlm.model import Lvlm

KINDS = {"object": "object", "attribute": "color", "relation": "relation"}
SHARE = 0.05
ROUTES: tuple[tuple[str, str, int], ...] = (
    ("last", "image:all", 1),
    ("last", "image:all", 3),
    ("question:all", "image:all", 1),
    ("question:all", "image:all", 3),
    ("last", "question:all", 3),
)


def split_halves(items: Sequence[Any], seed: int = 0) -> tuple[list[Any], list[Any]]:
    """Divide items into two halves of different groups (scenes)."""
    groups = sorted({item.group for item in items})
    first = {groups[i] for i in np.random.default_rng(seed).permutation(len(groups))[: len(groups) // 2]}
    return [i for i in items if i.group in first], [i for i in items if i.group not in first]


def take_evenly(items: Sequence[Any], count: int) -> list[Any]:
    """Return `count` evenly spaced items, so that they are from as many scenes as possible."""
    return [items[i] for i in np.linspace(0, len(items) - 1, min(count, len(items))).astype(int)]


def as_dict(e: Estimate) -> dict[str, float]:
    """Return an estimate as JSON values."""
    return {"value": round(e.value, 4), "low": round(e.low, 4), "high": round(e.high, 4), "n": e.n}


def over_scenes(values: np.ndarray, groups: Sequence[str]) -> Estimate:
    """Return the mean of ``[N]`` or ``[N, sets]`` with an interval over scenes, and over sets if there are several."""
    table = values[:, None] if values.ndim == 1 else values
    if table.shape[1] == 1:
        low, high = cluster_bootstrap(table[:, 0], groups)
        return Estimate(float(table.mean()), low, high, len(table))
    rng = np.random.default_rng(0)
    names, index = np.unique(np.array(groups), return_inverse=True)
    sums = np.zeros((len(names), table.shape[1]))
    np.add.at(sums, index, table)
    counts = np.bincount(index)
    draws = []
    for _ in range(1000):
        rows, sets = rng.integers(len(names), size=len(names)), rng.integers(table.shape[1], size=table.shape[1])
        draws.append(sums[rows][:, sets].sum() / (counts[rows].sum() * len(sets)))
    low, high = draws_interval(np.array(draws), table.mean(), len(names))
    return Estimate(float(table.mean()), float(low), float(high), len(table))


def ablate_best(
    model: Lvlm, pairs: Sequence[CounterfactualPair], questions: Sequence[Example], tokens: str, draws: int
) -> dict[str, Any]:
    """Select heads on one half of the scenes, and ablate them on the other half, against random heads."""
    discovery, held_out = split_halves(pairs)
    first, second = (patch_heads(model, part, tokens=tokens) for part in (discovery, held_out))
    agreement = compare(first, second, k=(5,))
    size = max(1, round(SHARE * model.n_layers * model.n_heads))
    top = first.top(size)
    random = [first.random_heads(size, exclude=top, seed=seed) for seed in range(draws)]
    # Questions are divided by the same scenes: those of the first half give the means, those of the second are answered.
    used = {pair.group for pair in discovery}
    answered_questions = [e for e in questions if e.group not in used]
    sets = [HeadSet(heads) for heads in (top, *random)]
    reference = [e for e in questions if e.group in used]
    lost = ablate(model, answered_questions, sets, tokens=tokens, method="mean", reference=reference)
    wrong = lost.right[:, None].astype(float) - lost.right_without
    p = first.family_p()
    out: dict[str, Any] = {
        "heads": [str(h) for h in top],
        "effect_of_heads": [round(float(first.mean[h.layer, h.head]), 3) for h in top],
        "heads_with_p_under_.05": int((p <= 0.05).sum()),
        "rank_correlation_of_halves": as_dict(agreement.rank_correlation),
        "overlap_at_5": as_dict(agreement.overlap[5]),
        "pairs": [first.n_pairs, second.n_pairs],
        "excluded": first.excluded + second.excluded,
        "scenes": [len(set(first.groups)), len(set(second.groups))],
        "questions": len(answered_questions),
    }
    for name, values in (("margin_lost", lost.effects), ("accuracy_lost", wrong)):
        best, chance = over_scenes(values[:, 0], lost.groups), over_scenes(values[:, 1:], lost.groups)
        out[name] = {"top": as_dict(best), "random": as_dict(chance), "apart": bool(best.low > chance.high)}
    return out


def measure(model: Lvlm, data: ConceptDataset, limit: int, draws: int) -> dict[str, Any]:
    """Return all figures."""
    neutral = data.where(split="neutral")
    by_level = {level: take_evenly(counterfactuals.pairs(neutral, KINDS[level]), limit) for level in LEVELS}
    figures: dict[str, Any] = {}
    for level, pairs in by_level.items():
        kinds = {pair.clean.kind for pair in pairs}
        questions = take_evenly([e for e in neutral if e.kind in kinds], 2 * limit)
        for tokens in ("last", "suffix:all"):
            figures[f"{level}, heads at {tokens.removesuffix(':all')}"] = ablate_best(
                model, pairs, questions, tokens, draws
            )
    table = head_table(
        model,
        [p for pairs in by_level.values() for p in take_evenly(pairs, limit // 2)],
        methods=CORRELATIONAL + CAUSAL,
    )
    for row in table.agreement(k=(5,)).to_dict("records"):
        figures[f"agreement with patching, {row['level']}, {row['method']}"] = {
            name: {
                key: round(float(row[f"{name}{end}"]), 4)
                for key, end in (("value", ""), ("low", "_low"), ("high", "_high"))
            }
            for name in ("rank_correlation", "overlap@5")
        } | {"n": int(row["groups"]), "chance_of_overlap": round(float(row["chance@5"]), 4)}
    for level, pairs in by_level.items():
        examples = [p.clean for p in take_evenly(pairs, limit // 2)]
        for target, source, window in ROUTES:
            cut = attention_knockout.sweep(model, examples, target=target, source=source, window=window)
            frame = cut.frame()
            route = f"{target} from {source}".replace(":all", "")
            figures[f"knockout, {level}, {route}, window {window}"] = {
                "value": [round(float(v), 3) for v in frame["change"]],
                "low": [round(float(v), 3) for v in frame["change_low"]],
                "high": [round(float(v), 3) for v in frame["change_high"]],
                "right": [round(float(v), 3) for v in frame["right"]],
                "n": len(cut.ids),
            }
    return figures


def print_tables(figures: dict[str, Any]) -> None:
    """Print the tables."""
    console = wide_console()

    def text(e: dict[str, float]) -> str:
        return f"{e['value']:.2f} [{e['low']:.2f}, {e['high']:.2f}]"

    table = Table(
        "",
        "heads",
        "halves: rank corr.",
        "top 5 in common",
        "margin lost: top",
        "random",
        "accuracy lost: top",
        "random",
    )
    for name, f in figures.items():
        if "heads" in f:
            losses = [text(f[kind][which]) for kind in ("margin_lost", "accuracy_lost") for which in ("top", "random")]
            table.add_row(
                name, " ".join(f["heads"]), text(f["rank_correlation_of_halves"]), text(f["overlap_at_5"]), *losses
            )
    console.print(table)
    table = Table("agreement with patching", "rank correlation", "overlap at 5", "scenes")
    for name, f in figures.items():
        if name.startswith("agreement"):
            table.add_row(name.split(", ", 1)[1], text(f["rank_correlation"]), text(f["overlap@5"]), str(f["n"]))
    console.print(table)
    table = Table("knockout: relative change of the answer's probability", "by layer", "still right", "n")
    for name, f in figures.items():
        if name.startswith("knockout"):
            table.add_row(name.split(", ", 1)[1], str(f["value"]), str(f["right"]), str(f["n"]))
    console.print(table)


def main() -> None:
    """Run, print tables, and as the last line one JSON object."""
    options = option_parser(__doc__, quick="fewer scenes, about a minute", save=True).parse_args()
    torch.set_num_threads(1)
    wide_console().print(
        "Compares heads selected by patching with effects on other scenes, random heads and other scores."
    )
    with progress("heads"):
        data = scenes.dataset(n_images=100 if options.quick else 300, seed=11)
        figures = measure(load_lvlm("tiny"), data, *((40, 5) if options.quick else (100, 10)))
    print_tables(figures)
    finish("heads_tiny_model", describe_device("torch", "numpy"), figures, save=options.save)


if __name__ == "__main__":
    main()
