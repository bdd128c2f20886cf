"""Text for messages: near matches of an unknown name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
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


def format_reasons(counts: Mapping[str, int], most: int | None = None) -> str:
    """Return reasons with their numbers, the most frequent first, without those of number 0.

    The number follows the reason, so that a reason in the plural ("images without a box") is right for 1 as well.

    Parameters
    ----------
    counts
        Reason to number.
    most
        Number of reasons to name; of the others only their number is returned. None for all.

    Examples
    --------
    >>> from groundscope.core.text import format_reasons
    >>> format_reasons({"images without a box": 1, "objects too large to fill": 12, "crowds": 0})
    'objects too large to fill (12); images without a box (1)'
    """
    reasons = [(reason, count) for reason, count in Counter(counts).most_common() if count > 0]
    named = [f"{reason} ({count:,})" for reason, count in reasons[:most]]
    more = len(reasons) - len(named)
    return "; ".join([*named, format_count(more, "more reason")] if more else named)
