"""Ceilings of behavior: false violations and power on simulated readings, and what is found on the embedded model.

    python benchmarks/ceiling.py [--quick] [--save]

false_violations, power_05, power_10
    Shares of cells whose interval is above 0 where behavior is exactly as accurate as the best of four layers (nominal 2.5 %),
    and where it is .05 and .10 more accurate; 300 rows about 150 images.
unchanged
    Violations of the embedded model, whose prior overrides what its last token encodes; its headroom where image and prior
    disagree (`headroom_conflict`) and where they do not (`headroom_neutral`). Color questions, every layer at the last token.
leak
    Violations where answers have information that the readings do not: answers of the embedded model, readings of its copy with
    a color-blind vision tower.
missed
    Ceiling of the color-blind copy for questions about typical colors: the prior predicts these answers without any color in
    the image, so a high ceiling is no evidence that the image is represented.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks._harness import Figure, describe_device, figure, finish, option_parser, print_figures, progress
from diagnosis import Ceilings, ceilings_of_readings, representation_ceiling

LAYERS = (0.8, 0.7, 0.75, 0.5)
"""Accuracy of each layer in simulated readings."""
ROWS = 300
"""Rows of a simulated cell, two for each image."""


def simulate(extra: float, repeats: int, seed: int) -> float:
    """Return the share of simulated cells whose interval is above 0, if behavior is `extra` more accurate than the best layer."""
    rng = np.random.default_rng(seed)
    groups = [f"image {i // 2}" for i in range(ROWS)]
    above = 0
    for repeat in range(repeats):
        margins = np.where(rng.random((len(LAYERS), ROWS)) < np.array(LAYERS)[:, None], 1.0, -1.0)
        correct = rng.random(ROWS) < max(LAYERS) + extra
        result = ceilings_of_readings(margins, correct, groups, ["a"] * ROWS, ["b"] * ROWS, resamples=500, seed=repeat)
        above += result.cells[0].low > 0
    return above / repeats


def cells_of(ceilings: Ceilings) -> dict[str, Any]:
    """Return the cells by split."""
    return {cell.condition: cell for cell in ceilings.cells}


def measure_embedded(images: int) -> dict[str, Figure]:
    """Return the figures of the embedded model and its color-blind copy."""
    import groundscope as gs
    from groundscope.testing.planted_failures import make_color_blind

    model = gs.load_lvlm("tiny")
    blind = make_color_blind(model)
    data = gs.scenes.dataset(images, seed=3).filter(lambda e: e.kind == "color")
    with tempfile.TemporaryDirectory() as folder:
        stores = {
            name: gs.trace(m, data, sites=["resid_post"], tokens=["last"], out=Path(folder) / name, progress=False)
            for name, m in (("own", model), ("blind", blind))
        }
        with progress("ceilings"):
            own = cells_of(representation_ceiling(stores["own"], progress=False))
            leak = cells_of(
                representation_ceiling(stores["blind"], gs.answer(model, data, progress=False), progress=False)
            )
            dark = cells_of(representation_ceiling(stores["blind"], progress=False))
    n = len(data)
    for name, cells in (("unchanged", own), ("leak", leak), ("color blind", dark)):
        for split, cell in cells.items():
            print(
                f"{name}, {split} ({cell.n}): behavior {cell.behavior:.3f}, ceiling {cell.ceiling:.3f}, difference "
                f"{cell.difference:+.3f} [{cell.low:+.3f}, {cell.high:+.3f}]{', violated' if cell.violated else ''}"
            )
    return {
        "unchanged": figure(sum(c.violated for c in own.values()), "= 0", n),
        "headroom_conflict": figure(own["conflict"].headroom, "", own["conflict"].n),
        "headroom_neutral": figure(own["neutral"].headroom, "", own["neutral"].n),
        "leak": figure(float(leak["neutral"].violated), "= 1", leak["neutral"].n),
        "missed": figure(dark["typical"].ceiling, "", dark["typical"].n),
    }


def main() -> None:
    """Measure, print, and with ``--save`` write the record."""
    options = option_parser(__doc__, quick="fewer simulations and images", save=True).parse_args()
    repeats, images = (100, 150) if options.quick else (1000, 600)
    figures: dict[str, Figure] = {}
    for name, extra, goal in (
        ("false_violations", 0.0, "<= 0.08"),
        ("power_05", 0.05, ""),
        ("power_10", 0.1, ">= 0.9"),
    ):
        with progress(name):
            figures[name] = figure(simulate(extra, repeats, 1), goal, repeats)
    figures |= measure_embedded(images)
    print_figures(figures)
    finish("ceiling", describe_device("torch", "scikit-learn"), figures, save=options.save)


if __name__ == "__main__":
    main()
