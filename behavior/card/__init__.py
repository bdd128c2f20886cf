"""The evaluation card: frequency and severity of wrong answers by benchmark, level and task, for one or several models.

`evaluation_card`
    Make a card of answers, scored benchmarks and verdict files; `EvaluationCard` saves JSON with a schema, CSV and a page.
`PROFILES`
    Severity profiles: driving, medical, assistive, uniform.
`SURVEY_ROWS`
    The survey's Table 3, with its values, ours and reasons; open (`register_row`).
`reword`
    Answers of a local model that change under paraphrase and under the form of the answer; rules in `REWORDINGS`, which is open.
`symptoms`
    Self-contradiction, hesitation, rationalization, and answers in the asked form.
"""

from behavior.card.card import EvaluationCard, evaluation_card, judge_captions, task_of
from behavior.card.facts import facts_of
from behavior.card.files import CARD_SCHEMA
from behavior.card.page import CardTable, card_page, card_tables, table_html
from behavior.card.profiles import PROFILES, Profile, named_profiles, weight_of
from behavior.card.rewording import REWORDINGS, RewordedAnswers, Rewording, reword
from behavior.card.rows import CardAnswer, CardDifference, CardFigure, CardRow, ModelFacts
from behavior.card.safety import read_safety
from behavior.card.survey_table import SURVEY_ROWS, SurveyRow, register_row, survey_cells
from behavior.card.symptoms import HEDGES, RATIONALIZATIONS, entropy_of, has_form, hesitates, rationalizes, symptoms
from behavior.card.tables import (
    card_text,
    difference_cells,
    fact_cells,
    figure_cells,
    profile_cells,
    ranking_lines,
    rewording_cells,
    row_cells,
    share_text,
    summary_lines,
)

__all__ = [
    "CARD_SCHEMA",
    "HEDGES",
    "PROFILES",
    "RATIONALIZATIONS",
    "REWORDINGS",
    "SURVEY_ROWS",
    "CardAnswer",
    "CardDifference",
    "CardFigure",
    "CardRow",
    "CardTable",
    "EvaluationCard",
    "ModelFacts",
    "Profile",
    "RewordedAnswers",
    "Rewording",
    "SurveyRow",
    "card_page",
    "card_tables",
    "card_text",
    "difference_cells",
    "entropy_of",
    "evaluation_card",
    "fact_cells",
    "facts_of",
    "figure_cells",
    "has_form",
    "hesitates",
    "judge_captions",
    "named_profiles",
    "profile_cells",
    "ranking_lines",
    "rationalizes",
    "read_safety",
    "register_row",
    "reword",
    "rewording_cells",
    "row_cells",
    "share_text",
    "summary_lines",
    "survey_cells",
    "symptoms",
    "table_html",
    "task_of",
    "weight_of",
]
