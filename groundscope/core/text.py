"""Text in messages: near matches of an unknown name."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``; did you mean …?`` with the nearest of the known names, or an empty string where no name is near."""
    names = list(known)
    matches = get_close_matches(word, names, n=3, cutoff=0.6)
    # An option may be written without its group: folds for probe.folds.
    matches += [n for n in names if n.rpartition(".")[2] == word.rpartition(".")[2] and n not in matches]
    return f"; did you mean {' or '.join(matches[:3])}?" if matches else ""
