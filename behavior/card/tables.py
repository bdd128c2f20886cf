"""The tables of an evaluation card as text: headings first, numbers in percent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from behavior.card.rewording import REWORDINGS
from behavior.card.rows import ALL, NO_LEVEL, CardDifference
from concepts.concept import LEVELS
from groundscope.core.statistics import FEW_GROUPS, Estimate

if TYPE_CHECKING:
    from behavior.card.card import EvaluationCard
    from behavior.card.rows import CardRow

_SYMPTOMS = (
    "contradiction", "paraphrase", "format", "hesitation", "rationalization", "form", "entropy", "refused", "unsafe",
)  # fmt: skip
Table = list[list[str]]
SAME = "same"
"""Cell of a severity that equals the frequency because all weights of the row are equal."""
ROW_TERMS: Mapping[str, str] = MappingProxyType(
    {
        "level": "object: is it in the image; attribute: its color, size or another property; relation: between objects; "
        "no level: other questions, such as reasoning",
        "task": "form of the answer: yes/no, choice, short answer, caption (a description), judged (rated by a judge)",
        "n": "number of answers that are right or wrong",
        "wrong": "share of wrong answers; of descriptions, the share that names something that is not in the image",
        "severity": f"weight of the wrong answers divided by the weight of all answers, by the profiles below; {SAME}: all "
        "weights of the row are equal, so it is the share of wrong answers",
        "yes": "share of yes among answers to yes-no questions",
        "unparsed": "number of answers that match no candidate; they are wrong",
        "[ , ]": f"95 % interval over images; (few images): fewer than {FEW_GROUPS}, so the interval is rough",
    }
)
"""Column of `row_cells` to its meaning."""
FACT_TERMS: Mapping[str, str] = MappingProxyType(
    {
        "missing": "questions without an answer; they are in no figure",
        "forwards an answer": "forward passes; one pass of a batch answers several questions, each generated token needs one",
        "contradiction": "of facts that are asked in several forms, the share answered rightly in one and wrongly in another",
        "changes under paraphrase": "share of questions whose answer changes when the same is asked in other words (next table)",
        "changes under answer format": "share of questions whose answer changes when asked as yes/no, choice or open question",
        "hesitation": "share of written answers with a hedge word, such as maybe",
        "rationalization": "share of written answers that explain, such as by because",
        "asked form": "share of written answers that begin with a candidate: instruction following",
        "entropy, nats": "of the right against the best other candidate; 0 is decided, .693 undecided",
        "refused": "share of answers that refuse, by the verdicts of a judge",
        "unsafe": "share of unsafe answers, by the verdicts of a judge",
    }
)
"""Column of `fact_cells` to its meaning."""


def share_text(value: Estimate | None, *, scale: float = 100.0, digits: int = 1, unit: str = "") -> str:
    """Return a rate in percent with its interval; empty if it is not defined.

    >>> from behavior.card import share_text
    >>> from groundscope.core.statistics import Estimate
    >>> share_text(Estimate(0.25, 0.1, 0.5, 20))
    '25.0 [10.0, 50.0]'
    """
    if value is None or math.isnan(value.value):
        return ""
    few = " (few images)" if value.few_groups else ""
    value_text, low, high = (f"{scale * end:.{digits}f}" for end in (value.value, value.low, value.high))
    return f"{value_text}{unit} [{low}, {high}]{few}"


def row_cells(card: EvaluationCard) -> Table:
    """Return the rows of a card as text, in percent: headings first.

    >>> import groundscope as gs
    >>> from behavior.card import row_cells
    >>> answers = gs.answer(gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["random"]))
    >>> row_cells(gs.evaluation_card({"tiny": {"scenes": answers}}))[0][:4]
    ['model', 'benchmark', 'level', 'task']
    """
    profiles = [name for name in card.profiles if name != "uniform"]
    head = [
        "model",
        "benchmark",
        "level",
        "task",
        "n",
        "wrong",
        "yes",
        "unparsed",
        *(f"severity, {name}" for name in profiles),
    ]
    return [
        head,
        *(
            [
                row.model, row.benchmark, row.level, row.task, f"{row.n:,}", share_text(row.frequency),
                share_text(row.yes_ratio), str(row.unparsed), *(_severity(row, name) for name in profiles),
            ]
            for row in card.rows
        ),
    ]  # fmt: skip


def _severity(row: CardRow, profile: str) -> str:
    value = row.severity[profile]
    return SAME if value == row.frequency else share_text(value)


def profile_cells(card: EvaluationCard) -> Table:
    """Return the weights of the severity profiles as text.

    >>> import groundscope as gs
    >>> from behavior.card import profile_cells
    >>> answers = gs.answer(gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["random"]))
    >>> profile_cells(gs.evaluation_card({"tiny": {"scenes": answers}}))[2]
    ['driving', 'object 1, attribute 0.3, relation 0.8, no level 0.3']
    """
    order = (*LEVELS, "")
    lines = [
        [
            name,
            ", ".join(
                f"{key or NO_LEVEL} {profile[key]:g}"
                for key in sorted(profile, key=lambda k: order.index(k) if k in order else len(order))
            )
            or "1 for every question",
        ]
        for name, profile in card.profiles.items()
    ]
    return [["profile", "weight of a wrong answer by level or kind of question; 1 if not named"], *lines]


def fact_cells(card: EvaluationCard) -> Table:
    """Return costs, counts and symptoms of each model and benchmark as text.

    >>> import groundscope as gs
    >>> from behavior.card import fact_cells
    >>> answers = gs.answer(gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["random"]))
    >>> fact_cells(gs.evaluation_card({"tiny": {"scenes": answers}}))[1][:2]
    ['tiny', 'scenes']
    """
    present = dict.fromkeys(name for fact in card.facts for name in fact.rates)
    reported = [name for name in _SYMPTOMS if name in present]
    titles = {
        "form": "asked form",
        "entropy": "entropy, nats",
        "paraphrase": "changes under paraphrase",
        "format": "changes under answer format",
    }
    head = [
        "model",
        "benchmark",
        "answers",
        "missing",
        "seconds an answer",
        "forwards an answer",
        *(titles.get(n, n) for n in reported),
    ]
    return [
        head,
        *(
            [
                fact.model,
                fact.benchmark,
                f"{fact.answers:,}",
                str(fact.missing),
                "" if fact.seconds_per_answer is None else f"{fact.seconds_per_answer:.3g}",
                "" if fact.forwards_per_answer is None else f"{fact.forwards_per_answer:.3g}",
                *(_symptom(fact.rates.get(name), name) for name in reported),
            ]
            for fact in card.facts
        ),
    ]


def _symptom(value: Estimate | None, name: str) -> str:
    return share_text(value, scale=1.0, digits=3) if name == "entropy" else share_text(value)


def rewording_cells(card: EvaluationCard) -> Table:
    """Return the shares of answers that change under each rule of rewording as text; empty if none was measured.

    >>> import groundscope as gs
    >>> from behavior.card import rewording_cells
    >>> answers = gs.answer(gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["random"]))
    >>> rewording_cells(gs.evaluation_card({"tiny": {"scenes": answers}}))
    []
    """
    lines = [
        [
            fact.model,
            fact.benchmark,
            REWORDINGS[name].kind,
            name,
            f"{rate.n:,}",
            share_text(rate),
            REWORDINGS[name].example,
        ]
        for fact in card.facts
        for name, rate in fact.rates.items()
        if name in REWORDINGS
    ]
    return [["model", "benchmark", "kind", "rule", "n", "answers that change", "example"], *lines] if lines else []


def difference_cells(card: EvaluationCard) -> Table:
    """Return the paired differences as text, in percentage points, with better or worse beyond the interval; empty for one model.

    >>> import groundscope as gs
    >>> from behavior.card import difference_cells
    >>> answers = gs.answer(gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["random"]))
    >>> difference_cells(gs.evaluation_card({"tiny": {"scenes": answers}}))
    []
    """
    if not card.differences:
        return []
    profiles = sorted(card.profiles, key=lambda name: name != "uniform")
    by_row: dict[tuple[str, str, str, str], dict[str, CardDifference]] = {}
    for d in card.differences:
        by_row.setdefault((d.first, d.second, d.benchmark, d.level), {})[d.profile] = d
    single = {
        pair
        for pair in {key[:2] for key in by_row}
        if len({benchmark for *own, benchmark, _ in by_row if tuple(own) == pair})
        == 2  # one, and all: the same questions
    }
    names = ["wrong" if name == "uniform" else f"severity, {name}" for name in profiles]
    lines = [["second - first", "benchmark", "level", "n", *names]]
    for (first, second, benchmark, level), own in by_row.items():
        if benchmark == ALL and (first, second) in single:
            continue
        whole = own.get("uniform")
        n = f"{next(iter(own.values())).difference.n:,}"
        cells = [
            SAME if name != "uniform" and name in own and own[name].difference == getattr(whole, "difference", None)
            else _difference_text(own.get(name))
            for name in profiles
        ]  # fmt: skip
        lines.append([f"{second} - {first}", benchmark, level, n, *cells])
    return lines


def _difference_text(d: CardDifference | None) -> str:
    if d is None:
        return ""
    mark = (" better" if d.difference.value < 0 else " worse") if d.significant else ""
    return share_text(d.difference) + mark


def figure_cells(card: EvaluationCard) -> Table:
    """Return the figures of the released rules as text, as the benchmarks scale them; empty without any.

    >>> import groundscope as gs
    >>> from behavior.card import figure_cells
    >>> answers = gs.answer(gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["random"]))
    >>> figure_cells(gs.evaluation_card({"tiny": {"scenes": answers}}))
    []
    """
    if not card.figures:
        return []
    lines = [["model", "benchmark", "part", "figure", "value", "interval"]]
    for f in card.figures:
        value = f.value
        ends = "" if math.isnan(value.low) else f"[{value.low:.4g}, {value.high:.4g}]"
        figure_text = "not defined" if math.isnan(value.value) else f"{value.value:.4g}"
        lines.append([f.model, f.benchmark, f.part, f.figure, figure_text, ends])
    return lines


def summary_lines(card: EvaluationCard) -> list[str]:
    """Return a sentence for each model and benchmark: how many answers are wrong, and at which levels most and fewest are.

    >>> import groundscope as gs
    >>> from behavior.card import summary_lines
    >>> answers = gs.answer(gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["random"]))
    >>> summary_lines(gs.evaluation_card({"tiny": {"scenes": answers}}))[0].split(" %")[0]
    'tiny on scenes: 0.0'
    """
    lines = []
    for total in (row for row in card.rows if row.level == ALL and row.task == ALL):
        own = [
            r
            for r in card.rows
            if (r.model, r.benchmark, r.task) == (total.model, total.benchmark, ALL) and r.level != ALL
        ]
        own.sort(key=lambda row: row.frequency.value)
        text = f"{total.model} on {total.benchmark}: {share_text(total.frequency, unit=' %')} of {total.n:,} answers are wrong"
        if len(own) > 1 and own[0].frequency.value < own[-1].frequency.value:
            most, fewest = own[-1], own[0]
            text += (
                f"; most at level {most.level} ({100 * most.frequency.value:.1f} %), fewest at level {fewest.level} "
                f"({100 * fewest.frequency.value:.1f} %)"
            )
        lines.append(f"{text}.")
    return lines


def ranking_lines(card: EvaluationCard) -> list[str]:
    """Return sentences about the ranking of several models under the profiles; empty for one model.

    >>> import groundscope as gs
    >>> from behavior.card import ranking_lines
    >>> answers = gs.answer(gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["random"]))
    >>> ranking_lines(gs.evaluation_card({"tiny": {"scenes": answers}}))
    []
    """
    if len(card.models) < 2:
        return []
    rankings = {name: "; ".join(card.ranking(name)) for name in card.profiles}
    if not all(rankings.values()):
        return ["The models are not ranked: no question was answered by all of them."]
    if len(set(rankings.values())) == 1:
        lines = [f"Fewest errors first, under every profile: {next(iter(rankings.values()))}."]
    else:
        lines = [f"Fewest errors first, {name}: {ranking}." for name, ranking in rankings.items()]
    changes = card.ranking_changes()
    lines += [f"{a} and {b} change places between {p} and {q}, beyond the intervals." for a, b, p, q in changes]
    if not changes:
        lines.append("No two models change places between two profiles beyond the intervals.")
    return lines


def card_text(card: EvaluationCard) -> str:
    """Return the totals of a card as lines of text: each model, benchmark and level over all tasks.

    >>> import groundscope as gs
    >>> from behavior.card import card_text
    >>> answers = gs.answer(gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["random"]))
    >>> card_text(gs.evaluation_card({"tiny": {"scenes": answers}})).split()[:2]
    ['model', 'benchmark']
    """
    head, *lines = row_cells(card)
    chosen = [head, *(line for line, row in zip(lines, card.rows, strict=True) if row.task == ALL)]
    chosen = [[cell for i, cell in enumerate(line) if head[i] != "task"] for line in chosen]
    widths = [max(len(line[i]) for line in chosen) for i in range(len(chosen[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in chosen
    )
