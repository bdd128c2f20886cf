"""A tiny random model of every family, with a processor that needs Pillow only."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from toys_packed import glm4v, mistral3, qwen2_5_vl, qwen2_vl, qwen3_vl
from toys_queries import blip2_llama, blip2_opt, florence2, instructblip_llama, instructblip_t5, kosmos2
from toys_single import chameleon, deepseek_vl, gemma3, janus, llava, paligemma, paligemma2
from toys_tiled import idefics3, internvl, llama4, llava_next, llava_onevision, mllama, smolvlm

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
    """Return a family's model, with weights that matter, and its processor."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, processor = BUILDERS[name]()
        with torch.no_grad():
            for parameter in model.parameters():
                # At initialisation gates are closed, biases nothing and norms the same everywhere: errors would not show.
                parameter.add_(torch.randn_like(parameter) * (0.05 if parameter.ndim > 1 else 0.2))
    return model.eval(), processor
