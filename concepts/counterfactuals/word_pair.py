"""Pairs for one word of a written text, such as the wrong word of a caption."""

from __future__ import annotations

import re
from dataclasses import replace

from concepts.counterfactual_pair import CounterfactualPair
from concepts.counterfactuals.image_edits import EditedImage
from concepts.image_source import ImageSource
from concepts.mention import Mention
from concepts.schema import Example
from groundscope.core.errors import ConfigError, DataError
from groundscope.core.text import format_count

_EDITS = ("blank", "blur", "noise")


def word_pair(
    example: Example,
    text: str,
    word: str | Mention,
    right: str | None = None,
    *,
    occurrence: int = 1,
    image: str | ImageSource = "blank",
) -> CounterfactualPair:
    """Return the pair of images after which a model chooses one word of a written text.

    The words before it become the prefix of both examples, so `circuits.patch_heads` and the other methods act where the word
    is chosen. The clean image is the example's; the corrupt image shows no evidence, or other evidence.

    With a right word, the clean answer is `right`, the corrupt answer is `word`, and both are the candidates: an effect is the
    share of the image's evidence for the right word, against the wrong one, that a head carries. Without one (nothing that is
    in the image fits there), the clean answer is `word`, and the pair has no candidates: the metric ``log_probability`` measures
    how much the image raises the word.

    Parameters
    ----------
    example
        The image and the question; its own prefix, kind, answer and candidates are replaced.
    text
        The text, such as a caption of the model.
    word
        A word or phrase of the text as written there, or one of its mentions (`concepts.with_mentions`).
    right
        What the text should say instead.
    occurrence
        Which occurrence of the word, counted from 1.
    image
        The corrupt image: ``blank`` (the mean color), ``blur``, ``noise``, or an image of equal size, on which `word` is true.

    Raises
    ------
    DataError
        If the text does not contain the word, or not as often, or `right` equals it.
    ConfigError
        For an unknown edit of the image.

    Examples
    --------
    >>> import groundscope as gs
    >>> caption = gs.scenes.dataset(10, splits=["caption"])[0]
    >>> pair = gs.counterfactuals.word_pair(caption, "a yellow guitar and a blue car .", "car", "bus")
    >>> pair.clean.prefix, pair.clean.answer, pair.corrupt.answer
    ('a yellow guitar and a blue ', 'bus', 'car')
    """
    start, stop = (word.start, word.stop) if isinstance(word, Mention) else _find(example, text, word, occurrence)
    if not 0 <= start < stop <= len(text):
        msg = f"example '{example.id}': the text has no characters {start}-{stop - 1}; give the text of the mention"
        raise DataError(msg)
    wrong = text[start:stop]
    if right is not None and (not right.strip() or right.lower() == wrong.lower()):
        msg = f"example '{example.id}': the right word must be another word than '{wrong}', not '{right}'"
        raise DataError(msg)
    if isinstance(image, str) and image not in _EDITS:
        msg = f"unknown edit '{image}' of the image; choose from {', '.join(_EDITS)}, or give an image"
        raise ConfigError(msg)
    source = EditedImage(example.image, image) if isinstance(image, str) else image
    change = f"image: {image}" if isinstance(image, str) else "another image"
    clean = replace(
        example,
        id=f"{example.id}|{wrong} at {start}",
        prefix=text[:start] if text[:start].strip() else "",
        kind="word",
        mentions=(),
        answer=wrong if right is None else right,
        candidates=() if right is None else (right, wrong),
        prior_answer=None,
    )
    answer = "" if right is None else wrong
    corrupt = replace(clean, id=f"{clean.id}|{change}", image=source, answer=answer, labels={})
    return CounterfactualPair(clean, corrupt, image if isinstance(image, str) else "image", change)


def _find(example: Example, text: str, word: str, occurrence: int) -> tuple[int, int]:
    matches = list(re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", text)) if word.strip() else []
    if not 1 <= occurrence <= len(matches):
        msg = (
            f"example '{example.id}': the text contains '{word}' {format_count(len(matches), 'time')} as a whole word, "
            f"so it has no occurrence {occurrence}; give a word of the text as written there"
        )
        raise DataError(msg)
    return matches[occurrence - 1].span()
