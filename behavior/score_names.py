"""Names of the scores by which candidate answers are compared; `behavior.text_scores` computes those of texts."""

from __future__ import annotations

from groundscope.core.errors import ConfigError
from groundscope.core.text import nearest

FIRST_TOKEN, TEXT, TEXT_PER_TOKEN = "first_token", "text", "text_per_token"
SCORES = (FIRST_TOKEN, TEXT, TEXT_PER_TOKEN)
"""By the logits of their first tokens, by the log-probability of their texts, or by that per token (`behavior.text_scores`)."""


def check_score(score: str) -> None:
    """Raise `ConfigError` for an unknown score.

    >>> from behavior.score_names import check_score
    >>> check_score("text")
    """
    if score not in SCORES:
        msg = f"unknown score '{score}'; choose from {', '.join(SCORES)}{nearest(score, SCORES)}"
        raise ConfigError(msg)
