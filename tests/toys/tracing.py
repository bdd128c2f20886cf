"""Activations of the embedded architecture by plain torch hooks, and examples to trace."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from concepts import ConceptDataset, Example
from concepts.scenes.questions import as_example, existence
from concepts.scenes.scene import TEST, generator, sample_scene
from lvlm import Lvlm
from lvlm.active_interventions import mark_observer

LAYERS, VISION_LAYERS, PATCH, COLUMNS = 6, 4, 16, 7

COMPONENTS = ("resid_pre", "q", "k", "v", "z", "attn_out", "resid_mid", "mlp_out", "resid_post")

DECODER = "model.language_model.layers.{}"

VISION = "model.vision_tower.encoder.layers.{}"

# Where the components are in the Hugging Face classes, written down independently of the library's own table.
DECODER_AT = {
    "resid_pre": ("", "in"),
    "q": (".self_attn.q_proj", "out"),
    "k": (".self_attn.k_proj", "out"),
    "v": (".self_attn.v_proj", "out"),
    "z": (".self_attn.o_proj", "in"),
    "attn_out": (".self_attn", "out"),
    "resid_mid": (".post_attention_layernorm", "in"),
    "mlp_out": (".mlp", "out"),
    "resid_post": ("", "out"),
}

VISION_AT = {**DECODER_AT, "z": (".self_attn.out_proj", "in"), "resid_mid": (".layer_norm2", "in")}


def of_one_length(n: int = 6) -> ConceptDataset:
    """Questions of one token length about objects of several sizes; every third is about what is not there."""
    examples = []
    for i in range(n):
        scene = sample_scene(generator(TEST, 7, i), f"s{i}", count=3)
        absent = next(noun for noun in ("apple", "tree", "key", "bell") if scene.get(noun) is None)
        noun = absent if i % 3 == 2 else scene.objects[i % 2].noun
        examples.append(as_example(scene, existence(scene, noun), "neutral"))
    return ConceptDataset("one-length", tuple(examples))


@contextmanager
def hooked(model: Lvlm, see: Callable[[], None]) -> Iterator[None]:
    """Call something at the start of every forward of the whole model."""
    handle = model.hf.register_forward_pre_hook(mark_observer(lambda *_: see()))
    try:
        yield
    finally:
        handle.remove()


def has_sealed_shard(folder: Path, passes: int) -> bool:
    """Whether a store that is being written has a sealed shard; in the second chunk, its writer has time to seal the first."""
    end = time.monotonic() + (5 if passes > 24 else 0)
    while not any(folder.glob("shard-?-?????.h5")):
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


@contextmanager
def counted(model: Lvlm) -> Iterator[list[int]]:
    count: list[int] = []
    with hooked(model, lambda: count.append(1)):
        yield count


def raw(model: Lvlm, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every tensor of a forward, by plain torch hooks: ``decoder.L3.z`` -> [B, T, D]."""
    record: dict[str, torch.Tensor] = {}
    modules = dict(model.hf.named_modules())
    handles = []

    def listen(name: str, path: str, side: str) -> None:
        def after(_module: Any, _args: Any, output: Any) -> None:
            record[name] = (output[0] if isinstance(output, tuple) else output).clone()

        def before(_module: Any, args: Any, kwargs: Any) -> None:
            record[name] = (args[0] if args else kwargs["hidden_states"]).clone()

        module = modules[path]
        handles.append(
            module.register_forward_hook(after)
            if side == "out"
            else module.register_forward_pre_hook(before, with_kwargs=True)
        )

    for component in COMPONENTS:
        for n in range(LAYERS):
            path, side = DECODER_AT[component]
            listen(f"decoder.L{n}.{component}", DECODER.format(n) + path, side)
        for n in range(VISION_LAYERS):
            path, side = VISION_AT[component]
            listen(f"vision.L{n}.{component}", VISION.format(n) + path, side)
    listen("projector.out", "model.multi_modal_projector", "out")
    try:
        with torch.no_grad():
            model.hf(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return record


def patches_of(example: Example) -> list[int]:
    """The patches of the object asked about, by counting pixels."""
    thing = example.named_object()
    if thing is None:
        return []
    b = thing.require_box()
    counts = np.zeros(COLUMNS * COLUMNS)
    for y in range(int(b.y0), int(b.y1)):
        for x in range(int(b.x0), int(b.x1)):
            counts[y // PATCH * COLUMNS + x // PATCH] += 1
    inside = [int(i) for i in np.flatnonzero(counts >= 0.25 * PATCH**2)]
    return inside or [int(counts.argmax())]


def assert_same_bytes(first: Path, second: Path) -> None:
    files = sorted(p.name for p in first.iterdir())
    assert files == sorted(p.name for p in second.iterdir())
    assert "manifest.json" in files
    for name in files:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
