"""Rates of wrong objects, attributes and relations in descriptions, judged by the annotations of their images.

CHAIR (Rohrbach et al. 2018, arXiv 1809.02156) extended to the three levels of misalignment of Shu et al. (arXiv
2501.01346). A span is ``wrong`` only where the annotation excludes it; what it does not decide is ``unknown``, and no
part of a rate:

- **Objects**: wrong if the noun is listed as absent (closed vocabularies such as COCO's, or a question with the
  answer no), right if it may name an annotated object.
- **Attributes** of annotated objects: right if one of the objects that the noun may name has the attribute; wrong if each
  of them has another value of an exclusive set (one color, one material), or the opposite; numbers by counting, where the
  vocabulary is closed.
- **Relations**: by the data set's own questions and their opposites, and "left of" and "right of" by boxes that do not
  overlap, if both nouns name one object each.

An attribute or relation of an object that is wrong is unknown: the error is counted once, at the object.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from behavior.free_text.annotations import ImageAnnotation, color_of
from behavior.free_text.parser import parse_description
from behavior.free_text.spans import Description, Span, Verdict
from concepts.annotated_object import AnnotatedObject
from concepts.concept import LEVELS, Level
from concepts.nouns import number
from concepts.reading.annotation_questions import COLORS, OPPOSITES, relation_name
from concepts.reading.exclusive_values import ACTIONS, alternatives, attribute_kinds
from groundscope.core.errors import DataError
from groundscope.core.short_repr import short_repr
from groundscope.core.text import format_count

# `import behavior` imports this module, so numpy and modules that need it are imported when scoring.
if TYPE_CHECKING:
    import pandas as pd

    from groundscope.core.statistics import Estimate

_COUNTS = {
    word: n for n, word in enumerate("zero one two three four five six seven eight nine ten eleven twelve".split())
}
_SIDES = {"to the left of": "left", "to the right of": "right"}


@dataclass(frozen=True)
class LevelScores:
    """Rates of one level over all descriptions, with 95 % intervals over images; NaN if the denominator is 0.

    Examples
    --------
    >>> import groundscope as gs
    >>> image = gs.ImageAnnotation("1", (gs.AnnotatedObject("o", "cat", None),), absent=("dog",))
    >>> objects = gs.score_descriptions({"1": "A cat, a dog and a tree."}, {"1": image}).level("object")
    >>> objects.wrong_of_judged.value, objects.unknown.value
    (0.5, 0.3333333333333333)
    """

    level: Level
    n: int
    """Number of spans."""
    wrong_of_judged: Estimate
    """Share of wrong spans among those that the annotation decides; for objects, as CHAIR_i."""
    descriptions_with_wrong: Estimate
    """Share of descriptions with a wrong span; for objects, as CHAIR_s."""
    unknown: Estimate
    """Share of spans that the annotation does not decide."""
    recall: Estimate
    """Share of annotated objects that the description names; NaN for the other levels, whose annotations are not complete."""


@dataclass(frozen=True)
class FreeTextScores:
    """Judged descriptions and their rates at three levels.

    Examples
    --------
    >>> import groundscope as gs
    >>> image = gs.ImageAnnotation("1", (gs.AnnotatedObject("o", "cat", None, {"color": "black"}),))
    >>> scores = gs.score_descriptions({"1": "A white cat."}, {"1": image})
    >>> scores.frame()[["level", "n", "wrong"]].values.tolist()[:2]
    [['object', 1, 0], ['attribute', 1, 1]]
    """

    descriptions: tuple[Description, ...]
    """The texts with spans, verdicts and reasons."""
    levels: tuple[LevelScores, ...]

    __repr__ = short_repr

    def level(self, level: Level) -> LevelScores:
        """Return the rates of one level."""
        return next(row for row in self.levels if row.level == level)

    def frame(self) -> pd.DataFrame:
        """Return one row per level: numbers of spans by verdict, and the rates with their intervals."""
        import pandas as pd

        rows = []
        for scores in self.levels:
            counts = Counter(span.verdict for row in self.descriptions for span in row.of_level(scores.level))
            row: dict[str, object] = {"level": scores.level, "n": scores.n}
            row |= {verdict: counts[verdict] for verdict in ("right", "wrong", "unknown")}
            for name in ("wrong_of_judged", "descriptions_with_wrong", "recall"):
                figure: Estimate = getattr(scores, name)
                row |= {name: figure.value, f"{name}_low": figure.low, f"{name}_high": figure.high}
            rows.append(row)
        return pd.DataFrame(rows)


def score_descriptions(
    descriptions: Mapping[str, str] | Iterable[Description],
    annotations: Mapping[str, ImageAnnotation],
    *,
    nouns: Iterable[str] = (),
) -> FreeTextScores:
    """Parse descriptions, judge their spans by the annotations of their images, and return rates at three levels.

    Parameters
    ----------
    descriptions
        Id to the text, the id being an image or a question; or descriptions with spans, for example by people
        (`read_descriptions`). Spans that have a verdict keep it.
    annotations
        The same ids to the annotations of their images (`image_annotations`); may have more. Intervals are over images.
    nouns
        Further names of things for the parser; those of the annotations are always used.

    Raises
    ------
    DataError
        If there are no descriptions, or one has no annotation, or an id is there twice.

    Examples
    --------
    >>> import groundscope as gs
    >>> data = gs.scenes.dataset(10)
    >>> annotations = gs.image_annotations(data)
    >>> captions = {e.group: e.answer for e in data.where(kind="caption")}
    >>> gs.score_descriptions(captions, annotations).level("attribute").wrong_of_judged.value
    0.0
    """
    rows = _parsed(descriptions, annotations, nouns)
    judged = tuple(judge_description(row, annotations[row.id]) for row in rows)
    return FreeTextScores(judged, tuple(_level_scores(level, judged, annotations) for level in LEVELS))


def _parsed(
    descriptions: Mapping[str, str] | Iterable[Description],
    annotations: Mapping[str, ImageAnnotation],
    nouns: Iterable[str],
) -> list[Description]:
    named_descriptions: list[tuple[str, str | Description]] = []
    if isinstance(descriptions, Mapping):
        named_descriptions += [(str(name), text) for name, text in descriptions.items()]
    else:
        named_descriptions += [(row.id, row) for row in descriptions]
    if not named_descriptions:
        msg = "there are no descriptions to score; give at least one"
        raise DataError(msg)
    repeated = [name for name, count in Counter(name for name, _ in named_descriptions).items() if count > 1]
    if repeated:
        msg = f"the id '{repeated[0]}' has two descriptions; ids must be unique"
        raise DataError(msg)
    missing = [name for name, _ in named_descriptions if name not in annotations]
    if missing:
        msg = (
            f"description '{missing[0]}': no annotation of its image ({format_count(len(missing), 'such description')}); "
            "free text is judged by annotated objects, so load data that has them, or leave these descriptions out"
        )
        raise DataError(msg)
    names = {noun for name, _ in named_descriptions for noun in _nouns(annotations[name])} | set(nouns)
    return [
        row if isinstance(row, Description) else parse_description(row, nouns=names, id=name)
        for name, row in named_descriptions
    ]


def _nouns(image: ImageAnnotation) -> list[str]:
    return [*(o.noun for o in image.objects), *image.present, *image.absent]


def judge_description(description: Description, image: ImageAnnotation) -> Description:
    """Return a description whose spans without a verdict are judged by the annotation of its image, with reasons.

    Examples
    --------
    >>> import groundscope as gs
    >>> image = gs.ImageAnnotation("1", (gs.AnnotatedObject("o", "cat", None, {"color": "black"}),))
    >>> judged = gs.judge_description(gs.parse_description("A white cat under a tree."), image)
    >>> [(judged.phrase(span), span.verdict) for span in judged.spans]
    [('cat', 'right'), ('tree', 'unknown'), ('white cat', 'wrong'), ('cat under tree', 'unknown')]
    """
    wrong: set[tuple[int, int]] = set()
    spans: list[Span] = []
    for span in sorted(description.spans, key=lambda s: LEVELS.index(s.level)):
        if span.verdict is None:
            if any(place in wrong for place in span.arguments):
                verdict, reason = "unknown", "an object that it refers to is not in the image"
            else:
                verdict, reason = _JUDGES[span.level](span, description, image)
            span = replace(span, verdict=verdict, reason=reason)  # the judged span replaces the open one
        if span.level == "object" and span.verdict == "wrong":
            wrong.add(span.place)
        spans.append(span)
    return description.with_spans(spans)


Judgment = tuple[Verdict, str]
_UNKNOWN = "the annotation does not say"


def _judge_object(span: Span, description: Description, image: ImageAnnotation) -> Judgment:
    noun = span.words(description.text).lower()
    presence = image.states_presence(noun)
    if presence is None:
        return "unknown", _UNKNOWN
    return ("right", "annotated") if presence else ("wrong", "annotated as absent")


def _judge_attribute(span: Span, description: Description, image: ImageAnnotation) -> Judgment:
    noun = description.text[slice(*span.arguments[0])].lower()
    word = span.words(description.text).lower()
    objects = image.named(noun)
    if not objects:
        return "unknown", _UNKNOWN
    count = int(word) if word.isdigit() else _COUNTS.get(word)
    if count is not None:
        return _judge_count(count, noun, objects, image)
    if any(_has(item, word) for item in objects):
        return "right", "annotated"
    excluded = [_excluding_value(item, word) for item in objects]
    if all(excluded):
        return "wrong", f"annotated as {excluded[0]}"
    return "unknown", _UNKNOWN


def _judge_count(count: int, noun: str, objects: tuple[AnnotatedObject, ...], image: ImageAnnotation) -> Judgment:
    # One box may hold several things whose noun is in the plural, and an open vocabulary may miss some.
    if not image.absent or any(number(o.noun) != "singular" or o.box is None for o in objects):
        return "unknown", _UNKNOWN
    if len(objects) == count:
        return "right", f"{len(objects)} annotated"
    return "wrong", f"{len(objects)} annotated"


def _has(item: AnnotatedObject, word: str) -> bool:
    values = {value.lower() for value in item.attributes.values()}
    color = color_of(word)
    return word in values or (color is not None and color in {color_of(value) for value in values}) or bool(
        set(attribute_kinds([word], item.noun).items()) & set(attribute_kinds(sorted(values), item.noun).items())
    )  # fmt: skip


def _excluding_value(item: AnnotatedObject, word: str) -> str | None:
    """Return the annotated value that excludes an attribute; None if none does."""
    values = sorted({value.lower() for value in item.attributes.values()})
    color = color_of(word)
    if color in COLORS:
        own = item.attributes.get("color")
        return own if own is not None and color_of(own) not in (None, color) else None
    named = attribute_kinds([word], item.noun)
    for kind, value in attribute_kinds(values, item.noun).items():
        if named.get(kind) in alternatives(kind, value, item.noun):
            return value
    return None


def _judge_relation(span: Span, description: Description, image: ImageAnnotation) -> Judgment:
    subject, other = (description.text[slice(*place)].lower() for place in span.arguments)
    words = span.words(description.text).lower()
    relation = relation_name(words) or next((name for name in (*OPPOSITES, *ACTIONS) if words.endswith(name)), None)
    if relation is None:
        return "unknown", _UNKNOWN
    for name_a, name, name_b, truth in image.relations:
        named = _same(subject, name_a) and _same(other, name_b)
        if named and name == relation:
            return ("right", "annotated") if truth else ("wrong", "annotated as false")
        if truth and named and (OPPOSITES.get(name) == relation or relation in ACTIONS.get(name, ())):
            return "wrong", f"annotated as {name}"
    return _judge_sides(_SIDES.get(relation), image.named(subject), image.named(other))


def _same(noun: str, annotated: str) -> bool:
    return ImageAnnotation("", present=(annotated,)).states_presence(noun) is True


def _judge_sides(side: str | None, first: tuple[AnnotatedObject, ...], second: tuple[AnnotatedObject, ...]) -> Judgment:
    if side is None or len(first) != 1 or len(second) != 1 or first[0].box is None or second[0].box is None:
        return "unknown", _UNKNOWN
    a, b = first[0].box, second[0].box
    if a.x1 <= b.x0 or b.x1 <= a.x0:
        is_left = a.x1 <= b.x0
        return ("right", "by boxes") if is_left == (side == "left") else ("wrong", "by boxes")
    return "unknown", "the boxes overlap"


_JUDGES = {"object": _judge_object, "attribute": _judge_attribute, "relation": _judge_relation}


def _level_scores(
    level: Level, judged: tuple[Description, ...], annotations: Mapping[str, ImageAnnotation]
) -> LevelScores:
    from groundscope.core.statistics import estimate

    images = [annotations[row.id].id for row in judged]
    counts = [Counter(span.verdict for span in row.of_level(level)) for row in judged]
    wrong = [count["wrong"] for count in counts]
    recalls = [_recalled(row, annotations[row.id]) if level == "object" else (0, 0) for row in judged]
    return LevelScores(
        level=level,
        n=sum(sum(count.values()) for count in counts),
        wrong_of_judged=estimate(wrong, images, [count["wrong"] + count["right"] for count in counts]),
        descriptions_with_wrong=estimate([n > 0 for n in wrong], images),
        unknown=estimate([count["unknown"] for count in counts], images, [sum(count.values()) for count in counts]),
        recall=estimate([a for a, _ in recalls], images, [b for _, b in recalls]),
    )


def _recalled(row: Description, image: ImageAnnotation) -> tuple[int, int]:
    """Return how many of the nouns of annotated objects a description names, and how many there are."""
    named = [span.words(row.text).lower() for span in row.of_level("object")]
    nouns = dict.fromkeys(o.noun for o in image.objects)
    return sum(any(_same(word, noun) for word in named) for noun in nouns), len(nouns)
