"""The table of an arena as text, CSV, LaTeX and HTML, laid out like Table 1 of the survey: classes of methods, then columns."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from groundscope.core.statistics import Estimate
from mitigation.arena.measures import (
    CAPTION_INVENTED,
    CAPTION_RECALL,
    CAPTION_WITH_INVENTED,
    CAPTION_WORDS,
    improves,
)
from mitigation.arena.result import ArenaResult, RowResult

_SHORT: Mapping[str, str] = {
    "conflict: wrong by prior": "wrong by prior",
    "adversarial absent: says yes": "false yes",
    "present: says no": "present denied",
    "neutral: right": "neutral right",
    "all: right": "all right",
    CAPTION_INVENTED: "CHAIR_i",
    CAPTION_WITH_INVENTED: "CHAIR_s",
    CAPTION_RECALL: "caption recall",
    CAPTION_WORDS: "words",
}
"""Measure to its column heading; measures without one are in the CSV file only."""
_SPLITS = ("random", "popular", "adversarial")
_CLASSES = ("steering", "decoding", "attention", "heads", "layers", "weights", "prompt", "post-hoc", "")


@dataclass(frozen=True)
class Column:
    """A column: its heading, the measure it shows, and how."""

    heading: str
    cell: Callable[[RowResult], str]
    measure: str | None = None


def columns(arena: ArenaResult) -> list[Column]:
    """Return the columns of an arena: measures with a short name, accuracies by split as POPE prints them, and the price."""
    names = arena.measure_names
    result = [Column(short, _measured_cell(name), name) for name, short in _SHORT.items() if name in names]
    for split in _SPLITS:
        for part in ("accuracy", "F1", "yes ratio"):
            name = f"{split}: {part}"
            if name in names:
                result.append(Column(f"{split} {part}", _measured_cell(name), name))
    result += [Column(name, _number(name), name) for name in names if name.startswith(("MME", "AMBER"))]
    if any(row.cut_to_length is not None for row in arena.rows):
        result.append(Column("CHAIR_i, plain cut to length", lambda r: _cut(r.cut_to_length)))
        result.append(Column("CHAIR_i, plain cut to recall", lambda r: _cut(r.cut_to_recall)))
    if any(row.price is not None for row in arena.rows):
        result += [
            Column("first token, ms", lambda r: "" if r.price is None else f"{1e3 * r.price.first:.1f}"),
            Column("first token, x", lambda r: "" if r.price is None else f"{r.price.first_ratio:.2f}"),
            Column("further token, ms", lambda r: "" if r.price is None else f"{1e3 * r.price.token:.1f}"),
            Column("further token, x", lambda r: "" if r.price is None else f"{r.price.token_ratio:.2f}"),
            Column("rows a token", lambda r: "" if r.price is None else f"{r.price.token_rows:.2g}"),
        ]
    return result


def _measured_cell(name: str) -> Callable[[RowResult], str]:
    scale = 1.0 if name == CAPTION_WORDS else 100.0

    def cell(row: RowResult) -> str:
        measure = row.measure(name)
        if measure is None or math.isnan(measure.value.value):
            return ""
        text = f"{scale * measure.value.value:.1f}"
        if measure.spread is not None:
            text += f"±{scale * measure.spread:.1f}"
        return text + {True: " +", False: " -", None: ""}[_outcome(name, measure.change)]

    return cell


def _number(name: str) -> Callable[[RowResult], str]:
    def cell(row: RowResult) -> str:
        measure = row.measure(name)
        return "" if measure is None else f"{measure.value.value:.1f}"

    return cell


def _outcome(name: str, amount: Estimate | None) -> bool | None:
    return None if amount is None else improves(name, amount)


def _cut(cut: object) -> str:
    value = getattr(cut, "chair_i", math.nan)
    return "" if math.isnan(value) else f"{100 * value:.1f}"


def ordered(arena: ArenaResult, regime: str) -> list[RowResult]:
    """Return the rows of a regime: the model alone, controls, then methods by class."""
    rows = [row for row in arena.rows if row.regime == regime]
    plain, others = rows[:1], rows[1:]
    controls = [row for row in others if row.control]
    methods = [row for row in others if not row.control]
    return [
        *plain,
        *controls,
        *sorted(methods, key=lambda r: _CLASSES.index(r.category) if r.category in _CLASSES else 9),
    ]


def label(row: RowResult) -> str:
    """Return the name of a row as tables show it."""
    return f"{row.name}, chosen" if row.chosen else row.name


def cells(arena: ArenaResult, regime: str) -> list[list[str]]:
    """Return the table of one regime as text: headings, then rows."""
    shown_columns = columns(arena)
    lines = [["class", "method", *(c.heading for c in shown_columns), "not better than"]]
    controls = 1 + sum(row.control and row.problem is None for row in ordered(arena, regime))
    for row in ordered(arena, regime):
        kind = "control" if row.control else row.category
        if row.problem is not None:
            lines.append([kind, label(row), *[""] * len(shown_columns), row.problem])
        else:
            lines.append([kind, label(row), *(c.cell(row) for c in shown_columns), _listed(row, controls)])
    return lines


def _listed(row: RowResult, controls: int) -> str:
    """Return the controls that a row does not beat."""
    return "any control" if controls > 1 and len(row.not_beaten) == controls else ", ".join(row.not_beaten)


def as_text(arena: ArenaResult, *, brief: bool = False) -> str:
    """Return the tables of all regimes as lines of text; `brief` leaves out F1, the share of yes, and details of price."""
    parts = []
    for regime in dict.fromkeys(row.regime for row in arena.rows):
        lines = [
            line
            for line, row in zip(cells(arena, regime), [None, *ordered(arena, regime)], strict=True)
            if not _problem(row)
        ]
        if brief:
            skipped = {
                i for i, head in enumerate(lines[0]) if head.endswith((" F1", " yes ratio")) or head in _NOT_BRIEF
            }
            lines = [[cell for i, cell in enumerate(line) if i not in skipped] for line in lines]
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]) - 1)]
        body = (_aligned(line, widths) for line in lines)
        failures = [f"not measured: {label(row)}: {row.problem}" for row in ordered(arena, regime) if row.problem]
        parts.append("\n".join([f"{regime}:", *body, *failures]))
    return "\n\n".join(parts)


def _problem(row: RowResult | None) -> bool:
    return row is not None and row.problem is not None


_NOT_BRIEF = (
    "class", "all right", "CHAIR_s", "CHAIR_i, plain cut to recall", "first token, ms", "further token, ms",
    "rows a token",
)  # fmt: skip
"""Headings of columns that a brief table leaves out."""


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    *columns, last = line
    padded = [
        cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(columns, widths, strict=True))
    ]
    return "  ".join([*padded, last]).rstrip()


def as_csv(arena: ArenaResult) -> str:
    """Return every measure, interval, change and price as CSV (`ArenaResult.frame`)."""
    buffer = io.StringIO()
    arena.frame().to_csv(buffer, index=False)
    return buffer.getvalue()


_LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}", "±": r"$\pm$"}
)


def as_latex(arena: ArenaResult) -> str:
    """Return the tables of all regimes as LaTeX with booktabs."""
    parts = []
    for regime in dict.fromkeys(row.regime for row in arena.rows):
        head, *lines = cells(arena, regime)
        rows = [" & ".join(cell.translate(_LATEX) for cell in line[:-1]) + r" \\" for line in lines]
        groups = [line[0] for line in lines]
        body = [(r"\midrule" + "\n" if i and groups[i] != groups[i - 1] else "") + row for i, row in enumerate(rows)]
        parts.append(
            "\n".join(
                [
                    f"% {regime}; + better, - worse than the model alone beyond an interval that holds for all rows together",
                    r"\begin{tabular}{ll" + "r" * (len(head) - 3) + "}",
                    r"\toprule",
                    " & ".join(cell.translate(_LATEX) for cell in head[:-1]) + r" \\",
                    r"\midrule",
                    *body,
                    r"\bottomrule",
                    r"\end{tabular}",
                ]
            )
        )
    return "\n\n".join(parts) + "\n"


def as_html(arena: ArenaResult) -> str:
    """Return the tables of all regimes as an HTML fragment; every text is escaped."""
    parts = []
    for regime in dict.fromkeys(row.regime for row in arena.rows):
        head, *lines = cells(arena, regime)
        top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        rows = "".join(f"<tr>{_html_cells(line)}</tr>" for line in lines)
        parts.append(
            f"<h3>{html.escape(regime)}</h3><table class='arena'><thead><tr>{top}</tr></thead><tbody>{rows}</tbody></table>"
        )
    return "\n".join(parts)


def _html_cells(line: Sequence[str]) -> str:
    texts = [
        f"<th scope='row'>{html.escape(cell)}</th>" if i == 1 else f"<td>{html.escape(cell)}</td>"
        for i, cell in enumerate(line)
    ]
    return "".join(texts)
