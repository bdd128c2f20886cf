"""The evaluation card: errors by benchmark, level and task, with severity, costs and symptoms."""

from __future__ import annotations

from experiments.report.html import closed, paragraph, section, table
from experiments.results.run_files import RunFiles


def card_section(run: RunFiles) -> str:
    """Return the section."""
    from behavior.card import (
        difference_cells,
        fact_cells,
        figure_cells,
        ranking_lines,
        rewording_cells,
        row_cells,
        survey_cells,
    )

    card = run.card
    head, *lines = row_cells(card)
    parts = [
        paragraph(
            "Wrong answers in percent, with 95 % intervals over images. Severity is the weight of wrong answers divided by that "
            "of all answers, by profile; a description is wrong if it invents something."
        ),
        table(head, lines),
        *(paragraph(line) for line in ranking_lines(card)),
    ]
    for name, title, cells in (
        ("card-differences", "Paired differences between models", difference_cells(card)),
        ("card-facts", "Cost and symptoms", fact_cells(card)),
        ("card-rewordings", "The same fact, asked otherwise: answers that change", rewording_cells(card)),
        ("card-figures", "Figures of the released rules", figure_cells(card)),
        ("card-survey", "What benchmarks evaluate: the survey's table, and where we differ", survey_cells()),
    ):
        if cells:
            parts.append(closed(name, title, table(cells[0], cells[1:])))
    return section("card", "Evaluation card", *parts, stages=("card",))
