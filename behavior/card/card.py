"""The evaluation card: what one or several models get wrong, how often and how severely, over benchmarks, levels and tasks.

The survey asks for it (Shu et al., arXiv 2501.01346, H.1): object, attribute and relation; frequency and severity;
several kinds of tasks; reasoning kept intact. Models enter with their answers: from `behavior.answer`, or from files
(`behavior.benchmarks.score_files`), so closed models have the same rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

from behavior.benchmarks.questions import BenchmarkScore
from behavior.benchmarks.rates import share
from behavior.card.profiles import Profile, check_profiles
from behavior.card.rows import ALL, NO_LEVEL, CardAnswer, CardDifference, CardFigure, CardRow, ModelFacts
from behavior.card.symptoms import symptoms
from behavior.parsing import YES_NO
from behavior.result import Answer, BehaviorResult
from concepts.concept import LEVELS
from groundscope.core.errors import DataError
from groundscope.core.short_repr import short_repr
from groundscope.core.statistics import FEW_GROUPS, Estimate, cluster_bootstrap, estimate, ratio

if TYPE_CHECKING:
    import pandas as pd

    from concepts.schema import ConceptDataset

Scored = BenchmarkScore | BehaviorResult
"""A model's answers to one benchmark: scored by its rule, or to a dataset."""


@dataclass(frozen=True)
class EvaluationCard:
    """The card of one or several models; returned by `evaluation_card`.

    Examples
    --------
    >>> import groundscope as gs
    >>> data = gs.scenes.dataset(10, splits=["random"])
    >>> card = gs.evaluation_card({"tiny": {"icon scenes": gs.answer(gs.load_lvlm("tiny"), data)}})
    >>> card.row("tiny", "icon scenes", "object").task
    'all'
    """

    rows: tuple[CardRow, ...]
    figures: tuple[CardFigure, ...]
    facts: tuple[ModelFacts, ...]
    differences: tuple[CardDifference, ...]
    answers: tuple[CardAnswer, ...]
    """The judged answers, from which the rows can be computed again."""
    profiles: Mapping[str, Profile]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    __repr__ = short_repr

    def __post_init__(self) -> None:
        object.__setattr__(self, "profiles", MappingProxyType(dict(self.profiles)))
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))

    @property
    def models(self) -> list[str]:
        """Names of the models, in order."""
        return list(dict.fromkeys(f.model for f in self.facts))

    @property
    def benchmarks(self) -> list[str]:
        """Names of the benchmarks, in order of first appearance."""
        return list(dict.fromkeys(f.benchmark for f in self.facts))

    def row(self, model: str, benchmark: str, level: str = ALL, task: str = ALL) -> CardRow:
        """Return a row; raises `DataError` for one that the card does not have."""
        for row in self.rows:
            if (row.model, row.benchmark, row.level, row.task) == (model, benchmark, level, task):
                return row
        msg = (
            f"the card has no row {model}, {benchmark}, {level}, {task}; its models are {', '.join(self.models)}, its "
            f"benchmarks {', '.join(self.benchmarks)}"
        )
        raise DataError(msg)

    def ranking(self, profile: str = "uniform") -> list[str]:
        """Return the models by the severity of their errors over all benchmarks, the least severe first.

        `uniform` is the frequency. Each model is ranked on the questions that all models answered; the list is empty if there are
        none.
        """
        keys = [{(a.benchmark, a.id) for a in self.answers if a.model == model} for model in self.models]
        common = set.intersection(*keys) if keys else set()
        if not common:
            return []
        totals: dict[str, float] = {}
        for model in self.models:
            rows = [a for a in self.answers if a.model == model and (a.benchmark, a.id) in common]
            weights = [_weight(self.profiles[profile], a) for a in rows]
            whole = sum(weights)
            totals[model] = sum(w for w, a in zip(weights, rows, strict=True) if a.wrong) / whole if whole else 0.0
        return sorted(self.models, key=totals.__getitem__)

    def ranking_changes(self) -> list[tuple[str, str, str, str]]:
        """Return pairs of models whose order differs between two profiles beyond the intervals.

        Each entry is ``first, second, profile, other profile``: the paired intervals of their difference over all common
        questions exclude 0 with opposite signs.
        """
        whole = [d for d in self.differences if d.benchmark == ALL and d.level == ALL and d.significant]
        changes = []
        for a, b in itertools.combinations(whole, 2):
            if (a.first, a.second) == (b.first, b.second) and (a.difference.value > 0) != (b.difference.value > 0):
                changes.append((a.first, a.second, a.profile, b.profile))
        return changes

    def frame(self) -> pd.DataFrame:
        """Return one line per row: names, ``n``, ``unparsed``, and each figure with ``<figure>_low`` and ``<figure>_high``."""
        import pandas as pd

        from behavior.card.files import row_record

        return pd.DataFrame([row_record(row) for row in self.rows])

    def save(self, folder: Path | str) -> list[Path]:
        """Write ``card.json``, ``card.csv``, ``card_answers.csv`` and ``card.html`` into a folder; return their paths."""
        from behavior.card.files import write_card

        return write_card(self, Path(folder))

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read the ``card.json`` that `save` wrote; raises `DataError` for a missing, damaged or other file."""
        from behavior.card.files import read_card

        return read_card(cls, Path(path))


def evaluation_card(
    models: Mapping[str, Mapping[str, Scored]],
    *,
    data: Mapping[str, ConceptDataset] | None = None,
    profiles: Mapping[str, Profile] | None = None,
    facts: Mapping[str, str] | None = None,
    safety: Mapping[str, Mapping[str, tuple[bool, bool]]] | None = None,
    reworded: Mapping[str, Mapping[str, Mapping[str, Estimate]]] | None = None,
    differences: str = "first",
) -> EvaluationCard:
    """Make the evaluation card of models that answered benchmarks or datasets.

    Parameters
    ----------
    models
        Model to its answers by benchmark: a `behavior.benchmarks.BenchmarkScore`, or a `BehaviorResult` to any dataset. A closed
        model, or one before and after a mitigation, is another entry.
    data
        Benchmark to its dataset, with which the descriptions of a `BehaviorResult` are judged by CHAIR; else they are left out.
    profiles
        Severity profiles by name; `behavior.card.PROFILES` for None. ``uniform`` is always included.
    facts
        Id of a question to the fact that it asks about, for self-contradiction (`behavior.card.symptoms`).
    safety
        Model to verdicts by id of a question: whether the answer refuses, and whether it is unsafe (`read_safety`).
    reworded
        Model to benchmark to the rates of answers that change when questions are asked otherwise (`behavior.card.reword`).
    differences
        ``first`` compares every other model with the first; ``all`` compares every two.

    Raises
    ------
    DataError
        For no model, a model without a judged answer, or two models whose questions of one benchmark have the same ids and other
        truths.
    ConfigError
        For a weight outside 0 to 1.

    Examples
    --------
    >>> import groundscope as gs
    >>> data = gs.scenes.dataset(20, splits=["random", "conflict"])
    >>> models = {name: {"icon scenes": gs.answer(gs.load_lvlm(name), data)} for name in ("tiny", "tiny-unbiased")}
    >>> card = gs.evaluation_card(models)
    >>> card.models, [level for level in ("object", "attribute") if card.row("tiny", "icon scenes", level).n]
    (['tiny', 'tiny-unbiased'], ['object', 'attribute'])
    """
    chosen = check_profiles(profiles)
    if not models:
        msg = "an evaluation card needs at least one model with answers"
        raise DataError(msg)
    answers: list[CardAnswer] = []
    figures: list[CardFigure] = []
    stated: list[ModelFacts] = []
    truths: dict[tuple[str, str], tuple[str, str]] = {}
    for model, results in models.items():
        before = len(answers)
        for benchmark, result in results.items():
            rows, tasks = _answers_of(result, (data or {}).get(benchmark))
            _check_truths(truths, model, benchmark, rows)
            answers += [_card_answer(model, benchmark, row, tasks) for row in rows if row.correct is not None]
            if isinstance(result, BenchmarkScore):
                figures += [
                    CardFigure(model, benchmark, part, name, value)
                    for part, values in ((ALL, result.figures), *result.parts.items())
                    for name, value in values.items()
                ]
            stated.append(_facts_of(model, benchmark, result, rows, facts, (safety or {}).get(model)))
            rates = (reworded or {}).get(model, {}).get(benchmark)
            if rates:
                stated[-1] = replace(stated[-1], rates={**stated[-1].rates, **rates})
        if len(answers) == before:
            msg = f"model '{model}' has no answer that is right or wrong; give answers to questions, or data for its descriptions"
            raise DataError(msg)
    return EvaluationCard(
        tuple(_rows(answers, chosen)),
        tuple(figures),
        tuple(stated),
        tuple(_differences(answers, list(models), chosen, differences)),
        tuple(answers),
        chosen,
        {"models": list(models), "differences": differences},
    )


def judge_captions(answers: BehaviorResult, data: ConceptDataset) -> BehaviorResult:
    """Return answers whose descriptions are right or wrong: wrong where CHAIR finds something invented.

    The vocabulary is that of the dataset (`behavior.metrics.score_dataset_captions`).

    Examples
    --------
    >>> import groundscope as gs
    >>> from behavior.card import judge_captions
    >>> data = gs.scenes.dataset(10)[:1]
    >>> about = (data[0].id, data[0].group, "neutral", "object", "caption", "Describe the image.", "", ())
    >>> rows = [gs.Answer(*about, None, None, text=" and ".join(o.noun for o in data[0].objects))]
    >>> answers = gs.BehaviorResult(tuple(rows), gs.Cost(None, None, 1))
    >>> judge_captions(answers, gs.ConceptDataset("one", data)).answers[0].correct
    True
    """
    from behavior.metrics import score_dataset_captions

    if not any(a.kind == "caption" for a in answers.answers):
        return answers
    scores = score_dataset_captions(answers, data)
    right = {c.id: not c.hallucinated for c in scores.captions}
    return replace(
        answers, answers=tuple(replace(a, correct=right[a.id]) if a.id in right else a for a in answers.answers)
    )


def task_of(answer: Answer) -> str:
    """Return the kind of task of an answer to a dataset.

    >>> import groundscope as gs
    >>> from behavior.card import task_of
    >>> about = ("q", "image", "neutral", "object", "existence", "Is there a cat?", "yes", ("yes", "no"))
    >>> task_of(gs.Answer(*about, "yes", True))
    'yes/no'
    """
    if answer.candidates:
        return "yes/no" if set(answer.candidates) == YES_NO else "choice"
    return "caption" if answer.kind == "caption" else "short answer"


def _answers_of(result: Scored, data: ConceptDataset | None) -> tuple[Sequence[Answer], Mapping[str, str]]:
    if isinstance(result, BenchmarkScore):
        return result.answers.answers, result.tasks
    judged = result if data is None else judge_captions(result, data)
    return judged.answers, {}


def _check_truths(
    truths: dict[tuple[str, str], tuple[str, str]], model: str, benchmark: str, rows: Iterable[Answer]
) -> None:
    for row in rows:
        about = (row.question, row.answer)
        if truths.setdefault((benchmark, row.id), about) != about:
            msg = (
                f"model '{model}', benchmark '{benchmark}': question '{row.id}' has another text or truth than for the models "
                "before; compare answers to the same questions"
            )
            raise DataError(msg)


def _card_answer(model: str, benchmark: str, row: Answer, tasks: Mapping[str, str]) -> CardAnswer:
    unparsed = row.given is None and bool(row.candidates)
    task = tasks.get(row.id) or task_of(row)
    return CardAnswer(
        model, benchmark, row.id, row.group, row.level, row.kind, task, bool(row.correct), row.given, unparsed
    )


def _facts_of(
    model: str,
    benchmark: str,
    result: Scored,
    rows: Sequence[Answer],
    facts: Mapping[str, str] | None,
    safety: Mapping[str, tuple[bool, bool]] | None,
) -> ModelFacts:
    rates = symptoms(rows, facts)
    judged = [(safety[row.id], row.group) for row in rows if row.id in safety] if safety else []
    if judged:
        groups = [group for _, group in judged]
        rates["refused"] = share([refused for (refused, _), _ in judged], groups)
        rates["unsafe"] = share([unsafe for (_, unsafe), _ in judged], groups)
    answers = result.answers if isinstance(result, BenchmarkScore) else result
    cost = answers.cost
    score = result if isinstance(result, BenchmarkScore) else None
    return ModelFacts(
        model,
        benchmark,
        len(rows),
        score.missing if score else 0,
        cost.seconds_per_answer if cost.answers else None,
        cost.forwards_per_answer if cost.answers else None,
        rates,
        score.variant if score else "",
        score.notes if score else (),
    )


def _level(answer: CardAnswer) -> str:
    return answer.level or NO_LEVEL


def _weight(profile: Profile, answer: CardAnswer) -> float:
    return float(profile.get(answer.kind, profile.get(answer.level, 1.0)))


def _rows(answers: Sequence[CardAnswer], profiles: Mapping[str, Profile]) -> list[CardRow]:
    rows = []
    parts: dict[tuple[str, str], list[CardAnswer]] = {}
    for answer in answers:
        parts.setdefault((answer.model, answer.benchmark), []).append(answer)
    for (model, benchmark), members in parts.items():
        present = [level for level in (*LEVELS, NO_LEVEL) if any(_level(a) == level for a in members)]
        tasks = list(dict.fromkeys(a.task for a in members))
        for level in (ALL, *present):
            own = [a for a in members if level in (ALL, _level(a))]
            for task in (ALL, *tasks):
                chosen = [a for a in own if task in (ALL, a.task)]
                if chosen and (task == ALL or len({a.task for a in own}) > 1 or level == ALL):
                    rows.append(_row(model, benchmark, level, task, chosen, profiles))
    return rows


def _row(
    model: str, benchmark: str, level: str, task: str, answers: Sequence[CardAnswer], profiles: Mapping[str, Profile]
) -> CardRow:
    groups = [a.group for a in answers]
    wrong = [a.wrong for a in answers]
    severity = {}
    for name, profile in profiles.items():
        weights = [_weight(profile, a) for a in answers]
        if len(set(weights)) == 1 and weights[0]:  # then severity is the frequency, whose interval is narrower
            severity[name] = estimate(wrong, groups)
        else:
            severity[name] = estimate([w * bad for w, bad in zip(weights, wrong, strict=True)], groups, weights)
    yes_no = [a for a in answers if a.task == "yes/no" and a.given in {"yes", "no", None}]
    ratio_of_yes = share([a.given == "yes" for a in yes_no], [a.group for a in yes_no]) if yes_no else None
    return CardRow(
        model,
        benchmark,
        level,
        task,
        len(answers),
        estimate(wrong, groups),
        severity,
        ratio_of_yes,
        sum(a.unparsed for a in answers),
    )


def _differences(
    answers: Sequence[CardAnswer], models: Sequence[str], profiles: Mapping[str, Profile], which: str
) -> list[CardDifference]:
    pairs = list(itertools.combinations(models, 2))
    pairs = pairs if which == ALL else [pair for pair in pairs if pair[0] == models[0]]
    by_model = {m: {(a.benchmark, a.id): a for a in answers if a.model == m} for m in models}
    result = []
    for first, second in pairs:
        common = [key for key in by_model[first] if key in by_model[second]]
        benchmarks = list(dict.fromkeys(benchmark for benchmark, _ in common))
        for benchmark in (ALL, *benchmarks):
            keys = [key for key in common if benchmark in (ALL, key[0])]
            levels = dict.fromkeys(_level(by_model[first][key]) for key in keys)
            for level in (ALL, *levels):
                chosen = [key for key in keys if level in (ALL, _level(by_model[first][key]))]
                before, after = ([by_model[m][key] for key in chosen] for m in (first, second))
                for name, profile in profiles.items():
                    value = _difference(before, after, profile)
                    if value is not None:
                        result.append(CardDifference(first, second, benchmark, level, name, value))
    return result


def _difference(before: Sequence[CardAnswer], after: Sequence[CardAnswer], profile: Profile) -> Estimate | None:
    """Return the weighted paired difference of wrong answers; None where no question has a weight."""
    import numpy as np

    from behavior.comparison import change_estimate

    weights = [_weight(profile, a) for a in before]
    groups = [f"{a.benchmark}/{a.group}" for a in before]
    changes = [int(b.wrong) - int(a.wrong) for a, b in zip(before, after, strict=True)]
    total = sum(weights)
    if not total:
        return None
    if len(set(weights)) == 1:
        return change_estimate(np.array(changes), groups)
    pairs = [(w * c, w) for w, c in zip(weights, changes, strict=True)]
    low, high = cluster_bootstrap(pairs, groups, ratio)
    return Estimate(sum(x for x, _ in pairs) / total, low, high, len(pairs), len(set(groups)) < FEW_GROUPS)
