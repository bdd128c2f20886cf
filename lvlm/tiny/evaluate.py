"""Evaluate an embedded model on held-out scenes: ``python -m lvlm.tiny.evaluate [tiny] [--images 1200] [--json FILE]``.

Every figure has a 95 % interval from a bootstrap over scenes. Scenes are drawn from test seeds and disjoint from training.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from concepts import scenes
from concepts.object_mentions import mentioned_objects
from concepts.scenes.icons import NOUNS
from concepts.schema import ConceptDataset, Example
from groundscope.core.statistics import Estimate, estimate
from lvlm.answer_keys import answer_key
from lvlm.loading import load_lvlm
from lvlm.model import Lvlm

HELD_OUT_SEED = 9000
"""Seed of the scenes of the figures in the model card."""


GOALS = {
    "neutral existence": ">= .95",
    "neutral attribute": ">= .93",
    "neutral relation": ">= .90",
    "typical right": ">= .97",
    "conflict wrong by prior": ".15 - .40",
    "caption recall": ">= .85",
    "caption CHAIR_i": ".05 - .20",
}
"""Goals of the model with the prior; its twin is evaluated by the same figures."""


@dataclass(frozen=True)
class Answered:
    """An example and the model's answer."""

    example: Example
    text: str

    @property
    def right(self) -> bool:
        """Whether the answer is the true one."""
        return self.text == self.example.answer


def ask(model: Lvlm, data: Sequence[Example], size: int = 64) -> list[Answered]:
    """Answer questions by the candidate with the largest score."""
    out: list[Answered] = []
    for batch in model.batches(data, size):
        logits = model.logits(batch.inputs)
        for encoding, row in zip(batch.encodings, logits, strict=True):
            key = answer_key(model, encoding.example)
            out.append(Answered(encoding.example, key.candidates[int(key.scores(row).argmax())]))
    return out


def describe(model: Lvlm, data: Sequence[Example], size: int = 64) -> list[Answered]:
    """Answer with free text, by greedy decoding."""
    out: list[Answered] = []
    for batch in model.batches(data, size):
        texts = model.generate_batch(batch)
        out += [Answered(e.example, t) for e, t in zip(batch.encodings, texts, strict=True)]
    return out


def rate(answers: Sequence[Answered], true: Callable[[Answered], float]) -> Estimate:
    """Return the mean of a value over answers, with an interval over scenes."""
    return estimate([float(true(g)) for g in answers], [g.example.group for g in answers])


@contextmanager
def block_image(model: Lvlm, layers: Sequence[int], image: Sequence[int]) -> Iterator[None]:
    """Block attention from text to the image in decoder layers while the context is open (arXiv 2304.14767)."""

    def blocked(length: int) -> Tensor:
        hidden = torch.full((length, length), float("-inf"), dtype=model.dtype).triu(1)
        rows = [i for i in range(length) if i not in set(image)]
        hidden[np.ix_(rows, list(image))] = float("-inf")
        return hidden[None, None].to(model.device)

    def before(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        return args, {**kwargs, "attention_mask": blocked(states.shape[1])}

    hooks = [
        model.hf.get_submodule(
            f"{model.spec.decoder.layers}.{layer}.{model.spec.decoder.attention}"
        ).register_forward_pre_hook(before, with_kwargs=True)
        for layer in layers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def knockout(model: Lvlm, data: ConceptDataset) -> dict[str, dict[str, float]]:
    """Return accuracy by kind of question, with and without attention from text to the image in some layers."""
    image = model.encode(data.examples[0]).tokens.image
    every = range(model.n_layers)
    cuts: dict[str, Sequence[int]] = {
        "uncut": (),
        **{f"only layer {layer}": (layer,) for layer in every},
        "all above 0": every[1:],
        "all": every,
    }
    table: dict[str, dict[str, float]] = {}
    for name, layers in track(cuts.items(), description="attention knockout", transient=True):
        with block_image(model, layers, image):
            answers = ask(model, data.examples)
        kinds = sorted({g.example.kind for g in answers})
        table[name] = {k: float(np.mean([g.right for g in answers if g.example.kind == k])) for k in kinds}
    return table


def measure(model: Lvlm, n_images: int = 1200, seed: int = HELD_OUT_SEED) -> dict[str, Estimate]:
    """Return all figures of the model card except the knockout table."""
    data = scenes.dataset(n_images, seed)
    answers = ask(model, [e for e in data if e.candidates])
    captions = describe(model, data.where(split="caption").examples)

    def of(**values: str) -> list[Answered]:
        return [g for g in answers if all(getattr(g.example, k) == v for k, v in values.items())]

    figures = {
        "neutral existence": rate(of(split="neutral", kind="existence"), lambda g: g.right),
        "neutral attribute": rate(of(split="neutral", level="attribute"), lambda g: g.right),
        "neutral color": rate(of(split="neutral", kind="color"), lambda g: g.right),
        "neutral what_color": rate(of(split="neutral", kind="what_color"), lambda g: g.right),
        "neutral size": rate(of(split="neutral", kind="size"), lambda g: g.right),
        "neutral relation": rate(of(split="neutral", kind="relation"), lambda g: g.right),
    }
    for split in ("random", "popular", "adversarial"):
        absent = [g for g in of(split=split) if g.example.answer == "no"]
        figures[f"false positives {split}"] = rate(absent, lambda g: g.text == "yes")
    conflict, typical = of(split="conflict"), of(split="typical")
    figures["typical right"] = rate(typical, lambda g: g.right)
    figures["conflict wrong by prior"] = rate(conflict, lambda g: g.text == g.example.prior_answer)
    for kind in ("color", "what_color"):
        part = [g for g in conflict if g.example.kind == kind]
        figures[f"conflict wrong by prior, {kind}"] = rate(part, lambda g: g.text == g.example.prior_answer)

    def truth(g: Answered) -> set[str]:
        return {o.noun for o in g.example.objects}

    nouns = {noun: noun for noun in NOUNS}
    figures["caption recall"] = rate(
        captions, lambda g: len(truth(g) & set(mentioned_objects(g.text, nouns))) / len(truth(g))
    )
    named = [[noun not in truth(g) for noun in mentioned_objects(g.text, nouns)] for g in captions]
    figures["caption CHAIR_i"] = estimate(
        [sum(wrong) for wrong in named], [g.example.group for g in captions], [len(wrong) for wrong in named]
    )
    return figures


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(prog="python -m lvlm.tiny.evaluate", description="Measure an embedded model.")
    parser.add_argument("model", nargs="?", default="tiny", help="tiny, tiny-unbiased, or a model folder")
    parser.add_argument("--images", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=HELD_OUT_SEED)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    model = load_lvlm(options.model)
    figures = measure(model, options.images, options.seed)
    probe = scenes.dataset(200, options.seed + 1, splits=("neutral",))
    cuts = knockout(model, probe)
    console = Console()
    table = Table("figure", "value [95 %]", "n", "goal", title=f"{options.model}, held-out seed {options.seed}")
    for name, figure in figures.items():
        table.add_row(name, str(figure), str(figure.n), GOALS.get(name, ""))
    console.print(table)
    kinds = list(next(iter(cuts.values())))
    table = Table("text cut off from the image in", *kinds, title="attention knockout, accuracy on neutral questions")
    for name, row in cuts.items():
        table.add_row(name, *(f"{row[k]:.2f}" for k in kinds))
    console.print(table)
    if options.json:
        record = {"model": options.model, "seed": options.seed, "images": options.images, "knockout": cuts}
        record["figures"] = {name: asdict(figure) for name, figure in figures.items()}
        options.json.write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
