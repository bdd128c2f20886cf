"""Ask a model every question of a dataset, in batches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from itertools import compress
from typing import Any, Protocol

from torch import Tensor

from behavior.matching import DEFAULT_MATCH, matches_answer
from behavior.parsing import Parser, judge_text, parsers_of
from behavior.question_batches import QuestionBatch, question_batches, sharing_conditions
from behavior.repeated_sampling import repeat_sampled
from behavior.result import Answer, BehaviorResult, Cost
from behavior.score_names import FIRST_TOKEN, check_score
from behavior.text_scores import candidate_tokens, score_texts
from concepts.combination import PARTS, dataset_parts
from concepts.schema import ConceptDataset, Example
from groundscope.core.errors import ConfigError, DataError, ModelError
from groundscope.core.progress import display
from lvlm.active_interventions import intervention_record, mark_observer
from lvlm.answer_keys import AnswerKey, answer_key, check_prefixes
from lvlm.decoding.prefix_run import PrefixBatch
from lvlm.model import Batch, Lvlm
from lvlm.sampling import Sampling

_EXCLUDED = -1e4
"""Smallest logit that a margin is computed from."""
_SINGLE = "unmodified"
"""Name of the only condition of `answer`, which is not recorded in the provenance."""


class LogitsUnder(Protocol):
    """Computes a batch's logits under each of several conditions, as `circuits.logits_under` returns it."""

    @property
    def continue_prefixes(self) -> tuple[bool, ...]:
        """For each condition, whether questions that share a prefix continue it."""
        ...

    def __call__(self, batch: Batch | PrefixBatch, /) -> Sequence[Tensor]:
        """Return the logits at the last position under each condition, ``[B, V]`` each."""
        ...


def answer(
    model: Lvlm,
    data: ConceptDataset,
    *,
    generate: bool = False,
    score: str = FIRST_TOKEN,
    parser: str | None = None,
    match: str = DEFAULT_MATCH,
    max_new_tokens: int = 40,
    sampling: Sampling | None = None,
    seeds: int = 1,
    batch_size: int = 32,
    progress: bool | None = None,
) -> BehaviorResult:
    """Ask a model every question of a dataset.

    A question with candidates takes one forward pass: the answer is the candidate with the highest score (log-sum-exp of
    the logits of its first tokens) at the last token of the prompt; the margin is its score minus the best other score. A
    question without candidates is answered by generation, greedy unless `sampling` is given; with `generate`, so are all
    questions. The text that answers an open question is compared with its true answer and aliases by `match`; a caption is
    not. With `score`, whole texts of candidates are compared, so that these may share their first token. After the prefix of an
    example (`Example.prefix`), the answer is what follows it: `Answer.text` does not repeat the prefix.

    Questions about one image share one run of the image and of all tokens before the first that differs, where that is exact
    (`lvlm.prefix_sharing.unshared_because`); the provenance then has ``"prefixes": "shared"``, because the last bits of values
    can differ from those of whole prompts.

    Parameters
    ----------
    model
        The model; hooks on it, such as an applied steering vector, act as in any forward pass.
    data
        The questions.
    generate
        Generate text and parse the answer from it, also for questions with candidates.
    score
        How candidates are scored: ``first_token`` as above; ``text`` by the log-probability of the whole text exactly as written,
        in nats, in one forward pass for each candidate; ``text_per_token`` by the same divided by the number of tokens, which
        does not prefer short texts. `Answer.probabilities` are then those that the answer begins with each text.
    parser
        Name of the parser of generated yes-no answers, one of `behavior.parsing.PARSERS`; by default that of the
        benchmark that `data` was loaded from (`behavior.parsing.parser_for`).
    match
        Rule for the answers to open questions, one of `behavior.matching.MATCHES`.
    max_new_tokens
        Maximum number of generated tokens.
    sampling
        How generated tokens are drawn; None takes the most likely token.
    seeds
        Number of sampled answers to each question that is answered by generation. Those after the first have ids
        ``<id>#2``, ``<id>#3``, …; rates count all of them, and their intervals are clustered by image.
    batch_size
        Number of questions per forward pass.
    progress
        Whether to show a progress bar; None shows it on a terminal.

    Returns
    -------
    BehaviorResult
        The answers in the order of `data`.

    Raises
    ------
    DataError
        For an empty dataset, a true answer that is not a candidate, a question with one candidate, or an image that
        cannot be read; all but the last are raised before the first forward pass.
    ConfigError
        For a batch size, number of tokens or number of seeds below 1, several seeds without sampling, or an unknown parser
        or rule.
    ModelError
        If the logits are not finite.

    Examples
    --------
    >>> import groundscope as gs
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["conflict"])
    >>> answers = gs.answer(model, data)
    >>> len(answers), answers.rate("accuracy").n
    (6, 6)
    """
    results = answer_each(
        model,
        data,
        {_SINGLE: nullcontext},
        generate=generate,
        score=score,
        parser=parser,
        match=match,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seeds=seeds,
        batch_size=batch_size,
        progress=progress,
    )
    return results[_SINGLE]


def answer_each(
    model: Lvlm,
    data: ConceptDataset,
    conditions: Mapping[str, Callable[[], AbstractContextManager[None]]],
    *,
    logits: LogitsUnder | None = None,
    generate: bool = False,
    score: str = FIRST_TOKEN,
    parser: str | None = None,
    match: str = DEFAULT_MATCH,
    max_new_tokens: int = 40,
    sampling: Sampling | None = None,
    seeds: int = 1,
    batch_size: int = 32,
    progress: bool | None = None,
) -> dict[str, BehaviorResult]:
    """Ask a model every question of a dataset under several conditions; each batch is encoded once for all of them.

    Parameters
    ----------
    model, data, generate, score, parser, match, max_new_tokens, sampling, seeds, batch_size, progress
        As for `answer`.
    conditions
        Name to a function that opens the condition's context, such as an applied steering vector.
    logits
        Function that returns a batch's logits at the last position under each condition, in their order, ``[B, V]`` each, if
        that is faster than a forward pass in each context (`circuits.logits_under`). Text is always generated in the contexts.

    Returns
    -------
    dict
        Condition to its answers in the order of `data`. With several conditions, their separate costs are None.

    Raises
    ------
    DataError, ConfigError, ModelError
        As for `answer`.

    Examples
    --------
    >>> from contextlib import nullcontext
    >>> import groundscope as gs
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["conflict"])
    >>> results = gs.behavior.answer_each(model, data, {"first": nullcontext, "second": nullcontext})
    >>> results["first"].answers == results["second"].answers
    True
    """
    if batch_size < 1 or max_new_tokens < 1:
        msg = f"batch_size={batch_size}, max_new_tokens={max_new_tokens}: both must be at least 1"
        raise ConfigError(msg)
    if seeds < 1 or (seeds > 1 and sampling is None):
        msg = f"seeds={seeds}: must be at least 1, and above 1 only with sampling, because greedy answers are always the same"
        raise ConfigError(msg)
    matches_answer("", (), match)  # raises for an unknown rule
    check_score(score)
    digest = data.digest
    data = repeat_sampled(data, seeds, generate=generate)
    parser, rules = parsers_of(data, parser)
    _check(model, data, generate=generate, score=score)
    scored = [i for i, e in enumerate(data) if e.candidates and not generate]
    generated = [i for i, e in enumerate(data) if generate or not e.candidates]
    rows: dict[str, dict[int, Answer]] = {name: {} for name in conditions}

    sharing = sharing_conditions(model, data.examples, conditions)
    shared: set[str] = set()

    def batches(rows_of_kind: Sequence[int], names: Sequence[str], extra: int = 0) -> Iterator[QuestionBatch]:
        """Yield the batches of some questions; their indices are those of the data."""
        examples = [data.examples[i] for i in rows_of_kind]
        for batch in question_batches(model, examples, batch_size, list(conditions), names, extra):
            if isinstance(batch.prompts, PrefixBatch):
                continued = sharing if logits is None else compress(conditions, logits.continue_prefixes)
                shared.update(set(batch.conditions).intersection(continued))
            yield replace(batch, index=tuple(rows_of_kind[i] for i in batch.index))

    def in_contexts(batch: QuestionBatch) -> Iterator[Tensor]:
        for name in batch.conditions:
            with conditions[name]():
                yield model.answer_logits(batch.prompts)

    start = time.perf_counter()
    with _count_forwards(model) as forwards, display(show=progress) as bar:
        bar.add_task("answering", total=len(data))

        def advance(batch: QuestionBatch) -> None:
            bar.advance(bar.task_ids[0], len(batch.index) * len(batch.conditions) / len(conditions))

        def read(batch: QuestionBatch, logits_per_condition: Sequence[Tensor]) -> None:
            examples = [e.example for e in batch.prompts.encodings]
            keys = _rows_of_keys(model, examples)
            for name, scores in zip(batch.conditions, logits_per_condition, strict=True):
                rows[name].update(zip(batch.index, _choose(model, examples, keys, scores), strict=True))
            advance(batch)

        # GPU work is asynchronous until its results are read, so encode and submit the next batch before that.
        unread: tuple[QuestionBatch, Sequence[Tensor]] | None = None
        of_texts = scored if score != FIRST_TOKEN else []
        longest = max((len(t) for i in of_texts for t in candidate_tokens(model, data[i], score)), default=0)
        for batch in batches(of_texts, sharing, longest):
            for name in batch.conditions:
                with conditions[name]():
                    answers = [
                        _compare(e.example, values, log_p)
                        for e, (values, log_p) in zip(
                            batch.prompts.encodings, score_texts(model, batch.prompts, score), strict=True
                        )
                    ]
                rows[name].update(zip(batch.index, answers, strict=True))
            advance(batch)
        of_tokens = scored if score == FIRST_TOKEN else []
        sharing_tokens = sharing if logits is None else _shared_by(logits, model, data, conditions)
        for batch in batches(of_tokens, sharing_tokens):
            logits_per_condition = list(in_contexts(batch)) if logits is None else logits(batch.prompts)
            if unread is not None:
                read(*unread)
            unread = batch, logits_per_condition
        if unread is not None:
            read(*unread)
        for batch in batches(generated, sharing, max_new_tokens):
            examples = [e.example for e in batch.prompts.encodings]
            for name in batch.conditions:
                with conditions[name]():
                    texts = model.generate_batch(batch.prompts, max_new_tokens, sampling=sampling)
                answers = [_parse(e, text, rules[e.id], match) for e, text in zip(examples, texts, strict=True)]
                rows[name].update(zip(batch.index, answers, strict=True))
            advance(batch)
    single = len(conditions) == 1
    seconds = time.perf_counter() - start
    cost = Cost(seconds if single else None, len(forwards) if single else None, len(data))
    provenance = {
        "model": model.name,
        "config_hash": model.config_hash,
        "weights_hash": model.weights_hash,
        "data": data.name,
        "data_digest": digest,
        **({"parts": list(dataset_parts(data))} if PARTS in data.provenance else {}),
        "batch_size": batch_size,
        "generate": generate,
        **({"score": score} if score != FIRST_TOKEN else {}),
        "parser": parser,
        "max_new_tokens": max_new_tokens,
        "attention": model.attention,
        **({"revision": model.revision} if model.revision else {}),
        **({"decoding": "greedy" if sampling is None else asdict(sampling)} if generated else {}),
        **({"seeds": seeds} if seeds > 1 else {}),
        **({"match": match} if match != DEFAULT_MATCH else {}),
    }
    provenances: dict[str, dict[str, Any]] = {}
    for name, open_context in conditions.items():
        with open_context():  # changes that are active in this context belong to the provenance
            provenances[name] = {**provenance, **intervention_record(model.hf)}
        if name in shared:
            provenances[name]["prefixes"] = "shared"
        if list(conditions) != [_SINGLE]:
            provenances[name]["condition"] = name
    return {
        name: BehaviorResult(tuple(answers[i] for i in range(len(data))), cost, provenances[name])
        for name, answers in rows.items()
    }


def _check(model: Lvlm, data: ConceptDataset, *, generate: bool, score: str) -> None:
    """Raise errors about the questions before the first forward pass."""
    if not len(data):
        msg = f"dataset '{data.name}' has no examples to ask"
        raise DataError(msg)
    for example in data:
        candidates = example.candidates
        if candidates and len(set(candidates)) < max(2, len(candidates)):
            msg = f"example '{example.id}': give two or more different candidates, or no candidates for free text"
            raise DataError(msg)
        if candidates and example.answer not in candidates:
            msg = f"example '{example.id}': the true answer '{example.answer}' is not one of {', '.join(candidates)}"
            raise DataError(msg)
        check_prefixes(model, (example,))
        if candidates and not generate and score == FIRST_TOKEN:
            answer_key(model, example)  # raises if the tokenizer gives two candidates the same tokens
        elif candidates and not generate:
            candidate_tokens(model, example, score)  # raises for candidates that texts cannot distinguish


def _shared_by(logits: LogitsUnder, model: Lvlm, data: ConceptDataset, conditions: Collection[str]) -> tuple[str, ...]:
    """Return all conditions if `logits` continues prefixes under several of them and the questions have prefixes in common."""
    unchanged = sharing_conditions(model, data.examples, {"": nullcontext})
    return tuple(conditions) if unchanged and sum(logits.continue_prefixes) > 1 else ()


def _rows_of_keys(model: Lvlm, examples: Sequence[Example]) -> dict[AnswerKey, list[int]]:
    """Return the rows of each answer key, which are scored together."""
    rows: dict[AnswerKey, list[int]] = {}
    for row, example in enumerate(examples):
        rows.setdefault(answer_key(model, example), []).append(row)
    return rows


def _choose(
    model: Lvlm, examples: Sequence[Example], keys: Mapping[AnswerKey, Sequence[int]], logits: Tensor
) -> list[Answer]:
    """Return the answer with the best candidate for each row of logits ``[B, V]``, given the rows of each answer key."""
    wide = logits.float()
    log_total = wide.logsumexp(-1)  # [B]; not finite if any logit is NaN or infinite
    for example, total in zip(examples, log_total.tolist(), strict=True):
        if not math.isfinite(total):
            msg = (
                f"example '{example.id}': the logits of {model.name} are not finite; lower the steering strength, or "
                "load the model in float32"
            )
            raise ModelError(msg)
    # A decoder excludes tokens by minus infinity; a margin stays finite.
    wide = wide.clamp_min(_EXCLUDED)
    answers: dict[int, Answer] = {}
    for key, members in keys.items():
        scores = key.scores(wide[members])  # [M, n_candidates]
        shares = (scores - log_total[members, None]).exp().tolist()
        for row, values, probabilities in zip(members, scores.tolist(), shares, strict=True):
            answers[row] = _best(examples[row], values, probabilities)
    return [answers[row] for row in range(len(examples))]


def _compare(example: Example, scores: Sequence[float], log_p: Sequence[float]) -> Answer:
    """Return the answer with the best candidate by the scores of whole texts."""
    return _best(example, scores, [math.exp(value) for value in log_p])


def _best(example: Example, scores: Sequence[float], probabilities: Sequence[float]) -> Answer:
    """Return the answer with the best candidate."""
    candidates = example.candidates
    right = candidates.index(example.answer)
    other = max((i for i in range(len(candidates)) if i != right), key=scores.__getitem__)
    margin = scores[right] - scores[other]
    return _row(
        example,
        # A tie counts as wrong, whatever the candidates' order.
        given=candidates[right if margin > 0 else other],
        correct=margin > 0,
        margin=margin,
        probabilities=tuple(probabilities),
    )


def _parse(example: Example, text: str, rule: Parser, match: str) -> Answer:
    """Parse the generated text of one question."""
    choice, correct = judge_text(example, text, rule, match)
    return _row(example, given=choice, correct=correct, text=text)


def _row(example: Example, **fields: Any) -> Answer:
    names = ("id", "group", "split", "kind", "question", "answer", "candidates", "prior_answer")
    return Answer(**{name: getattr(example, name) for name in names}, level=example.level or "", **fields)


@contextmanager
def _count_forwards(model: Lvlm) -> Iterator[list[None]]:
    """Collect one item per forward pass; each generated token is one pass, and only the model knows when it stops."""
    passes: list[None] = []
    hook = model.hf.register_forward_pre_hook(mark_observer(lambda *_: passes.append(None)))
    try:
        yield passes
    finally:
        hook.remove()
