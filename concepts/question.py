"""A question about an image, with its true answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from concepts.concept import Level

YES_NO = ("yes", "no")
"""Candidates of a yes-no question."""


def yes_or_no(truth: bool) -> str:
    """Return the true answer to a yes-no question."""
    return YES_NO[0] if truth else YES_NO[1]


@dataclass(frozen=True)
class Question:
    """A question about an image, with its true answer; `Example` adds the image.

    Examples
    --------
    >>> import groundscope as gs
    >>> question = gs.Question("Is there a dog in the image?", "no", ("yes", "no"), "object", "existence")
    >>> question.answer in question.candidates
    True
    """

    text: str
    answer: str
    """The true answer."""
    candidates: tuple[str, ...]
    """The possible answers, such as ``("yes", "no")`` or all colors; empty for free text."""
    level: Level
    kind: str
    """Form of the question: ``existence``, ``color``, ``what_color``, ``size``, ``relation``, ``caption``, …"""
    subject: str | None = None
    """Id of the object of the question; None if the object is not in the image."""
    labels: Mapping[str, bool] = field(default_factory=dict)
    """Truth of the concepts that the question is about, by concept (``level:name``)."""
    prior_answer: str | None = None
    """The most likely answer without the image, such as the typical color; None if unknown."""
