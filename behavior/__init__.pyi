"""Public names of `behavior`, each with its module."""

from . import amber, judge_files, metrics, mme, taxonomy
from .answer_files import load_answers
from .answering import answer, answer_each
from .benchmark_table import BenchmarkRow, BenchmarkTable, benchmark_table
from .bleu import bleu
from .chair import ChairResult, chair
from .comparison import Comparison, compare
from .metrics import BehaviorMetric, compare_metric, compute_metrics
from .parsing import PARSERS
from .pope import PopeResult, PopeScores, pope
from .result import Answer, BehaviorResult, Cost

__all__ = [
    "PARSERS",
    "Answer",
    "BehaviorMetric",
    "BehaviorResult",
    "BenchmarkRow",
    "BenchmarkTable",
    "ChairResult",
    "Comparison",
    "Cost",
    "PopeResult",
    "PopeScores",
    "amber",
    "answer",
    "answer_each",
    "benchmark_table",
    "bleu",
    "chair",
    "compare",
    "compare_metric",
    "compute_metrics",
    "judge_files",
    "load_answers",
    "metrics",
    "mme",
    "pope",
    "taxonomy",
]
