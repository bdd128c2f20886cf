"""What a method costs: seconds and rows of the decoder for one answer, measured in isolation next to the model alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lvlm.access.decoder_module import decoder_of
from lvlm.active_interventions import mark_observer

if TYPE_CHECKING:
    from concepts.schema import Example
    from lvlm.encoding.encode import Batch
    from lvlm.model import Lvlm
    from mitigation.protocol import Mitigation


@dataclass(frozen=True)
class Price:
    """The cost of one answer of `tokens` tokens; medians over repetitions.

    Examples
    --------
    >>> from mitigation.arena.price import Price
    >>> Price(first=0.2, token=0.05, first_ratio=2.1, token_ratio=1.9, first_rows=2, token_rows=2, tokens=64).token_ratio
    1.9
    """

    first: float
    """Seconds until the logits of the first token: prompts, branches and what a method does before."""
    token: float
    """Seconds for each further token."""
    first_ratio: float
    """`first` divided by that of the model alone, measured in alternation."""
    token_ratio: float
    first_rows: float
    """Rows of the decoder's forward passes until the first token, for each answer."""
    token_rows: float
    """Rows of the decoder's forward passes for each further token."""
    tokens: int


def measure_price(
    model: Lvlm,
    mitigation: Mitigation | None,
    examples: Sequence[Example],
    *,
    new_tokens: int = 64,
    repetitions: int = 3,
) -> Price:
    """Measure a method on single questions, each in a separate batch, in alternation with the model alone.

    End tokens are ignored, so that all answers have the same length.

    Parameters
    ----------
    model
        The model.
    mitigation
        The method; None measures the model alone.
    examples
        The questions; captions are the usual case.
    new_tokens
        Number of tokens of an answer.
    repetitions
        Number of measurements of each question.
    """
    batches = [next(model.batches([example], 1)) for example in examples]
    plain: list[tuple[float, float]] = []
    ours: list[tuple[float, float]] = []
    rows: list[tuple[float, float]] = []
    for repetition in range(repetitions + 1):
        for batch in batches:
            alone = _seconds(model, None, batch, new_tokens)
            own = alone if mitigation is None else _seconds(model, mitigation, batch, new_tokens)
            if repetition:  # the first run of each pays for lazy initialization
                plain.append(alone[:2])
                ours.append(own[:2])
                rows.append(own[2:])
    first, token = (statistics.median(values) for values in zip(*ours, strict=True))
    first_ratio, token_ratio = (
        statistics.median(own[i] / alone[i] for own, alone in zip(ours, plain, strict=True)) for i in (0, 1)
    )
    first_rows, token_rows = (statistics.median(values) for values in zip(*rows, strict=True))
    return Price(first, token, first_ratio, token_ratio, first_rows, token_rows, new_tokens)


def _seconds(
    model: Lvlm, mitigation: Mitigation | None, batch: Batch, new_tokens: int
) -> tuple[float, float, float, float]:
    """Return the seconds until the first token and for each further one, and the decoder's rows for both."""
    with nullcontext() if mitigation is None else mitigation.applied(model), model.without_end_tokens():
        with _count_rows(model) as first_rows:
            start = _now(model)
            model.generate_batch(batch, 1)
            first = _now(model) - start
        with _count_rows(model) as all_rows:
            start = _now(model)
            model.generate_batch(batch, new_tokens)
            total = _now(model) - start
    further = max(new_tokens - 1, 1)
    return first, max(total - first, 0.0) / further, sum(first_rows), max(sum(all_rows) - sum(first_rows), 0) / further


def _now(model: Lvlm) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


@contextmanager
def _count_rows(model: Lvlm) -> Iterator[list[int]]:
    """Collect the number of rows of each forward pass of the decoder."""
    counts: list[int] = []

    @mark_observer
    def count(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = (*args, kwargs.get("inputs_embeds"), kwargs.get("input_ids"))
        tokens = next((x for x in values if isinstance(x, torch.Tensor) and x.dim() >= 2), None)
        counts.append(1 if tokens is None else len(tokens))

    handle = decoder_of(model).register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield counts
    finally:
        handle.remove()
