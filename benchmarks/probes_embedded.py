"""What probes find in the embedded model: where colour, noun and relation are decodable, also where it answers by prior.

    python benchmarks/probes_embedded.py [--quick] [--save]

Everything is synthetic. Scores are balanced accuracies on held-out images, means over the concepts named; chance is 0.5.
Probes are fitted on the neutral split only. "Wrong by prior" are answers on the conflict split that the model gets wrong;
their images are other ones than those the probes were fitted to.

"Lexical" is what the same probes reach on the same questions about one grey picture: what is not above it is not read from
the image. The statements at the end are hypotheses; the table reports whether each holds.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from activation_store import ActivationStore, trace
from concepts import ConceptDataset, scenes
from lvlm import load_lvlm
from probes import ProbeGrid, fit_grid, lexical_control, probeable, transfer
from probes.analysis import alignment, logit_lens

RESULTS = Path(__file__).parent / "results" / "probes_embedded.json"
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
"""What, and where. ``named``: whether what the question says is true. ``asked``: whether it asks for an attribute, which the
is decodable from the words alone and not from the image: the lexical control must show it."""


@dataclass(frozen=True)
class Grey:
    """One grey picture of some size. The mean of an image's own pixels would not do: it tells the colors in it."""

    size: tuple[int, int]

    @property
    def identity(self) -> str:
        """Size and color."""
        return f"grey 128 {self.size[0]}x{self.size[1]}"

    def load(self) -> Image.Image:
        """Return it, RGB."""
        return Image.new("RGB", self.size, (128, 128, 128))


def with_asked(data: ConceptDataset) -> ConceptDataset:
    """Label each example with whether its question asks for an attribute."""
    return replace(
        data, examples=tuple(replace(e, labels={**e.labels, "attribute:asked": e.level == "attribute"}) for e in data)
    )


def without_images(data: ConceptDataset) -> ConceptDataset:
    """Return the same questions about a grey picture."""
    size = data[0].image.load().size
    return ConceptDataset(f"{data.name}, no images", tuple(replace(e, image=Grey(size)) for e in data))


def by_layer(grid: ProbeGrid, score: str = "balanced_accuracy") -> list[float]:
    """Return the mean over concepts at each layer."""
    return [round(float(v), 3) for v in getattr(grid, score).mean(axis=(0, 2))]


def measure(store: ActivationStore, blank: ActivationStore) -> dict[str, Any]:
    """Fit every place and collect figures."""
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
    figures |= statements(figures)
    vocabulary = logit_lens.read_vocabulary(store.path)
    nouns = [c for c in kinds["noun"] if c.split(":")[1] in vocabulary]
    if nouns:
        read: Any = logit_lens.object_readout(store, nouns, vocabulary, rows=neutral, resamples=200)
        auc = [round(float(v), 3) for v in read.groupby("layer")["auc"].mean()]
        figures["noun by the unembedding at image:mean, auc"] = {"value": auc, "n": int(read["n"].max())}
    alike: Any = alignment.layerwise(store, text_store=blank, permutations=100)
    for name, part in alike.groupby("measure"):
        figures[f"image and question tokens, {name}"] = {
            "value": [round(float(v), 3) for v in part["value"]],
            "baseline": [round(float(v), 3) for v in part["baseline"]],
            "n": int(part["n"].max()),
        }
    return figures


def statements(figures: dict[str, Any]) -> dict[str, Any]:
    """Say what holds: decodable means that the mean lower end of the intervals is over chance at some layer."""

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
    noun_figures = figures.get("asked at decoder.resid_post last")
    if noun_figures:
        value = sum(noun_figures["concepts_above_lexical"])
        out["layers where the words' own concept is called visual"] = {
            "value": [value],
            "goal": "0",
            "holds": value == 0,
            "n": len(noun_figures["value"]),
        }
    return out


def main() -> None:
    """Trace, fit, print a table, and as the last line one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer images, about a minute")
    parser.add_argument("--save", action="store_true", help="write the figures to benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    console.print("Compares what probes read from the embedded model, place by place, with shuffled labels.")
    data = scenes.dataset(n_images=80 if options.quick else 250, seed=0).filter(lambda e: bool(e.candidates))
    data = with_asked(data)
    model = load_lvlm("tiny")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        trace(model, data, sites=SITES, tokens=TOKENS, out=path)
        logit_lens.keep_vocabulary(path, model.processor.tokenizer.get_vocab())
        trace(model, without_images(data), sites=["resid_post"], tokens=TOKENS, out=path.with_name("blank"))
        figures = measure(ActivationStore(path), ActivationStore(path.with_name("blank")))
    table = Table("where", "by layer", "other figures", "n")
    for name, f in figures.items():
        other_figures = {k: v for k, v in f.items() if k not in {"value", "n"}}
        table.add_row(name, str(f["value"]), "; ".join(f"{k} {v}" for k, v in other_figures.items()), str(f["n"]))
    console.print(table)
    device = f"{platform.machine()}, torch {torch.__version__}, numpy {np.__version__}"
    outcome = {"benchmark": "probes_embedded", "device": device, "figures": figures}
    if options.save:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(outcome, indent=1) + "\n")
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
