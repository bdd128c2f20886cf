"""The table that papers print: accuracy, precision, recall, F1 and the share of yes, by data set and split."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from behavior.parsing import YES_NO
from behavior.pope import SPLITS, score_result
from groundscope.core.short_repr import short_repr

# `import behavior` imports this module, so numpy and modules that need it are imported when scoring.
if TYPE_CHECKING:
    import pandas as pd

    from behavior.result import Answer, BehaviorResult
    from groundscope.core.statistics import Estimate

FIGURES = ("accuracy", "precision", "recall", "f1", "yes_ratio")
"""Figures of a row, in order. All but accuracy are of yes-no questions only, with ``yes`` as the positive class."""
MEAN = "mean"
"""Split of the row with the unweighted means over the splits of POPE: random, popular, adversarial."""


@dataclass(frozen=True)
class BenchmarkRow:
    """The figures of the questions of one data set, split and form.

    Examples
    --------
    >>> import groundscope as gs
    >>> from groundscope.core.statistics import Estimate
    >>> accuracy = {"accuracy": Estimate(0.5, 0.1, 0.9, 2)}
    >>> row = gs.BenchmarkRow("pope", "random", "choice", n=2, unparsed=0, figures=accuracy)
    >>> gs.BenchmarkTable((row,)).cells()[1]
    ['pope', 'random', '2', '50.0', '', '', '', '', '0']
    """

    data: str
    """Name of the data set: the part of a combined dataset (`concepts.combine_datasets`)."""
    split: str
    """Split of the questions, or ``mean``."""
    form: str
    """``yes-no``, ``choice`` (other candidates) or ``open`` (a text that is compared with the true answer)."""
    n: int
    unparsed: int
    """Answers that match no candidate, which count as wrong."""
    figures: Mapping[str, Estimate]
    """Figure to its estimate; the means have no interval (NaN)."""


@dataclass(frozen=True)
class BenchmarkTable:
    """Rows by data set and split; returned by `benchmark_table`.

    Examples
    --------
    >>> import groundscope as gs
    >>> data = gs.scenes.dataset(20, splits=["random", "popular"])
    >>> table = gs.benchmark_table(gs.answer(gs.load_lvlm("tiny"), data))
    >>> [(row.split, row.n) for row in table.rows]
    [('random', 10), ('popular', 10), ('mean', 20)]
    """

    rows: tuple[BenchmarkRow, ...]

    __repr__ = short_repr

    def frame(self) -> pd.DataFrame:
        """Return one row per row: ``data, split, form, n, unparsed``, each figure, ``<figure>_low``, ``<figure>_high``."""
        import pandas as pd

        lines = []
        for row in self.rows:
            line: dict[str, object] = {n: getattr(row, n) for n in ("data", "split", "form", "n", "unparsed")}
            for name in FIGURES:
                figure = row.figures.get(name)
                ends = (math.nan,) * 3 if figure is None else (figure.value, figure.low, figure.high)
                line |= dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))
            lines.append(line)
        return pd.DataFrame(lines)

    def records(self) -> list[dict[str, Any]]:
        """Return the rows as values that JSON can represent; a figure that is not defined is null."""
        return [
            {
                **{n: getattr(row, n) for n in ("data", "split", "form", "n", "unparsed")},
                **{name: _without_nan(asdict(figure)) for name, figure in row.figures.items()},
            }
            for row in self.rows
        ]

    def cells(self) -> list[list[str]]:
        """Return the table as text: a row of headings, then percentages with one decimal as papers print them."""
        several = len({row.form for row in self.rows}) > 1
        head = ["data", "split", *(["form"] if several else []), "n"]
        head += ["accuracy", "precision", "recall", "F1", "yes", "unparsed"]
        lines = [head]
        for row in self.rows:
            values = [_percent(row.figures.get(name)) for name in FIGURES]
            form = [row.form] if several else []
            lines.append([row.data, row.split, *form, str(row.n), *values, str(row.unparsed)])
        return lines

    def text(self) -> str:
        """Return the table as lines of text, in percent."""
        lines = self.cells()
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        n_texts = lines[0].index("n")
        return "\n".join(
            "  ".join(
                cell.ljust(width) if i < n_texts else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )


def benchmark_table(answers: BehaviorResult) -> BenchmarkTable:
    """Return the figures of answers by data set, split and form of the questions; captions are left out.

    Yes-no questions are scored as by `behavior.pope` (Li et al. 2023, arXiv 2305.10355). A data set with several of
    POPE's splits also has a row with the unweighted means over them, as papers report them.

    Parameters
    ----------
    answers
        Answers of `answer` or `load_answers`. Those to a combined dataset (`concepts.combine_datasets`) have rows for each of
        its parts.

    Examples
    --------
    >>> import groundscope as gs
    >>> about = ("image 1", "random", "object", "existence", "Is there an apple?")
    >>> first = gs.Answer("1", *about, "yes", ("yes", "no"), given="yes", correct=True)
    >>> second = gs.Answer("2", *about, "no", ("yes", "no"), given="yes", correct=False)
    >>> answers = gs.BehaviorResult((first, second), gs.Cost(None, None, 2), {"data": "two"})
    >>> print(gs.benchmark_table(answers).text())
    data  split   n  accuracy  precision  recall    F1    yes  unparsed
    two   random  2      50.0       50.0   100.0  66.7  100.0         0
    """
    from groundscope.core.statistics import Estimate

    parts = [str(part) for part in answers.provenance.get("parts") or ()]
    name = str(answers.provenance.get("data", "answers"))
    members: dict[tuple[str, str, str], list[Answer]] = {}
    for row in answers.answers:
        if row.correct is not None:
            part = next((p for p in parts if row.id.startswith(f"{p}/")), name)
            members.setdefault((part, row.split, _form(row)), []).append(row)
    rows: list[BenchmarkRow] = []
    for data in dict.fromkeys(part for part, _, _ in members):
        own = [
            _row(data, split, form, answers, chosen) for (part, split, form), chosen in members.items() if part == data
        ]
        rows += own
        yes_no = [row for row in own if row.form == "yes-no" and row.split in SPLITS]
        if len(yes_no) > 1:
            means = {
                figure: Estimate(sum(row.figures[figure].value for row in yes_no) / len(yes_no), math.nan, math.nan, 0)
                for figure in FIGURES
            }
            n, unparsed = sum(row.n for row in yes_no), sum(row.unparsed for row in yes_no)
            rows.append(BenchmarkRow(data, MEAN, "yes-no", n, unparsed, means))
    return BenchmarkTable(tuple(rows))


def _form(answer: Answer) -> str:
    if not answer.candidates:
        return "open"
    return "yes-no" if set(answer.candidates) == YES_NO else "choice"


def _row(data: str, split: str, form: str, answers: BehaviorResult, chosen: list[Answer]) -> BenchmarkRow:
    from behavior.result import BehaviorResult

    part = BehaviorResult(tuple(chosen), answers.cost, answers.provenance)
    if form != "yes-no":
        return BenchmarkRow(data, split, form, len(part), part.unparsed, {"accuracy": part.rate("accuracy")})
    scores = score_result(part)
    return BenchmarkRow(
        data, split, form, scores.n, scores.unparsed, {figure: getattr(scores, figure) for figure in FIGURES}
    )


def _percent(figure: Estimate | None) -> str:
    return "" if figure is None or math.isnan(figure.value) else f"{100 * figure.value:.1f}"


def _without_nan(values: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()}
