"""Where answers came from: what image, prompt and prior brought to right and to wrong ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from concepts.schema import LEVELS
from diagnosis.results import Diagnosis
from experiments.report import figures
from experiments.report.data import Facts
from experiments.report.figures import Point
from experiments.report.html import figure, paragraph, section, table
from groundscope.core.statistics import cluster_bootstrap

PARTS = ("image", "prompt", "prior")
FEWEST = 3
"""Answers without which a mean says nothing."""


@dataclass(frozen=True)
class Share:
    """What the parts brought, in the mean over some answers; in natural log-odds of the answer given."""

    level: str
    right: bool
    n: int
    parts: dict[str, Point]

    @property
    def name(self) -> str:
        """What its row is called."""
        return f"{self.level}: {'right' if self.right else 'wrong'} ({self.n})"


def shares(facts: Facts) -> list[Share]:
    """Return the mean split of right and wrong answers of each level; empty where none were split."""
    if facts.diagnoses is None:
        return []
    split = [one for one in facts.diagnoses.examples if one.sources]
    found = []
    for level in LEVELS:
        for right in (True, False):
            ones = [o for o in split if o.example["level"] == level and (o.verdict is None) == right]
            if len(ones) >= FEWEST:
                found.append(Share(level, right, len(ones), {part: _mean(ones, part) for part in PARTS}))
    return found


def _mean(ones: list[Diagnosis], part: str) -> Point:
    values = np.array([o.sources[part] for o in ones])
    return Point(float(values.mean()), *cluster_bootstrap(values, [o.example["group"] for o in ones]), len(ones))


def sources_section(facts: Facts) -> str:
    """Return the section; nothing where no answer was split."""
    found = shares(facts)
    if not found:
        return ""
    lines = {part: [share.parts[part] for share in found] for part in PARTS}
    rows = [
        [s.name, *(_text(s.parts[p]) for p in PARTS), f"{sum(s.parts[p].value for p in PARTS):+.2f}"] for s in found
    ]
    return section(
        "sources",
        "What answers came from",
        paragraph(_words(found)),
        figure(
            figures.shares(lines, [s.name for s in found], "What image, prompt and prior bring to the answer given"),
            "Mean Shapley shares of the log-odds of the answer given, right and wrong answers of each level, with 95 % intervals "
            "over images. Right of 0: speaks for the answer; left: against it.",
        ),
        table(["answers", *PARTS, "log-odds"], rows),
        paragraph(
            "The prior is what the model would say with a blank picture and other questions of the kind; image and prompt are "
            "what the real ones add. What the words of a question suggest by themselves, as an apple suggests red, counts as "
            "prompt. The three sum up to the log-odds of the answer.",
            soft=True,
        ),
        made=("diagnose",),
    )


def _text(point: Point) -> str:
    ends = "" if np.isnan(point.low) else f" [{point.low:+.2f}, {point.high:+.2f}]"
    return f"{point.value:+.2f}{ends}"


def _words(found: list[Share]) -> str:
    """Say for each level what carried its wrong answers."""
    told = []
    for share in found:
        if share.right:
            continue
        most = max(PARTS, key=lambda part: share.parts[part].value)
        image = share.parts["image"]
        side = (
            "speaks against them" if image.high < 0 else "speaks for them too" if image.low > 0 else "decides nothing"
        )
        carried = "" if most == "image" else f" and the {most} carries them, {_text(share.parts[most])}"
        told.append(f"In wrong answers about {share.level}s the image {side}, {_text(image)}{carried}.")
    said = " ".join(told) or "No level has wrong answers enough to tell."
    return f"Each answer's log-odds, split into what the image, the prompt and the language prior brought. {said}"
