"""True and false captions of an image as questions whose answers begin with different words.

Captions that differ in their middle begin alike, so a model's first token cannot choose between them. Asked is whether a
caption is true, yes or no; or which of several is true, by letter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from concepts.reading.assembly import YES_NO, yes_or_no
from concepts.schema import Example, ImageSource, Level
from groundscope.core.errors import ConfigError, DataError

FORMS = ("yes_no", "choice")
"""``yes_no``: the true caption and one false one, each asked about alone. ``choice``: all captions, by letter."""
LETTERS = "ABCDEFGH"


@dataclass(frozen=True)
class Captioned:
    """An image with captions, and what they are about."""

    id: str
    image: ImageSource
    group: str
    level: Level
    kind: str
    split: str = "neutral"
    labels: Mapping[str, bool] | None = None
    """Concepts that are so in the image, whichever caption is asked about."""


def statement(subject: Captioned, caption: str, truth: bool, name: str) -> Example:
    """Return the question whether a caption is true; `name` tells it from others about the same image."""
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
    """Raise `ConfigError` for a form that there is not."""
    if form not in FORMS:
        msg = f"form='{form}': there are {', '.join(FORMS)}"
        raise ConfigError(msg)


def asked(subject: Captioned, true: str, false: Sequence[str], form: str, where: str) -> tuple[Example, ...]:
    """Return the questions about one true caption and one or more false ones.

    Which false caption is asked about, and under which letter the true one stands, is decided by the digest of the id:
    all alike over a data set, and the same whatever else is in it.

    Raises
    ------
    DataError
        Naming the record, for captions that are equal or too many.
    """
    if len({c.strip() for c in (true, *false)}) <= len(false) or len(false) >= len(LETTERS):
        msg = f"{where}: the captions must differ, and be {len(LETTERS)} at most"
        raise DataError(msg)
    chance = int.from_bytes(hashlib.sha256(subject.id.encode()).digest()[:8])
    if form == "yes_no":
        other = false[chance % len(false)]
        return statement(subject, true, True, "true"), statement(subject, other, False, "false")
    place = chance % (len(false) + 1)
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


def further(false: Sequence[str], form: str) -> int:
    """Return how many false captions are not asked about."""
    return len(false) - 1 if form == "yes_no" else 0
