"""Text for messages: near matches of an unknown name."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(word: str, names: Iterable[str]) -> str:
    """Return ``; did you mean …?`` with the nearest of `names`, or an empty string if no name is near."""
    candidates = list(names)
    matches = get_close_matches(word, candidates, n=3, cutoff=0.6)
    # Also match an option without its group: folds for probe.folds.
    matches += [n for n in candidates if n.rpartition(".")[2] == word.rpartition(".")[2] and n not in matches]
    return f"; did you mean {' or '.join(matches[:3])}?" if matches else ""


def format_count(count: int, noun: str, plural: str = "") -> str:
    """Return a number and its noun, in the singular for 1 and otherwise in the plural: with an s, or as `plural` says.

    >>> from groundscope.core.text import format_count
    >>> format_count(1, "wrong answer"), format_count(0, "pair"), format_count(1200, "forward pass", "forward passes")
    ('1 wrong answer', '0 pairs', '1,200 forward passes')
    """
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"
