"""Training-free methods next to each other, with controls."""

from __future__ import annotations

from experiments.report import figures
from experiments.report.html import closed, figure, paragraph, section, table, text
from experiments.results.run_files import RunFiles


def arena_section(run: RunFiles) -> str:
    """Return the section."""
    from mitigation.arena.figure import pareto_figure
    from mitigation.arena.tables import cells

    arena = run.arena
    regimes = list(dict.fromkeys(row.regime for row in arena.rows))
    parts = [
        paragraph(
            f"Every method and every control answers the same {arena.provenance['questions']} questions about "
            f"{arena.provenance['images']} images. A plus or a minus marks a change against the model alone beyond its "
            "paired interval over images, which is widened so that the intervals of all rows hold together with 95 %. "
            f"The last column names the controls that a method does not beat in {text(arena.objective)}."
        )
    ]
    for number, regime in enumerate(regimes):
        head, *lines = cells(arena, regime)
        answer_table = table(head, lines)
        parts.append(
            paragraph(f"Answers by {regime} decoding, in percent:") + answer_table
            if number == 0
            else closed(f"arena-{regime}", f"Answers by {regime}", answer_table)
        )
    parts.append(
        figure(
            figures.svg(pareto_figure(arena, regimes[0])),
            "Errors against time, against denied objects, and of captions against what they leave out: lower left is better. "
            "Squares are the model alone and controls; the line joins the rows that no other row beats in both.",
        )
    )
    return section("arena", "Which mitigation?", *parts, stages=("arena",))
