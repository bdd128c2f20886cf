"""The evaluation card: errors by benchmark, level and task, with severity, costs and symptoms."""

from __future__ import annotations

from collections.abc import Mapping

from experiments.report.html import closed, paragraph, section, term_list
from experiments.results.run_files import RunFiles


def card_section(run: RunFiles) -> str:
    """Return the section."""
    from behavior.card import card_tables, ranking_lines, summary_lines, table_html

    card = run.card
    parts = [paragraph(line) for line in (*summary_lines(card), *ranking_lines(card))]
    for table in card_tables(card):
        content = [paragraph(table.lead, soft=True), table_html(table.cells), _explain(table.terms, table.name)]
        parts += content if table.name == "rows" else [closed(f"card-{table.name}", table.title, *content)]
    return section("card", "Evaluation card", *parts, stages=("card",))


def _explain(terms: Mapping[str, str], name: str) -> str:
    return closed(f"card-{name}-terms", "What the names mean", term_list(terms)) if terms else ""
