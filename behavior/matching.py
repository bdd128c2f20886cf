"""Compare the text of an open answer with the true answer and its aliases, by named rules."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

from groundscope.core.errors import ConfigError
from groundscope.core.text import nearest

Match = Callable[[str, str], bool]
"""Function of a model's text and a true answer."""
_NUMBERS = "zero one two three four five six seven eight nine ten".split()
_ARTICLES = {"a", "an", "the"}


def normalize_answer(text: str) -> str:
    """Return an answer in lower case, without punctuation and articles, with digits for the numbers zero to ten.

    These are the steps of the VQA evaluation (Antol et al. 2015, arXiv 1505.00468); unlike its release, every mark is removed
    in the same way: hyphens and slashes separate words, a period or comma between digits remains or is removed.

    Examples
    --------
    >>> from behavior.matching import normalize_answer
    >>> normalize_answer(" The two red-ish Cars. "), normalize_answer("1,000.5 m")
    ('2 red ish cars', '1000.5 m')
    """
    plain = unicodedata.normalize("NFKC", text).lower().replace("\u2019", "'")
    plain = re.sub(r"(?<=\d),(?=\d)", "", plain)
    plain = re.sub(r"[-/_\\|\u2013\u2014]", " ", plain)
    plain = re.sub(r"(?<!\d)\.|\.(?!\d)", "", plain)
    plain = re.sub(r"[^\w\s.'%$+°]", "", plain)
    words = [str(_NUMBERS.index(word)) if word in _NUMBERS else word for word in plain.split()]
    return " ".join(word for word in words if word not in _ARTICLES)


def _normalized(text: str, answer: str) -> bool:
    return normalize_answer(text) == normalize_answer(answer)


def _exact(text: str, answer: str) -> bool:
    return text.strip() == answer.strip()


def _contains(text: str, answer: str) -> bool:
    words = normalize_answer(answer)
    return bool(words) and f" {words} " in f" {normalize_answer(text)} "


MATCHES: Mapping[str, Match] = MappingProxyType({"normalized": _normalized, "contains": _contains, "exact": _exact})
"""Rules for open answers: equal after `normalize_answer`; the answer among the words of the text; equal texts."""
DEFAULT_MATCH = "normalized"


def matches_answer(text: str, answers: Iterable[str], match: str = DEFAULT_MATCH) -> bool:
    """Return whether a text is one of the accepted answers by a rule of `MATCHES`.

    Raises
    ------
    ConfigError
        For an unknown rule.

    Examples
    --------
    >>> from behavior.matching import matches_answer
    >>> matches_answer("A Bicycle.", ["bike", "bicycle"]), matches_answer("It is a bicycle.", ["bicycle"])
    (True, False)
    >>> matches_answer("It is a bicycle.", ["bicycle"], "contains")
    True
    """
    if match not in MATCHES:
        msg = f"unknown match '{match}'; choose from {', '.join(MATCHES)}{nearest(match, MATCHES)}"
        raise ConfigError(msg)
    return any(MATCHES[match](text, answer) for answer in answers)
