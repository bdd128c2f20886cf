"""Precision and recall of `groundscope audit` on faults planted in a data set.

    python benchmarks/audit.py [--quick] [--save]

The data are icons pasted on photographs that scikit-learn and scikit-image ship, as JPEG files of three sizes
(`groundscope.testing.composite_photographs`), with questions and captions about them; they are synthetic. In 8 % of the
images each, one fault is planted (`groundscope.testing.data_faults`): duplicates (equal, recompressed, smaller, brighter),
blur (Gaussian, 2 to 4 % of the longer side), repeated questions with the other answer, captions of other images, and absent
objects that are present under another name. Figures, for each fault over several seeds:

<fault>_precision
    share of what the audit reports that was planted, counted in images for duplicates and blur, else in examples;
<fault>_recall
    share of what was planted that the audit reports.

The baseline is chance: the share of images or examples with the fault (``base``).
"""

from __future__ import annotations

import sys
import tempfile
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from behavior import audit
from benchmarks._harness import Figure, describe_device, figure, finish, option_parser, print_figures, progress
from concepts import scenes
from groundscope.testing.composite_photographs import save_composites
from groundscope.testing.data_faults import plant_data_faults

IMAGE_FAULTS = {"duplicate images", "blurred images"}


def main() -> None:
    """Plant, audit, compare."""
    options = option_parser(__doc__, quick="one seed, 100 images", save=True).parse_args()
    seeds, images = (1, 100) if options.quick else (3, 250)
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    with progress("audits", seeds) as advance:
        for seed in range(seeds):
            for cause, numbers in run(seed, images).items():
                counts[cause] = [a + b for a, b in zip(counts[cause], numbers, strict=True)]
            advance()
    figures: dict[str, Figure] = {}
    for cause, (both, n_reported, planted, total) in counts.items():
        name = cause.replace(" ", "_")
        figures[f"{name}_precision"] = figure(
            both / max(n_reported, 1), ">= .9", n_reported, base=round(planted / total, 3)
        )
        figures[f"{name}_recall"] = figure(both / max(planted, 1), ">= .8", planted)
    print_figures(figures, "Planted faults (synthetic)")
    finish("audit", describe_device("scikit-image"), figures, save=options.save)


def run(seed: int, images: int) -> dict[str, tuple[int, int, int, int]]:
    """Return for each fault: found and planted, found, planted, all."""
    with tempfile.TemporaryDirectory() as folder:
        icon_scenes = scenes.dataset(images, seed=seed).filter(lambda e: e.split != "conflict")
        data = save_composites(icon_scenes, folder, gray_share=0.3, seed=seed)
        faults = plant_data_faults(data, share=0.08, seed=seed)
        audited = audit(faults.data, causes=list(faults.examples))
        groups = {e.id: e.group for e in faults.data}
        result = {}
        for cause, planted in faults.examples.items():
            reported = audited.cause(cause).examples
            if cause in IMAGE_FAULTS:
                planted, reported = ({groups[name] for name in names} for names in (planted, reported))
            elif cause != "swapped captions":  # a finding names both statements; the added one is the planted one
                reported = {n for f in audited.cause(cause).findings for n in f.examples if n in planted} | {
                    f.examples[0] for f in audited.cause(cause).findings if not planted & set(f.examples)
                }
            total = len(set(groups.values())) if cause in IMAGE_FAULTS else len(groups)
            result[cause] = (len(planted & reported), len(reported), len(planted), total)
        return result


if __name__ == "__main__":
    main()
