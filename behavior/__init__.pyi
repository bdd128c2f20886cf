"""Public names of `behavior`, each with its module."""

from . import amber, judge_files, mme, taxonomy
from .answer_files import answered_elsewhere
from .answering import answer, answer_each
from .chair import ChairResult, chair
from .comparison import Comparison, compare
from .parsing import PARSERS
from .pope import PopeResult, PopeScores, pope
from .result import Answer, BehaviorResult, Cost

__all__ = [
    "PARSERS",
    "Answer",
    "BehaviorResult",
    "ChairResult",
    "Comparison",
    "Cost",
    "PopeResult",
    "PopeScores",
    "amber",
    "answer",
    "answer_each",
    "answered_elsewhere",
    "chair",
    "compare",
    "judge_files",
    "mme",
    "pope",
    "taxonomy",
]
