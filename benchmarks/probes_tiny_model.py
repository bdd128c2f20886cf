"""Where color, nouns and relations are decodable in the embedded model, also if its answer is wrong by prior.

    python benchmarks/probes_tiny_model.py [--quick] [--save]

The data is synthetic. Scores are balanced accuracies of linear probes on held-out images by layer, means over concepts;
chance is 0.5. Probes are fitted on the neutral split only. Figures:

CONCEPT at SITE TOKENS
    ``value``: scores; ``low``: mean lower ends of the intervals; ``control``: scores with shuffled labels; ``lexical``:
    scores of the same probes on the same questions about a gray image, the baseline of what the words alone reveal;
    ``concepts_above_lexical``: concepts whose score is above it; ``where_wrong_by_prior``: scores on answers of the conflict
    split that the model gets wrong, on other images than those of the training rows;
noun by the unembedding at image:mean, auc
    area under the ROC curve of nouns read with the logit lens;
image and question tokens, MEASURE
    alignment of the representations of image and question tokens, with a permutation baseline;
sentences such as "color is decodable at projector.out"
    hypotheses: ``holds`` if the mean lower end of the intervals is above chance at some layer.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from PIL import Image
from rich.table import Table

from activation_store import ActivationStore, trace
from benchmarks._harness import describe_device, finish, option_parser, progress, wide_console
from concepts import ConceptDataset, scenes
from lvlm import load_lvlm
from probes import ProbeGrid, alignment, fit_grid, lexical_control, probeable, transfer
from probes.analysis import logit_lens

SITES = ["resid_post", "vision.resid_post", "projector.out"]
TOKENS = ["last", "image:mean", "object:mean", "question:mean"]
PLACES = (
    ("color", "vision", "resid_post", "object:mean"),
    ("color", "projector", "out", "object:mean"),
    ("color", "decoder", "resid_post", "object:mean"),
    ("color", "decoder", "resid_post", "last"),
    ("noun", "vision", "resid_post", "image:mean"),
    ("noun", "projector", "out", "image:mean"),
    ("noun", "decoder", "resid_post", "image:mean"),
    ("relation", "vision", "resid_post", "image:mean"),
    ("relation", "projector", "out", "image:mean"),
    ("relation", "decoder", "resid_post", "last"),
    ("noun", "decoder", "resid_post", "last"),
    ("named", "decoder", "resid_post", "last"),
    ("asked", "decoder", "resid_post", "last"),
)
"""Concept, stack, component, tokens. ``named``: whether the statement in the question is true. ``asked``: whether the question is
about an attribute, which is visible in the words alone: the lexical control must detect it."""


@dataclass(frozen=True)
class GrayImage:
    """A gray image; the mean color of the original image would reveal the colors in it."""

    size: tuple[int, int]

    @property
    def identity(self) -> str:
        """Color and size."""
        return f"gray 128 {self.size[0]}x{self.size[1]}"

    def load(self) -> Image.Image:
        """Return the RGB image."""
        return Image.new("RGB", self.size, (128, 128, 128))


def add_asked_label(data: ConceptDataset) -> ConceptDataset:
    """Add the label ``attribute:asked``: whether the question is about an attribute."""
    return replace(
        data, examples=tuple(replace(e, labels={**e.labels, "attribute:asked": e.level == "attribute"}) for e in data)
    )


def replace_images(data: ConceptDataset) -> ConceptDataset:
    """Return the same questions about a gray image."""
    size = data[0].image.load().size
    return ConceptDataset(f"{data.name}, no images", tuple(replace(e, image=GrayImage(size)) for e in data))


def by_layer(grid: ProbeGrid, score: str = "balanced_accuracy") -> list[float]:
    """Return the mean over concepts at each layer."""
    return [round(float(v), 3) for v in getattr(grid, score).mean(axis=(0, 2))]


def measure(store: ActivationStore, blank: ActivationStore) -> dict[str, Any]:
    """Fit probes at every place of `PLACES` and return all figures; `blank` is the store of the questions about gray images."""
    frame = store.frame()
    neutral = (frame["split"] == "neutral").to_numpy()
    wrong = ((frame["split"] == "conflict") & (frame["correct"] == 0)).to_numpy()
    every = probeable(store, folds=3, rows=neutral)
    possible = [c for c in every if not c.endswith((":named", ":asked"))]
    kinds = {
        "color": [c for c in possible if c.startswith("attribute:")],
        "noun": [c for c in possible if c.startswith("object:")][:6],
        "relation": [c for c in possible if c.startswith("relation:")],
        "named": [c for c in every if c.endswith(":named")],
        "asked": [c for c in every if c.endswith(":asked")],
    }
    figures: dict[str, Any] = {}
    for kind, stack, component, tokens in PLACES:
        if not kinds[kind]:
            continue
        grid = fit_grid(store, kinds[kind], f"{stack}.{component}", tokens=tokens, folds=3, control=1, rows=neutral)
        entry: dict[str, Any] = {
            "value": by_layer(grid),
            "low": by_layer(grid, "low"),
            "control": by_layer(grid, "control"),
            "concepts": len(kinds[kind]),
            "n": int(grid.n_test.max()),
        }
        if stack == "decoder":
            words: Any = lexical_control(grid, blank, rows=neutral)
            entry["lexical"] = [round(float(v), 3) for v in words.groupby("layer")["lexical"].mean()]
            visual = [int(v) for v in words.groupby("layer")["is_visual"].sum()]
            entry["concepts_above_lexical"] = visual
        if kind == "color":
            moved: Any = transfer(grid, {"wrong by prior": (store, wrong)}, resamples=300)
            for name, score in (("where_wrong_by_prior", "balanced_accuracy"), ("low_where_wrong_by_prior", "low")):
                entry[name] = [round(float(v), 3) for v in moved.groupby("layer")[score].mean()]
            entry["n_wrong_by_prior"] = int(moved["n"].max())
        figures[f"{kind} at {stack}.{component} {tokens}"] = entry
    figures |= check_hypotheses(figures)
    vocabulary = logit_lens.read_vocabulary(store.path)
    nouns = [c for c in kinds["noun"] if c.split(":")[1] in vocabulary]
    if nouns:
        read: Any = logit_lens.object_readout(store, nouns, vocabulary, rows=neutral, resamples=200)
        auc = [round(float(v), 3) for v in read.groupby("layer")["auc"].mean()]
        figures["noun by the unembedding at image:mean, auc"] = {"value": auc, "n": int(read["n"].max())}
    # The texts are questions about one blank image: rows that have seen both, but no image of their own.
    alike: Any = alignment.measure_layers(store, blank, joint=True).table()
    for name, part in alike.groupby("measure"):
        figures[f"image and question tokens, {name}"] = {
            "value": [round(float(v), 3) for v in part["value"]],
            "baseline": [round(float(v), 3) for v in part["baseline"]],
            "n": int(part["n"].max()),
        }
    return figures


def check_hypotheses(figures: dict[str, Any]) -> dict[str, Any]:
    """Check the hypotheses; decodable means that the mean lower end of the intervals is above chance at some layer."""

    def best(name: str, key: str = "low") -> float:
        return max(figures[name][key], default=float("nan")) if name in figures else float("nan")

    def statement(value: float, holds: bool) -> dict[str, Any]:
        return {"value": [value], "goal": "> 0.5", "holds": holds, "n": 1}

    out = {}
    for kind, tokens in (("color", "object:mean"), ("noun", "image:mean")):
        for place in ("vision.resid_post", "projector.out"):
            value = best(f"{kind} at {place} {tokens}")
            out[f"{kind} is decodable at {place}"] = statement(value, value > 0.5)
    early = max(best(f"relation at {place} image:mean") for place in ("vision.resid_post", "projector.out"))
    late = best("relation at decoder.resid_post last")
    out["relation is decodable in the decoder and not before"] = statement(late, early <= 0.5 < late)
    for tokens in ("object:mean", "last"):
        value = best(f"color at decoder.resid_post {tokens}", "low_where_wrong_by_prior")
        out[f"true color is decodable where wrong by prior, {tokens}"] = statement(value, value > 0.5)
    named = figures.get("asked at decoder.resid_post last")
    if named:
        value = sum(named["concepts_above_lexical"])
        out["layers where a concept of the words alone is called visual"] = {
            "value": [value],
            "goal": "= 0",
            "holds": value == 0,
            "n": len(named["value"]),
        }
    return out


def main() -> None:
    """Trace, fit, print a table, and as the last line one JSON object."""
    options = option_parser(__doc__, quick="fewer images, about a minute", save=True).parse_args()
    torch.set_num_threads(1)
    console = wide_console()
    console.print(
        "Compares probes of the embedded model at several places with shuffled labels and with the words alone."
    )
    with tempfile.TemporaryDirectory() as folder, progress("tracing and fitting"):
        data = scenes.dataset(n_images=80 if options.quick else 250, seed=0).filter(lambda e: bool(e.candidates))
        data = add_asked_label(data)
        model = load_lvlm("tiny")
        path, blank_path = Path(folder) / "store", Path(folder) / "blank"
        trace(model, data, sites=SITES, tokens=TOKENS, out=path)
        logit_lens.keep_vocabulary(path, model.processor.tokenizer.get_vocab())
        trace(model, replace_images(data), sites=["resid_post"], tokens=TOKENS, out=blank_path)
        figures = measure(ActivationStore(path), ActivationStore(blank_path))
    table = Table("figure", "value by layer", "other scores", "n")
    for name, entry in figures.items():
        others = {key: value for key, value in entry.items() if key not in {"value", "n"}}
        table.add_row(name, str(entry["value"]), "; ".join(f"{k} {v}" for k, v in others.items()), str(entry["n"]))
    console.print(table)
    finish("probes_tiny_model", describe_device("torch", "numpy"), figures, save=options.save)


if __name__ == "__main__":
    main()
