"""Control: greedy answers cut to a length, because shorter captions name fewer absent objects."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from groundscope.core.errors import ConfigError
from groundscope.core.text import format_count
from lvlm.generation import greedy
from mitigation.training_free.method import TrainingFree
from mitigation.training_free.prompt_methods import text_of
from mitigation.training_free.word_limit import cut_tokens

if TYPE_CHECKING:
    from behavior import BehaviorResult
    from concepts.schema import ConceptDataset
    from lvlm.decoding.decoder import Decoder
    from lvlm.encoding.encode import Batch
    from lvlm.model import Lvlm
    from lvlm.sampling import Sampling


@dataclass(frozen=True)
class CutGreedy(TrainingFree):
    """Control: the greedy answer, cut after a number of words.

    `length_for_mean` chooses the number at which the mean length is closest to that of a method; `length_for_recall` chooses
    the smallest number at which captions reach the recall of a method. Answers that are chosen from candidates do not change.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.controls.cut_answers import CutGreedy
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(20).where(kind="caption")
    >>> with CutGreedy(3).applied(model):
    ...     answers = gs.answer(model, data)
    >>> [len(a.text.split()) for a in answers.answers]
    [3, 3]
    """

    label: ClassVar[str] = "greedy cut"
    control: ClassVar[bool] = True

    words: int = 50
    """Number of words after which an answer ends; at least 1."""

    def __post_init__(self) -> None:
        if isinstance(self.words, bool) or not isinstance(self.words, int) or self.words < 1:
            msg = f"words={self.words}: must be an integer of at least 1"
            raise ConfigError(msg)

    @property
    def name(self) -> str:
        """The number of words."""
        return f"{self.label} to {format_count(self.words, 'word')}"

    def _enter(self, model: Lvlm, stack: ExitStack) -> Decoder | None:
        return _CutDecoder(self.words)


@dataclass(frozen=True)
class _CutDecoder:
    words: int

    def first_logits(self, model: Lvlm, batch: Batch) -> Tensor:
        return model.logits(batch.inputs, batch.images)

    def generate(
        self, model: Lvlm, batch: Batch, max_new_tokens: int, sampling: Sampling | None = None
    ) -> list[list[int]]:
        answers = greedy(model, batch.inputs, max_new_tokens, images=batch.images)
        return [cut_tokens(answer, self.words, lambda tokens: text_of(model, tokens)) for answer in answers]


def cut_text(text: str, words: int) -> str:
    """Return the first words of a text, with single spaces between them if it is cut.

    Examples
    --------
    >>> from mitigation.training_free.controls.cut_answers import cut_text
    >>> cut_text("a red apple and a dog", 3)
    'a red apple'
    """
    parts = text.split()
    return text if len(parts) <= words else " ".join(parts[:words])


def length_for_mean(texts: Sequence[str], mean: float) -> int:
    """Return the number of words to which texts are cut so that their mean number of words is nearest to `mean`.

    Examples
    --------
    >>> from mitigation.training_free.controls.cut_answers import length_for_mean
    >>> length_for_mean(["a b c d", "a b", "a b c d e f"], 3.0)  # means 1, 2, 2.67, 3.33, ...
    4
    """
    lengths = [len(text.split()) for text in texts]
    if not any(lengths):
        msg = "there are no words to cut"
        raise ConfigError(msg)
    means = {n: sum(min(n, length) for length in lengths) / len(lengths) for n in range(1, max(lengths) + 1)}
    return min(means, key=lambda n: (round(abs(means[n] - mean), 9), -n))


def length_for_recall(answers: BehaviorResult, data: ConceptDataset, recall: float, **chair: Any) -> int:
    """Return the smallest number of words to which captions can be cut with at least a recall of their images' objects.

    Parameters
    ----------
    answers
        Greedy captions.
    data
        Their dataset.
    recall
        Recall of the method that the control is compared with.
    **chair
        Arguments of `behavior.chair.score_captions`.

    Returns
    -------
    int
        Number of words; that of the longest caption if even whole captions have less recall.
    """
    from behavior.chair import score_captions

    captions = [a for a in answers.answers if a.kind == "caption"]
    longest = max((len((a.text or "").split()) for a in captions), default=1)

    def recall_of(words: int) -> float:
        rows = tuple(replace(a, text=cut_text(a.text or "", words)) for a in captions)
        return score_captions(replace(answers, answers=rows), data, **chair).recall.value

    low, high = 1, max(longest, 1)
    while low < high:  # recall does not decrease with the length
        middle = (low + high) // 2
        if recall_of(middle) >= recall:
            high = middle
        else:
            low = middle + 1
    return low
