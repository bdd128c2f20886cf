"""Symptoms of a conflict between image and prior (survey 3.2.2): self-contradiction, hesitation, rationalization.

- **Contradiction**: of facts that are asked in several forms (a question and its negation, a paraphrase, yes/no and
  choice), the share answered rightly in one form and wrongly in another. Two wrong answers may also differ; they are
  not counted, so this is a lower bound.
- **Hesitation**: the share of written answers with one of `HEDGES`; and the mean entropy, in nats, of right against
  best other candidate by the margin of their log-scores (ln 2 is undecided).
- **Rationalization**: the share of written answers that match one of `RATIONALIZATIONS`, stated patterns of
  explaining a claim away.
- **Form**: the share of written answers to questions with candidates that have the requested form, which begins with
  a candidate or its letter. It is the card's measure of instruction following.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from behavior.benchmarks.rates import average, grouped, share
from behavior.result import Answer
from groundscope.core.statistics import Estimate

HEDGES = (
    "maybe", "perhaps", "possibly", "probably", "might", "may be", "could be", "appears to", "seems", "it is difficult to tell",
    "not sure", "unclear", "hard to say", "i think", "cannot determine", "likely",
)  # fmt: skip
"""Words and phrases of hesitation, compared in lower case as whole words."""
RATIONALIZATIONS = (
    r"\bbecause\b", r"\bdue to\b", r"\bsince (?:it|they|the)\b", r"\b(?:al)?though\b", r"\beven if\b", r"\bnot (?:yet )?ripe\b",
    r"\bunripe\b", r"\bmust (?:be|have)\b", r"\bwould (?:be|have)\b", r"\busually\b", r"\btypically\b", r"\bnormally\b",
)  # fmt: skip
"""Patterns of an explanation, compared in lower case."""
_HEDGE = re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, HEDGES)) + r")(?!\w)")
_EXPLAINS = re.compile("|".join(RATIONALIZATIONS))


def hesitates(text: str) -> bool:
    """Return whether a text has one of `HEDGES`.

    >>> from behavior.card import hesitates
    >>> hesitates("It might be red."), hesitates("It is red."), hesitates("A mighty dog")
    (True, False, False)
    """
    return _HEDGE.search(text.lower()) is not None


def rationalizes(text: str) -> bool:
    """Return whether a text matches one of `RATIONALIZATIONS`.

    >>> from behavior.card import rationalizes
    >>> rationalizes("Red, although it is not yet ripe"), rationalizes("It is red.")
    (True, False)
    """
    return _EXPLAINS.search(text.lower()) is not None


def has_form(answer: Answer) -> bool | None:
    """Return whether a written answer begins with a candidate, or with a candidate's letter; None if there is nothing to judge.

    >>> import groundscope as gs
    >>> from behavior.card import has_form
    >>> about = ("q", "image", "neutral", "object", "existence", "Is there a cat?", "yes", ("yes", "no"))
    >>> [has_form(gs.Answer(*about, None, False, text=text)) for text in ("Yes, one.", "There is one.", "")]
    [True, False, False]
    """
    if answer.text is None or not answer.candidates:
        return None
    plain = answer.text.strip().lstrip("*_`\"'([").lower()
    return any(re.match(rf"{re.escape(c.strip('()').lower())}(?!\w)", plain) is not None for c in answer.candidates)


def entropy_of(margin: float) -> float:
    """Return the entropy in nats of two candidates whose log-scores differ by `margin`.

    >>> from behavior.card import entropy_of
    >>> round(entropy_of(0.0), 4), round(entropy_of(50.0), 4)
    (0.6931, 0.0)
    """
    p = 1 / (1 + math.exp(-abs(margin)))
    return 0.0 if p in {0.0, 1.0} else -(p * math.log(p) + (1 - p) * math.log1p(-p))


def symptoms(answers: Sequence[Answer], facts: Mapping[str, str] | None = None) -> dict[str, Estimate]:
    """Return the rates of symptoms that the answers allow to measure, with intervals clustered by image.

    Parameters
    ----------
    answers
        The answers.
    facts
        Id of a question to the fact that it asks about; questions with the same fact are its forms.

    Examples
    --------
    >>> import groundscope as gs
    >>> from behavior.card import symptoms
    >>> about = ("image", "neutral", "attribute", "color", "Is it red?", "yes", ("yes", "no"))
    >>> rows = [gs.Answer(f"q{i}", *about, given, given == "yes", text=f"{given}.") for i, given in enumerate(["yes", "no"])]
    >>> result = symptoms(rows, {"q0": "red", "q1": "red"})
    >>> result["contradiction"].value, result["hesitation"].value, result["form"].value
    (1.0, 0.0, 1.0)
    """
    rates: dict[str, Estimate] = {}
    judged = [a for a in answers if a.correct is not None and a.kind != "caption"]
    forms_of_fact = grouped([a for a in judged if facts and a.id in facts], lambda a: (facts or {})[a.id])
    several = [forms for forms in forms_of_fact.values() if len(forms) > 1]
    if several:
        changed = [len({bool(a.correct) for a in forms}) > 1 for forms in several]
        rates["contradiction"] = share(changed, [forms[0].group for forms in several])
    written = [a for a in answers if a.text is not None]
    if written:
        groups = [a.group for a in written]
        rates["hesitation"] = share([hesitates(a.text or "") for a in written], groups)
        rates["rationalization"] = share([rationalizes(a.text or "") for a in written], groups)
    formed = [(form, a.group) for a in written if (form := has_form(a)) is not None]
    if formed:
        rates["form"] = share([form for form, _ in formed], [group for _, group in formed])
    scored = [a for a in answers if a.margin is not None]
    if scored:
        values = [entropy_of(a.margin or 0.0) for a in scored]
        rates["entropy"] = average(values, [a.group for a in scored], 0, math.log(2))
    return rates
