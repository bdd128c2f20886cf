"""From what a model wrote to the answer it gave: named rules, because released scorers differ, and figures with them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from groundscope.core.errors import ConfigError

if TYPE_CHECKING:
    from concepts.schema import ConceptDataset

Parser = Callable[[str], str | None]
"""From a text to ``yes``, ``no``, or None where it is neither."""

YES_NO = frozenset({"yes", "no"})
_YES = re.compile(r"\byes\b", re.IGNORECASE)
_VLMEVALKIT_MARKS = ';/[]"{}()=+\\_-><@`,?!'


def pope_release(text: str) -> str:
    """Read a text as POPE's released evaluation does (RUCAIBox/POPE, ``evaluate.py``).

    Of the text before the first full stop, without its commas: ``no`` if one of the words, split at single spaces, is
    ``No``, ``not`` or ``no``, else ``yes``.

    Slips of the release, kept here: an empty answer, "I cannot tell", "NO", "No!", "**No**" and "None" all count as
    yes; a line break does not end a word. `yes_no` is the same rule without them.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def yes_no(text: str) -> str | None:
    """Read a text as `pope_release` does, but only where it says yes or no.

    ``no`` where the released rule says no; ``yes`` where it says yes and the word yes, in any case, is before the first
    full stop; else None: the text is empty, a refusal or something else.
    """
    if pope_release(text) == "no":
        return "no"
    return "yes" if _YES.search(text.split(".")[0]) else None


def mme(text: str) -> str | None:
    """Read a text as MME's released evaluation does (BradyFU/Awesome-Multimodal-Large-Language-Models).

    The first of ``yes`` and ``no`` that is contained in the first four characters of the lower-cased text; else None.

    Slips of the release, kept here: blanks at the start count as characters ("  Yes" is neither), and "know" or
    "nothing" is no.
    """
    start = text.lower()[:4]
    return next((answer for answer in ("yes", "no") if answer in start), None)


def amber_release(text: str) -> str | None:
    """Accept exactly ``Yes`` or ``No``, as AMBER's released evaluation does; None for every other text.

    Source: junyangwang0410/AMBER, ``inference.py``. Slip of the release, kept here: "yes", "No." and "Yes, it is" are
    neither, and wrong.
    """
    return text.lower() if text in {"Yes", "No"} else None


def strict(text: str) -> str | None:
    """Accept a text that is ``yes`` or ``no``, in any case, with at most one full stop after it; None for all others."""
    plain = text.strip().lower().removesuffix(".")
    return plain if plain in YES_NO else None


def lmms_eval(text: str) -> str | None:
    """Accept ``yes`` or ``no`` in any case with blanks around it, as lmms-eval does for POPE; None for all others."""
    plain = text.lower().strip()
    return plain if plain in YES_NO else None


def vlmevalkit(text: str) -> str | None:
    r"""Read a text as VLMEvalKit does for yes-no questions (open-compass/VLMEvalKit, ``YOrN_Extraction``).

    Of the lower-cased text, each mark of ``; / [ ] " { } ( ) = + \ _ - > < @ ` , ? !`` is deleted if the text has it
    next to a space anywhere, or has a comma between digits anywhere, and else becomes a space; then full stops with no
    digit on either side are deleted, the first 32 of them. The answer is the one of ``yes`` and ``no`` that is among
    the words; None for both or neither.

    Slips of the release, kept here: ``*``, ``:`` and single quotes stay, so "**Yes**" is neither; a mark that has a
    space anywhere joins words elsewhere ("yes,or no, who knows" has the word "yesor"); only 32 full stops are deleted.
    """
    lower = text.lower()
    digits = re.search(r"\d,\d", lower) is not None
    plain = lower
    for mark in _VLMEVALKIT_MARKS:
        deleted = digits or f"{mark} " in lower or f" {mark}" in lower
        plain = plain.replace(mark, "" if deleted else " ")
    words = set(re.sub(r"(?<!\d)\.(?!\d)", "", plain, count=32).split())
    both = words & YES_NO
    return both.pop() if len(both) == 1 else None


PARSERS: Mapping[str, Parser] = MappingProxyType(
    {
        "pope_release": pope_release,
        "mme": mme,
        "strict": strict,
        "amber_release": amber_release,
        "yes_no": yes_no,
        "lmms_eval": lmms_eval,
        "vlmevalkit": vlmevalkit,
    }
)
"""Name to rule for answers to yes-no questions."""
DEFAULT_PARSER = "yes_no"
BENCHMARK_PARSERS: Mapping[str, str] = MappingProxyType({"mme": "mme", "amber": "amber_release"})
"""Loader of a dataset to the rule of its release, where that is the default."""


def named_parser(name: str) -> Parser:
    """Return a rule by name; raises `ConfigError` for an unknown name."""
    if name not in PARSERS:
        msg = f"no parser '{name}': there are {', '.join(PARSERS)}"
        raise ConfigError(msg)
    return PARSERS[name]


def parser_for(data: ConceptDataset, name: str | None = None) -> str:
    """Return the name of the rule for a dataset: `name` where it is not None, else that of the benchmark.

    The benchmark is the loader in the dataset's provenance: MME and AMBER have the rules of their releases, all other
    data `DEFAULT_PARSER`.

    Raises
    ------
    ConfigError
        For an unknown name.
    """
    chosen = BENCHMARK_PARSERS.get(str(data.provenance.get("loader")), DEFAULT_PARSER) if name is None else name
    named_parser(chosen)
    return chosen


def read_answer(text: str, candidates: Sequence[str], rule: Parser) -> str | None:
    """Return the candidate that a text gives, or None where it gives none.

    Parameters
    ----------
    text
        What the model wrote.
    candidates
        The possible answers. Yes-no questions are read by `rule`; for all others the answer is the only candidate that
        the text contains as whole words, in any case.
    rule
        One of `PARSERS`.
    """
    if set(candidates) == YES_NO:
        return rule(text)
    found = [c for c in candidates if re.search(rf"(?<!\w){re.escape(c)}(?!\w)", text, re.IGNORECASE)]
    return found[0] if len(found) == 1 else None
