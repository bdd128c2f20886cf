"""Sources of answers: Shapley shares of image, prompt and prior, for right and wrong answers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from concepts.concept import LEVELS
from diagnosis.results import Diagnosis
from experiments.report import figures
from experiments.report.figures import Point
from experiments.report.html import figure, paragraph, section, table
from experiments.results.run_files import RunFiles
from groundscope.core.statistics import cluster_bootstrap

PARTS = ("image", "prompt", "prefix", "prior")
"""Parts of the input; an answer has shares of its prompt or of its prefix."""
MIN_ANSWERS = 3
"""Smallest number of answers with a mean."""


@dataclass(frozen=True)
class Share:
    """Mean share of each part over some answers, in natural log-odds of the answer of the model."""

    level: str
    right: bool
    n: int
    parts: dict[str, Point]

    @property
    def name(self) -> str:
        """Name of its row."""
        return f"{self.level}: {'right' if self.right else 'wrong'} ({self.n})"


def shares(run: RunFiles) -> list[Share]:
    """Return the mean shares for right and wrong answers of each level; empty if no answer was attributed."""
    if run.diagnoses is None:
        return []
    attributed = [d for d in run.diagnoses.examples if d.sources]
    names = [name for name in PARTS if any(name in d.sources for d in attributed)]
    means = []
    for level in LEVELS:
        for right in (True, False):
            part = [d for d in attributed if d.example["level"] == level and (d.verdict is None) == right]
            if len(part) >= MIN_ANSWERS:
                means.append(Share(level, right, len(part), {name: _mean(part, name) for name in names}))
    return means


def _mean(diagnoses: list[Diagnosis], part: str) -> Point:
    values = np.array([d.sources.get(part, 0.0) for d in diagnoses])
    low, high = cluster_bootstrap(values, [d.example["group"] for d in diagnoses])
    return Point(float(values.mean()), low, high, len(diagnoses))


def sources_section(run: RunFiles) -> str:
    """Return the section; empty if no answer was attributed."""
    means = shares(run)
    if not means:
        return ""
    names = list(means[0].parts)
    lines = {part: [share.parts[part] for share in means] for part in names}
    rows = [
        [s.name, *(_text(s.parts[p]) for p in names), f"{sum(s.parts[p].value for p in names):+.2f}"] for s in means
    ]
    return section(
        "sources",
        "Image, prompt and prior",
        paragraph(_summary(means)),
        figure(
            figures.shares(lines, [s.name for s in means], "Shares of image, prompt and prior in the answer"),
            "Mean Shapley shares of the log-odds of the answer of the model, for right and wrong answers of each level, with "
            "95 % intervals over images. Right of 0 a part favors the answer, left of 0 it opposes it.",
        ),
        table(["answers", *names, "log-odds"], rows),
        paragraph(
            "The prior is the answer for a blank image and other questions of the same kind. Image and prompt are the changes "
            "that the real image and question make. An association of words in the question, such as apple and red, is part of "
            "the prompt. Answers after a prefix that no other question leads to, such as words of captions, have a share of the "
            "prefix instead of the prompt. The shares sum to the log-odds of the answer.",
            soft=True,
        ),
        stages=("diagnose",),
    )


def _text(point: Point) -> str:
    ends = "" if np.isnan(point.low) else f" [{point.low:+.2f}, {point.high:+.2f}]"
    return f"{point.value:+.2f}{ends}"


def _summary(means: list[Share]) -> str:
    """Return for each level whether the image opposes its wrong answers, and the largest share."""
    sentences = ["Shapley shares of image, prompt and language prior in the log-odds of each answer."]
    for share in means:
        if share.right:
            continue
        largest = max(share.parts, key=lambda part: share.parts[part].value)
        image = share.parts["image"]
        effect = "opposes them" if image.high < 0 else "favors them" if image.low > 0 else "has no clear effect"
        cause = "" if largest == "image" else f"; the largest share is the {largest}'s, {_text(share.parts[largest])}"
        sentences.append(f"In wrong answers about {share.level}s the image {effect}, {_text(image)}{cause}.")
    if len(sentences) == 1:
        sentences.append(f"No level has {MIN_ANSWERS} wrong answers.")
    return " ".join(sentences)
