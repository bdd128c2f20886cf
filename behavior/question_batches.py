"""The batches in which a model is asked the questions of a dataset, under several conditions.

Questions about one image share the run of their common prefix under the conditions that allow it (`lvlm.prefix_groups`); under
all others each question is a whole prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lvlm.decoding.prefix_run import PrefixBatch, prefix_batches
from lvlm.prefix_groups import PrefixGroups
from lvlm.prefix_sharing import unshared_because

if TYPE_CHECKING:
    from concepts.schema import Example
    from lvlm.model import Batch, Lvlm

Conditions = Mapping[str, Callable[[], AbstractContextManager[None]]]
"""Name to a function that opens the condition's context."""


@dataclass(frozen=True, eq=False)
class QuestionBatch:
    """Questions that are asked together, and the conditions under which they are."""

    prompts: Batch | PrefixBatch
    index: tuple[int, ...]
    """Index of each question in the examples."""
    conditions: tuple[str, ...]


def sharing_conditions(model: Lvlm, examples: Sequence[Example], conditions: Conditions) -> tuple[str, ...]:
    """Return the conditions under which questions about one image share their prefix; empty if no two have an image in common.

    Examples
    --------
    >>> from contextlib import nullcontext
    >>> import groundscope as gs
    >>> from behavior.question_batches import sharing_conditions
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10)
    >>> sharing_conditions(model, data.examples, {"alone": nullcontext})
    ('alone',)
    """
    images = [tuple(image.identity for image in e.images) for e in examples if e.images]
    if len(set(images)) == len(images):
        return ()
    names = []
    for name, open_context in conditions.items():
        with open_context():
            if not unshared_because(model):
                names.append(name)
    return tuple(names)


def question_batches(
    model: Lvlm,
    examples: Sequence[Example],
    size: int,
    conditions: Sequence[str],
    sharing: Sequence[str],
    extra: int = 0,
) -> Iterator[QuestionBatch]:
    """Yield every question once for each condition, in batches.

    Parameters
    ----------
    model, examples
        The model and the questions.
    size
        Largest number of questions of a batch.
    conditions
        Names of all conditions.
    sharing
        Names of those under which prefixes are shared.
    extra
        Largest number of tokens that will follow a prompt.

    Examples
    --------
    >>> import groundscope as gs
    >>> from behavior.question_batches import question_batches
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10)
    >>> batches = list(question_batches(model, data.examples, 16, ["alone"], ["alone"]))
    >>> sorted(i for batch in batches for i in batch.index) == list(range(len(data)))
    True
    """
    sharing_prefixes = tuple(name for name in conditions if name in sharing)
    on_whole_prompts = tuple(name for name in conditions if name not in sharing)
    if sharing_prefixes:
        groups = PrefixGroups(model, examples, size, extra)
        for batch in prefix_batches(model, groups):
            yield QuestionBatch(batch, batch.index, sharing_prefixes)
        others = groups.others()
        for batch in model.batches([examples[i] for i in others], size, in_order=False):
            yield QuestionBatch(batch, tuple(others[i] for i in batch.index), sharing_prefixes)
    if on_whole_prompts:
        for batch in model.batches(examples, size, in_order=False):
            yield QuestionBatch(batch, batch.index, on_whole_prompts)
