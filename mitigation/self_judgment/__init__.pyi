"""Public names of `mitigation.self_judgment`."""

from .detector import ALPHAS, DetectorResult, DetectorRow, detect
from .dsgd import CHOICES, SelfJudgmentDecoding
from .judge import EMBEDDED_TEMPLATE, PAPER_TEMPLATE, Judge, Judgments, judge_sentences

__all__ = [
    "ALPHAS",
    "CHOICES",
    "EMBEDDED_TEMPLATE",
    "PAPER_TEMPLATE",
    "DetectorResult",
    "DetectorRow",
    "Judge",
    "Judgments",
    "SelfJudgmentDecoding",
    "detect",
    "judge_sentences",
]
