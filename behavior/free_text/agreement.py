"""Agreement of two markings of the same descriptions: a parser and people, two people, or people and a judge."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from behavior.free_text.spans import VERDICTS, Description, Span
from concepts.concept import LEVELS, Level
from groundscope.core.errors import DataError
from groundscope.core.short_repr import short_repr

# `import behavior` imports this module, so numpy and modules that need it are imported when comparing.
if TYPE_CHECKING:
    import pandas as pd

    from groundscope.core.statistics import Estimate


@dataclass(frozen=True)
class LevelAgreement:
    """Agreement of two markings on the spans of one level; the first is the reference.

    Examples
    --------
    >>> from behavior.free_text import compare_spans, parse_description
    >>> first, second = parse_description("A cat and a dog."), parse_description("A cat and a dog.")
    >>> objects = compare_spans([first], [second]).level("object")
    >>> objects.both, objects.f1.value
    (2, 1.0)
    """

    level: Level
    both: int
    """Spans in both markings."""
    only_first: int
    only_second: int
    precision: Estimate
    """Share of the second marking's spans that are in the first, with an interval over descriptions."""
    recall: Estimate
    """Share of the first marking's spans that are in the second."""
    f1: Estimate
    """2 both / (spans of the first + spans of the second)."""
    verdicts: Estimate
    """Share of common spans with equal verdicts, among those with a verdict in both; NaN without any."""
    kappa: float
    """Cohen's kappa of these verdicts; NaN without any, or if both always give the same single verdict."""


@dataclass(frozen=True)
class SpanAgreement:
    """Agreement of two markings, by level.

    Examples
    --------
    >>> from behavior.free_text import compare_spans, parse_description
    >>> one = parse_description("A red apple.")
    >>> compare_spans([one], [one]).frame()[["level", "both", "f1"]].values.tolist()[:2]
    [['object', 1, 1.0], ['attribute', 1, 1.0]]
    """

    levels: tuple[LevelAgreement, ...]
    exact: bool
    """Whether spans had to be equal, or overlap with the same heads."""

    __repr__ = short_repr

    def level(self, level: Level) -> LevelAgreement:
        """Return the agreement at one level."""
        return next(row for row in self.levels if row.level == level)

    def frame(self) -> pd.DataFrame:
        """Return one row per level."""
        import pandas as pd

        rows = [
            {
                "level": row.level, "both": row.both, "only_first": row.only_first, "only_second": row.only_second,
                "precision": row.precision.value, "recall": row.recall.value, "f1": row.f1.value, "f1_low": row.f1.low,
                "f1_high": row.f1.high, "equal_verdicts": row.verdicts.value, "kappa": row.kappa,
            }
            for row in self.levels
        ]  # fmt: skip
        return pd.DataFrame(rows)


def compare_spans(first: Iterable[Description], second: Iterable[Description], *, exact: bool = False) -> SpanAgreement:
    """Compare two markings of the same texts.

    Parameters
    ----------
    first
        Reference, such as spans marked by people (`read_descriptions`).
    second
        The other marking, such as that of `parse_description`, with the same ids and texts in any order.
    exact
        Whether common spans have equal places and equal arguments. By default, objects are common if their heads
        (last words) are at the same place, and attributes and relations if they overlap and the heads of their
        objects are at the same places.

    Raises
    ------
    DataError
        If there are no descriptions, or ids or texts differ.

    Examples
    --------
    >>> from behavior.free_text import Description, Span, compare_spans, parse_description
    >>> marked = Description("1", "a dining table", (Span(2, 14, "object"),))
    >>> other = Description("1", "a dining table", (Span(9, 14, "object"),))
    >>> [compare_spans([marked], [other], exact=exact).level("object").both for exact in (False, True)]
    [1, 0]
    """
    pairs = _pairs(tuple(first), tuple(second))
    return SpanAgreement(tuple(_agreement(level, pairs, exact) for level in LEVELS), exact)


def _pairs(first: Sequence[Description], second: Sequence[Description]) -> list[tuple[Description, Description]]:
    others = {row.id: row for row in second}
    if not first:
        msg = "there are no descriptions to compare; give at least one"
        raise DataError(msg)
    missing = [row.id for row in first if row.id not in others] or [
        identity for identity in others if identity not in {row.id for row in first}
    ]
    if missing:
        msg = f"description '{missing[0]}' is in one marking only; both need the same ids"
        raise DataError(msg)
    for row in first:
        if row.text != others[row.id].text:
            msg = f"description '{row.id}' has another text in the second marking; compare markings of the same texts"
            raise DataError(msg)
    return [(row, others[row.id]) for row in first]


def match_spans(first: Sequence[Span], second: Sequence[Span], *, exact: bool = False) -> list[tuple[Span, Span]]:
    """Return the common spans of two markings of a text, each span once; see `compare_spans`."""
    pairs: list[tuple[Span, Span]] = []
    unused = list(second)
    for span in first:
        other = next((candidate for candidate in unused if _are_equal(span, candidate, exact)), None)
        if other is not None:
            unused.remove(other)
            pairs.append((span, other))
    return pairs


def _are_equal(first: Span, second: Span, exact: bool) -> bool:
    if first.level != second.level:
        return False
    if exact:
        return first.place == second.place and first.arguments == second.arguments
    if first.level == "object":
        return first.end == second.end
    heads = [tuple(end for _, end in span.arguments) for span in (first, second)]
    return heads[0] == heads[1] and first.start < second.end and second.start < first.end


def _agreement(level: Level, pairs: Sequence[tuple[Description, Description]], exact: bool) -> LevelAgreement:
    from groundscope.core.statistics import estimate

    ids = [first.id for first, _ in pairs]
    counts = []
    judged: list[tuple[str, str]] = []
    judged_ids: list[str] = []
    for first, second in pairs:
        mine, theirs = first.of_level(level), second.of_level(level)
        common = match_spans(mine, theirs, exact=exact)
        counts.append((len(common), len(mine), len(theirs)))
        both = [(a.verdict, b.verdict) for a, b in common if a.verdict is not None and b.verdict is not None]
        judged += both
        judged_ids += [first.id] * len(both)
    both_total, first_total, second_total = (sum(column) for column in zip(*counts, strict=True))
    return LevelAgreement(
        level=level,
        both=both_total,
        only_first=first_total - both_total,
        only_second=second_total - both_total,
        precision=estimate([c for c, _, _ in counts], ids, [b for _, _, b in counts]),
        recall=estimate([c for c, _, _ in counts], ids, [a for _, a, _ in counts]),
        f1=estimate([2 * c for c, _, _ in counts], ids, [a + b for _, a, b in counts]),
        verdicts=estimate([a == b for a, b in judged], judged_ids),
        kappa=_kappa(judged),
    )


def _kappa(pairs: Sequence[tuple[str, str]]) -> float:
    """Return Cohen's kappa: (observed - expected agreement) / (1 - expected)."""
    if not pairs:
        return float("nan")
    n = len(pairs)
    observed = sum(a == b for a, b in pairs) / n
    expected = sum(sum(a == v for a, _ in pairs) * sum(b == v for _, b in pairs) for v in VERDICTS) / n**2
    return float("nan") if expected == 1 else (observed - expected) / (1 - expected)
