"""What an audit finds, and the data that it examines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar, cast

from behavior.free_text.annotations import ImageAnnotation, annotation_of, examples_by_image
from concepts.schema import ConceptDataset, Example
from groundscope.core.errors import DataError, GroundscopeError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem of a data set, with the examples that it concerns.

    Examples
    --------
    >>> from behavior.data_audit import Finding
    >>> Finding(("q1", "q2"), ("image 1",), "'Is there a dog?' has the answers no and yes").images
    ('image 1',)
    """

    examples: tuple[str, ...]
    """Ids of the examples."""
    images: tuple[str, ...]
    """Their images (groups)."""
    message: str
    value: float | None = None
    """The measure that led to it, in the unit of its cause; None for a cause without a measure."""


@dataclass(frozen=True)
class CauseReport:
    """What an audit finds of one cause of errors.

    Examples
    --------
    >>> import groundscope as gs
    >>> report = gs.audit(gs.scenes.dataset(10), causes=["answer imbalance"]).cause("answer imbalance")
    >>> report.measured, report.reason
    (True, '')
    """

    name: str
    findings: tuple[Finding, ...] = ()
    values: Mapping[str, float] = field(default_factory=dict)
    """Further figures, such as the share of yes."""
    reason: str = ""
    """Why the data do not allow the measure; empty if it was measured."""

    @property
    def measured(self) -> bool:
        """Whether the data allow the measure."""
        return not self.reason

    @property
    def examples(self) -> frozenset[str]:
        """Ids of all examples that findings concern."""
        return frozenset(identity for finding in self.findings for identity in finding.examples)

    @property
    def images(self) -> frozenset[str]:
        """All images that findings concern."""
        return frozenset(image for finding in self.findings for image in finding.images)


class NotMeasuredError(GroundscopeError):
    """The data lack what a cause needs; the message says what."""


@dataclass(frozen=True)
class Cause:
    """A cause of errors in data: how it is found.

    Examples
    --------
    >>> from behavior.data_audit import CAUSES
    >>> CAUSES["small objects"].title
    'Questions about objects whose box is small'
    """

    title: str
    find: Callable[[AuditedData], tuple[list[Finding], dict[str, float]]]
    """Returns findings and further figures; raises `NotMeasuredError` if the data lack what it needs."""
    needs_pixels: bool = False
    """Whether every image is decoded."""


class AuditedData:
    """A data set with what several causes need, each computed once."""

    def __init__(self, data: ConceptDataset, caption_scores: Mapping[str, float] | None = None) -> None:
        if not len(data):
            msg = "the data have no examples; load data with at least one"
            raise DataError(msg)
        self.data = data
        self.caption_scores = caption_scores
        self._results: dict[str, object] = {}

    def once(self, name: str, compute: Callable[[], T]) -> T:
        """Return a result that several causes need, computed at its first use."""
        if name not in self._results:
            self._results[name] = compute()
        return cast("T", self._results[name])

    @cached_property
    def by_image(self) -> dict[str, list[Example]]:
        """Image to its examples; images of one group, such as counterfactual variants, are numbered from the second on."""
        images: dict[str, list[Example]] = {}
        counts: dict[str, int] = {}
        for rows in examples_by_image(self.data):
            group = rows[0].group
            counts[group] = counts.get(group, 0) + 1
            images[group if counts[group] == 1 else f"{group} #{counts[group]}"] = rows
        return images

    @cached_property
    def image_of(self) -> dict[str, str]:
        """Id of an example to its image."""
        return {example.id: image for image, rows in self.by_image.items() for example in rows}

    @cached_property
    def annotations(self) -> dict[str, ImageAnnotation]:
        """Image to its annotation."""
        return {image: annotation_of(rows) for image, rows in self.by_image.items()}

    @cached_property
    def captions(self) -> list[tuple[Example, str]]:
        """Each reference caption with its example."""
        rows = [e for e in self.data if e.kind == "caption" and not e.candidates]
        return [(e, line.strip()) for e in rows for line in e.answer.split("\n") if len(line.split()) > 1]

    def require_captions(self) -> list[tuple[Example, str]]:
        """Return the captions; raises `NotMeasuredError` without any."""
        if not self.captions:
            msg = "the data have no captions (examples of kind 'caption' with a reference description)"
            raise NotMeasuredError(msg)
        return self.captions

    @cached_property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Image to width and height in pixels, from the header of its file where it has one."""
        return {image: _size(rows[0]) for image, rows in self.by_image.items() if rows[0].images}

    def ids(self, image: str) -> tuple[str, ...]:
        """Return the ids of the examples of an image."""
        return tuple(example.id for example in self.by_image[image])

    def finding(self, examples: Iterable[Example], message: str, value: float | None = None) -> Finding:
        """Return a finding about examples."""
        rows = list(examples)
        return Finding(
            tuple(e.id for e in rows), tuple(dict.fromkeys(self.image_of[e.id] for e in rows)), message, value
        )


def _size(example: Example) -> tuple[int, int]:
    header = getattr(example.image, "header", None)
    return header.upright_size if header is not None else example.image.load().size
