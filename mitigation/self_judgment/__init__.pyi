"""Public names of `mitigation.self_judgment`."""

from .detector import ALPHAS, DetectorResult, DetectorRow, detect
from .dsgd import CHOICES, SelfJudgmentDecoding
from .fgsd import (
    HARM_TEMPLATE,
    HarmRefusal,
    RefusalCalibration,
    RefusalRates,
    calibrate_refusal,
    choose_threshold,
    harm_scores,
    refusal_rates,
)
from .judge import EMBEDDED_TEMPLATE, PAPER_TEMPLATE, Judge, Judgments, judge_sentences
from .sentence_tree import ScoredAnswer, SentenceTree, grow_tree, judged_preferences

__all__ = [
    "ALPHAS",
    "CHOICES",
    "EMBEDDED_TEMPLATE",
    "HARM_TEMPLATE",
    "PAPER_TEMPLATE",
    "DetectorResult",
    "DetectorRow",
    "HarmRefusal",
    "Judge",
    "Judgments",
    "RefusalCalibration",
    "RefusalRates",
    "ScoredAnswer",
    "SelfJudgmentDecoding",
    "SentenceTree",
    "calibrate_refusal",
    "choose_threshold",
    "detect",
    "grow_tree",
    "harm_scores",
    "judge_sentences",
    "judged_preferences",
    "refusal_rates",
]
