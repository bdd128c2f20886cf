"""Heads one by one: a table of effects, and for the strongest heads their attention on example images."""

from __future__ import annotations

import numpy as np

from experiments.report import figures
from experiments.report.html import closed, figure, missing_illustrations, paragraph, section, table, text
from experiments.results.illustrations import Illustrations
from experiments.results.run_files import RunFiles
from experiments.results.selection import HeadDetail, detailed_heads
from lvlm.sites import Head


def heads_section(run: RunFiles) -> str:
    """Return the section; empty if no head was scored."""
    if not run.head_scores:
        return ""
    illustrations = run.illustrations("circuits")
    details = detailed_heads(run.head_scores, run.top_heads, run.examples)
    return section(
        "heads",
        "Heads",
        paragraph(
            "Largest effect of each head over the kinds of pairs, in percent of the answer that it restores. Select a framed "
            "head to see its attention on the images with the largest effects."
        ),
        _effects(run, {d.head for d in details}),
        missing_illustrations(illustrations, run, "patch"),
        *(_detail(run, d, illustrations) for d in details),
        stages=("patch",),
    )


def _detail(run: RunFiles, detail: HeadDetail, illustrations: Illustrations | None) -> str:
    """Return the part about one head, which opens when it is selected."""
    name, at = str(detail.head), (detail.head.layer, detail.head.head)
    rows = []
    for kind, scores in run.head_scores.items():
        low, high = scores.interval()
        rows.append((kind, f"{scores.mean[at]:+.3f} [{low[at]:+.3f}, {high[at]:+.3f}]", f"{scores.sign[at]:.0%}"))
    best = run.head_scores[detail.kind].mean[at]
    return closed(
        f"head-{name}",
        f"{name}: restores {100 * best:.0f} % of {detail.kind} answers",
        table(["kind of pair", "effect", "scenes with an effect above 0"], rows),
        _attention(run, detail, illustrations),
    )


def _attention(run: RunFiles, detail: HeadDetail, illustrations: Illustrations | None) -> str:
    name = str(detail.head)
    panels, masses = [], []
    for example_id, effect in zip(detail.examples, detail.effects, strict=True):
        illustration = (illustrations or {}).get(example_id)
        if illustration is None or name not in illustration.attention:
            continue
        example, attention = run.examples[example_id], illustration.attention[name]
        panels.append(
            (illustration.image, attention.weights, f"{example.question}\n{example.answer}; effect {effect:+.2f}")
        )
        masses.append(f"{attention.image_mass:.0%}")
    if not panels:
        return ""
    return figure(
        figures.overlays(panels),
        f"Attention of {name} from the last token, on the images with its largest effects. Share of its attention on the "
        f"image: {', '.join(masses)}. A head can use the image without attention to it here, through tokens that attended to "
        "it in earlier layers.",
    )


def _effects(run: RunFiles, detailed: set[Head]) -> str:
    """Return the effects of all heads as a table with links, the last layer first."""
    stacked = np.stack([s.mean for s in run.head_scores.values()])
    largest = np.take_along_axis(stacked, np.abs(stacked).argmax(0)[None], 0)[0]
    n_layers, n_heads = largest.shape
    limit = max(0.05, float(np.abs(largest).max()))
    lines = ["<tr><th></th>" + "".join(f'<th scope="col">H{h}</th>' for h in range(n_heads)) + "</tr>"]
    for layer in reversed(range(n_layers)):
        cells = []
        for number in range(n_heads):
            value, head = float(largest[layer, number]), Head(layer, number)
            # Size of the effect: share of the tint; its sign: the color. Mixed with the page's color for dark mode.
            tint = f"--effect:{round(100 * abs(value) / limit)}%;--tint:var(--{'for' if value >= 0 else 'against'})"
            percentage = f"{round(100 * value) or 0}"
            label = f"{head}: {percentage} percent"
            inner = (
                f'<a href="#head-{head}" aria-label="{text(label)}">{percentage}</a>'
                if head in detailed
                else percentage
            )
            cells.append(f'<td style="{tint}">{inner}</td>')
        lines.append(f'<tr><th scope="row">L{layer}</th>{"".join(cells)}</tr>')
    return f'<div class="scroll" tabindex="0"><table class="heads">{"".join(lines)}</table></div>'
