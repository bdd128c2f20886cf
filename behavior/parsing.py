"""Parse generated text into answers with named rules, because released scorers differ and change the figures."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from behavior.matching import DEFAULT_MATCH, matches_answer
from groundscope.core.errors import ConfigError

if TYPE_CHECKING:
    from concepts.schema import ConceptDataset, Example

Parser = Callable[[str], str | None]
"""Function from a text to ``yes``, ``no``, or None if it is neither."""

YES_NO = frozenset({"yes", "no"})
_YES = re.compile(r"\byes\b", re.IGNORECASE)
_VLMEVALKIT_MARKS = ';/[]"{}()=+\\_-><@`,?!'


def pope_release(text: str) -> str:
    """Parse a text as POPE's released evaluation does (RUCAIBox/POPE, ``evaluate.py``).

    Take the text before the first period and remove commas: ``no`` if one of the words, split at single spaces, is
    ``No``, ``not`` or ``no``, otherwise ``yes``.

    Errors of the release, reproduced here: an empty answer, "I cannot tell", "NO", "No!", "**No**" and "None" all count
    as yes; a line break does not end a word. `yes_no` returns None for texts that do not contain yes.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def yes_no(text: str) -> str | None:
    """Parse a text as `pope_release` does, but require an explicit yes.

    ``no`` if the released rule returns no; ``yes`` if it returns yes and the word yes, ignoring case, is before the first
    period; otherwise None: the text is empty, a refusal or something else.
    """
    if pope_release(text) == "no":
        return "no"
    return "yes" if _YES.search(text.split(".")[0]) else None


def mme(text: str) -> str | None:
    """Parse a text as MME's released evaluation does (BradyFU/Awesome-Multimodal-Large-Language-Models).

    ``yes`` if the first four characters of the lower-cased text contain it, otherwise ``no`` if they contain that,
    otherwise None.

    Errors of the release, reproduced here: leading spaces count as characters ("  Yes" is neither), and "know" or
    "nothing" is no.
    """
    start = text.lower()[:4]
    return next((answer for answer in ("yes", "no") if answer in start), None)


def amber_release(text: str) -> str | None:
    """Accept exactly ``Yes`` or ``No``, as AMBER's released evaluation does; None for every other text.

    Source: junyangwang0410/AMBER, ``inference.py``. Error of the release, reproduced here: "yes", "No." and "Yes, it is"
    are neither, and therefore wrong.
    """
    return text.lower() if text in {"Yes", "No"} else None


def strict(text: str) -> str | None:
    """Accept ``yes`` or ``no``, ignoring case, with at most one period after it; None for every other text."""
    plain = text.strip().lower().removesuffix(".")
    return plain if plain in YES_NO else None


def lmms_eval(text: str) -> str | None:
    """Accept ``yes`` or ``no``, ignoring case and surrounding spaces, as lmms-eval does for POPE; None for other texts."""
    plain = text.lower().strip()
    return plain if plain in YES_NO else None


def vlmevalkit(text: str) -> str | None:
    r"""Parse a text as VLMEvalKit does for yes-no questions (open-compass/VLMEvalKit, ``YOrN_Extraction``).

    In the lower-cased text, each mark of ``; / [ ] " { } ( ) = + \ _ - > < @ ` , ? !`` is deleted if the text contains it
    next to a space anywhere, or a comma between digits anywhere; otherwise it becomes a space. Then the first 32 periods
    without a digit on either side are deleted. The answer is ``yes`` or ``no``, whichever is among the words; None for
    both or neither.

    Errors of the release, reproduced here: ``*``, ``:`` and single quotes remain, so "**Yes**" is neither; a mark next to
    a space in one place joins words in other places ("yes,or no, who knows" has the word "yesor"); only 32 periods are
    deleted.
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
"""Rules for answers to yes-no questions, by name."""
DEFAULT_PARSER = "yes_no"
BENCHMARK_PARSERS: Mapping[str, str] = MappingProxyType({"mme": "mme", "amber": "amber_release"})
"""Loader of a dataset to the parser of its release, if that is the default."""


def named_parser(name: str) -> Parser:
    """Return a rule by name; raises `ConfigError` for an unknown name."""
    if name not in PARSERS:
        msg = f"unknown parser '{name}'; choose from {', '.join(PARSERS)}"
        raise ConfigError(msg)
    return PARSERS[name]


def parser_for(data: ConceptDataset, name: str | None = None) -> str:
    """Return the parser name for a dataset: `name` if it is not None, otherwise that of the benchmark.

    The benchmark is the loader in the dataset's provenance: MME and AMBER use the parsers of their releases, all other
    datasets use `DEFAULT_PARSER`.

    Raises
    ------
    ConfigError
        For an unknown name.
    """
    parser = BENCHMARK_PARSERS.get(str(data.provenance.get("loader")), DEFAULT_PARSER) if name is None else name
    named_parser(parser)
    return parser


def parsers_of(data: ConceptDataset, name: str | None = None) -> tuple[str, dict[str, Parser]]:
    """Return the names of the parsers of a dataset, joined by commas, and the parser of each example by its id.

    The parts of a combined dataset (`concepts.combine_datasets`) have a parser each, as by `parser_for`.
    """
    from concepts.combination import dataset_parts

    parts = dataset_parts(data)
    names = {part: parser_for(rows, name) for part, rows in parts.items()}
    rules = {example.id: PARSERS[names[part]] for part, rows in parts.items() for example in rows}
    return ", ".join(dict.fromkeys(names.values())) or parser_for(data, name), rules


def judge_text(example: Example, text: str, rule: Parser, match: str = DEFAULT_MATCH) -> tuple[str | None, bool | None]:
    """Return the candidate that a text chooses, and whether it is right: ``given`` and ``correct`` of an `Answer`.

    A question with candidates is parsed by `rule` (`read_answer`); an open question is compared with its true answer and
    aliases by `match` (`behavior.matching`) and has no ``given``; a caption is neither right nor wrong.
    """
    if example.candidates:
        choice = read_answer(text, example.candidates, rule)
        return choice, choice == example.answer
    if example.kind == "caption" or not example.answer.strip():
        return None, None
    return None, matches_answer(text, (example.answer, *example.aliases), match)


def read_answer(text: str, candidates: Sequence[str], rule: Parser) -> str | None:
    """Return the candidate that a text contains, or None if it contains no candidate or several.

    Parameters
    ----------
    text
        Text that the model generated.
    candidates
        The possible answers. Yes-no questions are parsed by `rule`; for all others the answer is the only candidate that
        the text contains as whole words, ignoring case.
    rule
        One of `PARSERS`.
    """
    if set(candidates) == YES_NO:
        return rule(text)
    matches = [c for c in candidates if re.search(rf"(?<!\w){re.escape(c)}(?!\w)", text, re.IGNORECASE)]
    return matches[0] if len(matches) == 1 else None
