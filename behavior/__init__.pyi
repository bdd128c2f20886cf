"""Public names of `behavior`, each with its module."""

from . import amber, benchmarks, card, judge_files, metrics, mme, taxonomy
from .answer_files import load_answers
from .answering import answer, answer_each
from .benchmark_table import BenchmarkRow, BenchmarkTable, benchmark_table
from .bleu import bleu
from .card import EvaluationCard, evaluation_card
from .chair import ChairResult, chair
from .comparison import Comparison, compare
from .free_text import (
    Description,
    FreeTextScores,
    ImageAnnotation,
    Span,
    SpanAgreement,
    compare_spans,
    image_annotations,
    judge_description,
    parse_description,
    read_descriptions,
    score_descriptions,
    write_descriptions,
)
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
    "Description",
    "EvaluationCard",
    "FreeTextScores",
    "ImageAnnotation",
    "PopeResult",
    "PopeScores",
    "Span",
    "SpanAgreement",
    "amber",
    "answer",
    "answer_each",
    "benchmark_table",
    "benchmarks",
    "bleu",
    "card",
    "chair",
    "compare",
    "compare_metric",
    "compare_spans",
    "compute_metrics",
    "evaluation_card",
    "image_annotations",
    "judge_description",
    "judge_files",
    "load_answers",
    "metrics",
    "mme",
    "parse_description",
    "pope",
    "read_descriptions",
    "score_descriptions",
    "taxonomy",
    "write_descriptions",
]
