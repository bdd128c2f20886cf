"""Questions about true and false captions of an image, whose candidate answers differ in their first token.

Captions that differ only in the middle have the same first token, so they cannot be the candidates. The question is whether
one caption is true (yes or no), or which of several captions is true (by letter).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from concepts.concept import Level
from concepts.image_source import ImageSource
from concepts.question import YES_NO, yes_or_no
from concepts.schema import Example
from groundscope.core.errors import ConfigError, DataError
from groundscope.core.text import nearest

FORMS = ("yes_no", "choice")
"""``yes_no``: one question about the true caption and one about a false caption. ``choice``: one question with all captions,
answered by a letter."""
LETTERS = "ABCDEFGH"


@dataclass(frozen=True)
class CaptionedImage:
    """An image with captions, and the level and kind of their questions."""

    id: str
    image: ImageSource
    group: str
    level: Level
    kind: str
    split: str = "neutral"
    labels: Mapping[str, bool] | None = None
    """Labels of the image, the same for all of its captions."""


def truth_question(subject: CaptionedImage, caption: str, truth: bool, name: str) -> Example:
    """Return the question whether a caption is true; `name` ends its id, which must be unique."""
    return Example(
        id=f"{subject.id}/{name}",
        image=subject.image,
        question=f'Is the statement "{caption.strip()}" true of the image?',
        answer=yes_or_no(truth),
        candidates=YES_NO,
        level=subject.level,
        kind=subject.kind,
        split=subject.split,
        group=subject.group,
        labels={**(subject.labels or {}), f"{subject.level}:named": truth},
    )


def check_form(form: str) -> None:
    """Raise `ConfigError` for an unknown form."""
    if form not in FORMS:
        msg = f"unknown form '{form}'; choose from {', '.join(FORMS)}{nearest(form, FORMS)}"
        raise ConfigError(msg)


def caption_questions(
    subject: CaptionedImage, true: str, false: Sequence[str], form: str, where: str
) -> tuple[Example, ...]:
    """Return the questions about one true caption and one or more false captions.

    The digest of the id selects the false caption, and the letter of the true caption: uniform over a dataset, and
    independent of its other images.

    Raises
    ------
    DataError
        Names the record: for equal captions, or too many.
    """
    if len({c.strip() for c in (true, *false)}) <= len(false) or len(false) >= len(LETTERS):
        msg = f"{where}: the captions must differ, and there may be at most {len(LETTERS)}"
        raise DataError(msg)
    number = int.from_bytes(hashlib.sha256(subject.id.encode()).digest()[:8])
    if form == "yes_no":
        other = false[number % len(false)]
        return truth_question(subject, true, True, "true"), truth_question(subject, other, False, "false")
    place = number % (len(false) + 1)
    captions = [*false[:place], true, *false[place:]]
    letters = tuple(LETTERS[: len(captions)])
    options = " ".join(f"{letter}: {c.strip()}" for letter, c in zip(letters, captions, strict=True))
    return (
        Example(
            id=subject.id,
            image=subject.image,
            question=f"Which is true of the image? {options} Answer with {', '.join(letters[:-1])} or {letters[-1]}.",
            answer=letters[place],
            candidates=letters,
            level=subject.level,
            kind=subject.kind,
            split=subject.split,
            group=subject.group,
            labels=dict(subject.labels or {}),
        ),
    )


def count_unused(false: Sequence[str], form: str) -> int:
    """Return the number of false captions without a question."""
    return len(false) - 1 if form == "yes_no" else 0
