"""Untrained models with weights large enough that heads differ, and pairs of pictures to show them."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from concepts.counterfactual_pair import CounterfactualPair
from concepts.counterfactuals import pairs as counterfactual_pairs
from concepts.scenes import questions
from concepts.scenes.scene import TEST, generator, sample_scene
from concepts.schema import ConceptDataset, Example
from lvlm import wrap_lvlm
from lvlm.model import Lvlm
from lvlm.tiny.architecture import build_model, build_processor


def random_model(seed: int = 0, gain: float = 4.0) -> Lvlm:
    """Return a random model whose linear maps are larger than at initialisation, so that images change its answers.

    Query and key weights are drawn again, small: enlarged initial weights would make every token attend to itself alone.
    """
    hf = build_model(seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in hf.model.language_model.layers:
            for maps in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                maps.weight.copy_(torch.randn(maps.weight.shape, generator=draw) * 0.02)
        for module in hf.modules():
            if isinstance(module, nn.Linear):
                module.weight *= gain
    return wrap_lvlm(hf, build_processor(), name="random")


@cache
def shared_model() -> Lvlm:
    """Return one random model that no test may change."""
    return random_model()


@cache
def examples(count: int = 8) -> tuple[Example, ...]:
    """Return questions of unlike kinds and lengths about different scenes."""
    dataset = []
    for i in range(count):
        scene = sample_scene(generator(TEST, 77, i), f"scene{i}", nouns=["apple", "car", "dog"])
        apple = scene.objects[0]
        question = (
            questions.what_color(scene, apple),
            questions.color(scene, apple, apple.attributes["color"]),
            questions.existence(scene, "car"),
            questions.existence(scene, "umbrella"),
        )[i % 4]
        dataset.append(questions.as_example(scene, question, "neutral"))
    return tuple(dataset)


def data(count: int = 8) -> ConceptDataset:
    return ConceptDataset("toys", examples(count))


@cache
def pairs(kind: str, count: int = 8) -> tuple[CounterfactualPair, ...]:
    return tuple(counterfactual_pairs(data(count), kind=kind))


def hooks_of(model: Lvlm) -> int:
    """Count the hooks on a model, without those that transformers adds to record outputs."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    hooks = [hook for module in model.hf.modules() for kind in kinds for hook in getattr(module, kind).values()]
    return sum(not getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks)


def layers_of(model: Lvlm) -> Any:
    return model.hf.model.language_model.layers


@torch.no_grad()
def capture(model: Lvlm, inputs: Any) -> dict[str, Any]:
    """One plain forward of one example: z, attn_out, mlp_out and resid_post of every layer, float64 ``[L, T, d]``."""
    record: dict[str, list[torch.Tensor]] = {"z": [], "attn_out": [], "mlp_out": [], "resid_post": []}

    def keep(name: str) -> Any:
        def hook(_m: Any, args: Any, out: Any) -> None:
            record[name].append((args[0] if name == "z" else out)[0].double())

        return hook

    hooks = []
    for layer in layers_of(model):
        modules = {"z": layer.self_attn.o_proj, "attn_out": layer.self_attn.o_proj, "mlp_out": layer.mlp}
        hooks += [m.register_forward_hook(keep(name)) for name, m in {**modules, "resid_post": layer}.items()]
    try:
        model.hf(**inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.stack(values).numpy() for name, values in record.items()}
