"""The evaluation card as text tables and as one HTML page without scripts or external resources."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from behavior.card.rewording import REWORDINGS
from behavior.card.rows import ALL
from behavior.card.survey_table import survey_cells
from groundscope.core.statistics import Estimate

if TYPE_CHECKING:
    from behavior.card.card import EvaluationCard

_STYLE = """
:root{color-scheme:light dark;--line:#8886;--soft:#6669}
body{font:16px/1.5 system-ui,sans-serif;margin:0 auto;max-width:72rem;padding:1rem;background:Canvas;color:CanvasText}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem}
th,td{padding:.3rem .6rem;text-align:left;border-bottom:1px solid var(--line);white-space:nowrap}
td.wide{white-space:normal;min-width:16rem}h2{margin-top:2rem}
"""
_SYMPTOMS = (
    "contradiction", "paraphrase", "format", "hesitation", "rationalization", "form", "entropy", "refused", "unsafe",
)  # fmt: skip
Table = list[list[str]]


def share_text(value: Estimate | None, *, scale: float = 100.0, digits: int = 1) -> str:
    """Return a rate in percent with its interval; empty if it is not defined.

    >>> from behavior.card import share_text
    >>> from groundscope.core.statistics import Estimate
    >>> share_text(Estimate(0.25, 0.1, 0.5, 20))
    '25.0 [10.0, 50.0]'
    """
    if value is None or math.isnan(value.value):
        return ""
    few = " (few images)" if value.few_groups else ""
    value_text, low, high = (f"{scale * end:.{digits}f}" for end in (value.value, value.low, value.high))
    return f"{value_text} [{low}, {high}]{few}"


def row_cells(card: EvaluationCard) -> Table:
    """Return the rows of a card as text, in percent: headings first.

    >>> import groundscope as gs
    >>> from behavior.card import row_cells
    >>> answers = gs.answer(gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["random"]))
    >>> row_cells(gs.evaluation_card({"tiny": {"scenes": answers}}))[0][:4]
    ['model', 'benchmark', 'level', 'task']
    """
    profiles = [name for name in card.profiles if name != "uniform"]
    head = [
        "model",
        "benchmark",
        "level",
        "task",
        "n",
        "wrong",
        *(f"severity, {name}" for name in profiles),
        "yes",
        "unparsed",
    ]
    return [
        head,
        *(
            [
                row.model, row.benchmark, row.level, row.task, f"{row.n:,}", share_text(row.frequency),
                *(share_text(row.severity[name]) for name in profiles), share_text(row.yes_ratio), str(row.unparsed),
            ]
            for row in card.rows
        ),
    ]  # fmt: skip


def fact_cells(card: EvaluationCard) -> Table:
    """Return costs, counts and symptoms of each model and benchmark as text.

    >>> import groundscope as gs
    >>> from behavior.card import fact_cells
    >>> answers = gs.answer(gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["random"]))
    >>> fact_cells(gs.evaluation_card({"tiny": {"scenes": answers}}))[1][:2]
    ['tiny', 'scenes']
    """
    present = dict.fromkeys(name for fact in card.facts for name in fact.rates)
    reported = [name for name in _SYMPTOMS if name in present]
    titles = {
        "form": "asked form",
        "entropy": "entropy, nats",
        "paraphrase": "changes under paraphrase",
        "format": "changes under answer format",
    }
    head = [
        "model",
        "benchmark",
        "answers",
        "missing",
        "seconds an answer",
        "forwards an answer",
        *(titles.get(n, n) for n in reported),
    ]
    return [
        head,
        *(
            [
                fact.model,
                fact.benchmark,
                f"{fact.answers:,}",
                str(fact.missing),
                "" if fact.seconds_per_answer is None else f"{fact.seconds_per_answer:.3g}",
                "" if fact.forwards_per_answer is None else f"{fact.forwards_per_answer:.3g}",
                *(_symptom(fact.rates.get(name), name) for name in reported),
            ]
            for fact in card.facts
        ),
    ]


def _symptom(value: Estimate | None, name: str) -> str:
    return share_text(value, scale=1.0, digits=3) if name == "entropy" else share_text(value)


def rewording_cells(card: EvaluationCard) -> Table:
    """Return the shares of answers that change under each rule of rewording as text; empty if none was measured.

    >>> import groundscope as gs
    >>> from behavior.card import rewording_cells
    >>> answers = gs.answer(gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["random"]))
    >>> rewording_cells(gs.evaluation_card({"tiny": {"scenes": answers}}))
    []
    """
    lines = [
        [fact.model, fact.benchmark, REWORDINGS[name].kind, name, f"{rate.n:,}", share_text(rate)]
        for fact in card.facts
        for name, rate in fact.rates.items()
        if name in REWORDINGS
    ]
    return [["model", "benchmark", "kind", "rule", "n", "answers that change"], *lines] if lines else []


def difference_cells(card: EvaluationCard) -> Table:
    """Return the paired differences as text, in percentage points; empty for one model.

    >>> import groundscope as gs
    >>> from behavior.card import difference_cells
    >>> answers = gs.answer(gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["random"]))
    >>> difference_cells(gs.evaluation_card({"tiny": {"scenes": answers}}))
    []
    """
    if not card.differences:
        return []
    lines = [["second minus first", "benchmark", "level", "profile", "n", "wrong", "beyond the interval"]]
    for d in card.differences:
        mark = ("better" if d.difference.value < 0 else "worse") if d.significant else ""
        names = f"{d.second} - {d.first}"
        lines.append([names, d.benchmark, d.level, d.profile, f"{d.difference.n:,}", share_text(d.difference), mark])
    return lines


def figure_cells(card: EvaluationCard) -> Table:
    """Return the figures of the released rules as text, as the benchmarks scale them; empty without any.

    >>> import groundscope as gs
    >>> from behavior.card import figure_cells
    >>> answers = gs.answer(gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["random"]))
    >>> figure_cells(gs.evaluation_card({"tiny": {"scenes": answers}}))
    []
    """
    if not card.figures:
        return []
    lines = [["model", "benchmark", "part", "figure", "value", "interval"]]
    for f in card.figures:
        value = f.value
        ends = "" if math.isnan(value.low) else f"[{value.low:.4g}, {value.high:.4g}]"
        figure_text = "not defined" if math.isnan(value.value) else f"{value.value:.4g}"
        lines.append([f.model, f.benchmark, f.part, f.figure, figure_text, ends])
    return lines


def ranking_lines(card: EvaluationCard) -> list[str]:
    """Return sentences about the ranking of several models under the profiles; empty for one model.

    >>> import groundscope as gs
    >>> from behavior.card import ranking_lines
    >>> answers = gs.answer(gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["random"]))
    >>> ranking_lines(gs.evaluation_card({"tiny": {"scenes": answers}}))
    []
    """
    if len(card.models) < 2:
        return []
    lines = [f"{name}: {', '.join(card.ranking(name))}" for name in card.profiles]
    changes = card.ranking_changes()
    lines += [f"{a} and {b} change places between {p} and {q}, beyond the intervals" for a, b, p, q in changes]
    if not changes:
        lines.append("No two models change places between two profiles beyond the intervals.")
    return lines


def card_text(card: EvaluationCard) -> str:
    """Return the totals of a card as lines of text: each model, benchmark and level over all tasks.

    >>> import groundscope as gs
    >>> from behavior.card import card_text
    >>> answers = gs.answer(gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["random"]))
    >>> card_text(gs.evaluation_card({"tiny": {"scenes": answers}})).split()[:2]
    ['model', 'benchmark']
    """
    head, *lines = row_cells(card)
    chosen = [head, *(line for line, row in zip(lines, card.rows, strict=True) if row.task == ALL)]
    chosen = [[cell for i, cell in enumerate(line) if head[i] != "task"] for line in chosen]
    widths = [max(len(line[i]) for line in chosen) for i in range(len(chosen[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in chosen
    )


def card_page(card: EvaluationCard) -> str:
    """Return the card as one HTML page; every text is escaped.

    >>> import groundscope as gs
    >>> from behavior.card import card_page
    >>> answers = gs.answer(gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["random"]))
    >>> "<b>" in card_page(gs.evaluation_card({"<b>": {"scenes": answers}}))
    False
    """
    parts = [
        _section(
            "What is wrong, and how severely",
            "Percent of answers with 95 % intervals over images. Severity is the weight of wrong answers divided by that of "
            "all, by profile; a description is wrong if it invents something.",
            row_cells(card),
        ),
        _section(
            "Several models",
            "Paired differences on the questions that both answered, in percentage points.",
            difference_cells(card),
        ),
    ]
    lines = ranking_lines(card)
    if lines:
        parts.append("<h2>Ranking</h2><ul>" + "".join(f"<li>{_text(line)}</li>" for line in lines) + "</ul>")
    parts += [
        _section(
            "Cost and symptoms",
            "Symptoms in percent, entropy in nats. The asked form is the card's measure of instruction following.",
            fact_cells(card),
        ),
        _section(
            "The same fact, asked otherwise",
            "Percent of answers that change when the question is worded otherwise (paraphrase) or the answer has another form.",
            rewording_cells(card),
        ),
        _section("Figures of the released rules", "Scaled as the benchmarks scale them.", figure_cells(card)),
        _section(
            "What benchmarks evaluate",
            "The survey's Table 3; where we differ: survey -> ours.",
            survey_cells(),
        ),
    ]
    notes = [f"{f.model}, {f.benchmark}: {note}" for f in card.facts for note in f.notes]
    if notes:
        parts.append("<h2>Notes</h2><ul>" + "".join(f"<li>{_text(note)}</li>" for note in notes) + "</ul>")
    title = f"Evaluation card: {', '.join(card.models)}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body><main><h1>{_text(title)}</h1>"
        f"{''.join(parts)}</main></body></html>\n"
    )


def _section(title: str, lead: str, cells: Sequence[Sequence[str]]) -> str:
    if not cells:
        return ""
    head, *lines = cells
    top = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in head)
    body = "".join("<tr>" + "".join(_cell(cell) for cell in line) + "</tr>" for line in lines)
    table = f'<div class="scroll" tabindex="0"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    return f"<h2>{_text(title)}</h2><p>{_text(lead)}</p>{table}"


def _cell(cell: str) -> str:
    return f"<td{' class=wide' if len(cell) > 60 else ''}>{_text(cell)}</td>"


def _text(value: str) -> str:
    return html.escape(value, quote=True)
