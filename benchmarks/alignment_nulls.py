"""False positives of the permutation tests of alignment, the choice of a layer included.

    python benchmarks/alignment_nulls.py [--quick] [--save]

Images and texts are unrelated: random walks over layers, as in a residual stream, with unequal variances of features and a
modality gap. For each of 200 such data sets (``--quick``: 20) with fixed seeds, `probes.alignment.measure_layers` measures every
layer, and `LayerAlignment.best` chooses the layer of the largest value and tests it with 199 permutations of images, which
repeat this choice. A test that ignores the choice (the p of the chosen layer alone) is printed next to it. Figures:

cosine, cka, cknna, mutual_knn
    data sets with p below .05; goal: 2 to 20 of 200 (the test's level is 9 of 200; this range has a probability of 99.9 %).
image_to_text@k, text_to_image@k
    the same for recall, which is often tied and therefore conservative; goal: at most 20.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from activation_store import MemorySource
from benchmarks._harness import describe_device, figure, finish, option_parser, print_figures, progress
from probes import alignment

IMAGES, LAYERS, WIDTH = 40, 4, 16
MEASURES = ["cosine", "retrieval", "cka", "cknna", "mutual_knn"]


def unrelated(seed: int) -> tuple[MemorySource, MemorySource]:
    """Return images and texts whose layers are random walks without anything in common but a gap."""
    rng = np.random.default_rng(seed)
    table = {"id": range(IMAGES), "group": range(IMAGES)}
    sources = []
    for name, tokens in (("image", "image:mean"), ("text", "question:mean")):
        steps = rng.normal(size=(IMAGES, LAYERS, WIDTH)) * np.exp(rng.normal(size=WIDTH))
        walk = steps.cumsum(axis=1) + 3 * rng.normal(size=WIDTH)
        sources.append(MemorySource({("resid_post", tokens): walk}, table, provenance={"input": name}))
    return sources[0], sources[1]


def main() -> None:
    """Run, print a table, and as the last line one JSON object."""
    parser = option_parser(__doc__, quick="20 data sets", save=True)
    options = parser.parse_args()
    sets = 20 if options.quick else 200
    chosen: dict[str, list[float]] = {}
    ignoring: dict[str, list[float]] = {}
    start = time.process_time()
    with progress("data sets", sets) as advance:
        for seed in range(sets):
            result = alignment.measure_layers(*unrelated(seed), measures=MEASURES, seed=seed, progress=False)
            alone: Any = result.table().set_index(["measure", "image_layer"])["p"]
            for row in result.best().to_dict("records"):
                name = str(row["measure"])
                chosen.setdefault(name, []).append(float(row["p"]))
                ignoring.setdefault(name, []).append(float(alone[name, row["image_layer"]]))
            advance()
    figures = {}
    for name, values in chosen.items():
        below = int((np.array(values) < 0.05).sum())
        ignored = int((np.array(ignoring[name]) < 0.05).sum())
        most = f"<= {round(0.1 * sets)}"
        figures[name] = figure(below, most, sets, without_the_choice=ignored)
        if "@" not in name and not options.quick:
            figures[f"{name}, at least"] = figure(below, ">= 2", sets)
    print_figures(figures, f"p below .05 among {sets} data sets without a relation")
    print(f"{time.process_time() - start:.0f} CPU seconds")
    finish("alignment_nulls", describe_device("numpy"), figures, save=options.save and not options.quick)


if __name__ == "__main__":
    main()
