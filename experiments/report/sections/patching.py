"""Which heads carry the answer: patching effects by kind of pair, with their controls."""

from __future__ import annotations

import numpy as np

from circuits.results.head_scores import HeadScores, compare
from experiments.report import figures
from experiments.report.html import closed, figure, paragraph, section, table
from experiments.results.run_files import RunFiles
from groundscope.core.text import format_count
from lvlm.sites import Head

TOP = 5
"""Heads that are compared between two sets of pairs."""


def patching_section(run: RunFiles) -> str:
    """Return the section; only with reasons if no head could be scored."""
    if not run.head_scores:
        reasons = (paragraph(f"{kind}: {reason}") for kind, reason in run.missing_pairs.items())
        return section("used", "What uses it", *reasons)
    heads = [Head.parse(head) for head in run.top_heads]
    panels = [
        (f"{kind} ({format_count(scores.n_pairs, 'pair')})", scores.mean) for kind, scores in run.head_scores.items()
    ]
    excluded = ", ".join(f"{s.excluded} of {s.n_pairs + s.excluded} {kind}" for kind, s in run.head_scores.items())
    missing = "".join(
        paragraph(f"No pairs of kind {kind}: {reason}", soft=True) for kind, reason in run.missing_pairs.items()
    )
    return section(
        "used",
        "What uses it",
        paragraph(
            "Each pair has two images with different answers. The output of one head at the last token of the clean run "
            "replaces its output in the run on the other image; every head is patched alone and exactly. An effect of 1 means "
            "that the head restores the whole difference between the two answers."
        ),
        figure(
            figures.effects(panels, [(head.layer, head.head) for head in heads]),
            "Patching effect of each head by kind of pair. Frames mark the heads that the next stages use.",
        ),
        _effects(run, heads),
        _placebo(run, heads),
        _pairs(run) if run.pairs else paragraph(f"Pairs without a difference, excluded: {excluded}.", soft=True),
        missing,
        stages=("patch",),
    )


def _effects(run: RunFiles, heads: list[Head]) -> str:
    rows = [(str(head), *(_cell(scores, head) for scores in run.head_scores.values())) for head in heads]
    return table(["head", *run.head_scores], rows)


def _cell(scores: HeadScores, head: Head) -> str:
    low, high = scores.interval()
    at = (head.layer, head.head)
    return f"{scores.mean[at]:+.3f} [{low[at]:+.3f}, {high[at]:+.3f}]"


def _placebo(run: RunFiles, heads: list[Head]) -> str:
    """Return the effects of the same heads in placebo pairs, or why no such pairs exist; empty for icon scenes."""
    about = {kind: card["placebo"] for kind, card in run.pairs.items() if card.get("placebo")}
    if not about:
        return ""
    scores = run.control_scores("placebo")
    parts = [
        paragraph(f"No placebo pairs of kind {kind}: {card['reason']}", soft=True)
        for kind, card in about.items()
        if card.get("reason")
    ]
    if scores:
        moved = ", ".join(
            f"{about[kind]['moved'] / about[kind]['scale']:.0%} of it for {kind} ({format_count(s.n_pairs, 'pair')})"
            for kind, s in scores.items()
            if about[kind].get("scale")
        )
        rows = [
            (str(head), *(f"{_cell(s, head)}, size {_size(s, head):.3f}" for s in scores.values())) for head in heads
        ]
        parts += [
            paragraph(
                "Placebo pairs: photographs changed in the same way, after which the true answer is the same. Effects are on the "
                f"scale of the pairs above: 1 is their mean difference in log-odds. Placebo changes move the answer by {moved}. "
                "A head with a similar effect in both responds to the change of the image, not to the answer. Size: mean "
                "absolute effect."
            ),
            table(["head", *(f"{kind}, placebo" for kind in scores)], rows),
        ]
    return "".join(parts)


def _size(scores: HeadScores, head: Head) -> float:
    """Return the mean absolute effect of a head."""
    return float(np.abs(scores.effects[:, head.layer, head.head]).mean())


def _pairs(run: RunFiles) -> str:
    """Return how the pairs were made, what the model answers to them, and which of them localize heads."""
    photographs = any(card["method"] for card in run.pairs.values())
    names = list(next(iter(run.pairs.values()))["outcomes"])
    columns = ["kind", *(["method"] if photographs else []), "pairs", *names, "no difference", "used"]
    rows = [
        (kind, *([card["method"]] if photographs else []), card["made"], *(card["outcomes"].get(name, 0) for name in names),
         card["excluded"], f"{card['used']} ({card['set']})")
        for kind, card in run.pairs.items()
    ]  # fmt: skip
    every = run.control_scores("all")
    return "".join(
        (
            paragraph(
                "Pairs, and the answers of the model to both images. Heads are localized with pairs that it answers right on "
                "both; if these are too few, with all. Pairs whose images hardly change the log-odds of the answer are excluded "
                "(no difference)."
            ),
            table(columns, rows),
            *(paragraph(_agreement(kind, run.head_scores[kind], scores)) for kind, scores in every.items()),
            *(_reasons(kind, card["left_out"]) for kind, card in run.pairs.items() if card["left_out"]),
        )
    )


def _agreement(kind: str, right: HeadScores, every: HeadScores) -> str:
    k = min(TOP, right.mean.size)
    comparison = compare(right, every, k=(k,), resamples=200)
    common = round(k * comparison.overlap[k].value)
    return (
        f"{kind}: heads from the {format_count(right.n_pairs, 'pair')} with two right answers, compared with all "
        f"{every.n_pairs}: {common} of the best {k} in common, rank correlation "
        f"{comparison.rank_correlation.value:.2f}."
    )


def _reasons(kind: str, left_out: dict[str, int]) -> str:
    rows = sorted(((count, reason) for reason, count in left_out.items() if count), key=lambda row: (-row[0], row[1]))
    return closed(f"left-out-{kind}", f"Examples without a pair of kind {kind}", table(["number", "reason"], rows))
