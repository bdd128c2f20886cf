"""Sources of answers: shares of lean, form, knowledge and image in the log-odds, for right and wrong answers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from concepts.concept import LEVELS
from diagnosis.results import SOURCES, Diagnosis
from experiments.report import figures
from experiments.report.figures import Point
from experiments.report.html import figure, paragraph, section, table
from experiments.results.run_files import RunFiles
from groundscope.core.statistics import cluster_bootstrap

SPREADS = ("noun_spread", "blank_spread")
MIN_ANSWERS = 3
"""Smallest number of answers with a mean."""


@dataclass(frozen=True)
class Share:
    """Mean of each share over some answers, in natural log-odds of the true answer against the model's, or the next one."""

    level: str
    right: bool
    n: int
    parts: dict[str, Point]
    no_image: Point | None
    """Log-odds without any image; None if the model needs an image."""
    spreads: dict[str, float]
    """Median standard deviation over nouns, and of the image's share over blank images, where they exist."""

    @property
    def name(self) -> str:
        """Name of its row."""
        return f"{self.level}: {'right' if self.right else 'wrong'} ({self.n})"


def shares(run: RunFiles) -> list[Share]:
    """Return the mean shares for right and wrong answers of each level; empty if no answer was split."""
    if run.diagnoses is None:
        return []
    attributed = [d for d in run.diagnoses.examples if d.sources]
    means = []
    for level in LEVELS:
        for right in (True, False):
            part = [d for d in attributed if d.example["level"] == level and (d.verdict is None) == right]
            if len(part) >= MIN_ANSWERS:
                no_image = _mean(part, "no_image") if all("no_image" in d.sources for d in part) else None
                values = {name: [d.sources[name] for d in part if name in d.sources] for name in SPREADS}
                spreads = {name: float(np.median(each)) for name, each in values.items() if each}
                parts = {name: _mean(part, name) for name in SOURCES}
                means.append(Share(level, right, len(part), parts, no_image, spreads))
    return means


def _mean(diagnoses: list[Diagnosis], part: str) -> Point:
    values = np.array([d.sources[part] for d in diagnoses])
    low, high = cluster_bootstrap(values, [d.example["group"] for d in diagnoses])
    return Point(float(values.mean()), low, high, len(diagnoses))


def input_attribution_section(run: RunFiles) -> str:
    """Return the section; empty if no answer was split."""
    means = shares(run)
    if not means:
        return ""
    lines = {part: [share.parts[part] for share in means] for part in SOURCES}
    rows = [
        [
            s.name,
            *(_text(s.parts[p]) for p in SOURCES),
            f"{sum(s.parts[p].value for p in SOURCES):+.2f}",
            _text(s.no_image) if s.no_image else "-",
            *(f"{s.spreads[name]:.2f}" if name in s.spreads else "-" for name in SPREADS),
        ]
        for s in means
    ]
    return section(
        "sources",
        "Image and words",
        paragraph(_summary(means)),
        figure(
            figures.shares(lines, [s.name for s in means], "Shares of words and image in the answer"),
            "Mean shares of the log-odds of the true answer against the model's (for right answers, against the next one), for "
            "each level, with 95 % intervals over images. Right of 0 a part favors the true answer, left of 0 it opposes it.",
        ),
        table(["answers", *SOURCES, "log-odds", "no image", "sd over nouns", "sd over blank images"], rows),
        paragraph(
            "Lean: the log-odds for a blank image and a question without content. Form: the change by the question about other "
            "nouns. Knowledge: the change by its own nouns, such as an association of apple and red. Image: the change by the "
            "image, with what image and nouns do only together. The shares sum to the log-odds. The log-odds without any image "
            "are not part of the sum. Standard deviations are medians over answers. Answers after a prefix, such as words of "
            "captions, have other prefixes in place of other nouns.",
            soft=True,
        ),
        stages=("diagnose",),
    )


def _text(point: Point) -> str:
    ends = "" if np.isnan(point.low) else f" [{point.low:+.2f}, {point.high:+.2f}]"
    return f"{point.value:+.2f}{ends}"


def _summary(means: list[Share]) -> str:
    """Return for each level whether the image favors the truth in its wrong answers, and the share most against it."""
    sentences = ["Shares of lean, form, knowledge and image in the log-odds of the true answer."]
    for share in means:
        if share.right:
            continue
        worst = min(share.parts, key=lambda part: share.parts[part].value)
        image = share.parts["image"]
        effect = (
            "opposes the truth" if image.high < 0 else "favors the truth" if image.low > 0 else "has no clear effect"
        )
        cause = "" if worst == "image" else f"; most against the truth is the {worst}, {_text(share.parts[worst])}"
        sentences.append(f"In wrong answers about {share.level}s the image {effect}, {_text(image)}{cause}.")
    if len(sentences) == 1:
        sentences.append(f"No level has {MIN_ANSWERS} wrong answers.")
    return " ".join(sentences)
