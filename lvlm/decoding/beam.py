"""Beam search, and diverse beams with groups of one, under any answer rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from groundscope.core.errors import ConfigError
from lvlm.decoding.decoder import AnswerRule, Prompts, RuleDecoder
from lvlm.decoding.loop import PADDING, DecodingRun, prompts_of
from lvlm.generation import end_tokens

if TYPE_CHECKING:
    from lvlm.encoding.encode import Batch
    from lvlm.model import Lvlm
    from lvlm.sampling import Sampling


@dataclass(frozen=True)
class Beams:
    """How a beam search compares answers.

    Examples
    --------
    >>> from lvlm.decoding.beam import Beams
    >>> Beams(count=3).count
    3
    """

    count: int = 5
    """Number of answers that are continued."""
    length_penalty: float = 1.0
    """A finished answer of n tokens (its end included) has the score ``sum of log p / n ** length_penalty``."""

    def __post_init__(self) -> None:
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 1:
            msg = f"count={self.count}: the number of beams must be an integer of at least 1"
            raise ConfigError(msg)
        if not math.isfinite(self.length_penalty):
            msg = f"length_penalty={self.length_penalty}: must be a finite number"
            raise ConfigError(msg)


@dataclass
class BeamState:
    """The running and the finished answers to one prompt."""

    beams: Beams
    rows: list[int]
    """Number of each running answer in the run."""
    scores: list[float] = field(default_factory=lambda: [0.0])
    tokens: list[list[int]] = field(default_factory=lambda: [[]])
    finished: list[tuple[float, list[int]]] = field(default_factory=list)
    done: bool = False

    def advance(self, log_p: Tensor, ends: frozenset[int], *, last: bool) -> tuple[list[int], list[int]]:
        """Extend the answers by one token; return the parent row and the token of each answer that runs on.

        Of the best ``(1 + ends) k`` extensions those that end are finished if they are among the best k; the best k others run
        on. The search is done when k answers are finished and the best running one has no better score at its present length.

        Parameters
        ----------
        log_p
            Log-probabilities of the next token of each running answer, ``[k, V]``.
        ends
            Tokens that end an answer.
        last
            Whether no further token may follow.
        """
        count, vocabulary = self.beams.count, log_p.shape[1]
        total = log_p + torch.tensor(self.scores, dtype=log_p.dtype, device=log_p.device)[:, None]  # [k, V]
        best = total.flatten().topk(min(max(2, 1 + len(ends)) * count, total.numel()))
        running: list[tuple[float, int, int]] = []
        length = len(self.tokens[0]) + 1
        for rank, (score, index) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            parent, token = divmod(index, vocabulary)
            if score == -math.inf:  # excluded by the rule
                continue
            if last or token in ends:
                if rank < count:
                    answer = [*self.tokens[parent], *([] if token in ends else [token])]
                    self.finished.append((score / length**self.beams.length_penalty, answer))
            elif len(running) < count:
                running.append((score, parent, token))
        self.finished = sorted(self.finished, key=lambda item: -item[0])[:count]
        parents = [self.rows[parent] for _, parent, _ in running]
        self.tokens = [[*self.tokens[parent], token] for _, parent, token in running]
        self.scores = [score for score, _, _ in running]
        full = len(self.finished) == count
        self.done = not running or (full and self.scores[0] / length**self.beams.length_penalty <= self.finished[-1][0])
        return parents, [token for _, _, token in running]


@torch.no_grad()
def beam_search(
    model: Lvlm,
    prompts: Sequence[Prompts],
    rule: AnswerRule,
    max_new_tokens: int,
    *,
    names: Sequence[str],
    beams: Beams | None = None,
) -> list[list[int]]:
    """Return the best answer to each prompt under beam search, as token ids without its end token.

    As ``generate(num_beams=k, do_sample=False, early_stopping=False)`` of transformers, for the tokens that end an answer here:
    the model's end tokens, and a placeholder of an image. Prompts whose search is done leave the forward passes.

    Parameters
    ----------
    model
        The model.
    prompts
        The prompts of all answers, grouped by shape.
    rule
        How the logits of prompts and branches are combined; branches follow the beams.
    max_new_tokens
        Largest number of tokens of an answer.
    names
        Name of each answer, for messages.
    beams
        Number of beams and length penalty.

    Raises
    ------
    ModelError
        If the logits of the model at a step are not finite.
    """
    options = beams or Beams()
    ends = end_tokens(model) | {model.content_id}
    run = DecodingRun(model, prompts, rule, continues=max_new_tokens > 1, names=names)
    searches = [BeamState(options, [row]) for row in range(len(names))]
    log_p = run.start().log_softmax(-1)
    for number in range(max_new_tokens):
        parents: list[int] = []
        tokens: list[int] = []
        for search in searches:
            if search.done:
                continue
            start = len(parents)
            more_parents, more_tokens = search.advance(log_p[search.rows], ends, last=number + 1 == max_new_tokens)
            if not search.done:
                parents += more_parents
                tokens += more_tokens
                search.rows = list(range(start, len(parents)))
        if not parents:
            break
        run.select(parents)
        log_p = run.next(torch.tensor(tokens, device=log_p.device)).log_softmax(-1)
    return [search.finished[0][1] for search in searches]


@dataclass(frozen=True)
class BeamDecoder(RuleDecoder):
    """A `lvlm.decoding.decoder.Decoder` that writes answers by beam search; the first token alone is that of the rule.

    Examples
    --------
    >>> import groundscope as gs
    >>> from lvlm.decoding.beam import BeamDecoder, Beams
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["conflict"])
    >>> with model.decoding_with(BeamDecoder(Beams(3))):
    ...     text = gs.answer(model, data[:1], generate=True).answers[0].text
    >>> text in data[0].candidates
    True
    """

    beams: Beams = field(default_factory=Beams)

    def generate(
        self, model: Lvlm, batch: Batch, max_new_tokens: int, sampling: Sampling | None = None
    ) -> list[list[int]]:
        """Return each answer as token ids, without its end token; raises `ConfigError` for sampled answers."""
        if sampling is not None:
            msg = "beam search compares the most likely answers and draws none; answer without sampling"
            raise ConfigError(msg)
        names = [encoding.example.id for encoding in batch.encodings]
        rule = self.start(model, batch)
        return beam_search(model, prompts_of(batch), rule, max_new_tokens, names=names, beams=self.beams)


@dataclass(frozen=True)
class Continuation:
    """One of several continuations of an answer."""

    tokens: tuple[int, ...]
    """Token ids, with the token of `stops` that it ends in, without an end token."""
    log_p: float
    """Sum of the model's log-probabilities of the tokens, and of the end token if it has ended."""
    ended: bool
    """Whether an end token followed."""


def diverse_tokens(log_p: Tensor, running: Sequence[bool], diversity: float) -> list[int]:
    """Return the next token of each continuation: the most likely one after a penalty for tokens of earlier continuations.

    Diverse beam search (Vijayakumar et al. 2018, arXiv 1610.02424) with groups of one: the k-th continuation takes the largest
    ``log p - diversity * n``, where n is the number of earlier running continuations that take the token at this step. The lowest
    id of equal scores is taken.

    Parameters
    ----------
    log_p
        Log-probabilities ``[k, V]``.
    running
        Which continuations have not ended; the others take token 0.
    diversity
        Penalty of a token for each earlier continuation that takes it.

    Examples
    --------
    >>> import torch
    >>> from lvlm.decoding.beam import diverse_tokens
    >>> log_p = torch.tensor([[-0.1, -1.0, -3.0]] * 3)
    >>> diverse_tokens(log_p, [True, True, True], 2.0)
    [0, 1, 0]
    """
    counts = torch.zeros(log_p.shape[1], dtype=log_p.dtype, device=log_p.device)
    tokens = []
    for row, alive in zip(log_p, running, strict=True):
        token = PADDING
        if alive:
            scores = row - diversity * counts
            token = int((scores == scores.max()).nonzero()[0])
            counts[token] += 1
        tokens.append(token)
    return tokens


def continue_diversely(
    run: DecodingRun,
    logits: Tensor,
    max_new_tokens: int,
    *,
    diversity: float,
    stops: frozenset[int],
    ends: frozenset[int],
) -> list[Continuation]:
    """Continue the answers of a run, which are equal so far, each until it ends, by `diverse_tokens`.

    Parameters
    ----------
    run
        A run whose answers are copies of one answer (`DecodingRun.select`).
    logits
        Logits of their next token, ``[k, V]``.
    max_new_tokens
        Largest number of tokens of a continuation.
    diversity
        Penalty of `diverse_tokens`.
    stops
        Tokens after which a continuation ends; they belong to it.
    ends
        Tokens that end the whole answer; they do not belong to it.
    """
    count = len(logits)
    running, ended = [True] * count, [False] * count
    written: list[list[int]] = [[] for _ in range(count)]
    totals = [0.0] * count
    for number in range(max_new_tokens):
        log_p = logits.log_softmax(-1)
        tokens = diverse_tokens(log_p, running, diversity)
        for row, token in enumerate(tokens):
            if not running[row]:
                continue
            totals[row] += float(log_p[row, token])
            ended[row] = token in ends
            if not ended[row]:
                written[row].append(token)
            running[row] = not ended[row] and token not in stops
        if not any(running) or number + 1 == max_new_tokens:
            break
        tokens = [token if alive else PADDING for token, alive in zip(tokens, running, strict=True)]
        logits = run.next(torch.tensor(tokens, device=logits.device))
    return [
        Continuation(tuple(tokens_of_row), total, end)
        for tokens_of_row, total, end in zip(written, totals, ended, strict=True)
    ]
