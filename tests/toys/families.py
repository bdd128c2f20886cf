"""A tiny random model of every family, with a processor that needs Pillow only."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from lvlm import Lvlm, wrap_lvlm
from tests.toys.native_resolution_families import glm4v, mistral3, qwen2_5_vl, qwen2_vl, qwen3_vl
from tests.toys.query_families import blip2_llama, blip2_opt, florence2, instructblip_llama, instructblip_t5, kosmos2
from tests.toys.single_view_families import chameleon, deepseek_vl, gemma3, janus, llava, paligemma, paligemma2
from tests.toys.tiled_families import idefics3, internvl, llama4, llava_next, llava_onevision, mllama, smolvlm

BUILDERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    f.__name__: f
    for f in (
        llava,
        llava_next,
        llava_onevision,
        qwen2_vl,
        qwen2_5_vl,
        qwen3_vl,
        glm4v,
        idefics3,
        smolvlm,
        internvl,
        paligemma,
        paligemma2,
        gemma3,
        mllama,
        blip2_opt,
        blip2_llama,
        instructblip_llama,
        instructblip_t5,
        deepseek_vl,
        janus,
        kosmos2,
        florence2,
        chameleon,
        llama4,
        mistral3,
    )
}


@cache
def build(name: str) -> tuple[Any, Any]:
    """Return a family's model, with weights that matter, and its processor; every caller is given the same one."""
    return build_new(name)


def build_new(name: str) -> tuple[Any, Any]:
    """Return what `build` returns, as objects that no other test has: for tests that replace a module's ``forward``."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, processor = BUILDERS[name]()
        with torch.no_grad():
            for parameter in model.parameters():
                # At initialisation gates are closed, biases nothing and norms the same everywhere: errors would not show.
                parameter.add_(torch.randn_like(parameter) * (0.05 if parameter.ndim > 1 else 0.2))
    return model.eval(), processor


L, VT = "model.language_model.layers", "model.vision_tower.encoder.layers"

CLIP = (VT, "self_attn.out_proj")

# Where layers and output projections are in the Hugging Face classes, written down independently of the library.
WHERE: dict[str, tuple[str, str, str, str]] = {
    **dict.fromkeys(("llava", "llava_next", "llava_onevision"), (L, "self_attn.o_proj", *CLIP)),
    **dict.fromkeys(("paligemma", "paligemma2", "gemma3"), (L, "self_attn.o_proj", *CLIP)),
    **dict.fromkeys(
        ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"), (L, "self_attn.o_proj", "model.visual.blocks", "attn.proj")
    ),
    **dict.fromkeys(
        ("idefics3", "smolvlm"),
        ("model.text_model.layers", "self_attn.o_proj", "model.vision_model.encoder.layers", "self_attn.out_proj"),
    ),
    "internvl": (L, "self_attn.o_proj", "model.vision_tower.encoder.layer", "attention.projection_layer"),
    "mllama": (L, "self_attn.o_proj", "model.vision_model.transformer.layers", "self_attn.o_proj"),
    "blip2_opt": (
        "language_model.model.decoder.layers",
        "self_attn.out_proj",
        "vision_model.encoder.layers",
        "self_attn.projection",
    ),
    **dict.fromkeys(
        ("blip2_llama", "instructblip_llama"),
        ("language_model.model.layers", "self_attn.o_proj", "vision_model.encoder.layers", "self_attn.projection"),
    ),
    "instructblip_t5": (
        "language_model.decoder.block",
        "layer.0.SelfAttention.o",
        "vision_model.encoder.layers",
        "self_attn.projection",
    ),
    "deepseek_vl": (L, "self_attn.o_proj", "model.vision_model.encoder.layers", "self_attn.out_proj"),
    "janus": (L, "self_attn.o_proj", "model.vision_model.encoder.layers", "self_attn.projection_layer"),
    "kosmos2": (
        "text_model.model.layers",
        "self_attn.out_proj",
        "vision_model.model.encoder.layers",
        "self_attn.out_proj",
    ),
    "florence2": ("model.language_model.decoder.layers", "self_attn.out_proj", "", ""),
    "chameleon": ("model.layers", "self_attn.o_proj", "", ""),
    "llama4": ("language_model.model.layers", "self_attn.o_proj", "vision_model.model.layers", "self_attn.o_proj"),
    "mistral3": (L, "self_attn.o_proj", "model.vision_tower.transformer.layers", "attention.o_proj"),
}

LENS = "llava llava_next llava_onevision qwen2_5_vl qwen3_vl glm4v idefics3 gemma3 llama4 mistral3".split()
"""Families of which tests/lvlm/test_transformer_lens.py shows that TransformerLens sees the same."""

FAMILY = pytest.mark.parametrize("family", list(BUILDERS))


@cache
def model(family: str) -> Lvlm:
    return wrap_lvlm(*build(family), name=family, validate=False)


def at(root: Any, path: str) -> Any:
    for part in path.split("."):
        root = root[int(part)] if part.isdigit() else getattr(root, part)
    return root


def raw(family: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Residual streams and head outputs of a forward, by plain torch hooks."""
    record: dict[str, torch.Tensor] = {}
    handles = []
    lvlm = model(family)
    decoder, o, vision, vo = WHERE[family]
    for stack, path, projection in (("decoder", decoder, o), ("vision", vision, vo)):
        for n, layer in enumerate(at(lvlm.hf, path) if path else ()):

            def after(_m: Any, _a: Any, out: Any, name: str = f"{stack}.L{n}.resid_post") -> None:
                record[name] = (out[0] if isinstance(out, tuple) else out).clone()

            def before(_m: Any, args: Any, name: str = f"{stack}.L{n}.z") -> None:
                record[name] = args[0].clone()

            handles.append(layer.register_forward_hook(after))
            if family != "mllama" or hasattr(layer, "self_attn"):
                handles.append(at(layer, projection).register_forward_pre_hook(before))
    try:
        with torch.no_grad():
            record["logits"] = lvlm.hf(**inputs, use_cache=False).logits[:, -1]
    finally:
        for handle in handles:
            handle.remove()
    return record


PLACED = [
    f for f in BUILDERS if f not in {"mllama", "florence2"} and "blip" not in f and f not in {"kosmos2", "chameleon"}
]
