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
