"""What the embedded model is taught, in which order, and for how long.

The table of `lvlm.tiny.train` in numbers; every share, rate and count that decides what the model becomes is here.
"""

from __future__ import annotations

from dataclasses import dataclass

from concepts.world import BIASED
from lvlm.tiny.lessons import Lesson


@dataclass(frozen=True)
class Stage:
    """One row of the table above."""

    name: str
    steps: int
    size: int
    rate: float
    lesson: Lesson | None
    """None for the stages that have patch labels instead of questions."""
    vision_rate: float = 0.0
    """Learning rate of the vision tower as a share of `rate`."""
    projector: bool = True
    decoder: bool = True
    level: float = 0.6
    """Share of the steps at full rate; a stage that starts on a plateau needs it long."""


STAGES: tuple[Stage, ...] = (
    Stage("vision", 4000, 64, 1e-3, None, vision_rate=1.0, projector=False, decoder=False, level=0.0),
    Stage(
        "text",
        700,
        16,
        1e-3,
        Lesson(
            {
                "existence": 0.3,
                "color": 0.18,
                "what_color": 0.12,
                "size": 0.06,
                "relation": 0.2,
                "place": 0.08,
                "caption": 0.06,
            },
            world=BIASED,
            yes=0.6,
            blind=True,
        ),
        projector=False,
        level=0.0,
    ),
    Stage("project", 400, 32, 1e-3, None, decoder=False, level=0.0),
    Stage(
        "glance",
        500,
        16,
        1e-3,
        Lesson({"existence": 0.35, "what_color": 0.3, "place": 0.33, "color": 0.02}, objects=(1, 2), noise=0.01),
    ),
    Stage(
        "align",
        1300,
        16,
        1e-3,
        Lesson({"existence": 0.35, "what_color": 0.25, "place": 0.25, "color": 0.15}, objects=(1, 4), noise=0.01),
    ),
    Stage(
        "tune",
        2800,
        16,
        1e-3,
        Lesson(
            {
                "existence": 0.16,
                "color": 0.16,
                "what_color": 0.1,
                "size": 0.14,
                "relation": 0.33,
                "place": 0.05,
                "caption": 0.06,
            }
        ),
        vision_rate=0.2,
    ),
    Stage(
        "locate",
        800,
        16,
        1e-3,
        Lesson(
            {"existence": 0.04, "what_color": 0.06, "size": 0.2, "relation": 0.2, "place": 0.5},
            objects=(1, 3),
            relations=("left of", "above"),
            noise=0.01,
        ),
        level=0.9,
    ),
    Stage(
        "relate",
        1100,
        16,
        1e-3,
        Lesson(
            {
                "existence": 0.1,
                "color": 0.08,
                "what_color": 0.07,
                "size": 0.2,
                "relation": 0.45,
                "place": 0.05,
                "caption": 0.05,
            }
        ),
        vision_rate=0.2,
    ),
    Stage(
        "prior",
        1200,
        16,
        6e-4,
        Lesson(
            {"existence": 0.26, "color": 0.18, "what_color": 0.1, "size": 0.12, "relation": 0.22, "caption": 0.12},
            world=BIASED,
            yes=0.62,
            erased=0.09,
            recolored=0.09,
            blank=0.04,
            noise=0.04,
        ),
    ),
)
