"""Public names of `behavior`, each with its module."""

from . import amber, benchmarks, card, judge_files, metrics, mme, taxonomy
from .answer_files import load_answers
from .answering import answer, answer_each
from .benchmark_table import BenchmarkRow, BenchmarkTable, benchmark_table
from .bleu import bleu
from .card import EvaluationCard, evaluation_card
from .chair import ChairResult, chair
from .comparison import Comparison, compare
from .data_audit import (
    Audit,
    CauseErrors,
    CauseReport,
    Finding,
    audit,
    composition_rarity,
    hold_out_compositions,
    split_by_rarity,
)
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
    "Audit",
    "BehaviorMetric",
    "BehaviorResult",
    "BenchmarkRow",
    "BenchmarkTable",
    "CauseErrors",
    "CauseReport",
    "ChairResult",
    "Comparison",
    "Cost",
    "Description",
    "EvaluationCard",
    "Finding",
    "FreeTextScores",
    "ImageAnnotation",
    "PopeResult",
    "PopeScores",
    "Span",
    "SpanAgreement",
    "amber",
    "answer",
    "answer_each",
    "audit",
    "benchmark_table",
    "benchmarks",
    "bleu",
    "card",
    "chair",
    "compare",
    "compare_metric",
    "compare_spans",
    "composition_rarity",
    "compute_metrics",
    "evaluation_card",
    "hold_out_compositions",
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
    "split_by_rarity",
    "taxonomy",
    "write_descriptions",
]
