"""Token selections: one grammar for reading, patching and steering.

======================  ==================================================================================
selection               tokens
======================  ==================================================================================
``last``                the last token of the prompt, or of the prefix if the example has one
``bos``                  the first token
``all``                 every token: the prompt's, and generated tokens in a sequence that has some
``image:HOW``           image tokens
``object:HOW``          image tokens that overlap the box of the object in question; ``object:<id>:HOW`` another object
``question:HOW``        tokens of the question's own words
``suffix:HOW``          prompt tokens after the last image token; every prompt token if the sequence has no image tokens
``prefix:HOW``          tokens of the prefix, the written start of the answer (`concepts.schema.Example.prefix`)
``mention:WHICH``       one token for each object that the prefix mentions (`concepts.schema.Example.mentions`), stored as a
                        ragged array: the mention's ``first`` or ``last`` token, or the one ``before`` it, where the model
                        chooses the word
``system:HOW``          prompt tokens before the image, without the first
``generated:HOW``       tokens of the model's own answer; ``generated:<k>`` the k-th, counted from 0
``answer:HOW``          tokens of the true answer, appended to the prompt; ``answer:<k>`` the k-th
``positions:12,13``     listed prompt tokens, counted from 0
``last+generated``      the last token of the prompt, and every generated token
``suffix+generated``    every token after the image, generated tokens included
======================  ==================================================================================

HOW is ``all`` (every token: patched jointly, stored as a ragged array), ``mean`` (the mean vector) or ``each`` (one token
at a time). ``all`` and ``positions:…`` mean every token unless ``:mean`` or ``:each`` follows. ``generated:<k>`` is the state
in which the model has read the k-th token of its answer and is about to choose the next.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from groundscope.core.errors import SiteError
from groundscope.core.text import nearest

__all__ = [
    "LEGACY_PATCH_TOKENS",
    "LEGACY_STEERING_POSITIONS",
    "MENTION_TOKENS",
    "PATCHABLE",
    "READABLE",
    "SINGLE",
    "STEERABLE",
    "STORED_ROLES",
    "TokenSelection",
]

Reduction = Literal["mean", "all", "each"]
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)
SINGLE = ("last", "bos")
"""Roles of one token."""
STORED_ROLES = ("bos", "system", "image", "question", "object", "prefix", "last", "answer", "generated")
"""Roles whose positions an activation store records for every example, in the order of its columns."""
MENTION_TOKENS = ("before", "first", "last")
"""Tokens of a mention that the role ``mention`` selects."""
_PLURAL = ("image", "object", "question", "suffix", "prefix", "system", "generated", "answer")
"""Roles of several tokens, which need a reduction."""
_ANSWERS = ("generated", "answer")
_WITH_GENERATED = ("last", "suffix")
_FORMS = (
    *(*SINGLE, *(f"{role}+generated" for role in _WITH_GENERATED), *(f"{role}:<k>" for role in _ANSWERS)),
    *("all", "all:mean", "all:each", "positions:<i>,<j>", "positions:<i>,<j>:mean", "positions:<i>,<j>:each"),
    *(f"{role}:{how}" for role in _PLURAL for how in REDUCTIONS),
    *(f"object:<id>:{how}" for how in REDUCTIONS),
    *(f"mention:{which}" for which in MENTION_TOKENS),
)
_READINGS = {"all": "every one of them", "mean": "their mean", "each": "one at a time"}
_POSITIONS = re.compile(r"^\d+(,\d+)*$")

READABLE = tuple(form for form in _FORMS if not form.endswith((":each", "+generated")))
"""Forms that activations can be read at."""
PATCHABLE = (
    *("last", "all", "all:each", "positions:<i>,<j>", "positions:<i>,<j>:each"),
    *(f"{role}:{how}" for role in ("suffix", "question", "prefix", "image", "object") for how in ("all", "each")),
)
"""Forms that an encoded prompt can be patched at."""
STEERABLE = ("last", "last+generated", "all", "image:all", "suffix:all", "suffix+generated", "generated:all")
"""Forms that need no encoded prompt, so that any forward pass or generation can be changed there."""

LEGACY_PATCH_TOKENS: Mapping[str, str] = MappingProxyType(
    {role: f"{role}:all" for role in ("suffix", "image", "question", "object")}
)
"""Selections in result files of groundscope 0.1, by today's spelling."""
LEGACY_STEERING_POSITIONS: Mapping[str, str] = MappingProxyType(
    {
        "last": "last+generated",
        "image": "image:all",
        "suffix": "suffix+generated",
        "question": "suffix:all",
        "generated": "generated:all",
        "all": "all",
    }
)
"""Positions in steering vectors of format versions 1 to 3, by today's spelling."""
ALL_IMAGE_TOKENS, IMAGE_MEAN = "image:all", "image:mean"
"""The selections of every image token, and of their mean."""


@dataclass(frozen=True, order=True)
class TokenSelection:
    """Tokens of a sequence, and whether they are used jointly, one at a time, or as their mean.

    The module's docstring lists the grammar. If an example lacks the object in question, the selection is empty, and a store
    holds NaN for it.

    Examples
    --------
    >>> from lvlm import TokenSelection
    >>> selection = TokenSelection.parse("image:mean")
    >>> selection.role, selection.reduction
    ('image', 'mean')
    >>> str(TokenSelection("positions", "each", indices=(12, 13)))
    'positions:12,13:each'
    >>> TokenSelection.parse("image")
    Traceback (most recent call last):
    groundscope.core.errors.SiteError: token selection 'image' has several readings: 'image:mean' (their mean), 'image:all' \
(every one of them), 'image:each' (one at a time); choose one of them
    """

    role: str
    reduction: Reduction | None = None
    """None for a single token, and for prompt tokens with generated ones."""
    step: int | None = None
    """Index of an answer token, counted from 0."""
    name: str = ""
    """Id of the object, empty for the object in question; of `MENTION_TOKENS` for the role ``mention``."""
    indices: tuple[int, ...] = ()
    """Prompt positions, for the role ``positions``."""
    generated: bool = False
    """Whether every generated token is selected too."""

    def __str__(self) -> str:
        whole = self.reduction == "all" and self.role in ("all", "positions")
        parts = (
            f"{self.role}+generated" if self.generated else self.role,
            self.name,
            "" if self.step is None else str(self.step),
            ",".join(map(str, self.indices)),
            "" if whole or self.reduction is None else self.reduction,
        )
        return ":".join(part for part in parts if part)

    @property
    def ragged(self) -> bool:
        """Whether it selects any number of tokens of an example, each on its own row.

        Examples
        --------
        >>> from lvlm import TokenSelection
        >>> [TokenSelection.parse(text).ragged for text in ("image:all", "mention:first", "image:mean")]
        [True, True, False]
        """
        return self.reduction == "all" or self.role == "mention"

    @property
    def form(self) -> str:
        """The selection with placeholders for numbers and object ids, as lists of allowed selections spell it.

        Examples
        --------
        >>> from lvlm import TokenSelection
        >>> TokenSelection.parse("positions:12,13:each").form
        'positions:<i>,<j>:each'
        """
        how = "" if self.reduction is None else f":{self.reduction}"
        if self.role == "mention":
            return str(self)
        if self.indices:
            return f"positions:<i>,<j>{how.removesuffix(':all')}"
        if self.step is not None:
            return f"{self.role}:<k>"
        return f"{self.role}:<id>{how}" if self.name else str(self)

    @classmethod
    def parse(cls, text: str | TokenSelection, *, allowed: Sequence[str] = ()) -> TokenSelection:
        """Read a selection as printed.

        Parameters
        ----------
        text
            The selection; a `TokenSelection` is checked and returned.
        allowed
            Forms that the caller supports, such as ``last``, ``image:all``, ``positions:<i>,<j>`` (see `form`); by default all.

        Raises
        ------
        SiteError
            For an unknown selection, one that can be read in several ways, and one that is not allowed; the message lists the
            selections to choose from.

        Examples
        --------
        >>> from lvlm import TokenSelection
        >>> str(TokenSelection.parse("object:apple:mean"))
        'object:apple:mean'
        >>> TokenSelection.parse("imgae:all", allowed=("last", "image:all"))
        Traceback (most recent call last):
        groundscope.core.errors.SiteError: unknown token selection 'imgae:all'; choose from last, image:all; did you mean \
image:all?
        """
        forms = tuple(allowed) or _FORMS
        selection = text if isinstance(text, TokenSelection) else cls._read(text, forms)
        if allowed and selection.form not in allowed:
            similar = nearest(str(selection), forms)
            msg = f"token selection '{selection}' is not supported here; choose from {_choices(forms)}{similar}"
            raise SiteError(msg)
        return selection

    @classmethod
    def _read(cls, text: str, forms: Sequence[str]) -> TokenSelection:
        role, *parts = text.split(":") if isinstance(text, str) else [""]
        match parts:
            case [] if role in SINGLE:
                return cls(role)
            case [] if role == "all":
                return cls(role, "all")
            case [] if role in {f"{name}+generated" for name in _WITH_GENERATED}:
                return cls(role.removesuffix("+generated"), generated=True)
            case [("mean" | "each") as how] if role == "all":
                return cls(role, how)
            case [numbers] if role == "positions" and _POSITIONS.match(numbers):
                return cls(role, "all", indices=_indices(numbers))
            case [numbers, ("mean" | "each") as how] if role == "positions" and _POSITIONS.match(numbers):
                return cls(role, how, indices=_indices(numbers))
            case [step] if role in _ANSWERS and step.isdecimal() and str(int(step)) == step:
                return cls(role, step=int(step))
            case [("mean" | "all" | "each") as how] if role in _PLURAL:
                return cls(role, how)
            case [which] if role == "mention" and which in MENTION_TOKENS:
                return cls(role, name=which)
            case [name, ("mean" | "all" | "each") as how] if role == "object" and name and name not in REDUCTIONS:
                return cls(role, how, name=name)
            case _:
                raise SiteError(_problem(text, forms))


def _indices(numbers: str) -> tuple[int, ...]:
    return tuple(sorted({int(number) for number in numbers.split(",")}))


def _problem(text: object, forms: Sequence[str]) -> str:
    if isinstance(text, str) and text == "mention" and "mention:first" in forms:
        return (
            "token selection 'mention' has several readings: 'mention:before' (the token before each mention, where the word is "
            "chosen), 'mention:first' and 'mention:last' (its first and last token); choose one of them"
        )
    readings = [f"'{text}:{how}' ({_READINGS[how]})" for how in REDUCTIONS if f"{text}:{how}" in forms]
    if readings and text in _PLURAL:
        ambiguous = len(readings) > 1
        return (
            f"token selection '{text}' has several readings: {', '.join(readings)}; choose one of them"
            if ambiguous
            else f"unknown token selection '{text}'; write {readings[0]}"
        )
    if isinstance(text, str) and _POSITIONS.match(text.replace(" ", "")) and "positions:<i>,<j>" in forms:
        return (
            f"unknown token selection '{text}'; write 'positions:{text.replace(' ', '')}' for positions counted from 0"
        )
    literal = f"'{text}'" if isinstance(text, str) else repr(text)
    return f"unknown token selection {literal}; choose from {_choices(forms)}{nearest(str(text), forms)}"


def _choices(forms: Sequence[str]) -> str:
    """Return forms for a message; roles with the same reductions share one entry if the list is long."""
    if len(forms) <= 8:
        return ", ".join(forms)
    roles = {role: tuple(how for how in REDUCTIONS if f"{role}:{how}" in forms) for role in _PLURAL}
    grouped = {f"{role}:{how}" for role, reductions in roles.items() for how in reductions}
    texts = [form for form in forms if form not in grouped and not form.startswith("object:<id>")]
    for reductions in dict.fromkeys(how for how in roles.values() if how):
        members = "|".join(role for role, how in roles.items() if how == reductions)
        texts.append(f"<{members}>:<{'|'.join(reductions)}>")
    return ", ".join(texts)
