"""Ask a model every question of a dataset, in batches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from rich.progress import Progress
from torch import Tensor

from behavior.parsing import Parser, named_parser, parser_for, read_answer
from behavior.result import Answer, BehaviorResult, Cost
from concepts.schema import ConceptDataset, Example
from groundscope.core.errors import ConfigError, DataError, ModelError
from groundscope.core.progress import display
from lvlm import applied
from lvlm.answers import AnswerKey, answer_key
from lvlm.model import Batch, Lvlm


def answer(
    model: Lvlm,
    data: ConceptDataset,
    batch_size: int = 32,
    *,
    generate: bool = False,
    parser: str | None = None,
    max_new_tokens: int = 40,
    progress: bool = True,
) -> BehaviorResult:
    """Ask a model every question of a dataset.

    A question with candidates is answered by one forward: the given answer is the candidate with the highest
    log-score at the last token of the prompt, and the margin says by how much. A question without candidates (a
    caption) is answered by greedy generation, as all are with `generate`.

    Parameters
    ----------
    model
        What to ask; hooks on it, such as an applied steering vector, act as in any forward.
    data
        What to ask.
    batch_size
        How many examples of equal length share a forward.
    generate
        Let the model write its answers, and read them by the parser, also where there are candidates.
    parser
        Name of the parser of written yes-no answers, one of `behavior.parsing.PARSERS`; by default the rule of the
        benchmark that `data` was loaded from (`behavior.parsing.parser_for`).
    max_new_tokens
        How many tokens it may write.
    progress
        Show a progress bar where the error output is a terminal.

    Returns
    -------
    BehaviorResult
        The answers in the order of `data`.

    Raises
    ------
    DataError
        For an empty dataset, a true answer that is no candidate, a question with one candidate, an image that cannot
        be read; all but the last before the first forward.
    ConfigError
        For a batch size or number of tokens below 1, or an unknown parser.
    ModelError
        Where the logits are not finite.
    """
    asked = answer_each(
        model,
        data,
        {"as it is": nullcontext},
        batch_size,
        generate=generate,
        parser=parser,
        max_new_tokens=max_new_tokens,
        progress=progress,
    )
    return asked["as it is"]


def answer_each(
    model: Lvlm,
    data: ConceptDataset,
    conditions: Mapping[str, Callable[[], AbstractContextManager[None]]],
    batch_size: int = 32,
    *,
    logits: Callable[[Batch], Sequence[Tensor]] | None = None,
    generate: bool = False,
    parser: str | None = None,
    max_new_tokens: int = 40,
    progress: bool = True,
) -> dict[str, BehaviorResult]:
    """Ask a model every question of a dataset under each of several conditions, batch by batch: encoded once for all.

    Parameters
    ----------
    model, data, batch_size, generate, parser, max_new_tokens, progress
        As for `answer`.
    conditions
        Name to what opens the context that the model answers in, such as an applied steering vector.
    logits
        Gives a batch's logits at the last position under each condition, ``[B, V]`` each, where that is possible faster
        than by a forward in each context (`circuits.execution.conditions.logits_under`). Text is always written in the contexts.

    Returns
    -------
    dict
        Condition to its answers in the order of `data`. With several conditions their costs are not known apart.

    Raises
    ------
    DataError, ConfigError, ModelError
        As for `answer`.
    """
    if batch_size < 1 or max_new_tokens < 1:
        msg = f"batch_size={batch_size}, max_new_tokens={max_new_tokens}: both must be at least 1"
        raise ConfigError(msg)
    parser = parser_for(data, parser)
    rule = named_parser(parser)
    _check(model, data, written=generate)
    chosen = [i for i, e in enumerate(data) if e.candidates and not generate]
    written = [i for i, e in enumerate(data) if generate or not e.candidates]
    rows: dict[str, dict[int, Answer]] = {name: {} for name in conditions}

    def in_contexts(batch: Batch) -> Iterator[Tensor]:
        for opened in conditions.values():
            with opened():
                yield model.logits(batch.inputs, batch.images)

    start = time.perf_counter()
    with _counted(model) as forwards, _bar(len(data), progress) as bar:

        def read(batch: Batch, every: Sequence[Tensor]) -> None:
            examples = [e.example for e in batch.encodings]
            for name, one in zip(conditions, every, strict=True):
                found = _choose(model, examples, one)
                rows[name].update(zip((chosen[i] for i in batch.index), found, strict=True))
            bar.advance(bar.task_ids[0], len(examples))

        # A device goes on by itself until its results are read: the next batch is encoded and sent before that.
        unread: tuple[Batch, Sequence[Tensor]] | None = None
        for batch in model.batches([data.examples[i] for i in chosen], batch_size, in_order=False):
            every = list(in_contexts(batch)) if logits is None else logits(batch)
            if unread is not None:
                read(*unread)
            unread = batch, every
        if unread is not None:
            read(*unread)
        for batch in model.batches([data.examples[i] for i in written], batch_size, in_order=False):
            examples = [e.example for e in batch.encodings]
            for name, opened in conditions.items():
                with opened():
                    texts = model.generate(batch, max_new_tokens)
                found = [_read(e, text, rule) for e, text in zip(examples, texts, strict=True)]
                rows[name].update(zip((written[i] for i in batch.index), found, strict=True))
            bar.advance(bar.task_ids[0], len(examples))
    alone = len(conditions) == 1
    seconds = time.perf_counter() - start
    cost = Cost(seconds if alone else None, len(forwards) if alone else None, len(data))
    provenance = {
        "model": model.name,
        "config_hash": model.config_hash,
        "weights_hash": model.weights_hash,
        "data": data.name,
        "data_digest": data.digest,
        "batch_size": batch_size,
        "generate": generate,
        "parser": parser,
        "max_new_tokens": max_new_tokens,
        "attention": model.attention,
        **({"revision": model.revision} if model.revision else {}),
        **({"decoding": "greedy"} if written else {}),
    }
    said: dict[str, dict[str, Any]] = {}
    for name, opened in conditions.items():
        with opened():  # what is applied in it is part of where its answers came from
            said[name] = {**provenance, **applied.record(model.hf)}
        if list(conditions) != ["as it is"]:
            said[name]["condition"] = name
    return {
        name: BehaviorResult(tuple(found[i] for i in range(len(data))), cost, said[name])
        for name, found in rows.items()
    }


def _check(model: Lvlm, data: ConceptDataset, *, written: bool) -> None:
    """Find what would go wrong before the first forward."""
    if not len(data):
        msg = f"dataset '{data.name}' has no examples to ask"
        raise DataError(msg)
    for example in data:
        candidates = example.candidates
        if candidates and len(set(candidates)) < max(2, len(candidates)):
            msg = f"example '{example.id}': a question needs two or more different candidates, or none for free text"
            raise DataError(msg)
        if candidates and example.answer not in candidates:
            msg = f"example '{example.id}': the true answer '{example.answer}' is not one of {', '.join(candidates)}"
            raise DataError(msg)
        if candidates and not written:
            answer_key(model, example)  # raises where the tokenizer cannot tell the candidates apart


def _choose(model: Lvlm, examples: Sequence[Example], logits: Tensor) -> list[Answer]:
    """Take the best candidate of each row of logits ``[B, V]``."""
    wide = logits.float()
    log_total = wide.logsumexp(-1)  # [B]; not finite where any logit is NaN or infinite
    for example, total in zip(examples, log_total.tolist(), strict=True):
        if not math.isfinite(total):
            msg = (
                f"example '{example.id}': the logits of {model.name} are not finite; steer less, or load it in float32"
            )
            raise ModelError(msg)
    # Rows that share their candidates, and the tokens these begin with, are scored together.
    alike: dict[AnswerKey, list[int]] = {}
    for row, example in enumerate(examples):
        alike.setdefault(answer_key(model, example), []).append(row)
    answers: dict[int, Answer] = {}
    for key, members in alike.items():
        candidates = key.candidates
        scores = key.scores(wide[members])  # [M, n_candidates]
        shares = (scores - log_total[members, None]).exp().tolist()
        for row, values, probabilities in zip(members, scores.tolist(), shares, strict=True):
            example = examples[row]
            right = candidates.index(example.answer)
            other = max((i for i in range(len(candidates)) if i != right), key=values.__getitem__)
            margin = values[right] - values[other]
            answers[row] = _row(
                example,
                # A tie is not an answer to the question: it counts as wrong, whatever the candidates' order.
                given=candidates[right if margin > 0 else other],
                correct=margin > 0,
                margin=margin,
                probabilities=tuple(probabilities),
            )
    return [answers[row] for row in range(len(examples))]


def _read(example: Example, text: str, rule: Parser) -> Answer:
    """Read what was written to one question."""
    if not example.candidates:
        return _row(example, given=None, correct=None, text=text)
    given = read_answer(text, example.candidates, rule)
    return _row(example, given=given, correct=given == example.answer, text=text)


def _row(example: Example, **said: Any) -> Answer:
    names = ("id", "group", "split", "level", "kind", "question", "answer", "candidates", "prior_answer")
    return Answer(**{name: getattr(example, name) for name in names}, **said)


@contextmanager
def _counted(model: Lvlm) -> Iterator[list[None]]:
    """Count the forward passes of a model: a generated token is one too, and only the model knows when it stops."""
    seen: list[None] = []
    hook = model.hf.register_forward_pre_hook(applied.observer(lambda *_: seen.append(None)))
    try:
        yield seen
    finally:
        hook.remove()


@contextmanager
def _bar(total: int, wanted: bool) -> Iterator[Progress]:
    with display(show=None if wanted else False) as bar:
        bar.add_task("answering", total=total)
        yield bar
