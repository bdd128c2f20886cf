"""Texts of the same form as an example's own text, without what its own words suggest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from concepts.noun_replacement import nouns_of, replace_nouns
from concepts.schema import Example, Level
from lvlm.model import Lvlm

MATCHED = 8
"""Largest number of matched texts of an example."""
_CANDIDATES = 4 * MATCHED
"""Number of texts among which those with the same number of tokens come first."""


def matched_questions(
    model: Lvlm, examples: Sequence[Example], *, among: Iterable[Example] | None = None, seed: int = 0
) -> dict[str, tuple[str, ...]]:
    """Return for each example up to 8 questions of the same form about other nouns.

    The nouns of the question are replaced by other nouns of the data (`concepts.noun_replacement`). If a question names no noun
    of the data, other questions of the same level and kind with the same candidates replace it. Questions with as many tokens as
    the own question come first.

    Parameters
    ----------
    model
        Its tokenizer counts the tokens.
    examples
        The examples; those without a matched question are missing in the result.
    among
        Examples with the nouns and the other questions; by default `examples`.
    seed
        Seed of the choice.

    Examples
    --------
    >>> import groundscope as gs
    >>> data = gs.scenes.dataset(10).where(kind="color")
    >>> questions = gs.input_attribution.matched_questions(gs.load_lvlm("tiny"), data[:1], among=data)
    >>> data[0].question, len(questions[data[0].id])
    ('Is the airplane blue?', 8)
    """
    pool = tuple(examples if among is None else among)
    nouns = nouns_of(pool)
    of_kind: dict[tuple[Level | None, str, tuple[str, ...]], dict[str, None]] = {}
    for e in pool:
        of_kind.setdefault((e.level, e.kind, e.candidates), {})[e.question] = None
    matched: dict[str, tuple[str, ...]] = {}
    for i, e in enumerate(examples):
        # Without a level the one noun of the question is replaced, as for a question about an object.
        texts = replace_nouns(e.question, e.level or "object", nouns, count=_CANDIDATES, seed=[seed, i])
        if not texts:
            texts = _sample(of_kind.get((e.level, e.kind, e.candidates), {}), e.question, [seed, i])
        lengths = {text: _length(model, replace(e, question=text)) for text in (e.question, *texts)}
        nearest = sorted(texts, key=lambda text, own=e.question, n=lengths: n[text] != n[own])
        if nearest:
            matched[e.id] = tuple(nearest[:MATCHED])
    return matched


def matched_prefixes(
    model: Lvlm, examples: Sequence[Example], *, among: Iterable[Example] | None = None, seed: int = 0
) -> dict[str, tuple[str, ...]]:
    """Return for each example up to 8 prefixes of other examples of the same level and kind.

    Prefixes with as many tokens come first. Arguments are those of `matched_questions`.

    Examples
    --------
    >>> from dataclasses import replace
    >>> import groundscope as gs
    >>> data = gs.scenes.dataset(10).where(kind="color")[:2]
    >>> words = [replace(e, prefix=text) for e, text in zip(data, ("a red", "a blue"))]
    >>> list(gs.input_attribution.matched_prefixes(gs.load_lvlm("tiny"), words).values())
    [('a blue',), ('a red',)]
    """
    pool = tuple(examples if among is None else among)
    of_kind: dict[tuple[Level | None, str], dict[str, None]] = {}
    for e in pool:
        if e.prefix:
            of_kind.setdefault((e.level, e.kind), {})[e.prefix] = None
    tokenizer = model.processor.tokenizer
    matched: dict[str, tuple[str, ...]] = {}
    for i, e in enumerate(examples):
        texts = _sample(of_kind.get((e.level, e.kind), {}), e.prefix, [seed, i]) if e.prefix else ()
        lengths = {text: len(tokenizer(text)["input_ids"]) for text in (e.prefix, *texts)}
        nearest = sorted(texts, key=lambda text, own=e.prefix, n=lengths: n[text] != n[own])
        if nearest:
            matched[e.id] = tuple(nearest[:MATCHED])
    return matched


def _sample(texts: Mapping[str, None], own: str, seed: list[int]) -> tuple[str, ...]:
    others = [text for text in texts if text != own]
    order = np.random.default_rng(seed).permutation(len(others))[:_CANDIDATES]
    return tuple(others[int(k)] for k in order)


def _length(model: Lvlm, example: Example) -> int:
    """Return the number of tokens of an example's prompt, with its image as one placeholder."""
    return len(model.processor.tokenizer(model.prompt(example.request, system=example.system))["input_ids"])
