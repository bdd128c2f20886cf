"""Stages of the embedded model's training: data, parameters, learning rates and numbers of steps.

The table in `lvlm.tiny.train` in numbers; all hyperparameters that determine the trained model are here.
"""

from __future__ import annotations

from dataclasses import dataclass

from concepts.scenes.distributions import BIASED
from lvlm.tiny.training_data import Lesson


@dataclass(frozen=True)
class Stage:
    """One stage: a row of the table in `lvlm.tiny.train`."""

    name: str
    steps: int
    size: int
    rate: float
    lesson: Lesson | None
    """None for stages with patch labels instead of questions."""
    vision_rate: float = 0.0
    """Learning rate of the vision tower, relative to `rate`; 0 freezes it."""
    projector: bool = True
    decoder: bool = True
    meaning: float = 0.0
    """Weight of `lvlm.tiny.train.meaning_loss`, on the properties of the objects that a question's nouns name."""
    late: float = 0.0
    """Share of scenes whose questions about size do not attend to the image in the first layer that reads it."""
    level: float = 0.6
    """Share of the steps at full learning rate; a stage that starts on a plateau needs a large share."""


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
