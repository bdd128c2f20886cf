"""The evaluation card as one HTML page without scripts or external resources."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from behavior.card.survey_table import survey_cells
from behavior.card.tables import (
    FACT_TERMS,
    ROW_TERMS,
    Table,
    difference_cells,
    fact_cells,
    figure_cells,
    profile_cells,
    ranking_lines,
    rewording_cells,
    row_cells,
    summary_lines,
)

if TYPE_CHECKING:
    from behavior.card.card import EvaluationCard

_STYLE = """
:root{color-scheme:light dark;--line:#8886}
body{font:16px/1.5 system-ui,sans-serif;margin:0 auto;max-width:76rem;padding:1rem;background:Canvas;color:CanvasText}
p,li,dl{max-width:52rem}h2{margin:2rem 0 .5rem}dl{display:grid;grid-template-columns:auto 1fr;gap:.2rem .9rem;font-size:.9rem}
dt{font-weight:600}dd{margin:0}summary{cursor:pointer}details{margin:.5rem 0}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .9rem .3rem 0;text-align:left;border-bottom:1px solid var(--line);vertical-align:top;white-space:nowrap}
thead th{white-space:normal;vertical-align:bottom}tr.group th{padding-top:.9rem}td.wide{white-space:normal;min-width:16rem}
@media(max-width:30rem){th,td{padding-right:.6rem}dl{grid-template-columns:1fr}dd{margin-bottom:.4rem}}
"""
_GROUPED = ("model", "benchmark", "second - first")
"""Columns that become a heading above the rows that have the same values, in tables that begin with one of `_SUBJECTS`."""
_SUBJECTS = ("model", "second - first")
_WIDE = 40
"""Longest text of a cell that is not wrapped."""


@dataclass(frozen=True)
class CardTable:
    """A table of a card with its explanation.

    Examples
    --------
    >>> from behavior.card.page import CardTable
    >>> CardTable("rows", "Wrong answers", "In percent.", [["model", "wrong"], ["tiny", "5.0"]]).closed
    False
    """

    name: str
    """Plain name, for anchors."""
    title: str
    lead: str
    """What the table shows, in sentences."""
    cells: Table
    """Headings first."""
    terms: Mapping[str, str] = field(default_factory=dict)
    """Column to its meaning."""
    closed: bool = False
    """Whether a reader opens it only on request."""


def card_tables(card: EvaluationCard) -> list[CardTable]:
    """Return the tables of a card that have rows, in order.

    >>> import groundscope as gs
    >>> from behavior.card import card_tables
    >>> answers = gs.answer(gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["random"]))
    >>> [table.name for table in card_tables(gs.evaluation_card({"tiny": {"scenes": answers}}))]
    ['rows', 'profiles', 'facts', 'survey']
    """
    facts = fact_cells(card)
    tables = [
        CardTable("rows", "Wrong answers, and their severity", "In percent.", row_cells(card), ROW_TERMS),
        CardTable(
            "profiles",
            "Severity profiles",
            "How much a wrong answer weighs in an application. The weights are assumptions; replace them (card.weights).",
            profile_cells(card),
        ),
        CardTable(
            "differences",
            "Differences between models",
            "On the questions that both answered, in percentage points: negative values are fewer errors of the second model. "
            "Better or worse: the interval excludes 0.",
            difference_cells(card),
        ),
        CardTable(
            "facts",
            "Cost and symptoms",
            "Symptoms in percent, unless the name has another unit.",
            _one_per_line(facts),
            {name: meaning for name, meaning in FACT_TERMS.items() if name in facts[0]},
        ),
        CardTable(
            "rewordings",
            "The same question in other words, or with another form of answer",
            "Percent of answers that change, of the questions that a rule applies to.",
            rewording_cells(card),
        ),
        CardTable(
            "figures",
            "Figures of the released rules",
            "As each benchmark's own scorer computes and scales them.",
            figure_cells(card),
        ),
        CardTable(
            "survey",
            "What known benchmarks evaluate",
            "Table 3 of the survey (Shu et al., arXiv 2501.01346), not results of these models. Where the project differs, "
            "the cell is: survey -> project, with the reason.",
            survey_cells(),
            closed=True,
        ),
    ]
    return [table for table in tables if len(table.cells) > 1]


def card_page(card: EvaluationCard) -> str:
    """Return the card as one HTML page; every text is escaped.

    >>> import groundscope as gs
    >>> from behavior.card import card_page
    >>> answers = gs.answer(gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["random"]))
    >>> "<b>" in card_page(gs.evaluation_card({"<b>": {"scenes": answers}}))
    False
    """
    about = card.provenance.get("about")
    data = [f"{name}: {text}." for name, text in about.items()] if isinstance(about, Mapping) else []
    parts = [_list([*data, *summary_lines(card), *ranking_lines(card)])]
    for table in card_tables(card):
        content = f"<p>{_text(table.lead)}</p>{table_html(table.cells)}{_terms(table.terms)}"
        if table.closed:
            parts.append(f"<details><summary>{_text(table.title)}</summary>{content}</details>")
        else:
            parts.append(f'<h2 id="{_text(table.name)}">{_text(table.title)}</h2>{content}')
    notes = [f"{f.model}, {f.benchmark}: {note}" for f in card.facts for note in f.notes]
    if notes:
        parts.append(f"<h2>Notes</h2>{_list(notes)}")
    title = f"Evaluation card: {'; '.join(card.models)}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body><main><h1>{_text(title)}</h1>"
        f"{''.join(parts)}</main></body></html>\n"
    )


def table_html(cells: Sequence[Sequence[str]]) -> str:
    """Return a table as HTML; rows of one model and benchmark are under one heading, which names them.

    >>> from behavior.card.page import table_html
    >>> table_html([["model", "n"], ["tiny", "3"], ["tiny", "4"]]).count("tiny")
    1
    """
    head, *lines = cells
    grouped = [i for i, name in enumerate(head) if name in _GROUPED and head[0] in _SUBJECTS]
    others = [i for i in range(len(head)) if i not in grouped]
    used = [i for i in others if any(line[i] for line in lines)]
    body: list[str] = []
    before: list[str] = []
    for line in lines:
        group = [line[i] for i in grouped]
        if grouped and group != before:
            body.append(
                f'<tr class="group"><th colspan="{len(used)}" scope="rowgroup">{_text(": ".join(group))}</th></tr>'
            )
        before = group
        body.append("<tr>" + "".join(_cell(line[i]) for i in used) + "</tr>")
    top = "".join(f'<th scope="col">{_text(head[i])}</th>' for i in used)
    return (
        f'<div class="scroll" tabindex="0"><table class="card"><thead><tr>{top}</tr></thead><tbody>{"".join(body)}</tbody>'
        "</table></div>"
    )


def _one_per_line(cells: Table) -> Table:
    """Return a wide table of models and benchmarks as one with a line for each cell that has a text."""
    head, *lines = cells
    return [
        [*head[:2], "measure", "value"],
        *([*line[:2], name, cell] for line in lines for name, cell in zip(head[2:], line[2:], strict=True) if cell),
    ]


def _terms(terms: Mapping[str, str]) -> str:
    if not terms:
        return ""
    pairs = "".join(f"<dt>{_text(name)}</dt><dd>{_text(meaning)}</dd>" for name, meaning in terms.items())
    return f"<details><summary>What the names mean</summary><dl>{pairs}</dl></details>"


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{_text(line)}</li>" for line in lines) + "</ul>"


def _cell(cell: str) -> str:
    return f"<td{' class=wide' if len(cell) > _WIDE else ''}>{_text(cell)}</td>"


def _text(value: str) -> str:
    return html.escape(value, quote=True)
