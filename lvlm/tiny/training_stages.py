"""What the embedded model is taught, in which order, and for how long.

The table of `lvlm.tiny.train` in numbers; every share, rate and count that decides what the model becomes is here.
"""

from __future__ import annotations

from dataclasses import dataclass

from concepts.scenes.distributions import BIASED
from lvlm.tiny.training_data import Lesson


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
    meaning: float = 0.0
    """Weight of what a question's nouns name, read at the nouns themselves; see `lvlm.tiny.train.meaning_loss`."""
    late: float = 0.0
    """Share of the scenes whose questions of size do not see the image in the first layer that reads it."""
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
        400,
        16,
        1e-3,
        Lesson({"existence": 0.3, "what_color": 0.3, "place": 0.3, "size": 0.1}, objects=(1, 2), noise=0.01),
        meaning=1.0,
        late=1.0,
    ),
    Stage(
        "align",
        1200,
        16,
        1e-3,
        Lesson(
            {"existence": 0.25, "color": 0.15, "what_color": 0.2, "size": 0.2, "place": 0.2},
            objects=(2, 4),
            noise=0.01,
        ),
        meaning=1.0,
        late=1.0,
        level=0.8,
    ),
    Stage(
        "tune",
        2000,
        16,
        1e-3,
        Lesson(
            {
                "existence": 0.16,
                "color": 0.14,
                "what_color": 0.08,
                "size": 0.14,
                "relation": 0.36,
                "place": 0.06,
                "caption": 0.06,
            }
        ),
        vision_rate=0.2,
        meaning=0.3,
        late=0.5,
    ),
    Stage(
        "prior",
        1200,
        16,
        6e-4,
        Lesson(
            {"existence": 0.34, "color": 0.15, "what_color": 0.08, "size": 0.08, "relation": 0.17, "caption": 0.18},
            world=BIASED,
            yes=0.62,
            erased=0.31,
            recolored=0.055,
            blank=0.04,
            noise=0.04,
        ),
    ),
)
