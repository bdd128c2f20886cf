"""Edges of a decoder by whole forwards and plain torch hooks, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any

import numpy as np
import torch
import transformers as hf
from torch import Tensor, nn

from circuits.results.graph import Graph, Shape
from concepts.counterfactual_pair import CounterfactualPair
from concepts.schema import Example
from lvlm import FamilySpec, Lvlm, wrap_lvlm
from lvlm.family.specification import StackSpec
from tests.toys.families import at, build
from tests.toys.model_parts import ID, TEXT, clip

LLAMA = ("self_attn.", "input_layernorm", "post_attention_layernorm", "", "mlp")

PATHS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "llava": ("model.language_model.layers", LLAMA, "model.language_model.norm"),
    "qwen3_vl": ("model.language_model.layers", LLAMA, "model.language_model.norm"),
    "paligemma2": (
        "model.language_model.layers",
        (
            "self_attn.",
            "input_layernorm",
            "pre_feedforward_layernorm",
            "post_attention_layernorm",
            "post_feedforward_layernorm",
        ),
        "model.language_model.norm",
    ),
    "blip2_opt": (
        "language_model.model.decoder.layers",
        ("self_attn.", "self_attn_layer_norm", "final_layer_norm", "", "fc2"),
        "language_model.model.decoder.final_layer_norm",
    ),
}
"""Where layers are, and in a layer: attention, norm before it, norm before the MLP, norm after attention, what the MLP adds."""


def double(family: str) -> Lvlm:
    network, processor = build(family)
    return wrap_lvlm(deepcopy(network).double(), processor, name=family, validate=False)


class Oracle:
    """A decoder run by whole forwards and plain torch hooks."""

    def __init__(self, lvlm: Lvlm, pair: CounterfactualPair, paths: tuple[str, tuple[str, ...], str]) -> None:
        self.lvlm, self.pair = lvlm, pair
        layers, (attention, norm, middle, after, mlp), final = paths
        self.layers = [
            {
                "norm": at(layer, norm),
                "middle": at(layer, middle),
                "after": at(layer, after) if after else nn.Identity(),
                "mlp": at(layer, mlp),
                "o": at(layer, attention + ("o_proj" if hasattr(layer.self_attn, "o_proj") else "out_proj")),
                **{c: at(layer, f"{attention}{c}_proj") for c in "qkv"},
            }
            for layer in at(lvlm.hf, layers)
        ]
        self.first, self.final = at(lvlm.hf, layers)[0], at(lvlm.hf, final)
        key = lvlm.processor.tokenizer.convert_tokens_to_ids
        self.tokens = [key(example.answer) for example in (pair.clean, pair.corrupt)]
        self.seen = {side: self.watch(getattr(pair, side)) for side in ("clean", "corrupt")}
        self.gap = self.seen["clean"]["metric"] - self.seen["corrupt"]["metric"]

    @contextmanager
    def edited(self, edits: dict[tuple[int, str], Any], record: dict[Any, Any] | None = None) -> Iterator[None]:
        """Edit inputs of modules (norms, output projections) or their outputs (q, k, v projections), and record them."""
        with ExitStack() as stack:
            for i, parts in enumerate([*self.layers, {"final": self.final}]):
                for name, module in parts.items():

                    def before(_m: Any, args: Any, i: int = i, name: str = name) -> Any:
                        x = args[0]
                        new = edits[i, name](x) if (i, name) in edits else x
                        if record is not None:
                            record[i, name] = new.clone()
                        return (new, *args[1:])

                    def after(_m: Any, _a: Any, out: Any, i: int = i, name: str = name) -> Any:
                        new = edits[i, name](out) if (i, name) in edits else out
                        if record is not None:
                            record[i, name] = new.clone()
                        return new

                    is_input = name in ("norm", "middle", "o", "final")
                    stack.callback(
                        (
                            module.register_forward_pre_hook(before)
                            if is_input
                            else module.register_forward_hook(after)
                        ).remove
                    )
            yield

    @torch.no_grad()
    def metric(self, example: Example, edits: dict[tuple[int, str], Any], record: Any = None) -> float:
        with self.edited(edits, record):
            logits = self.lvlm.hf(**self.lvlm.collate([self.lvlm.encode(example)]), use_cache=False).logits[0, -1]
        return float(logits[self.tokens[0]] - logits[self.tokens[1]])

    def watch(self, example: Example) -> dict[Any, Any]:
        record: dict[Any, Any] = {}
        start: list[Tensor] = []
        hook = self.first.register_forward_pre_hook(
            lambda _m, a, kw: start.append((a[0] if a else kw["hidden_states"]).clone()), with_kwargs=True
        )
        record["metric"] = self.metric(example, {}, record)
        hook.remove()
        record["input"] = start[0]
        return record

    def moved(self, source: str, by: float) -> Tensor:
        """The change of a node's output if it is moved a share of the way from the corrupt to the clean run."""
        clean, corrupt = self.seen["clean"], self.seen["corrupt"]
        if source == "input":
            return by * (clean["input"] - corrupt["input"])
        layer, _, head = source[1:].partition(".")
        if head == "mlp":
            return by * (clean[int(layer), "mlp"] - corrupt[int(layer), "mlp"]).reshape(clean["input"].shape)
        parts, h = self.layers[int(layer)], int(head[1:])
        z, other = corrupt[int(layer), "o"], clean[int(layer), "o"]
        width = z.shape[-1] // self.lvlm.n_heads
        columns = slice(h * width, (h + 1) * width)
        new = z.clone()
        new[..., columns] += by * (other - z)[..., columns]
        with torch.no_grad():
            return parts["after"](parts["o"](new)) - parts["after"](parts["o"](z))

    def edge_effect(self, source: str, target: str, by: float) -> float:
        """The metric in the corrupt run if one target alone reads the changed output of one source."""
        delta = self.moved(source, by)
        if target == "logits":
            return self.metric(self.pair.corrupt, {(len(self.layers), "final"): lambda x: x + delta})
        layer, _, tail = target[1:].partition(".")
        i = int(layer)
        if tail == "mlp":
            return self.metric(self.pair.corrupt, {(i, "middle"): lambda x: x + delta.reshape(x.shape)})
        head, letter = int(tail[1:-2]), tail[-1]
        parts, x = self.layers[i], self.seen["corrupt"][i, "norm"]
        with torch.no_grad():
            new = parts[letter](parts["norm"](x + delta))
        record: dict[Any, Any] = {}
        self.metric(self.pair.corrupt, {(i, letter): lambda _: new}, record)
        width = record[i, "o"].shape[-1] // self.lvlm.n_heads

        def only(z: Tensor) -> Tensor:  # of all heads that read the new projection, this one alone is kept
            z = z.clone()
            columns = slice(head * width, (head + 1) * width)
            z[..., columns] = record[i, "o"][..., columns]
            return z

        return self.metric(self.pair.corrupt, {(i, "o"): only})


def parallel(config: Any = hf.PhiConfig) -> Lvlm:
    """A decoder whose MLPs read what its attention reads."""
    network, processor = build("llava")
    del network
    torch.manual_seed(0)
    whole = hf.LlavaConfig(
        vision_config=clip(), text_config=config(**TEXT), image_token_index=ID["<image>"], vision_feature_layer=-1
    )
    model = hf.LlavaForConditionalGeneration(whole).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    output = "self_attn.dense" if config is hf.PhiConfig else "self_attn.o_proj"
    stack = StackSpec("model.language_model.layers", mid_norm="input_layernorm", output_projection=output)
    return wrap_lvlm(model, processor, spec=FamilySpec("llava", decoder=stack), name="parallel", validate=False)


def graph_of(lvlm: Lvlm, seed: int = 0, *, parallel_mlp: bool = False) -> Graph:
    """A graph with random scores: which edges are scored how does not matter to what runs along them."""
    shape = Shape(lvlm.n_layers, lvlm.n_heads, (parallel_mlp,) * lvlm.n_layers)
    scores = np.random.default_rng(seed).normal(size=shape.there.shape)
    return Graph(
        np.where(shape.there, scores, 0),
        shape,
        n_pairs=1,
        excluded=0,
        mode="denoise",
        model="toy",
        config_hash="c",
        weights_hash="w",
        pairs_digest="p",
    )
