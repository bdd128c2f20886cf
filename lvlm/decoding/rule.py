"""How the next token of an answer is chosen: a rule for the logits, and the branches of the prompt that it compares with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from lvlm.sites import Site

if TYPE_CHECKING:
    from lvlm.encoding.encode import Encoding, Inputs
    from lvlm.model import Lvlm


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts of equal shape, without padding."""

    rows: tuple[int, ...]
    """Index of the answer that each prompt belongs to."""
    inputs: Inputs
    """Model inputs on the model's device."""
    images: tuple[str, ...] = ()
    """Identity of each row's images; rows with equal ones share one run of the vision tower. Empty: nothing is shared."""


@dataclass(frozen=True, eq=False)
class Branch:
    """Variants of the prompts, one for each answer, that are continued with the same tokens as the answers.

    The prompts of a branch may differ in length from those of the answers and from each other.
    """

    name: str
    prompts: tuple[Prompts, ...]
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    """Opens changes of the model that are active in the prefill of this branch only."""

    @classmethod
    def of(
        cls, name: str, model: Lvlm, encodings: Sequence[Encoding], **more: Callable[[], AbstractContextManager[object]]
    ) -> Branch:
        """Return the branch of encoded prompts, the i-th for answer i; they are grouped by shape.

        Parameters
        ----------
        name
            Name in messages.
        model
            The model.
        encodings
            One for each answer.
        **more
            ``context``.
        """
        groups: dict[tuple[object, ...], list[int]] = {}
        for row, encoding in enumerate(encodings):
            groups.setdefault(encoding.shape, []).append(row)
        prompts = tuple(
            Prompts(
                tuple(rows),
                model.collate([encodings[row] for row in rows]),
                tuple(encodings[row].image_key for row in rows),
            )
            for rows in groups.values()
        )
        return cls(name, prompts, **more)


@dataclass(frozen=True, eq=False)
class Step:
    """What a rule knows when the next token of each answer is chosen."""

    number: int
    """Number of tokens before it in the answer: 0 for the first."""
    logits: Tensor
    """Logits after the prompts and the tokens so far, ``[B, V]``."""
    branches: tuple[Tensor, ...] = ()
    """Logits of each branch, ``[B, V]``, in the order of `AnswerRule.branches`."""
    tokens: Tensor | None = None
    """The tokens of the answers so far, int ``[B, number]``."""
    activations: Mapping[str, Tensor] = field(default_factory=dict)
    """By name of each of `AnswerRule.sites`: its activations at the last token of each answer, ``[B, D]``."""
    image_activations: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    """By name of each of `AnswerRule.image_sites`, for each answer: its activations at the image tokens, ``[n, D]``; in the first
    step only."""


class AnswerRule:
    """How the tokens of one batch of answers are chosen; the default takes the model's own logits.

    A rule is made for each batch (`RuleDecoder.start`), so its attributes may hold what it remembers between tokens.
    """

    sites: Sequence[Site] = ()
    """Sites of the decoder that `Step.activations` contains."""
    image_sites: Sequence[Site] = ()
    """Sites of the decoder that `Step.image_activations` contains."""
    independent: bool = False
    """Whether `branches` does not read its argument; then branches of text may run in the forward pass of the prompts."""

    def branches(self, first: Step) -> Sequence[Branch]:
        """Return the branches; called once, after the prefill of the prompts, whose step is `first`."""
        return ()

    def combine(self, step: Step) -> Tensor:
        """Return the logits that the next token is chosen from, ``[B, V]``; minus infinity excludes a token."""
        return step.logits

    def select(self, parents: Sequence[int]) -> None:
        """Follow other answers: the i-th is answer ``parents[i]`` so far; for rules that remember something of each answer."""
