"""What a model answers to both examples of counterfactual pairs: four outcomes, counted and selected by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from circuits.results.head_scores import HeadScores
from concepts.counterfactual_pair import CounterfactualPair
from concepts.schema import Example
from groundscope.core.errors import ConfigError, PatchError
from groundscope.core.progress import progress_bar
from groundscope.core.text import format_count, nearest
from lvlm.answer_keys import answer_key
from lvlm.model import Lvlm

if TYPE_CHECKING:
    import pandas as pd

RIGHT = "right on both"
OUTCOMES = (RIGHT, "one wrong", "both wrong", "unchanged")
"""Outcomes of a pair. The last three have at least one wrong answer: the answer changes and one, or both, are wrong, or it
does not change."""


@dataclass(frozen=True)
class PairOutcomes:
    """The answers of a model to both examples of each pair; returned by `pair_outcomes`.

    Examples
    --------
    >>> from circuits import PairOutcomes
    >>> outcomes = PairOutcomes(("a", "b"), (("yes", "no"), ("yes", "no")), (("yes", "no"), ("yes", "yes")), ("", ""))
    >>> outcomes.counts
    {'right on both': 1, 'one wrong': 0, 'both wrong': 0, 'unchanged': 1}
    """

    ids: tuple[str, ...]
    """Id of each pair's clean example."""
    answers: tuple[tuple[str, str], ...]
    """True answers of the clean and of the corrupt example."""
    model_answers: tuple[tuple[str, str], ...]
    """Answers of the model: the candidate of largest score."""
    groups: tuple[str, ...]
    """Image of each pair."""

    def __repr__(self) -> str:
        return f"PairOutcomes({', '.join(f'{count} {name}' for name, count in self.counts.items())})"

    @property
    def outcomes(self) -> tuple[str, ...]:
        """Outcome of each pair, of `OUTCOMES`; a placebo pair with two right answers is right on both."""
        return tuple(_outcome(true, answer) for true, answer in zip(self.answers, self.model_answers, strict=True))

    @property
    def counts(self) -> dict[str, int]:
        """Number of pairs by outcome, all four."""
        counts = Counter(self.outcomes)
        return {name: counts[name] for name in OUTCOMES}

    def select(self, scores: HeadScores, *outcomes: str) -> HeadScores:
        """Return the scores of the pairs with some outcomes, to compare heads between sets of pairs.

        Choosing pairs by the model's answers changes which heads are found: compare several sets.

        Parameters
        ----------
        scores
            Scores of these pairs.
        outcomes
            Names, by default ``right on both``.

        Raises
        ------
        ConfigError
            For an unknown outcome.
        PatchError
            If no pair of `scores` has such an outcome.

        Examples
        --------
        >>> import groundscope as gs
        >>> model = gs.load_lvlm("tiny")
        >>> pairs = gs.counterfactuals.pairs(gs.scenes.dataset(10), "object")[:3]
        >>> scores = gs.patch_heads(model, pairs)
        >>> gs.circuits.pair_outcomes(model, pairs).select(scores, "right on both").n_pairs
        3
        """
        names = outcomes or (RIGHT,)
        unknown = next((name for name in names if name not in OUTCOMES), None)
        if unknown is not None:
            msg = f"unknown outcome '{unknown}'; choose from {', '.join(OUTCOMES)}{nearest(unknown, OUTCOMES)}"
            raise ConfigError(msg)
        chosen = {pair for pair, outcome in zip(self.ids, self.outcomes, strict=True) if outcome in names}
        keep = np.array([pair in chosen for pair in scores.ids], bool)
        if not keep.any():
            msg = (
                f"none of the {format_count(scores.n_pairs, 'pair')} of the scores is {' or '.join(names)}; the pairs "
                f"are {self!r}"
            )
            raise PatchError(msg)
        return scores.select(keep)

    def frame(self) -> pd.DataFrame:
        """Return one row a pair: id, group, true answers, the model's answers, outcome."""
        import pandas as pd

        rows = zip(self.ids, self.groups, self.answers, self.model_answers, self.outcomes, strict=True)
        return pd.DataFrame(
            [
                {
                    "id": name, "group": group, "clean": true[0], "corrupt": true[1], "model_clean": answers[0],
                    "model_corrupt": answers[1], "outcome": outcome,
                }
                for name, group, true, answers, outcome in rows
            ]
        )  # fmt: skip


def pair_outcomes(
    model: Lvlm, pairs: Sequence[CounterfactualPair], *, batch_size: int = 32, progress: bool | None = None
) -> PairOutcomes:
    """Ask a model the question of each pair about both images.

    Parameters
    ----------
    model
        The model.
    pairs
        Pairs; the answer is the candidate of largest score, or without candidates one of the two true answers.
    batch_size
        Examples per forward pass.
    progress
        Whether to show progress; by default only if standard error is a terminal.

    Raises
    ------
    PatchError
        If `pairs` is empty.
    DataError
        If two candidates of a pair begin with the same token.

    Examples
    --------
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> pairs = gs.counterfactuals.pairs(gs.scenes.dataset(10), "object")[:3]
    >>> gs.circuits.pair_outcomes(model, pairs)
    PairOutcomes(3 right on both, 0 one wrong, 0 both wrong, 0 unchanged)
    """
    if not pairs:
        msg = "pairs is empty; make pairs with counterfactuals.pairs(data, kind=…)"
        raise PatchError(msg)
    examples = [example for pair in pairs for example in (pair.clean, pair.corrupt)]
    keys = [answer_key(model, _with_candidates(pair)) for pair in pairs]
    answers: list[str] = [""] * len(examples)
    with progress_bar(progress) as bar:
        task = bar.add_task("answering both images", total=len(examples))
        for batch in model.batches(examples, batch_size):
            logits = model.logits(batch.inputs, batch.images)
            for row, number in enumerate(batch.index):
                key = keys[number // 2]
                answers[number] = key.candidates[int(key.scores(logits[row].float()).argmax())]
            bar.advance(task, len(batch.index))
    model_answers = zip(answers[::2], answers[1::2], strict=True)
    return PairOutcomes(
        tuple(p.clean.id for p in pairs),
        tuple((p.clean.answer, p.corrupt.answer) for p in pairs),
        tuple(model_answers),
        tuple(p.group for p in pairs),
    )


def _with_candidates(pair: CounterfactualPair) -> Example:
    if pair.clean.candidates:
        return pair.clean
    return replace(pair.clean, candidates=tuple(dict.fromkeys((pair.clean.answer, pair.corrupt.answer))))


def _outcome(true: tuple[str, str], answer: tuple[str, str]) -> str:
    right = sum(a == b for a, b in zip(true, answer, strict=True))
    if right == 2:
        return RIGHT
    if answer[0] == answer[1]:
        return "unchanged"
    return "one wrong" if right else "both wrong"
