"""Peak memory, in addition to the weights, of every step on a model of the width of LLaVA-1.5-7B.

    python benchmarks/real_width.py [--quick] [--save] [--dtype bfloat16] [--device cpu] [--tower 24] [--steps load,trace,…]

The model is a random LLaVA-1.5-7B (decoder width 4096, 32 heads, MLP width 11008, 32,000 words; CLIP-L at 336 pixels: 576
image tokens, 595 tokens in all) with 2 and with 4 decoder layers. Each step runs in a separate process, whose peak memory is
read from the operating system (on a GPU, from torch), for all steps except ``load`` counted from the end of loading. The part
that grows with the number of layers is extrapolated to 32. Most of the time is spent in the vision tower, whose memory is not
in question: ``--tower 2`` gives it two layers. ``--quick`` uses width 1024, 8 heads and MLP width 2816. With ``--save``
figures are written after each step. Figures:

STEP_2_layers_gb, STEP_4_layers_gb
    measured gigabytes in addition to the weights;
STEP_32_layers_gb
    the extrapolation; goal: at most 2 GB.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._harness import (
    Figure,
    describe_device,
    figure,
    option_parser,
    progress,
    save_record,
    wide_console,
)
from lvlm.tiny.architecture import IMAGE, build_tokenizer, vocabulary

STEPS = ("load", "trace", "patch", "ablate", "steer", "diagnose")
FULL_LAYERS = 32
"""Decoder layers of LLaVA-1.5-7B, to which memory is extrapolated."""
MAX_GB = 2.0
"""Goal: gigabytes of a step in addition to the weights."""
IMAGE_SIZE, PATCH_SIZE = 336, 14


def write_model(folder: Path, layers: int, dtype: str, tower: int, *, quick: bool) -> None:
    """Write a random LLaVA with `layers` decoder layers and `tower` vision layers, and its processor."""
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
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
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
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
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
    pictures = CLIPImageProcessorPil(
        do_resize=True, size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, do_center_crop=False
    )
    LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
    ).save_pretrained(folder)
    del model
    gc.collect()


def run_step(step: str, folder: Path, dtype: str, device: str) -> dict[str, int]:
    """Run a step in a separate process; return its memory in bytes and the number of tokens."""
    script = Path(__file__).with_name("_real_width_run.py")
    command = [sys.executable, str(script), step, str(folder), dtype, device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        msg = f"the step '{step}' failed:\n{done.stderr[-3000:]}"
        raise RuntimeError(msg)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Run, print a table, and as the last line one JSON object."""
    parser = option_parser(
        __doc__, quick="a narrow model", save=True, device=True, dtypes=("bfloat16", "float16", "float32")
    )
    parser.add_argument("--tower", type=int, default=24, help="layers of the vision tower (default: 24)")
    parser.add_argument("--steps", default=",".join(STEPS), help="steps to run, separated by commas (default: all)")
    parser.add_argument("--layers", default="2,4", help="two numbers of decoder layers to extrapolate from")
    options = parser.parse_args()
    steps = options.steps.split(",")
    if unknown := set(steps) - set(STEPS):
        parser.error(f"unknown step {', '.join(sorted(unknown))}; choose from {', '.join(STEPS)}")
    layers = tuple(int(number) for number in options.layers.split(","))
    memory: dict[str, list[dict[str, int]]] = {}
    record: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / str(number) for number in layers]
        for number, folder in zip(layers, folders, strict=True):
            # In a separate process: its memory must not remain allocated while steps are measured.
            arguments = f"{number}, {options.dtype!r}, {options.tower}, quick={options.quick}"
            code = f"from benchmarks.real_width import *; write_model(Path({str(folder)!r}), {arguments})"
            with progress(f"writing a model of {number} layers"):
                subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
        for step in steps:
            with progress(step, len(folders)) as advance:
                memory[step] = []
                for folder in folders:
                    memory[step].append(run_step(step, folder, options.dtype, options.device))
                    advance()
            record = make_record(memory, layers, options)
            if options.save:
                save_record(record)
    title = f"peak memory in addition to the weights; {FULL_LAYERS} layers are extrapolated from {options.layers}"
    table = Table("step", *(f"{number} layers" for number in (*layers, FULL_LAYERS)), "goal", title=title)
    for step in steps:
        entries = [record["figures"][f"{step}_{number}_layers_gb"] for number in (*layers, FULL_LAYERS)]
        table.add_row(step, *(f"{entry['value']:.2f} GB" for entry in entries), entries[-1]["goal"])
    wide_console().print(table)
    print(json.dumps(record))


def make_record(
    memory: dict[str, list[dict[str, int]]], layers: tuple[int, ...], options: argparse.Namespace
) -> dict[str, Any]:
    """Return the record of the steps that have run."""
    figures: dict[str, Figure] = {}
    for step, runs in memory.items():
        gigabytes = [(run["peak"] - run["weights"]) / 1e9 for run in runs]
        # Memory-mapped pages of the weights can be dropped at any time, so that fewer layers may seem to need more memory.
        growth = max(0.0, gigabytes[1] - gigabytes[0]) / (layers[1] - layers[0])
        for number, value in zip(layers, gigabytes, strict=True):
            figures[f"{step}_{number}_layers_gb"] = figure(value)
        full = max(gigabytes) + growth * (FULL_LAYERS - layers[1])
        figures[f"{step}_{FULL_LAYERS}_layers_gb"] = figure(full, f"<= {MAX_GB:g} GB")
    return {
        "benchmark": "real_width",
        "device": describe_device("torch", device=options.device),
        "dtype": options.dtype,
        "width": 1024 if options.quick else 4096,
        "tokens": next(iter(memory.values()))[0]["tokens"],
        "tower_layers": options.tower,
        "figures": figures,
    }


if __name__ == "__main__":
    main()
