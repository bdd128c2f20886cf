"""Text per question in its prompt: retrieved captions, or the output of a detector."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from groundscope.core.errors import ConfigError, DataError
from groundscope.core.files import canonical_json
from groundscope.core.text import format_count
from mitigation.training_free.method import Category, Regime, check_choice
from mitigation.training_free.prompt_methods import PromptMethod
from mitigation.training_free.prompt_words import words_problem
from mitigation.training_free.seeds import generator_of

if TYPE_CHECKING:
    import pandas as pd

    from concepts.schema import Example
    from lvlm.model import Lvlm

Key = Literal["id", "group"]


@dataclass(frozen=True)
class Augment(PromptMethod):
    """Put a text into the prompt of each question: retrieved captions, detections, or facts of another model.

    The texts come from the user, by the id of a question or by its image (`Example.group`). A gain can come from the longer
    prompt alone; `ShuffledAugment` is the control with texts of other images.

    Raises
    ------
    ConfigError
        For a template without ``{text}`` and ``{question}``.
    DataError
        For a question without a text, before generation.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation import augment
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["conflict"])
    >>> captions = {e.group: "the image shows a " + e.objects[0].noun + " ." for e in data}
    >>> with augment(captions, key="group").applied(model):
    ...     answers = gs.answer(model, data)
    >>> len(answers)
    6
    """

    label: ClassVar[str] = "augmented prompt"
    category: ClassVar[Category] = "prompt"
    regime: ClassVar[Regime] = "greedy"

    texts: Mapping[str, str] = field(default_factory=dict)
    """Text by key."""
    key: Key = "id"
    """What the texts belong to: the ``id`` of a question, or its image or scene (``group``)."""
    template: str = "{text}\n{question}"
    """Prompt of the answer, with ``{text}`` and ``{question}``."""

    def __post_init__(self) -> None:
        check_choice("key", self.key, ("id", "group"))
        if "{text}" not in self.template or "{question}" not in self.template:
            msg = f"template '{self.template}': must contain {{text}} and {{question}}"
            raise ConfigError(msg)
        object.__setattr__(self, "texts", MappingProxyType(dict(self.texts)))

    @property
    def name(self) -> str:
        """Number of texts."""
        return f"{self.label} ({format_count(len(self.texts), 'text')})"

    @property
    def parameters(self) -> Mapping[str, Any]:
        """Settings, and the digest of the texts."""
        digest = hashlib.sha256(canonical_json(dict(self.texts)).encode()).hexdigest()
        return {"key": self.key, "template": self.template, "texts": len(self.texts), "texts_sha256": digest}

    def problem(self, model: Lvlm, example: Example) -> str | None:
        """Return that a question has no text, or which words of it the tokenizer does not know."""
        text = self._texts().get(getattr(example, self.key))
        if text is None:
            return f"not applicable: no text for the {self.key} '{getattr(example, self.key)}'"
        return words_problem(model, text)

    def _texts(self) -> Mapping[str, str]:
        return self.texts

    def _rewritten(self, model: Lvlm, examples: Sequence[Example]) -> Sequence[Example]:
        texts = self._texts()
        missing = next((e for e in examples if getattr(e, self.key) not in texts), None)
        if missing is not None:
            msg = f"example '{missing.id}': no text for its {self.key} '{getattr(missing, self.key)}'; add one to the table"
            raise DataError(msg)
        return [
            replace(e, question=self.template.format(text=texts[getattr(e, self.key)], question=e.question))
            for e in examples
        ]


@dataclass(frozen=True)
class ShuffledAugment(Augment):
    """The control of `Augment`: every key has the text of another one, and no key a text equal to its own.

    Examples
    --------
    >>> from mitigation.training_free.methods.augment import ShuffledAugment
    >>> sorted(ShuffledAugment({"a": "1", "b": "2"})._texts().items())
    [('a', '2'), ('b', '1')]
    """

    label: ClassVar[str] = "shuffled augmented prompt"
    control: ClassVar[bool] = True

    seed: int = 0
    """Seed of the permutation."""

    @property
    def parameters(self) -> Mapping[str, Any]:
        """Settings, the digest of the texts, and the seed."""
        return {**super().parameters, "seed": self.seed}

    def _texts(self) -> Mapping[str, str]:
        different = sorted(set(self.texts.values()))
        if len(different) == 1:
            msg = "all texts are equal, so they cannot be exchanged; give texts that differ between images"
            raise DataError(msg)
        order = [different[i] for i in generator_of(self.seed, "texts").permutation(len(different))]
        following = dict(zip(order, [*order[1:], *order[:1]], strict=True))
        return {key: following[text] for key, text in self.texts.items()}


def augment(
    table: Mapping[str, str] | pd.DataFrame,
    *,
    key: Key = "id",
    column: str = "text",
    template: str = "{text}\n{question}",
    shuffled: int | None = None,
) -> Augment:
    """Return the method that puts the texts of a table into the prompts.

    Parameters
    ----------
    table
        Text by key, or a data frame with a column named as `key`.
    key
        ``id`` of a question, or its ``group``.
    column
        Column of the texts in a data frame.
    template
        Prompt of the answer, with ``{text}`` and ``{question}``.
    shuffled
        Seed of the control, in which every key gets a different text; None for the method itself.

    Raises
    ------
    DataError
        For a data frame without the columns, an empty cell, or two different texts for one key.

    Examples
    --------
    >>> import groundscope as gs
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["conflict"])
    >>> facts = gs.mitigation.augment({e.id: "a red apple" for e in data})
    >>> with facts.applied(model):
    ...     answers = gs.answer(model, data)
    >>> len(answers)
    6
    """
    texts = dict(table) if isinstance(table, Mapping) else _texts_of(table, key, column)
    wrong = next((name for name, text in texts.items() if not isinstance(text, str) or not text.strip()), None)
    if wrong is not None:
        msg = f"the text for '{wrong}' is empty or not text; leave the {key} out, or give a text"
        raise DataError(msg)
    if shuffled is None:
        return Augment(texts, key, template)
    return ShuffledAugment(texts, key, template, shuffled)


def _texts_of(table: pd.DataFrame, key: str, column: str) -> dict[str, str]:
    missing = next((name for name in (key, column) if name not in table.columns), None)
    if missing is not None:
        msg = f"the table has no column '{missing}'; its columns are: {', '.join(map(str, table.columns))}"
        raise DataError(msg)
    texts: dict[str, str] = {}
    for name, text in zip(table[key].astype(str), table[column], strict=True):
        if texts.setdefault(name, text) != text:
            msg = f"two texts for the {key} '{name}'; join them into one"
            raise DataError(msg)
    return texts
