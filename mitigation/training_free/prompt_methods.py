"""Methods that answer another prompt: with text before the question, or after the model has written about the image."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lvlm.decoding.decoder import AnswerRule, Branch, Step
from lvlm.decoding.loop import DecodingRun, generate_prompts
from mitigation.training_free.branches import examples_of
from mitigation.training_free.method import TrainingFree

if TYPE_CHECKING:
    from concepts.schema import Example
    from lvlm.decoding.decoder import Decoder
    from lvlm.encoding.encode import Batch
    from lvlm.model import Lvlm
    from lvlm.sampling import Sampling


@dataclass(frozen=True)
class PromptMethod(TrainingFree):
    """A method that answers other prompts; subclasses override `_rewritten`, and `_rule` if they also change the logits.

    Examples
    --------
    >>> from dataclasses import dataclass, replace
    >>> import groundscope as gs
    >>> from mitigation.training_free.prompt_methods import PromptMethod
    >>> @dataclass(frozen=True)
    ... class Polite(PromptMethod):
    ...     def _rewritten(self, model, examples):
    ...         return [replace(example, question=f"Please Answer . {example.question}") for example in examples]
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["conflict"])
    >>> with Polite().applied(model):
    ...     answers = gs.answer(model, data)
    >>> len(answers)
    6
    """

    def _rewritten(self, model: Lvlm, examples: Sequence[Example]) -> Sequence[Example]:
        """Return the examples that are answered instead."""
        return examples

    def _prepared(self, model: Lvlm, examples: Sequence[Example]) -> tuple[Sequence[Example], AnswerRule]:
        """Return the examples that are answered instead, and the rule for their logits."""
        return self._rewritten(model, examples), AnswerRule()

    def _enter(self, model: Lvlm, stack: ExitStack) -> Decoder | None:
        return PromptDecoder(self)


@dataclass(frozen=True)
class PromptDecoder:
    """Decodes the prompts of a method; a `lvlm.decoding.decoder.Decoder`."""

    method: PromptMethod

    def first_logits(self, model: Lvlm, batch: Batch) -> Tensor:
        """Return the logits that the first token of each answer is chosen from, ``[B, V]``."""
        branch, rule = self._branch(model, batch)
        names = [encoding.example.id for encoding in batch.encodings]
        with torch.no_grad():
            return DecodingRun(model, branch.prompts, rule, continues=False, names=names).start()

    def generate(
        self, model: Lvlm, batch: Batch, max_new_tokens: int, sampling: Sampling | None = None
    ) -> list[list[int]]:
        """Return each answer as token ids, without its end token."""
        branch, rule = self._branch(model, batch)
        names = [encoding.example.id for encoding in batch.encodings]
        return generate_prompts(model, branch.prompts, rule, max_new_tokens, names=names, sampling=sampling)

    def _branch(self, model: Lvlm, batch: Batch) -> tuple[Branch, AnswerRule]:
        examples, rule = self.method._prepared(model, examples_of(batch, self.method.label))
        return Branch.of("prompts", model, [model.encode(example) for example in examples]), rule


# ---- text that the model writes first


class _Read(AnswerRule):
    """The model's own logits, passed to a function with the number of their step."""

    def __init__(self, read: AnswerRule | None) -> None:
        self._read = read

    def combine(self, step: Step) -> Tensor:
        if self._read is not None:
            self._read.combine(step)
        return step.logits


def write_about_images(
    model: Lvlm, examples: Sequence[Example], prompt: str, max_new_tokens: int, *, read: AnswerRule | None = None
) -> list[tuple[int, list[int]]]:
    """Let the model answer a prompt about the images of examples; equal images are answered once.

    Parameters
    ----------
    model
        The model.
    examples
        Examples whose images are described.
    prompt
        The question about the images.
    max_new_tokens
        Largest number of tokens of a text.
    read
        A rule whose `combine` receives every step; its result is ignored.

    Returns
    -------
    list
        For each example the number of its text among those that the model wrote, and its tokens.
    """
    prompts: dict[tuple[str, str | None], Example] = {}
    keys = []
    for example in examples:
        key = ("\n".join(image.identity for image in example.images), example.system)
        keys.append(key)
        prompts.setdefault(
            key, replace(example, question=prompt, suffix="", prefix="", mentions=(), objects=(), subject=None)
        )
    branch = Branch.of("text about the image", model, [model.encode(example) for example in prompts.values()])
    names = [example.id for example in prompts.values()]
    texts = generate_prompts(model, branch.prompts, _Read(read), max_new_tokens, names=names)
    numbers = {key: number for number, key in enumerate(prompts)}
    return [(numbers[key], texts[numbers[key]]) for key in keys]


def text_of(model: Lvlm, tokens: Sequence[int]) -> str:
    """Return the text of tokens, without special tokens."""
    return model.processor.tokenizer.decode(list(tokens), skip_special_tokens=True).strip()
