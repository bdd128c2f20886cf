"""Which heads and examples the report shows in detail. Stages use the same functions to write the illustrations of these."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from concepts.schema import Example
from diagnosis.results import OVERRIDDEN, UNEXPLAINED, VERDICTS, Diagnoses, Diagnosis
from lvlm.sites import Head

if TYPE_CHECKING:
    import pandas as pd

    from circuits import HeadScores

HEADS = 8
"""Largest number of heads shown in detail."""
EXAMPLES = 3
"""Examples shown for each of them."""


@dataclass(frozen=True)
class HeadDetail:
    """A head, the kind of pair in which its effect is largest, and the examples with the largest effects."""

    head: Head
    kind: str
    examples: tuple[str, ...]
    """Ids."""
    effects: tuple[float, ...]
    """Patching effect of the head in the pair of each example."""


def detailed_heads(scores: Mapping[str, HeadScores], top: Sequence[str], examples: Collection[str]) -> list[HeadDetail]:
    """Return the heads to show: those that the next stages use, then the best two of each kind of pair.

    Parameters
    ----------
    scores
        Head scores by kind of pair.
    top
        The heads that the next stages use.
    examples
        Ids of the examples that can be shown.
    """
    heads = [Head.parse(h) for h in top]
    for of_kind in scores.values():
        heads += [h for h in of_kind.top(2) if h not in heads]
    details = []
    for head in heads[:HEADS]:
        kind, of_kind = max(scores.items(), key=lambda item: item[1].mean[head.layer, head.head])
        strongest = _strongest_examples(of_kind, head, examples)
        details.append(HeadDetail(head, kind, tuple(e for e, _ in strongest), tuple(v for _, v in strongest)))
    return details


def _strongest_examples(scores: HeadScores, head: Head, examples: Collection[str]) -> list[tuple[str, float]]:
    """Return the examples in whose pairs the effect of a head is largest, one for each image."""
    effects = scores.effects[:, head.layer, head.head]
    groups: set[str] = set()
    chosen: list[tuple[str, float]] = []
    for row in np.argsort(-effects, kind="stable"):
        if scores.ids[row] not in examples or scores.groups[row] in groups:
            continue
        groups.add(scores.groups[row])
        chosen.append((scores.ids[row], float(effects[row])))
        if len(chosen) == EXAMPLES:
            break
    return chosen


def prior_errors(frame: pd.DataFrame, examples: Mapping[str, Example]) -> list[int]:
    """Return the rows of a store with wrong answers that follow the prior against the image.

    Parameters
    ----------
    frame
        Table of examples of the store.
    examples
        Discovery examples by id.
    """
    answers = frame["model_answer"].tolist()
    traced = [examples[name] for name in frame["id"].tolist()]
    return [
        row
        for row, e in enumerate(traced)
        if e.split == "conflict" and e.prior_answer is not None and answers[row] == e.prior_answer != e.answer
    ]


def typical_error(errors: Sequence[Example]) -> Example | None:
    """Return the error by prior that the report follows through the model; None without errors.

    The choice depends on the question and the image only, not on the effect of steering: a green apple, else an apple, else
    the first; open questions about the color before yes/no questions.
    """

    def rank(example: Example) -> tuple[bool, bool, bool]:
        thing = example.named_object()
        apple = thing is not None and thing.noun == "apple"
        green = thing is not None and thing.attributes.get("color") == "green"
        return not apple, not green, example.kind != "what_color"

    return min(errors, key=rank) if errors else None


def detailed_diagnoses(diagnoses: Diagnoses, count: int) -> list[Diagnosis]:
    """Select the diagnoses to show: one of each verdict and level in turn, in each group the most certain first."""
    parts: dict[tuple[str, str], list[Diagnosis]] = {}
    for diagnosis in sorted(diagnoses.wrong, key=lambda d: d.confidence):
        parts.setdefault((str(diagnosis.verdict), diagnosis.example["level"]), []).append(diagnosis)
    # Errors by prior are the main subject; unexplained answers come last.
    order = sorted(parts, key=lambda key: (key[0] in UNEXPLAINED, key[0] != OVERRIDDEN, VERDICTS.index(key[0]), key[1]))
    chosen: list[Diagnosis] = []
    while len(chosen) < count and any(parts.values()):
        for key in order:
            if parts[key] and len(chosen) < count:
                chosen.append(parts[key].pop())
    return chosen
