"""Which heads carry the answer: patching effects by kind of pair."""

from __future__ import annotations

from experiments.report import figures
from experiments.report.html import figure, paragraph, section, table
from experiments.results.run_files import RunFiles
from lvlm.sites import Head


def patching_section(run: RunFiles) -> str:
    """Return the section; only with reasons if no head could be scored."""
    if not run.head_scores:
        reasons = (paragraph(f"{kind}: {reason}") for kind, reason in run.missing_pairs.items())
        return section("used", "What uses it", *reasons)
    heads = [Head.parse(head) for head in run.top_heads]
    panels = [(f"{kind} ({scores.n_pairs} pairs)", scores.mean) for kind, scores in run.head_scores.items()]
    rows = []
    for head in heads:
        cells = [str(head)]
        for scores in run.head_scores.values():
            low, high = scores.interval()
            at = (head.layer, head.head)
            cells.append(f"{scores.mean[at]:+.3f} [{low[at]:+.3f}, {high[at]:+.3f}]")
        rows.append(cells)
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
        table(["head", *run.head_scores], rows),
        paragraph(f"Excluded pairs, whose images hardly change the answer: {excluded}.", soft=True),
        missing,
        stages=("patch",),
    )
