"""Public names of `behavior`, each with its module."""

from . import amber, judge_files, mme, taxonomy
from .answer_files import answered_elsewhere
from .answering import answer, answer_each
from .chair import ChairResult, chair
from .comparison import Comparison, compare
from .measures import MEASURES, Measure, measure, measure_change
from .parsing import PARSERS
from .pope import PopeResult, PopeScores, pope
from .result import Answer, BehaviorResult, Cost

__all__ = [
    "MEASURES",
    "PARSERS",
    "Answer",
    "BehaviorResult",
    "ChairResult",
    "Comparison",
    "Cost",
    "Measure",
    "PopeResult",
    "PopeScores",
    "amber",
    "answer",
    "answer_each",
    "answered_elsewhere",
    "chair",
    "compare",
    "judge_files",
    "measure",
    "measure_change",
    "mme",
    "pope",
    "taxonomy",
]
