"""What tracing costs: a traced forward, written to HDF5, against the plain forward of the same inputs.

The model is a random LLaVA of middle size (hidden 512, 16 layers, 8 heads; 256 image and 32 text tokens, batch 8, scaled
dot product attention). Baseline and candidate are two copies of it, so that the baseline has never met nnsight. They
take turns, in alternating order; the figure is the median of the ratios of each turn. The candidate's time holds
everything that comes after encoding: forward, selection, table, writing, sealing, syncing.

The fixed cost of a trace is measured on the architecture of the embedded model, one example and one site. TransformerLens'
`run_with_cache` of the same sites and inputs, kept in memory and not written, is measured for comparison: it computes attention
step by step. Memory is the peak of a process that traces ten times as many examples, over that of one that does not.

    python benchmarks/trace.py [--quick] [--device cuda] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.console import Console
from rich.table import Table
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from activation_store import StoreWriter
from activation_store.tracing.plan import make_plan
from activation_store.tracing.tracer import Tracer
from concepts import ConceptDataset
from concepts.scenes.questions import as_example
from concepts.scenes.scene import TEST, generator, sample_scene
from concepts.schema import YES_NO, Question
from lvlm import Lvlm, wrap_lvlm
from lvlm.tiny.architecture import IMAGE, build_model, build_processor, build_tokenizer, vocabulary
from lvlm.transformer_lens import as_transformer_lens

SITES = ["resid_post", "z"]
TOKENS = ["last", "image:mean", "question:mean"]
BATCH = 8
TEXT = f"Is there a big cat {'or a dog ' * 6}in the image?"  # 32 text tokens with the template's own
GOALS = {"overhead_vs_plain": 1.11, "fixed_cost_ms": 2.0, "peak_memory_10x": 1.10}
PEAK = Path(__file__).resolve().parent / "_trace_memory.py"


def middle_model() -> LlavaForConditionalGeneration:
    """Build the model with random weights."""
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=6,
            num_attention_heads=4,
            image_size=224,
            patch_size=14,
            projection_dim=256,
        ),
        text_config=LlamaConfig(
            vocab_size=8192,
            hidden_size=512,
            intermediate_size=1376,
            num_hidden_layers=16,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=512,
        ),
        image_token_index=vocabulary().index(IMAGE),
        vision_feature_layer=-1,
        image_seq_length=256,
    )
    return LlavaForConditionalGeneration(config).eval()


def middle_processor() -> LlavaProcessor:
    """Build its processor; Pillow and numpy only."""
    pictures = CLIPImageProcessorPil(do_resize=True, size={"height": 224, "width": 224}, do_center_crop=False)
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 512
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
    )


def questions(count: int, text: str = TEXT) -> ConceptDataset:
    """Draw images and ask the same question about each."""
    scenes = [sample_scene(generator(TEST, 0, i), f"b{i}") for i in range(count)]
    question = Question(text, "yes", YES_NO, "object", "existence")
    return ConceptDataset("benchmark", tuple(as_example(scene, question, "neutral") for scene in scenes))


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Time a piece of work to its end on the device."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def alternate(
    baseline: Callable[[], object], candidate: Callable[[], object], n: int, device: torch.device
) -> list[tuple[float, float]]:
    """Time both in turn, each going first every other time, after one turn to warm up."""
    pairs = []
    for turn in range(n + 1):
        if turn % 2:
            traced, plain = seconds(candidate, device), seconds(baseline, device)
        else:
            plain, traced = seconds(baseline, device), seconds(candidate, device)
        pairs.append((plain, traced))
    return pairs[1:]


def overhead(n: int, batches: int, device: str, dtype: torch.dtype) -> tuple[list[tuple[float, float]], Lvlm, int]:
    """Time traced, written forwards against plain ones."""
    network: Any = middle_model()
    network.to(device, dtype)
    plain = wrap_lvlm(copy.deepcopy(network), middle_processor(), validate=False)
    traced = wrap_lvlm(network, middle_processor(), validate=False)
    data = questions(BATCH * batches)
    encoded = list(traced.batches(data.examples, BATCH))
    plan = make_plan(traced, encoded[0].encodings[0], SITES, TOKENS, "float32")
    tracer = Tracer.begin(traced, data, plan, BATCH, answers=True)

    def baseline() -> None:
        for batch in encoded:
            plain.logits(batch.inputs)

    def candidate() -> None:
        with tempfile.TemporaryDirectory() as folder, StoreWriter(folder, plan.schema, {}) as writer:
            for batch in encoded:
                writer.append(*tracer.batch(batch))

    pairs = alternate(baseline, candidate, n, traced.device)
    return pairs, traced, encoded[0].encodings[0].tokens.length


def fixed_cost(n: int) -> list[tuple[float, float]]:
    """Time a trace of one site of a small model on one example against its plain forward."""
    network = build_model()
    plain = wrap_lvlm(copy.deepcopy(network), build_processor(), validate=False)
    traced = wrap_lvlm(network, build_processor(), validate=False)
    data = questions(1, "Is there a cat in the image?")
    batch = next(traced.batches(data.examples, 1))
    plan = make_plan(traced, batch.encodings[0], ["decoder.L5.resid_post"], ["last"], "float32")
    tracer = Tracer.begin(traced, data, plan, 1, answers=True)
    return alternate(lambda: plain.logits(batch.inputs), lambda: tracer.forward(batch), n, traced.device)


def transformer_lens(n: int, device: str, dtype: torch.dtype) -> list[tuple[float, float]]:
    """Time TransformerLens' run_with_cache of the decoder's sites on one batch against the plain forward."""
    network: Any = middle_model()
    network.to(device, dtype)
    plain = wrap_lvlm(network, middle_processor(), validate=False)
    bridge = as_transformer_lens(plain)
    batch = next(plain.batches(questions(BATCH).examples, BATCH))
    inputs = dict(batch.inputs)
    ids = inputs.pop("input_ids")

    def is_traced(name: str) -> bool:
        return name.endswith(("hook_resid_post", "attn.hook_z")) and name.startswith("blocks.")

    def run() -> None:
        with torch.no_grad():
            bridge.run_with_cache(ids, names_filter=is_traced, **inputs)

    return alternate(lambda: plain.logits(batch.inputs), run, n, plain.device)


def peak_memory(examples: int) -> float:
    """Return the peak resident memory, in MiB, of a process that traces so many examples."""
    done = subprocess.run([sys.executable, str(PEAK), str(examples)], capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    """Run, print a table, and as the last line one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repetitions, about a minute")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    options = parser.parse_args()
    console = Console()
    console.print(
        "Compares tracing (nnsight, selection on the device, HDF5 written and synced) with the plain forward of the same "
        "inputs; fixed cost: tracing without writing, of a small model."
    )
    n, batches, small = (3, 1, 20) if options.quick else (9, 4, 100)
    with console.status("middle-sized LLaVA") if console.is_terminal else tempfile.TemporaryDirectory():
        pairs, model, length = overhead(n, batches, options.device, getattr(torch, options.dtype))
        fixed = fixed_cost(small)
        lens = transformer_lens(n, options.device, getattr(torch, options.dtype))
        few = 64 if options.quick else 128
        peaks = [peak_memory(few), peak_memory(10 * few)]
    ratio = statistics.median(traced / plain for plain, traced in pairs)
    cost = statistics.median(1000 * (traced - plain) for plain, traced in fixed)
    figures = {
        "overhead_vs_plain": {"value": round(ratio, 3), "n": n},
        "fixed_cost_ms": {"value": round(cost, 2), "n": small},
    }
    theirs = statistics.median(cached / plain for plain, cached in lens)
    grown = {"value": round(peaks[1] / peaks[0], 3), "n": 1, "goal": f"<= {GOALS['peak_memory_10x']}"}
    grown["holds"] = grown["value"] <= GOALS["peak_memory_10x"]
    table = Table("figure", "plain", "traced", "value", "goal", "holds", "n")
    for (name, figure), times in zip(figures.items(), (pairs, fixed), strict=True):
        figure |= {"goal": f"<= {GOALS[name]}", "holds": figure["value"] <= GOALS[name]}
        plain, traced = (statistics.median(column) * 1000 for column in zip(*times, strict=True))
        row = (f"{plain:.1f} ms", f"{traced:.1f} ms", figure["value"], figure["goal"], figure["holds"], figure["n"])
        table.add_row(name, *map(str, row))
    times = [f"{statistics.median(column) * 1000:.1f} ms" for column in zip(*lens, strict=True)]
    table.add_row("transformer_lens_vs_plain", *times, f"{theirs:.3f}", "", "", str(n))
    table.add_row(
        "peak_memory_10x", *(f"{p:.0f} MiB" for p in peaks), *(str(grown[k]) for k in ("value", "goal", "holds", "n"))
    )
    figures["transformer_lens_vs_plain"] = {"value": round(theirs, 3), "n": n, "goal": "", "holds": True}
    figures["peak_memory_10x"] = grown
    console.print(table)
    cuda = options.device.startswith("cuda")
    where = torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {torch.get_num_threads()} threads"
    console.print(f"{model!r}: {batches} batches of {BATCH} x {length} tokens a turn, {', '.join(SITES)} at {TOKENS}")
    device = f"{where}, {options.dtype}, torch {torch.__version__}"
    print(json.dumps({"benchmark": "trace", "device": device, "figures": figures}))


if __name__ == "__main__":
    main()
