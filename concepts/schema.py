"""Data classes of a model's inputs: objects, questions, examples, datasets and counterfactual pairs."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol, overload

from concepts.concept import Level
from concepts.mention import Mention
from concepts.outlines import Outline, outline_record
from groundscope.core.errors import ConfigError, DataError
from groundscope.core.short_repr import short_repr
from groundscope.core.text import format_count, nearest

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    from PIL import Image

EXAMPLE_COLUMNS = frozenset(
    {"id", "group", "question", "answer", "split", "kind", "level", "subject", "prior_answer", "model_answer", "margin"}
    | {"correct", "n_tokens", "boxes", "box_ids", "box_nouns", "image", "generated", "images", "candidates", "objects"}
    | {"aliases", "prefix", "mentions"}
)
"""Columns of tables of examples that are fields or results, not labels, and names with ``span:`` or ``mention:`` before."""


def is_label_name(name: str) -> bool:
    """Whether a column of a table of examples can hold labels, judged by its name.

    Examples
    --------
    >>> from concepts.schema import is_label_name
    >>> [is_label_name(name) for name in ("object:dog", "hallucinated", "scene:indoor", "question", "span:image")]
    [True, True, True, False, False]
    """
    return name not in EXAMPLE_COLUMNS and not name.startswith(("span:", "mention:"))


YES_NO = ("yes", "no")
"""Candidates of a yes-no question."""


def yes_or_no(truth: bool) -> str:
    """Return the true answer to a yes-no question."""
    return YES_NO[0] if truth else YES_NO[1]


@dataclass(frozen=True, slots=True)
class Box:
    """Axis-aligned box in pixels, half open: columns ``x0 .. x1-1``, rows ``y0 .. y1-1``.

    Examples
    --------
    >>> import groundscope as gs
    >>> box = gs.Box(10, 20, 14, 23)
    >>> box.area, box.center, box.intersection(gs.Box(12, 20, 30, 30))
    (12, (12.0, 21.5), 6)
    """

    x0: float
    y0: float
    x1: float
    y1: float

    @property
    def area(self) -> float:
        """Area in square pixels; 0 for an empty box."""
        return max(0.0, self.x1 - self.x0) * max(0.0, self.y1 - self.y0)

    @property
    def center(self) -> tuple[float, float]:
        """Center ``(x, y)`` in pixels."""
        return (self.x0 + self.x1) / 2, (self.y0 + self.y1) / 2

    def intersection(self, other: Box) -> float:
        """Return the area in square pixels of the overlap with another box."""
        return Box(max(self.x0, other.x0), max(self.y0, other.y0), min(self.x1, other.x1), min(self.y1, other.y1)).area


def check_box(box: Box, name: str) -> None:
    """Raise `DataError` for an object's box that is not finite, has a negative side or has no area."""
    sides = (box.x0, box.y0, box.x1, box.y1)
    if not all(math.isfinite(side) for side in sides) or min(box.x0, box.y0) < 0 or not box.area:
        msg = (
            f"object '{name}' has the box {', '.join(f'{side:g}' for side in sides)} (x0, y0, x1, y1): its sides must be "
            "finite, not negative, and x0 < x1, y0 < y1; clip it to the image, or give None for an object without a box"
        )
        raise DataError(msg)


@dataclass(frozen=True, slots=True)
class SceneObject:
    """An annotated object in an image.

    Raises
    ------
    DataError
        For a box that is not finite, has a negative side or has no area.

    Examples
    --------
    >>> import groundscope as gs
    >>> apple = gs.SceneObject("o1", "apple", gs.Box(10, 20, 40, 50), {"color": "green"})
    >>> apple.noun, apple.attributes["color"], apple.require_box().area
    ('apple', 'green', 900)
    """

    id: str
    noun: str
    box: Box | None
    """Its box in pixels of the loaded image; None if unknown, and then no image token belongs to the object."""
    attributes: Mapping[str, str] = field(default_factory=dict)
    """Kind of attribute to its value, such as ``{"color": "green", "size": "big"}``; empty without annotation."""
    outline: Outline = ()
    """Polygons ``(x0, y0, x1, y1, …)`` in pixels of the loaded image, or a mask (`RunLengthMask`); empty without annotation."""

    def __post_init__(self) -> None:
        if self.box is not None:
            check_box(self.box, self.id)

    def record(self) -> dict[str, object]:
        """Return the fields as values that JSON can represent; without an empty outline."""
        outline = {"outline": outline_record(self.outline)} if self.outline else {}
        box = None if self.box is None else asdict(self.box)
        return {"id": self.id, "noun": self.noun, "box": box, "attributes": dict(self.attributes), **outline}

    def require_box(self) -> Box:
        """Return the box; raises `DataError` for an object without one."""
        if self.box is None:
            msg = f"object '{self.id}' ({self.noun}) has no box in its annotation, but one is needed here"
            raise DataError(msg)
        return self.box


class ImageSource(Protocol):
    """Source of one RGB image, which is decoded or drawn each time it is loaded.

    Any object with these two members can be the image of an example: `FileImage`, `BytesImage`, or a class of the user's own.
    Derive identities from pixels or from what determines them: images with equal identities are encoded once.

    Examples
    --------
    >>> from dataclasses import dataclass, replace
    >>> from PIL import Image
    >>> import groundscope as gs
    >>> @dataclass(frozen=True)
    ... class PlainImage:
    ...     color: str
    ...     @property
    ...     def identity(self):
    ...         return f"plain {self.color}"
    ...     def load(self):
    ...         return Image.new("RGB", (112, 112), self.color)
    >>> example = replace(gs.scenes.dataset(10)[0], image=PlainImage("red"))
    >>> model = gs.load_lvlm("tiny")
    >>> model.encode(example).tokens.length == model.encode(gs.scenes.dataset(10)[0]).tokens.length
    True
    """

    def load(self) -> Image.Image:
        """Return the RGB image; raises `DataError`, naming the file, if it cannot be read."""
        ...

    @property
    def identity(self) -> str:
        """Text that is equal for equal images, such as the description of a scene or the digest of a file."""
        ...


@dataclass(frozen=True)
class NoImage:
    """The image of an example without one: its question is asked without an image.

    Examples
    --------
    >>> from dataclasses import replace
    >>> import groundscope as gs
    >>> from concepts import NoImage
    >>> example = replace(gs.scenes.dataset(10)[0], image=NoImage())
    >>> example.images
    ()
    """

    identity: str = "no image"

    def load(self) -> Image.Image:
        """Raise `DataError`: there is nothing to load."""
        msg = "an example without an image is used where an image is needed; leave it out: data.filter(lambda e: e.images)"
        raise DataError(msg)


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


@dataclass(frozen=True, slots=True)
class Example:
    """One question about one image, with its true answer and annotations.

    Examples
    --------
    >>> import groundscope as gs
    >>> image = gs.scenes.dataset(10)[0].image
    >>> question = "Is there a dog in the image?"
    >>> example = gs.Example("q1", image, question, "no", ("yes", "no"), "object", "existence", "neutral", "image 1")
    >>> example.image.load().size, example.named_object()
    ((112, 112), None)
    """

    id: str
    image: ImageSource
    question: str
    answer: str
    """The true answer, one of `candidates`; for a caption, a reference description."""
    candidates: tuple[str, ...]
    """The possible answers, such as ``("yes", "no")`` or all colors; empty for free text."""
    level: Level
    kind: str
    """Form of the question: ``existence``, ``color``, ``what_color``, ``size``, ``relation``, ``caption``, …"""
    split: str
    """Test condition: ``neutral``, ``random``, ``popular``, ``adversarial``, ``typical``, ``conflict``, …"""
    group: str
    """The image or scene; training and test data never share a group, and intervals are clustered by it."""
    labels: Mapping[str, bool | float] = field(default_factory=dict)
    """Truth by concept (``level:name``, or a free name), or a number; concepts that do not apply are missing."""
    objects: tuple[SceneObject, ...] = ()
    """The annotated objects of the image."""
    subject: str | None = None
    """Id of the object of the question; None if the object is not in the image."""
    prior_answer: str | None = None
    """The most likely answer without the image, such as the typical color; None if unknown."""
    prefix: str = ""
    """Start of the answer that the model has already written, such as the words of a caption before a wrong word. The model
    reads it after the prompt, and `answer` and `candidates` are what follows it; empty: the answer begins after the prompt."""
    mentions: tuple[Mention, ...] = ()
    """Objects that the prefix mentions, in the order of the text (`concepts.with_mentions`)."""
    aliases: tuple[str, ...] = ()
    """Other texts that count as the true answer of an open question."""
    further_images: tuple[ImageSource, ...] = ()
    """Images after the first, in the order in which the question refers to them; boxes belong to the first image."""
    suffix: str = ""
    """Text of the prompt after the question, on a new line unless it begins with white space: "Answer the question using a
    single word or phrase."."""
    system: str | None = None
    """System prompt; None for that of the model's chat template, if it has one."""

    __repr__ = short_repr

    @property
    def request(self) -> str:
        """The user's text of the prompt: the question, followed by the suffix."""
        if not self.suffix:
            return self.question
        return f"{self.question}{'' if self.suffix[0].isspace() else chr(10)}{self.suffix}"

    def _repr_html_(self) -> str:
        from concepts.display import examples_html

        return examples_html((self,))

    @property
    def images(self) -> tuple[ImageSource, ...]:
        """The images of the question in order: none (`NoImage`), one, or several."""
        return () if isinstance(self.image, NoImage) else (self.image, *self.further_images)

    def named_object(self) -> SceneObject | None:
        """Return the object of the question, or None if it is not in the image."""
        return next((o for o in self.objects if o.id == self.subject), None)

    def record(self) -> dict[str, object]:
        """Return the fields as values that JSON can represent, with the image as its identity.

        Fields that came after the first release are missing where they are empty, so that digests of older data are the same.
        """
        return {
            "id": self.id,
            "image": self.image.identity,
            "question": self.question,
            "answer": self.answer,
            "candidates": list(self.candidates),
            "level": self.level,
            "kind": self.kind,
            "split": self.split,
            "group": self.group,
            "labels": dict(self.labels),
            "objects": [o.record() for o in self.objects],
            "subject": self.subject,
            "prior_answer": self.prior_answer,
            **({"prefix": self.prefix} if self.prefix else {}),
            **({"mentions": [asdict(m) for m in self.mentions]} if self.mentions else {}),
            # Only if there are any: records of earlier versions keep their digests.
            **({"aliases": list(self.aliases)} if self.aliases else {}),
            **({"further_images": [i.identity for i in self.further_images]} if self.further_images else {}),
            **({"suffix": self.suffix} if self.suffix else {}),
            **({"system": self.system} if self.system is not None else {}),
        }


def require_one_image(examples: Iterable[Example], purpose: str) -> None:
    """Raise `DataError` for the first example without an image or with several; `purpose` begins the message."""
    other = next((e for e in examples if len(e.images) != 1), None)
    if other is not None:
        msg = (
            f"{purpose} needs questions about one image, and example '{other.id}' has {len(other.images) or 'no image'}; leave "
            "such examples out: data.filter(lambda e: len(e.images) == 1)"
        )
        raise DataError(msg)


@dataclass(frozen=True)
class ConceptDataset(Sequence[Example]):
    """An ordered, named collection of examples with unique ids; a sequence whose slices are datasets.

    Raises
    ------
    DataError
        If two examples have the same id.

    Examples
    --------
    >>> import groundscope as gs
    >>> data = gs.scenes.dataset(10)
    >>> colors = data.where(split="conflict", kind="what_color")
    >>> len(data), len(colors), colors[0].question
    (75, 2, 'What color is the apple?')
    """

    name: str
    examples: tuple[Example, ...]
    provenance: Mapping[str, object] = field(default_factory=dict)
    """Source of the data: generator and seed, or loader, files and their digests, and counts of what was left out."""

    def __repr__(self) -> str:
        images = len({example.group for example in self.examples})
        counts = [
            f"ConceptDataset('{self.name}', {format_count(len(self), 'example')}, {format_count(images, 'image')})"
        ]
        for name in ("level", "kind", "split"):
            values = Counter(getattr(example, name) for example in self.examples).most_common()
            more = f", {len(values) - 6} more" if len(values) > 6 else ""
            counts.append(f"    {name}s: " + ", ".join(f"{value} {count:,}" for value, count in values[:6]) + more)
        return "\n".join(counts if self.examples else counts[:1])

    def _repr_html_(self) -> str:
        from concepts.display import examples_html

        return examples_html(self.examples, repr(self).splitlines()[0])

    def __post_init__(self) -> None:
        ids: set[str] = set()
        for example in self.examples:
            if example.further_images and not example.images:
                msg = f"dataset '{self.name}': example '{example.id}' has further_images but no image; set image to the first"
                raise DataError(msg)
            if example.id in ids:
                msg = f"dataset '{self.name}': two examples have the id '{example.id}'; ids must be unique"
                raise DataError(msg)
            ids.add(example.id)
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))

    @classmethod
    def from_frame(
        cls,
        frame: pd.DataFrame,
        images: Path | str | None = None,
        *,
        name: str = "frame",
        classes: Sequence[str] = (),
        ignore: Sequence[str] = (),
    ) -> ConceptDataset:
        """Return the dataset of a data frame with a row for each question; its columns are those of `concepts.loaders.table`.

        Parameters
        ----------
        frame
            Cells of ``image`` and ``images`` may also be images of Pillow and any `ImageSource`.
        images
            Folder of the image files; None: paths are not resolved in a folder.
        name
            Name of the dataset, and of the frame in messages.
        classes, ignore
            As for `concepts.loaders.table`.

        Raises
        ------
        DataError, ConfigError
            As `concepts.loaders.table`.

        Examples
        --------
        >>> import pandas as pd
        >>> import groundscope as gs
        >>> image = gs.scenes.dataset(10)[0].image
        >>> frame = pd.DataFrame({"image": [image], "question": ["What is this?"], "blurred": ["no"], "score": [0.3]})
        >>> gs.ConceptDataset.from_frame(frame)[0].labels
        {'blurred': False, 'score': 0.3}
        """
        from concepts.reading.table_examples import examples_of_frame

        examples, labeled = examples_of_frame(frame, images, name, classes=classes, ignore=ignore)
        return cls(name, tuple(examples), {"loader": "frame", "kept": len(examples), "labels": labeled})

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> ConceptDataset: ...
    def __getitem__(self, index: int | slice) -> Example | ConceptDataset:
        if isinstance(index, slice):
            return ConceptDataset(self.name, self.examples[index], self.provenance)
        return self.examples[index]

    def filter(self, keep: Callable[[Example], bool]) -> ConceptDataset:
        """Return the dataset of the examples for which `keep` returns True, in order."""
        return ConceptDataset(self.name, tuple(e for e in self.examples if keep(e)), self.provenance)

    def where(self, **values: object) -> ConceptDataset:
        """Return the dataset of the examples whose fields equal `values`, e.g. ``where(split="conflict", level="attribute")``.

        Raises
        ------
        ConfigError
            For a field that examples do not have.
        """
        names = Example.__dataclass_fields__
        unknown = next((key for key in values if key not in names), None)
        if unknown is not None:
            msg = f"unknown field '{unknown}' of examples; choose from {', '.join(names)}{nearest(unknown, names)}"
            raise ConfigError(msg)
        return self.filter(lambda e: all(getattr(e, key) == value for key, value in values.items()))

    def with_prompt(self, *, suffix: str | None = None, system: str | None = None) -> ConceptDataset:
        """Return the dataset with another prompt around every question; the questions themselves do not change.

        Parameters
        ----------
        suffix
            Text after the question, on a new line unless it begins with white space; None leaves the present one. LLaVA and
            most evaluations of short answers use "Answer the question using a single word or phrase."
        system
            System prompt; None leaves the present one. The model's chat template must have a place for it.

        Examples
        --------
        >>> import groundscope as gs
        >>> data = gs.scenes.dataset(10).with_prompt(suffix="Answer the question using a single word or phrase.")
        >>> data[0].request.splitlines()[1]
        'Answer the question using a single word or phrase.'
        """
        more = {name: text for name, text in (("suffix", suffix), ("system", system)) if text is not None}
        return ConceptDataset(self.name, tuple(replace(e, **more) for e in self.examples), self.provenance)

    def with_choices(self, choices: Sequence[str]) -> ConceptDataset:
        """Return the dataset with these candidates for every open question; captions and other questions do not change.

        Raises
        ------
        DataError
            If no question is open, or the true answer of one is not among the choices; an answer whose alias is a choice is
            replaced by that choice.

        Examples
        --------
        >>> from dataclasses import replace
        >>> import groundscope as gs
        >>> colors = gs.scenes.dataset(10).where(kind="what_color")
        >>> open_questions = gs.ConceptDataset("open", tuple(replace(e, candidates=()) for e in colors))
        >>> open_questions.with_choices(["red", "green", "yellow", "blue", "orange", "purple", "brown", "gray"])[0].candidates[:2]
        ('red', 'green')
        """
        candidates = tuple(choices)
        if len(set(candidates)) < max(2, len(candidates)):
            msg = f"choices={list(candidates)}: give two or more different answers"
            raise DataError(msg)
        examples, count = [], 0
        for example in self.examples:
            if example.candidates or example.kind == "caption":
                examples.append(example)
                continue
            count += 1
            answer = next((a for a in (example.answer, *example.aliases) if a in candidates), None)
            if answer is None:
                msg = (
                    f"example '{example.id}': the true answer '{example.answer}' is not one of the choices "
                    f"{', '.join(candidates)}{nearest(example.answer, candidates)}"
                )
                raise DataError(msg)
            examples.append(replace(example, answer=answer, candidates=candidates))
        if not count:
            msg = f"dataset '{self.name}' has no open question: the choices would have no effect"
            raise DataError(msg)
        return ConceptDataset(self.name, tuple(examples), self.provenance)

    def frame(self) -> pd.DataFrame:
        """Return one row per example: its fields, and one column per concept label, NaN if the concept does not apply."""
        import pandas as pd

        rows = []
        for e in self.examples:
            row = {
                k: v
                for k, v in e.record().items()
                if k not in {"labels", "objects", "candidates", "image", "further_images", "aliases", "mentions"}
            }
            row.update({concept: float(value) for concept, value in e.labels.items()})
            rows.append(row)
        return pd.DataFrame(rows)

    @property
    def digest(self) -> str:
        """SHA-256 of all records in order; equal for equal data on every machine."""
        h = hashlib.sha256()
        for example in self.examples:
            h.update(json.dumps(example.record(), sort_keys=True).encode())
            h.update(b"\n")
        return h.hexdigest()


@dataclass(frozen=True)
class CounterfactualPair:
    """Two examples with the same question that differ in one stated thing, made by `concepts.counterfactuals.pairs`.

    The image of `corrupt` is that of `clean` with one change, and its true answer is another one; after the changes
    ``blank``, ``blur``, ``noise`` and ``mask`` the image shows no evidence for any answer.

    Raises
    ------
    DataError
        If the two examples have different prefixes.

    Examples
    --------
    >>> import groundscope as gs
    >>> pair = gs.counterfactuals.pairs(gs.scenes.dataset(10), "object", limit=1)[0]
    >>> pair.clean.question == pair.corrupt.question, pair.clean.answer, pair.corrupt.answer, pair.kind
    (True, 'yes', 'no', 'object')
    """

    clean: Example
    corrupt: Example
    kind: str
    """Kind of the change, an entry of `concepts.counterfactuals.KINDS`."""
    change: str
    """The change in words, such as ``apple: green -> red``."""
    method: str = ""
    """How a photograph was changed: ``swap``, ``mirror``, ``recolor``, ``inpaint``; empty for scenes, which are drawn again."""
    placebo: bool = False
    """Whether the true answer is the same in both: a control for what the change itself does."""

    def __post_init__(self) -> None:
        if self.clean.prefix != self.corrupt.prefix:
            msg = (
                f"pair '{self.clean.id}': clean has the prefix '{self.clean.prefix}', corrupt '{self.corrupt.prefix}'; give "
                "both examples the same prefix"
            )
            raise DataError(msg)

    def __repr__(self) -> str:
        answers = f"'{self.clean.answer}' -> '{self.corrupt.answer}'"
        method = f", {self.method}" if self.method else ""
        after = f" after '{self.clean.prefix.strip()}'" if self.clean.prefix else ""
        return f"CounterfactualPair({self.kind}{method}: {self.change}; '{self.clean.question}' {answers}{after})"

    def _repr_html_(self) -> str:
        from concepts.display import pair_html

        return pair_html(self)

    @property
    def group(self) -> str:
        """The image or scene of the clean example."""
        return self.clean.group
