"""Memory that work on a model of real width takes in addition to its weights.

    python benchmarks/real_width.py [--quick] [--save] [--dtype bfloat16] [--device cpu] [--tower 24] [--steps load,trace,…]

A random LLaVA-1.5-7B (decoder of width 4096, 32 heads, MLP 11008, 32,000 words; CLIP-L at 336 pixels: 576 image tokens, 595
in all) is cut to 2 and to 4 decoder layers. Each step runs in a separate process, and the peak of its memory is read from
the system; for steps after loading, from then on. What grows with layers is extrapolated to 32; the goal is that no step takes
more than 2 GB in addition to the weights. The vision tower takes most of the time and is not measured: ``--tower 2``
leaves it two layers. ``--quick`` takes width 1024, 8 heads, MLP 2816. With
``--save`` the figures are written after each step.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lvlm.tiny.architecture import IMAGE, build_tokenizer, vocabulary

RESULTS = Path(__file__).parent / "results" / "real_width.json"
STEPS = ("load", "trace", "patch", "ablate", "steer", "diagnose")
WHOLE = 32
ALLOWED = 2.0
"""Gigabytes that a step may take in addition to the weights."""
SIDE, PATCH = 336, 14


def write_model(folder: Path, layers: int, dtype: str, tower: int, *, quick: bool) -> None:
    """Write a random LLaVA of so many decoder and vision layers, with its processor."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    width, heads, inner = (1024, 8, 2816) if quick else (4096, 32, 11008)
    words = vocabulary()
    special: dict[str, Any] = {
        f"{name}_token_id": words.index(token) for name, token in (("bos", "<s>"), ("eos", "</s>"), ("pad", "<pad>"))
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=tower,
            num_attention_heads=16,
            image_size=SIDE,
            patch_size=PATCH,
            projection_dim=768,
        ),
        text_config=LlamaConfig(
            vocab_size=32000,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            **special,
        ),
        image_token_index=words.index(IMAGE),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(SIDE // PATCH) ** 2,
        tie_word_embeddings=False,
        **special,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder)
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 4096
    pictures = CLIPImageProcessorPil(do_resize=True, size={"height": SIDE, "width": SIDE}, do_center_crop=False)
    LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
    ).save_pretrained(folder)
    del model
    gc.collect()


def run(step: str, folder: Path, dtype: str, device: str) -> dict[str, int]:
    """Run a step in a separate process; return its figures in bytes."""
    command = [sys.executable, str(Path(__file__).with_name("_real_width_run.py")), step, str(folder), dtype, device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        message = f"{step} failed:\n{done.stderr[-3000:]}"
        raise RuntimeError(message)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Run, print a table and one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--save", action="store_true", help="write the figures to benchmarks/results")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tower", type=int, default=24, help="layers of the vision tower; its weights are not counted")
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument(
        "--layers", default="2,4", help="two numbers of decoder layers, from which the whole is extrapolated"
    )
    options = parser.parse_args()
    steps = options.steps.split(",")
    numbers = tuple(int(number) for number in options.layers.split(","))
    figures_by_step: dict[str, list[dict[str, int]]] = {}
    outcome: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        folders = [Path(place) / str(layers) for layers in numbers]
        for layers, folder in zip(numbers, folders, strict=True):
            # In a separate process: its memory must not remain allocated while steps are measured.
            call = f"write_model(Path({str(folder)!r}), {layers}, {options.dtype!r}, {options.tower}, quick={options.quick})"
            code = f"from benchmarks.real_width import *; {call}"
            subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
        for step in steps:
            figures_by_step[step] = [run(step, folder, options.dtype, options.device) for folder in folders]
            outcome = outcome_of(figures_by_step, numbers, options)
            if options.save:
                RESULTS.write_text(json.dumps(outcome, indent=4) + "\n")
    table = Table("step", *(f"{layers} layers" for layers in (*numbers, WHOLE)), "goal")
    for step in steps:
        figures = [outcome["figures"][f"{step}_{layers}_layers_gb"] for layers in (*numbers, WHOLE)]
        table.add_row(step, *(f"{figure['value']:.2f} GB" for figure in figures), figures[-1]["goal"])
    Console().print(
        f"peak memory in addition to the weights; {WHOLE} layers are extrapolated from {numbers[0]} and {numbers[1]}"
    )
    Console().print(table)
    print(json.dumps(outcome))


def outcome_of(
    figures_by_step: dict[str, list[dict[str, int]]], numbers: tuple[int, ...], options: argparse.Namespace
) -> dict[str, Any]:
    """Return the figures of the steps that have run."""
    figures: dict[str, dict[str, Any]] = {}
    for step, runs in figures_by_step.items():
        additional = [(step_run["peak"] - step_run["weights"]) / 1e9 for step_run in runs]
        growth = max(0.0, additional[1] - additional[0]) / (
            numbers[1] - numbers[0]
        )  # pages of the file may come and go
        whole = max(additional) + growth * (WHOLE - numbers[1])
        for layers, value in zip(numbers, additional, strict=True):
            figures[f"{step}_{layers}_layers_gb"] = {"value": round(value, 3), "goal": "", "holds": True, "n": 1}
        figures[f"{step}_{WHOLE}_layers_gb"] = {
            "value": round(whole, 3),
            "goal": f"<= {ALLOWED:g} GB",
            "holds": whole <= ALLOWED,
            "n": 1,
        }
    return {
        "benchmark": "real_width",
        "device": platform.machine() if options.device == "cpu" else options.device,
        "torch": torch.__version__,
        "dtype": options.dtype,
        "width": 1024 if options.quick else 4096,
        "tokens": next(iter(figures_by_step.values()))[0]["tokens"],
        "tower_layers": options.tower,
        "figures": figures,
    }


if __name__ == "__main__":
    main()
