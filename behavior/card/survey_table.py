"""The survey's Table 3: what nine benchmarks evaluate, with the survey's value of each cell, ours where it differs, and why.

Source: Shu et al., arXiv 2501.01346, Table 3. `SURVEY_ROWS` is open: `register_row` adds the row of another benchmark.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from groundscope.core.registry import Registry

COLUMNS = ("object", "attribute", "relation", "cognition", "instruction following")
"""Columns of the table with a yes or no."""
RULE, JUDGE = "rule", "judge"
"""How answers are evaluated; the survey calls them traditional and third-model."""


@dataclass(frozen=True)
class SurveyRow:
    """One benchmark of the table.

    Examples
    --------
    >>> from behavior.card import SURVEY_ROWS
    >>> row = SURVEY_ROWS["GAVIE"]
    >>> row.survey["instruction following"], row.value("instruction following")
    (False, True)
    """

    survey: Mapping[str, bool]
    """Column of `COLUMNS` to the survey's value."""
    survey_evaluation: str
    """`RULE` or `JUDGE`, as in the survey."""
    ours: Mapping[str, bool]
    """Columns where we differ, to our value."""
    ours_evaluation: str | None
    """Our value where it differs; None if it is the survey's."""
    reasons: Mapping[str, str]
    """Column, or ``evaluation``, to the reason of a difference."""
    benchmarks: tuple[str, ...] = ()
    """Names in `behavior.benchmarks.BENCHMARKS`."""

    def value(self, column: str) -> bool:
        """Return our value of a column of `COLUMNS`."""
        return self.ours.get(column, self.survey[column])

    @property
    def evaluation(self) -> str:
        """Our value of how answers are evaluated."""
        return self.ours_evaluation or self.survey_evaluation


def _row(
    marks: str,
    evaluation: str,
    *names: str,
    ours: Mapping[str, tuple[bool, str]] | None = None,
    judged: str | None = None,
) -> SurveyRow:
    survey: dict[str, bool] = dict(zip(COLUMNS, (mark == "+" for mark in marks), strict=True))
    changes = ours or {}
    reasons = {column: reason for column, (_, reason) in changes.items()}
    if judged is not None:
        reasons["evaluation"] = judged
    return SurveyRow(
        MappingProxyType(survey),
        evaluation,
        MappingProxyType({column: value for column, (value, _) in changes.items()}),
        JUDGE if judged is not None else None,
        MappingProxyType(reasons),
        names,
    )


def _problem(row: object) -> str | None:
    if not isinstance(row, SurveyRow):
        return "it must be a behavior.card.SurveyRow"
    lacking = next((c for c in COLUMNS if c not in row.survey), None)
    if lacking is not None:
        return f"it has no value for the column '{lacking}'"
    unexplained = next((c for c in row.ours if not row.reasons.get(c)), None)
    return None if unexplained is None else f"the column '{unexplained}' differs from the survey without a reason"


SURVEY_ROWS: Registry[SurveyRow] = Registry(
    "row of the survey's table",
    {
        "POPE": _row("+----", RULE, "pope", "llava_pope"),
        "CHAIR": _row("+----", RULE, "chair"),
        "MME": _row("++++-", RULE, "mme"),
        "MMHal-Bench": _row(
            "++++-",
            RULE,
            "mmhal",
            judged="its released script asks GPT-4 for a rating of each answer; there is no rule",
        ),
        "LLaVA-Bench": _row(
            "+++--",
            RULE,
            "llava_bench",
            ours={"cognition": (True, "a third of its questions are the category 'complex', which asks for reasoning")},
            judged="its released script asks GPT-4 to rate two answers; there is no rule",
        ),
        "LVLM-eHub": _row(
            "++-++",
            RULE,
            "lvlm_ehub",
            ours={"relation": (True, "its tasks of visual reasoning include VSR, statements about spatial relations")},
        ),
        "GAVIE": _row(
            "+++--",
            JUDGE,
            "gavie",
            ours={
                "instruction following": (
                    True,
                    "relevancy, one of its two ratings, is whether the answer follows the instruction",
                )
            },
        ),
        "CCEval": _row("+----", JUDGE, "cceval"),
        "HaELM": _row("+++--", JUDGE, "haelm"),
    },
    group="groundscope.survey_rows",
    check=_problem,
)
"""Rows by the survey's name of the benchmark: built-in, registered, and of installed packages."""


def register_row(name: str, row: SurveyRow, *, replace: bool = False) -> None:
    """Add the row of a benchmark to the table; an installed package uses the entry-point group ``groundscope.survey_rows``.

    Parameters
    ----------
    name
        Name of the benchmark.
    row
        Its row.
    replace
        Whether to replace an existing row.

    Raises
    ------
    ConfigError
        If the name is in use and `replace` is False, a column has no value, or a difference has no reason.

    Examples
    --------
    >>> from behavior.card import SURVEY_ROWS, register_row
    >>> register_row("My benchmark", SURVEY_ROWS["POPE"])
    >>> SURVEY_ROWS["My benchmark"].evaluation
    'rule'
    >>> SURVEY_ROWS.unregister("My benchmark")
    """
    SURVEY_ROWS.register(name, row, replace=replace)


def survey_cells() -> list[list[str]]:
    """Return the table as text: a row of headings, then a row for each benchmark; differences as ``survey -> ours``.

    Examples
    --------
    >>> from behavior.card import survey_cells
    >>> survey_cells()[3]
    ['MME', 'yes', 'yes', 'yes', 'yes', 'no', 'rule', '']
    """
    lines = [["benchmark", *COLUMNS, "evaluation", "reason of a difference"]]
    for name, row in SURVEY_ROWS.usable().items():
        cells = [_cell_text(_word(row.survey[c]), _word(row.value(c))) for c in COLUMNS]
        evaluation = _cell_text(row.survey_evaluation, row.evaluation)
        lines.append([name, *cells, evaluation, "; ".join(f"{c}: {reason}" for c, reason in row.reasons.items())])
    return lines


def _word(value: bool) -> str:
    return "yes" if value else "no"


def _cell_text(survey: str, ours: str) -> str:
    return survey if survey == ours else f"{survey} -> {ours}"
