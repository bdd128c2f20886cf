"""One preference: a prompt about images, the answer to prefer, and the answer to avoid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from concepts.answer_prefix import join_words
from concepts.image_source import ImageSource, NoImage
from concepts.reading.record import is_text
from concepts.schema import Example
from groundscope.core.errors import DataError
from groundscope.core.short_repr import short_repr


@dataclass(frozen=True)
class PreferencePair:
    """A prompt about images with a chosen and a rejected answer.

    Any maker fills it: a diagnosis (``source="diagnosis"``: the true answer is chosen, the answer that overrode it is rejected),
    a table of the user (``"labels"``), a tree of scored candidates (``"self_judgment"``), or a file (``"file"``).

    Raises
    ------
    DataError
        For a blank prompt or answer, and for equal answers.

    Examples
    --------
    >>> import groundscope as gs
    >>> example = gs.scenes.dataset(10).where(split="conflict", kind="what_color")[0]
    >>> pair = gs.PreferencePair.of(example, example.answer, example.prior_answer, source="labels")
    >>> pair.prompt, pair.chosen != pair.rejected, pair.group == example.group
    ('What color is the apple?', True, True)
    """

    id: str
    images: tuple[ImageSource, ...]
    """The images of the prompt, in the order in which it refers to them."""
    prompt: str
    """The user's text, without placeholders of images."""
    chosen: str
    rejected: str
    source: str
    """Who preferred: ``diagnosis``, ``labels``, ``self_judgment``, ``file``, …"""
    group: str = ""
    """The image or scene, which `PreferenceData.split` never divides; empty: the identity of the first image."""
    system: str | None = None
    """System prompt; None for that of the model's chat template."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """JSON values that state how the pair was made: verdict and confidence, scores, file and record."""

    __repr__ = short_repr

    def __post_init__(self) -> None:
        for name in ("prompt", "chosen", "rejected"):
            value = getattr(self, name)
            if not is_text(value) or not value.strip():
                msg = f"preference '{self.id}': '{name}' is blank or not text; give the words of it"
                raise DataError(msg)
        if self.chosen.strip() == self.rejected.strip():
            msg = f"preference '{self.id}': chosen and rejected are both '{self.chosen[:40]}'; they must differ"
            raise DataError(msg)
        if not self.group:
            object.__setattr__(self, "group", self.images[0].identity if self.images else self.prompt)
        object.__setattr__(self, "images", tuple(self.images))
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))

    @classmethod
    def of(
        cls,
        example: Example,
        chosen: str,
        rejected: str,
        *,
        source: str,
        name: str | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> PreferencePair:
        """Return the pair of two answers to an example's question; its prefix, if it has one, begins both answers.

        Parameters
        ----------
        example
            The question and its images.
        chosen, rejected
            The answers, after the example's prefix.
        source
            Who preferred.
        name
            Id of the pair; None for that of the example.
        provenance
            JSON values that state how the pair was made.
        """
        answers = [join_words(example.prefix, a) if example.prefix else a for a in (chosen, rejected)]
        return cls(
            example.id if name is None else name,
            example.images,
            example.request,
            answers[0],
            answers[1],
            source,
            example.group,
            example.system,
            {} if provenance is None else provenance,
        )

    def example(self) -> Example:
        """Return the prompt as an open question, as models encode it; its true answer is the chosen one."""
        images = self.images
        return Example(
            self.id,
            images[0] if images else NoImage(),
            self.prompt,
            self.chosen,
            (),
            "object",
            "caption",
            "neutral",
            self.group,
            further_images=images[1:],
            system=self.system,
        )

    def exchanged(self) -> PreferencePair:
        """Return the pair with the opposite preference."""
        return PreferencePair(
            self.id, self.images, self.prompt, self.rejected, self.chosen, self.source, self.group, self.system,
            {**self.provenance, "exchanged": True},
        )  # fmt: skip

    def record(self) -> dict[str, Any]:
        """Return the fields as values that JSON can represent, with images as their identities."""
        return {
            "id": self.id,
            "images": [image.identity for image in self.images],
            "prompt": self.prompt,
            "chosen": self.chosen,
            "rejected": self.rejected,
            "source": self.source,
            "group": self.group,
            **({"system": self.system} if self.system is not None else {}),
            "provenance": dict(self.provenance),
        }
