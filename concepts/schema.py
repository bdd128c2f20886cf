"""Data classes of a model's inputs: examples and datasets."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, overload

from concepts.annotated_object import AnnotatedObject
from concepts.concept import Level
from concepts.image_source import ImageSource, NoImage
from concepts.mention import Mention
from groundscope.core.errors import ConfigError, DataError
from groundscope.core.short_repr import short_repr
from groundscope.core.text import format_count, nearest

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd


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
    level: Level | None
    """``object``, ``attribute`` or ``relation``; None for a question without a level, such as one that asks for reasoning."""
    kind: str
    """Form of the question: ``existence``, ``color``, ``what_color``, ``size``, ``relation``, ``caption``, …"""
    split: str
    """Test condition: ``neutral``, ``random``, ``popular``, ``adversarial``, ``typical``, ``conflict``, …"""
    group: str
    """The image or scene; training and test data never share a group, and intervals are clustered by it."""
    labels: Mapping[str, bool | float] = field(default_factory=dict)
    """Truth by concept (``level:name``, or a free name), or a number; concepts that do not apply are missing."""
    objects: tuple[AnnotatedObject, ...] = ()
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

    def named_object(self) -> AnnotatedObject | None:
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
