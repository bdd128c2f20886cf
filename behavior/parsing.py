"""From what a model wrote to the answer it gave: named rules, because codebases differ and scores with them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from groundscope.core.errors import ConfigError

Parser = Callable[[str], str | None]
"""From a text to ``yes``, ``no``, or None where it is neither."""

YES_NO = frozenset({"yes", "no"})


def pope_release(text: str) -> str:
    """Read a text as POPE's released evaluation does (RUCAIBox/POPE, ``evaluate.py``).

    Of what stands before the first full stop, without its commas: ``no`` where one of the words, cut at spaces, is
    ``No``, ``not`` or ``no``, else ``yes``. So an empty answer, "NO" and "I cannot tell" all count as yes.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def mme(text: str) -> str | None:
    """Read a text as MME's released evaluation does (BradyFU/Awesome-Multimodal-Large-Language-Models).

    The whole text where it is ``yes`` or ``no`` in any case; else ``yes`` or ``no``, in this order, where it is within
    the first four characters; else None.
    """
    plain = text.strip().lower()
    if plain in YES_NO:
        return plain
    return next((answer for answer in ("yes", "no") if answer in plain[:4]), None)


def amber_release(text: str) -> str | None:
    """Take a text that is just ``Yes`` or ``No``, so written, as AMBER's released evaluation does; None for all others.

    Source: junyangwang0410/AMBER, ``inference.py``; answers are brought to these words before.
    """
    return text.lower() if text in {"Yes", "No"} else None


def strict(text: str) -> str | None:
    """Take a text that is ``yes`` or ``no``, in any case, with at most one full stop after it; None for all others."""
    plain = text.strip().lower().removesuffix(".")
    return plain if plain in YES_NO else None


PARSERS: Mapping[str, Parser] = MappingProxyType(
    {"pope_release": pope_release, "mme": mme, "strict": strict, "amber_release": amber_release}
)
"""Name to rule for answers to yes-no questions."""


def named_parser(name: str) -> Parser:
    """Return a rule by name; raises `ConfigError` for one that there is not."""
    if name not in PARSERS:
        msg = f"no parser '{name}': there are {', '.join(PARSERS)}"
        raise ConfigError(msg)
    return PARSERS[name]


def read_answer(text: str, candidates: Sequence[str], rule: Parser) -> str | None:
    """Return the candidate that a text gives, or None where it gives none.

    Parameters
    ----------
    text
        What the model wrote.
    candidates
        The answers that are possible. Yes-no questions are read by `rule`; for any others it is the only candidate
        that stands in the text as whole words, in any case.
    rule
        One of `PARSERS`.
    """
    if set(candidates) == YES_NO:
        return rule(text)
    found = [c for c in candidates if re.search(rf"(?<!\w){re.escape(c)}(?!\w)", text, re.IGNORECASE)]
    return found[0] if len(found) == 1 else None
