"""Shapley shares: split an answer's log-odds into contributions of image, prompt and prior, or of their parts.

The players are parts of the input that are present or replaced by a neutral part; each gets its exact Shapley value, and
the log-odds with all parts neutral is the prior. Shapley values of model inputs with replaced ("baseline") parts: Lundberg &
Lee 2017, arXiv 1705.07874; Sundararajan & Najmi 2020, arXiv 1908.08474.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from circuits.input_attribution import shapley
from circuits.input_attribution.coalitions import Game, make_game, players_of
from circuits.input_attribution.shapley_results import ShapleyShares, ShapleySources
from circuits.patching.activation import check_evaluating
from circuits.patching.sweep import side_by_side
from concepts.counterfactuals import EditedImage
from concepts.image_source import ImageSource
from concepts.schema import Example, require_one_image
from groundscope.core.errors import ConfigError, PatchError
from groundscope.core.progress import progress_bar
from groundscope.core.text import format_count, nearest
from lvlm.answer_keys import AnswerKey, answer_key
from lvlm.model import Encoding, Lvlm

EDITS = ("blank", "blur", "noise")
"""Edits of an image that need no box."""
NEUTRAL_IMAGES = ("blank",)
NEUTRAL_QUESTIONS = 4
"""Default largest number of neutral questions per example."""
EFFICIENCY = 1e-6
"""Largest difference between prior plus shares and the log-odds, relative to the largest value."""
_CHUNK = 16
"""Number of examples whose inputs are in memory together."""


def split_shapley(
    model: Lvlm,
    examples: Sequence[Example],
    *,
    of: Literal["said", "true"] = "true",
    image: Literal["whole", "objects"] = "whole",
    prompt: Literal["whole", "words", "prefix"] = "whole",
    neutral_images: Sequence[str | ImageSource] = NEUTRAL_IMAGES,
    neutral_questions: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    neutral_prefixes: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    orders: int = 64,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool | None = None,
) -> ShapleySources:
    """Split each answer's log-odds into prior, image and prompt, or parts of image and prompt.

    Let v(S) be the log-odds of the answer against all other candidates when the parts in S are present and all others are
    neutral. The prior is v(nothing), and each part gets its Shapley value; ``prior + sum of shares`` is the log-odds of
    the answer on the original input. `ShapleyShares.interaction` is the joint effect of image and prompt beyond their
    separate effects, ``v(both) - v(image) - v(prompt) + v(nothing)``; each of the two shares contains half of it. **Half of
    what the image says about the nouns of the question is therefore credited to the prompt, as if it were knowledge**; the
    prompt's share also does not separate the form of the question from its nouns. For these see
    `circuits.input_attribution.split`, whose default credits the interaction to the image.

    Parameters
    ----------
    model
        In evaluation mode.
    examples
        With candidate answers.
    of
        Answer to split: ``true``, the true answer, or ``said``, the model's answer.
    image
        ``whole``: the image is one player; ``objects``: each object's box and the rest of the image are separate players.
    prompt
        ``whole``: the question is one player; ``words``: each word is a separate player; ``prefix``: `Example.prefix`, the
        words that were written before the answer, is the player instead, and the question is in every run, so that its effect
        is part of the prior. Use it for words of captions, which all answer one question.
    neutral_images
        Names of edits of the image (``blank``, ``blur``, ``noise``), or images of the same size. Values are averaged over
        them; `ShapleyShares.spread` has their standard deviation.
    neutral_questions
        Questions with the same number of tokens as the examples' questions, or such questions by example id. None: up to 4
        other questions of `examples` with the same number of tokens and the same candidates, chosen at random; "neutral"
        then means "another question of the same kind".
    neutral_prefixes
        The same for ``prompt="prefix"``: texts with the same number of tokens as the prefixes, by default other prefixes of
        `examples`. They end where another word of the same kind begins if the examples are mentions (`concepts.with_mentions`).
    orders
        Number of random orders of arrival if there are more than 10 players, too many to run all coalitions.
    batch_size
        Number of inputs per batch.
    seed
        Seed of the random orders and of the choice of questions.
    progress
        Whether to show progress; by default only if standard error is a terminal.

    Returns
    -------
    ShapleySources
        Shares of every example, in order.

    Raises
    ------
    ConfigError
        If an option has an unknown value, or the family's decoder does not read the question.
    PatchError
        If `examples` is empty, neutral inputs differ in length, or an example has no neutral question, or with
        ``prompt="prefix"`` no prefix or no neutral one.
    DataError
        If an example has no image or several, no candidates, or candidates that begin with the same token.

    Examples
    --------
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> questions = gs.scenes.dataset(n_images=10, seed=0)[:3]
    >>> other = {e.id: [e.question] for e in questions}
    >>> sources = gs.input_attribution.split(model, questions, method="shapley", neutral_questions=other)
    >>> answer = sources[0]
    >>> answer.players, bool(abs(answer.prior + answer.shares.sum() - answer.log_odds) < 1e-6)
    (('image', 'prompt'), True)
    """
    _check(model, examples, of, image, prompt, neutral_images, orders)
    keys = [answer_key(model, example) for example in examples]
    neutral_texts = (
        _prefixes(model, examples, neutral_prefixes, seed)
        if prompt == "prefix"
        else _texts(model, examples, neutral_questions, seed)
    )
    results: list[ShapleyShares] = []
    with progress_bar(progress) as bar:
        task = bar.add_task("splitting answers by source", total=len(examples))
        for start in range(0, len(examples), _CHUNK):
            chunk = range(start, min(start + _CHUNK, len(examples)))
            games = [
                make_game(
                    model,
                    examples[i],
                    players_of(model, examples[i], model.encode(examples[i]), image, prompt),
                    [EditedImage(examples[i].image, n) if isinstance(n, str) else n for n in neutral_images],
                    neutral_texts[i],
                    orders,
                    seed,
                )
                for i in chunk
            ]
            runs = [(run, keys[i]) for i, game in zip(chunk, games, strict=True) for run in game.runs]
            scores, first = _run(model, runs, batch_size), 0
            for i, game in zip(chunk, games, strict=True):
                game_scores = np.stack(scores[first : first + len(game.runs)])
                results.append(_shares(examples[i], keys[i], game, game_scores, of))
                first += len(game.runs)
            bar.advance(task, len(chunk))
    names = tuple(n if isinstance(n, str) else n.identity for n in neutral_images)
    return ShapleySources(tuple(results), of, names, model.name, model.config_hash, model.weights_hash)


def _run(model: Lvlm, runs: Sequence[tuple[Encoding, AnswerKey]], size: int) -> list[np.ndarray]:
    """Return the candidates' scores of each run, float64 ``[candidates]``; inputs of equal shape share a batch."""
    out: list[np.ndarray] = [np.empty(0)] * len(runs)
    for part in side_by_side([run.shape for run, _ in runs], lambda _: size):
        logits = model.logits(model.collate([runs[i][0] for i in part])).double().cpu()
        for i, row in zip(part, logits, strict=True):
            out[i] = runs[i][1].scores(row).numpy()
    return out


def _shares(example: Example, key: AnswerKey, game: Game, scores: np.ndarray, of: str) -> ShapleyShares:
    """Compute shares from candidate scores ``[runs, candidates]``."""
    everything = int(game.members[-1, 0])
    model_answer = key.candidates[int(scores[everything].argmax())]
    answer = model_answer if of == "said" else example.answer
    answer_index = key.candidates.index(answer)
    odds = scores[:, answer_index] - np.logaddexp.reduce(np.delete(scores, answer_index, axis=1), axis=1)  # [runs]
    values = odds[game.members]  # [coalitions, neutrals]
    if game.orders is None:
        each, error = shapley.exact(values.T), np.zeros(len(game.players.names))  # [neutrals, players]
    else:
        each, errors = zip(*(_sampled(game.orders, game.coalitions, column) for column in values.T), strict=True)
        each, error = np.stack(each), np.sqrt(np.mean(np.square(errors), axis=0))
    mean = values.mean(1)
    shares, log_odds, prior = each.mean(0), float(mean[-1]), float(mean[0])
    gap = abs(prior + shares.sum() - log_odds)
    if not gap <= EFFICIENCY * max(1.0, float(np.abs(values).max())):
        msg = f"example '{example.id}': prior plus shares differ from the log-odds by {gap:.2g}; check that all logits are finite"
        raise PatchError(msg)
    image = np.arange(len(shares)) < game.players.of_image
    side_values = [mean[(game.coalitions == c).all(1).argmax()] for c in (image, ~image)]
    return ShapleyShares(
        example=_example_fields(example),
        answer=answer,
        said=model_answer,
        players=game.players.names,
        of_image=game.players.of_image,
        log_odds=log_odds,
        prior=prior,
        shares=shares,
        spread=each.std(0, ddof=1) if len(each) > 1 else np.full(len(shares), np.nan),
        error=error,
        interaction=float(log_odds - side_values[0] - side_values[1] + prior),
        coalitions=game.coalitions,
        values=mean,
        forwards=len(game.runs),
    )


def _sampled(orders: np.ndarray, coalitions: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    place = {row.tobytes(): i for i, row in enumerate(coalitions)}
    along = [[values[place[row.tobytes()]] for row in order] for order in shapley.arrivals(orders)]
    return shapley.from_orders(orders, np.array(along))


def _example_fields(example: Example) -> dict[str, str]:
    return {name: getattr(example, name) for name in ("id", "group", "level", "split", "kind", "question")} | {
        "truth": example.answer
    }


def _texts(
    model: Lvlm, examples: Sequence[Example], questions: Sequence[str] | Mapping[str, Sequence[str]] | None, seed: int
) -> list[tuple[str, ...]]:
    """Return the neutral questions of every example."""
    if questions is not None:
        return _option_texts(examples, questions, "neutral_questions")
    length = {q: len(model.processor.tokenizer(model.prompt(q))["input_ids"]) for q in {e.question for e in examples}}
    pools: dict[tuple[int, tuple[str, ...]], list[str]] = {}
    for e in examples:
        pool = pools.setdefault((length[e.question], e.candidates), [])
        if e.question not in pool:
            pool.append(e.question)
    out = []
    for i, e in enumerate(examples):
        others = [q for q in pools[length[e.question], e.candidates] if q != e.question]
        if not others:
            msg = (
                f"example '{e.id}': no other example has a question of {length[e.question]} tokens with the same "
                "candidates; pass more examples, or neutral_questions=[…] with the same number of tokens"
            )
            raise PatchError(msg)
        out.append(sample_texts(others, seed, i))
    return out


def _prefixes(
    model: Lvlm, examples: Sequence[Example], prefixes: Sequence[str] | Mapping[str, Sequence[str]] | None, seed: int
) -> list[tuple[str, ...]]:
    """Return the neutral prefixes of every example."""
    if prefixes is not None:
        return _option_texts(examples, prefixes, "neutral_prefixes")
    length = [len(model.encode(replace(e, mentions=())).tokens.prefix) for e in examples]
    pools: dict[int, dict[str, None]] = {}
    for e, n in zip(examples, length, strict=True):
        pools.setdefault(n, {})[e.prefix] = None
    out = []
    for i, (e, n) in enumerate(zip(examples, length, strict=True)):
        others = [text for text in pools[n] if text != e.prefix]
        if n and not others:
            msg = (
                f"example '{e.id}': no other example has a prefix of {format_count(n, 'token')}; pass more examples, or "
                "neutral_prefixes=[…] with the same number of tokens"
            )
            raise PatchError(msg)
        out.append(sample_texts(others, seed, i))
    return out


def _option_texts(
    examples: Sequence[Example], texts: Sequence[str] | Mapping[str, Sequence[str]], name: str
) -> list[tuple[str, ...]]:
    """Return the neutral texts that an option names for every example."""
    if not isinstance(texts, Mapping):
        return [tuple(texts)] * len(examples)
    missing = next((e.id for e in examples if not texts.get(e.id)), None)
    if missing is not None:
        msg = f"{name} has no entry for example '{missing}'; pass at least one with the same number of tokens"
        raise PatchError(msg)
    return [tuple(texts[e.id]) for e in examples]


def sample_texts(texts: Sequence[str], seed: int, number: int) -> tuple[str, ...]:
    """Return at most `NEUTRAL_QUESTIONS` random texts, the same for the same seed and number of the example.

    Examples
    --------
    >>> from circuits.input_attribution.shapley_split import sample_texts
    >>> texts = ("a", "b", "c")
    >>> sorted(sample_texts(texts, seed=0, number=1)), sample_texts(texts, 0, 1) == sample_texts(texts, 0, 1)
    (['a', 'b', 'c'], True)
    """
    order = np.random.Generator(np.random.PCG64([seed, number])).permutation(len(texts))
    return tuple(texts[int(k)] for k in order[:NEUTRAL_QUESTIONS])


def _check(
    model: Lvlm,
    examples: Sequence[Example],
    of: str,
    image: str,
    prompt: str,
    neutral_images: Sequence[str | ImageSource],
    orders: int,
) -> None:
    require_one_image(examples, "the attribution to image and prompt")
    for name, value, allowed in (
        ("of", of, ("said", "true")),
        ("image", image, ("whole", "objects")),
        ("prompt", prompt, ("whole", "words", "prefix")),
    ):
        if value not in allowed:
            msg = f"unknown {name} '{value}'; choose {' or '.join(allowed)}{nearest(value, allowed)}"
            raise ConfigError(msg)
    unknown = [n for n in neutral_images if isinstance(n, str) and n not in EDITS]
    if unknown or not neutral_images:
        problem = f"unknown neutral image '{unknown[0]}'" if unknown else "neutral_images is empty"
        msg = f"{problem}; choose from {', '.join(EDITS)}, or pass images of the same size"
        raise ConfigError(msg)
    if orders < 2:
        msg = f"orders={orders} is too small: a standard error needs at least 2"
        raise ConfigError(msg)
    if model.encoder_decoder:
        msg = f"{model.name}: input attribution does not support models whose encoder reads the question"
        raise ConfigError(msg)
    if not examples:
        msg = "examples is empty; pass at least one"
        raise PatchError(msg)
    check_evaluating(model)
