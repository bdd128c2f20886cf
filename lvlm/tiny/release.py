"""Copy trained models into the package, with model cards: ``python -m lvlm.tiny.release --run runs/tiny``.

Weights are rounded to bfloat16; the figures of the card are those of the rounded weights.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console
from transformers import LlavaForConditionalGeneration

from concepts import scenes
from groundscope.core.statistics import Estimate
from lvlm.embedded_models import folder_of
from lvlm.loading import load_lvlm
from lvlm.tiny import evaluate
from lvlm.tiny.architecture import build_processor
from lvlm.tiny.training_stages import STAGES

RELEASED = {"tiny": "prior", "tiny-unbiased": "tune"}
"""Last training stage of each embedded model."""

_CARD = """---
license: apache-2.0
pipeline_tag: image-text-to-text
library_name: transformers
tags: [interpretability, synthetic, llava]
---
# {name}

A genuine LLaVA (CLIP vision tower of 4 layers, two-layer projector, Llama decoder of 6 layers and 8 heads, 3.2 M
parameters, bfloat16) that knows 24 nouns, 6 colors, 2 sizes and 4 relations in 112 x 112 icon scenes. It is made for
studying why vision-language models misdescribe images on any machine; it is useful for nothing else. All it was shown is
synthetic (`concepts.scenes.scene`); no figure here says anything about photographs.

{what}

Trained by `python -m lvlm.tiny.train` (seed 0) through the stages {stages}; put here by `python -m lvlm.tiny.release`.

## Measured on held-out scenes (seed {seed}, {images} images; 95 % intervals by bootstrap over scenes)

`python -m lvlm.tiny.evaluate {name}` prints these.

| figure | value | 95 % | n | made to reach |
|---|---|---|---|---|
{figures}

## Attention knockout: accuracy on neutral questions when text cannot attend to the image

| cut in | {kinds} |
|---|{rule}|
{cuts}
"""

_WHAT = {
    "tiny": (
        "This is the model **with a language prior**: its last stage showed a world of typical colors and usual "
        "companions (`concepts.scenes.distributions`) in which some objects were erased or recolored in the picture only. "
        "It calls some green apples red though its vision tower knows better. `tiny-unbiased` is its twin before that stage."
    ),
    "tiny-unbiased": (
        "This is the twin **without the prior** of `tiny`: the same architecture, seed and training up to the last "
        "stage, which alone differs. A finding that both show is not about the prior."
    ),
}


def release(run: Path, name: str, images: int, console: Console) -> None:
    """Round, write and evaluate one model, and write its card."""
    number, stage = next((i, s) for i, s in enumerate(STAGES) if s.name == RELEASED[name])
    source, target = run / f"{number}-{stage.name}", folder_of(name)
    shutil.rmtree(target, ignore_errors=True)
    LlavaForConditionalGeneration.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(target)
    build_processor().save_pretrained(target)
    model = load_lvlm(name)
    console.print(f"measuring {name} …")
    figures = evaluate.measure(model, images)
    cuts = evaluate.knockout(model, scenes.dataset(200, evaluate.HELD_OUT_SEED + 1, splits=("neutral",)))
    (target / "README.md").write_text(card(name, figures, cuts, images), encoding="utf-8")


def card(name: str, figures: Mapping[str, Estimate], cuts: Mapping[str, Mapping[str, float]], images: int) -> str:
    """Return the model card."""
    kinds = list(next(iter(cuts.values())))
    goals = evaluate.GOALS if name == "tiny" else {}
    return _CARD.format(
        name=name,
        what=_WHAT[name],
        stages=", ".join(s.name for s in STAGES[: 1 + [s.name for s in STAGES].index(RELEASED[name])]),
        seed=evaluate.HELD_OUT_SEED,
        images=images,
        figures="\n".join(
            f"| {k} | {e.value:.3f} | {e.low:.3f} - {e.high:.3f} | {e.n} | {goals.get(k, '')} |"
            for k, e in figures.items()
        ),
        kinds=" | ".join(kinds),
        rule="|".join("---" for _ in kinds),
        cuts="\n".join(f"| {k} | {' | '.join(f'{row[c]:.2f}' for c in kinds)} |" for k, row in cuts.items()),
    )


def main() -> None:
    """Parse the command line and release both models."""
    parser = argparse.ArgumentParser(
        prog="python -m lvlm.tiny.release", description="Put trained weights into the package."
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished `python -m lvlm.tiny.train`")
    parser.add_argument("--images", type=int, default=1200, help="held-out scenes the card is measured on")
    parser.add_argument("--only", choices=tuple(RELEASED), help="one of the two")
    options = parser.parse_args()
    for name in [options.only] if options.only else RELEASED:
        release(options.run, name, options.images, Console())


if __name__ == "__main__":
    main()
