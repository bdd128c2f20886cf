"""Probes, heads, vector and verdicts of the embedded model's scenes on scenes that look different.

    python benchmarks/out_of_sample.py [--quick] [--save] [--scenes N] [--test-scenes N]

The data is synthetic. Everything is fitted on one set of icon scenes, unchanged: probes (place chosen by validation),
head scores, the default run's vector (``discriminant`` at the six best heads, fixed strength 1) and the probes of the diagnosis.
All of it is then applied to other scenes, drawn in the same style (the baseline) and changed:

flat icons      every icon is filled with its color and has a dark edge: no shading, no details inside
rotated         the image is rotated by 10 degrees; left, right, above and below keep their truth
blurred         Gaussian blur, radius 1.5 pixels of 112
JPEG 10         JPEG compression, quality 10

Figures, for each condition, with 95 % intervals over scenes; none has a goal, they are reported as measured:

accuracy LEVEL              right answers to neutral questions, without the vector
probe CONCEPT               balanced accuracy, mean over concepts; the interval is the mean of the probes' intervals
heads LEVEL                 rank correlation of head scores with those of the other scenes as drawn; overlap of the best five
false_yes_cut               share of the wrong "yes" about absent objects that the vector removes (adversarial questions)
recall_loss, neutral_loss   loss of right answers about present objects, and of accuracy on neutral questions
diagnosis VERDICT           share of the wrong answers with this verdict, Wilson's interval
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from math import cos, radians, sin
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image, ImageFilter
from rich.table import Table

from activation_store import ActivationStore, trace
from behavior import BehaviorResult
from behavior.metrics import METRICS
from benchmarks._harness import describe_device, finish, option_parser, progress, wide_console
from circuits import HeadScores, compare, patch_heads, top_heads
from concepts import counterfactuals, scenes
from concepts.annotated_object import AnnotatedObject, Box
from concepts.concept import LEVELS
from concepts.counterfactual_pair import CounterfactualPair
from concepts.image_files import BytesImage
from concepts.image_source import ImageSource
from concepts.scenes.icons import COLORS, icon
from concepts.scenes.scene import SIDE, Scene
from concepts.schema import ConceptDataset, Example
from diagnosis import diagnose, fit_directions
from experiments.config import SteerConfig
from groundscope.core.intervals import wilson
from lvlm import Lvlm, load_lvlm
from mitigation import Contrast, SteeringVector, derive
from mitigation.strength import answer_under
from probes import ProbeGrid, fit_grid, probeable, transfer

KINDS = {"object": "object", "attribute": "color", "relation": "relation"}
SITES = ["resid_post", "z", "mlp_out", "vision.resid_post", "projector.out"]
PLACES = (("noun", "object:", "image:mean"), ("color", "attribute:", "object:mean"), ("named", ":named", "last"))
"""Group of concepts, part of their names, token selection of the decoder's residual stream."""
ANGLE, RADIUS, QUALITY = 10, 1.5, 10
EDGE = 0.35
"""Factor on the color of an icon's edge in the flat style."""


@dataclass(frozen=True)
class FlatScene:
    """A scene whose icons are filled with one color, with a dark edge."""

    scene: Scene

    @property
    def identity(self) -> str:
        """The style and the description of the scene."""
        return f"flat {self.scene.identity}"

    def load(self) -> Image.Image:
        """Draw the scene."""
        from scipy.ndimage import binary_erosion

        canvas = replace(self.scene, objects=()).pixels().astype(np.float64)
        for item in self.scene.objects:
            box = item.require_box()
            x, y, side = (int(v) for v in (box.x0, box.y0, box.x1 - box.x0))
            alpha = icon(item.noun, item.attributes["color"], side)[1]
            inside = alpha[..., 0] > 0.5
            edge = inside & np.logical_not(binary_erosion(inside))
            color = np.array(COLORS[item.attributes["color"]]) * np.where(edge[..., None], EDGE, 1.0)
            region = canvas[y : y + side, x : x + side]
            region += (color - region) * alpha
        return Image.fromarray(np.rint(canvas).astype(np.uint8))


@dataclass(frozen=True)
class ChangedImage:
    """An image after a change of all of its pixels."""

    base: ImageSource
    change: str

    @property
    def identity(self) -> str:
        """The change and the identity of the image."""
        return f"{self.change} {self.base.identity}"

    def load(self) -> Image.Image:
        """Return the changed image."""
        image = self.base.load()
        if self.change == "rotated":
            fill = tuple(int(v) for v in np.asarray(image).reshape(-1, 3).mean(axis=0))
            return image.rotate(ANGLE, Image.Resampling.BICUBIC, fillcolor=fill)
        if self.change == "blurred":
            return image.filter(ImageFilter.GaussianBlur(RADIUS))
        buffer = BytesIO()
        image.save(buffer, "JPEG", quality=QUALITY)
        return BytesImage(buffer.getvalue(), self.identity).load()


def rotate_box(box: Box) -> Box:
    """Return the box around a box after the rotation, inside the image."""
    c, s, middle = cos(radians(ANGLE)), sin(radians(ANGLE)), SIDE / 2
    corners = [(x - middle, y - middle) for x in (box.x0, box.x1) for y in (box.y0, box.y1)]
    # Counterclockwise on the screen, where y points down.
    points = np.clip([(c * x + s * y + middle, -s * x + c * y + middle) for x, y in corners], 0, SIDE)
    (x0, y0), (x1, y1) = points.min(axis=0), points.max(axis=0)
    return Box(float(x0), float(y0), float(x1), float(y1))


def rotate_object(item: AnnotatedObject) -> AnnotatedObject:
    """Return the object with its box in the rotated image."""
    return replace(item, box=rotate_box(item.require_box()))


def changed(example: Example, condition: str) -> Example:
    """Return the example with its image in one of the conditions."""
    if condition == "as drawn" or not isinstance(example.image, Scene):
        return example
    objects = tuple(map(rotate_object, example.objects)) if condition == "rotated" else example.objects
    flat = condition == "flat icons"
    image: ImageSource = FlatScene(example.image) if flat else ChangedImage(example.image, condition)
    return replace(example, image=image, objects=objects)


CONDITIONS = ("as drawn", "flat icons", "rotated", "blurred", f"JPEG {QUALITY}")


def over_scenes(
    rows: Sequence[tuple[str, float, float]], statistic: Callable[[np.ndarray, np.ndarray], float]
) -> dict[str, float]:
    """Return a statistic of two sums over scenes with its bootstrap interval; rows are group and two numbers."""
    names, index = np.unique([row[0] for row in rows], return_inverse=True)
    sums = np.zeros((len(names), 3))
    np.add.at(sums, index, [(a, b, 1.0) for _, a, b in rows])
    rng = np.random.default_rng(0)
    draws = np.array([statistic(*_totals(sums[rng.integers(len(names), size=len(names))])) for _ in range(1000)])
    draws = draws[np.isfinite(draws)]
    value = statistic(*_totals(sums))
    low, high = np.quantile(draws, [0.025, 0.975]) if len(draws) else (np.nan, np.nan)
    return {"value": round(value, 4), "low": round(float(low), 4), "high": round(float(high), 4), "n": len(rows)}


def _totals(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    first, second, count = sums.sum(axis=0)
    return first / count, second / count


def rates(before: BehaviorResult, after: BehaviorResult, metric: str) -> list[tuple[str, float, float]]:
    """Return the scene of each answer to which a metric applies, and its values before and after."""
    chosen = METRICS[metric]
    pairs = zip(before.answers, after.answers, strict=True)
    return [(a.group, float(chosen.counts(a)), float(chosen.counts(b))) for a, b in pairs if chosen.applies(a)]


@dataclass(frozen=True)
class Fitted:
    """Everything that is fitted on the scenes as drawn."""

    grids: Mapping[str, ProbeGrid]
    heads: Mapping[str, HeadScores]
    vector: SteeringVector
    directions: Sequence[Any]


def fit(model: Lvlm, data: ConceptDataset, store: ActivationStore, pairs: int) -> Fitted:
    """Fit probes, head scores and vector on scenes as drawn."""
    neutral = (store.frame()["split"] == "neutral").to_numpy()
    names = probeable(store, folds=3, rows=neutral)
    grids = {}
    for kind, part, tokens in PLACES:
        concepts = [n for n in names if part in n and (kind == "named" or not n.endswith(":named"))][:6]
        grids[kind] = fit_grid(
            store, concepts, "resid_post", tokens=tokens, folds=3, control=0, rows=neutral, resamples=200
        )
    heads = {level: patch_heads(model, make_pairs(data, level, pairs), progress=False) for level in LEVELS}
    options = SteerConfig()
    contrast = Contrast.from_store(store, "object:named")
    vector = derive.discriminant(contrast, heads=top_heads(heads, 6), doubt=options.doubt, progress=False)
    return Fitted(grids, heads, vector, fit_directions(store, neutral))


def make_pairs(data: ConceptDataset, level: str, count: int) -> list[CounterfactualPair]:
    """Return evenly spaced pairs of a level."""
    level_pairs = counterfactuals.pairs(data.where(split="neutral"), KINDS[level])
    return [level_pairs[int(i)] for i in np.unique(np.linspace(0, len(level_pairs) - 1, min(count, len(level_pairs))))]


def measure(
    model: Lvlm, fitted: Fitted, data: ConceptDataset, condition: str, folder: Path, pairs: int, diagnosed: int
) -> dict[str, dict[str, float]]:
    """Return the figures of one condition."""
    view = ConceptDataset(f"{data.name}, {condition}", tuple(changed(e, condition) for e in data))
    tokens = ["last", "image:mean", "object:mean"]
    store = trace(model, view, SITES, tokens, folder, progress=False, batch_size=64)
    results = answer_under(model, view, {"before": None, "after": fitted.vector}, progress=False)
    before, after = results["before"], results["after"]
    out: dict[str, dict[str, float]] = {}
    for level in LEVELS:
        rows = rates(before, before, f"neutral, {level}: right")
        out[f"accuracy {level}"] = over_scenes(rows, lambda a, _: float(a))
    for kind, grid in fitted.grids.items():
        neutral_rows = (store.frame()["split"] == "neutral").to_numpy()
        table = transfer(grid, {condition: (store, neutral_rows)}, resamples=200)
        best = [table[(table["concept"] == c) & (table["layer"] == grid.best(c).layer)].iloc[0] for c in grid.concepts]
        value, low, high = (float(np.nanmean([row[k] for row in best])) for k in ("balanced_accuracy", "low", "high"))
        out[f"probe {kind}"] = {"value": round(value, 4), "low": round(low, 4), "high": round(high, 4), "n": len(best)}
    for level in LEVELS:
        level_pairs = [
            replace(p, clean=changed(p.clean, condition), corrupt=changed(p.corrupt, condition))
            for p in make_pairs(data, level, pairs)
        ]
        agreement = compare(fitted.heads[level], patch_heads(model, level_pairs, progress=False), k=(5,), resamples=200)
        for name, e in (("rank correlation", agreement.rank_correlation), ("overlap of 5", agreement.overlap[5])):
            out[f"heads {level}, {name}"] = {
                "value": round(e.value, 4), "low": round(e.low, 4), "high": round(e.high, 4), "n": len(level_pairs),
            }  # fmt: skip
    false_yes = rates(before, after, "adversarial absent: says yes")
    out["false_yes"] = over_scenes(false_yes, lambda a, _: float(a))
    out["false_yes_cut"] = over_scenes(false_yes, lambda a, b: float(1 - b / a) if a else float("nan"))
    recall, neutral = rates(before, after, "present: says no"), rates(before, after, "neutral: right")
    out["recall_loss"] = over_scenes(recall, lambda a, b: float(b - a))
    out["neutral_loss"] = over_scenes(neutral, lambda a, b: float(a - b))
    frame = store.frame()
    correct = dict(zip(frame["id"], frame["correct"], strict=True))
    wrong = [e for e in view if correct.get(e.id) == 0]
    chosen = [wrong[int(i)] for i in np.random.default_rng(0).permutation(len(wrong))[:diagnosed]]
    right = [e for e in view if correct.get(e.id) == 1]
    diagnoses = diagnose(model, store, fitted.directions, chosen + right, with_sources=False, progress=False)
    verdicts = Counter(d.verdict for d in diagnoses.examples if d.verdict is not None)  # right answers have none
    for verdict, count in sorted(verdicts.items()):
        n = verdicts.total()
        low, high = wilson(count, n)
        out[f"diagnosis {verdict}"] = {
            "value": round(count / n, 4), "low": round(float(low), 4), "high": round(float(high), 4), "n": n,
        }  # fmt: skip
    return out


def print_table(figures: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """Print one line for each figure, one column for each condition."""
    names = list(dict.fromkeys(name for of in figures.values() for name in of))
    table = Table("figure", *figures)
    for name in names:
        cells = [of.get(name) for of in figures.values()]
        table.add_row(
            name, *(f"{c['value']:.2f} [{c['low']:.2f}, {c['high']:.2f}] {c['n']}" if c else "" for c in cells)
        )
    wide_console().print(table)


def main() -> dict[str, Any]:
    """Run the benchmark."""
    parser = option_parser(__doc__, quick="60 scenes and 20 test scenes", save=True)
    parser.add_argument("--scenes", type=int, default=200, help="scenes that everything is fitted on (default: 200)")
    parser.add_argument("--test-scenes", type=int, default=100, help="scenes of each condition (default: 100)")
    options = parser.parse_args()
    fit_scenes, test_scenes = (60, 20) if options.quick else (options.scenes, options.test_scenes)
    pairs, diagnosed = (10, 6) if options.quick else (16, 16)
    model = load_lvlm("tiny")
    data = scenes.dataset(fit_scenes, seed=0).filter(lambda e: bool(e.candidates))
    test = scenes.dataset(test_scenes, seed=1000).filter(lambda e: bool(e.candidates))
    figures: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder, progress("conditions", len(CONDITIONS) + 1) as advance:
        tokens = ["last", "image:mean", "object:mean"]
        store = trace(model, data, SITES, tokens, Path(folder) / "fit", progress=False, batch_size=64)
        fitted = fit(model, data, store, pairs)
        advance(1, "fitted")
        for number, condition in enumerate(CONDITIONS):
            figures[condition] = measure(model, fitted, test, condition, Path(folder) / str(number), pairs, diagnosed)
            advance(1, f"{condition}: {json.dumps(figures[condition])}")
    print_table(figures)
    flat = {
        f"{name}, {condition}": {**value, "goal": "", "holds": True}
        for condition, of in figures.items()
        for name, value in of.items()
    }
    sizes = {"scenes": fit_scenes, "test_scenes": test_scenes, "pairs": pairs, "diagnosed": diagnosed}
    return finish(
        "out_of_sample", describe_device("torch", "transformers", "nnsight"), flat, save=options.save, sizes=sizes
    )


if __name__ == "__main__":
    main()
