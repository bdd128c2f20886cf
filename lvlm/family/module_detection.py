"""Detect a family's parts in a model, by the module names that transformers' families and their own code use.

A detected path is a guess until `lvlm.identity_checks` has checked it. Names are tried in order; of two possible names the more
specific one comes first (a norm named after the MLP that it precedes before one named after the attention that it follows,
which is another norm in sandwich-norm families).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from groundscope.core.errors import ModelError
from lvlm.family.specification import ABSENT, FamilySpec, StackSpec, find

_ATTENTION = ("self_attn", "self_attention", "attention", "attn", "layer.0.SelfAttention")
_CROSS = ("cross_attn", "encoder_attn", "layer.1.EncDecAttention")
_OUTPUT = ("o_proj", "out_proj", "projection_layer", "projection", "proj", "c_proj", "dense", "o", "wo")
_QUERY, _KEY, _VALUE = ("q_proj", "q", "query"), ("k_proj", "k", "key"), ("v_proj", "v", "value")
_FUSED = ("qkv", "c_attn", "in_proj", "query_key_value")
_MLP = ("mlp", "feed_forward", "ffn", "fc2", "layer.2.DenseReluDense", "layer.1.DenseReluDense")
_MID = (
    "pre_feedforward_layernorm",
    "layer_norm2",
    "layernorm_after",
    "norm2",
    "ln_2",
    "ffn_norm",
    "layer.2.layer_norm",
    "layer.1.layer_norm",
    "post_attention_layernorm",
    "final_layer_norm",
)
_ATTENTION_OUT = ("post_self_attn_layernorm", "ls1")
_MLP_OUT = ("post_mlp_layernorm", "post_feedforward_layernorm", "ls2")
_ATTENTION_GATES = ("lambda_1", "tanh(gate_attn)", "tanh(cross_attn_attn_gate)")
_MLP_GATES = ("lambda_2", "tanh(gate_ffn)", "tanh(cross_attn_mlp_gate)")
_PROJECTOR = (
    "multi_modal_projector",
    "connector",
    "aligner",
    "visual.merger",
    "language_projection",
    "image_to_text_projection",
    "projector",
    "llama_proj",
    "visual.attn_pool",
)
_FINAL_NORM = ("norm", "final_layer_norm", "layer_norm", "ln_f", "final_layernorm")
_VISION = re.compile(r"vision|visual|(^|[._])vit([._]|$)")
_INNER = {"layer", "layers", "blocks", "resblocks", "encoder", "transformer"}
"""Names of modules between a vision tower and its layers."""
_OTHER = re.compile(r"q_?former|vqmodel|generation|resampler|perceiver|predictor|audio", re.IGNORECASE)


def complete(spec: FamilySpec, model: nn.Module) -> FamilySpec:
    """Return the spec with its empty fields detected in the model.

    Raises
    ------
    ModelError
        If a part cannot be detected; the message shows the model's module tree and the field to set.
    """
    stacks = layer_lists(model)
    decoder = _stack(spec, model, "decoder", stacks.get("decoder", ""))
    unembedding = spec.unembedding or _path_of(model, _output_embeddings(model))
    if not unembedding:
        msg = _not_detected(spec, model, "unembedding", "no output embeddings")
        raise ModelError(msg)
    vision = _stack(spec, model, "vision", stacks.get("vision", ""))
    return replace(
        spec,
        decoder=decoder,
        vision=vision,
        projector=_without_absent(spec.projector or _projector(model)),
        final_norm=_without_absent(spec.final_norm or _final_norm(model, decoder)),
        unembedding=unembedding,
        vision_prefix=_class_tokens(model, vision) if spec.vision_prefix is None else spec.vision_prefix,
    )


def layer_lists(model: nn.Module) -> dict[str, str]:
    """Return the path of the list of layers of each detected stack: ``decoder``, ``vision``."""
    lists: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer, _ in lists)
        listed = isinstance(module, nn.ModuleList | nn.Sequential) and any(True for _ in module.children())
        if listed and not inside and not _OTHER.search(path) and _is_layer(next(iter(module.children()))):
            lists.append((path, module))
    vision = [path for path, _ in lists if _VISION.search(path)]
    text = [path for path, _ in lists if not _VISION.search(path)]
    # In an encoder-decoder, the decoder comes last.
    decoder = {"decoder": text[-1]} if text else {}
    return {**decoder, "vision": "+".join(vision)} if vision else decoder


def tree(model: nn.Module, depth: int = 4) -> str:
    """Return the model's module tree as text for a message; a list of equal modules is one line."""
    lines: list[str] = []

    def walk(module: nn.Module, name: str, level: int) -> None:
        children = list(module.named_children())
        listed = isinstance(module, nn.ModuleList | nn.Sequential) and len(children) > 1
        lines.append(f"{'  ' * level}{name}: {type(module).__name__}{f' of {len(children)}' if listed else ''}")
        for child, inner in children[:1] if listed else children:
            if level < depth + listed:
                walk(inner, child, level + 1)

    for name, module in model.named_children():
        walk(module, name, 1)
    return "\n".join(lines)


def describe_stack(model: nn.Module, layers: str) -> StackSpec:
    """Return the paths inside the layers of a list: for each part the first candidate that any layer has."""
    members: list[nn.Module] = [layer for path in layers.split("+") for layer in find(model, path)]

    def first(candidates: tuple[str, ...]) -> str:
        names = (name for name in candidates if any(_has(layer, name) for layer in members))
        return next(names, "")

    def below(parent: str, candidates: tuple[str, ...]) -> str:
        names = [f"{parent}.{name}" for name in candidates]
        return first(tuple(names)) if parent else ""

    attention, cross = first(_ATTENTION), first(_CROSS)
    fused, cross_fused = below(attention, _FUSED), below(cross, _FUSED)
    sandwich = any(_has(layer, "pre_feedforward_layernorm") for layer in members)
    return StackSpec(
        layers=layers,
        attention=attention,
        output_projection=below(attention, _OUTPUT),
        mid_norm=first(_MID),
        mlp=first(_MLP),
        query=below(attention, _QUERY) or (f"{fused}#0" if fused else ""),
        key=below(attention, _KEY) or (f"{fused}#1" if fused else ""),
        value=below(attention, _VALUE) or (f"{fused}#2" if fused else ""),
        attention_out=first(_ATTENTION_OUT) or ("post_attention_layernorm" if sandwich else ""),
        mlp_out=first(_MLP_OUT),
        attention_gate=first(tuple(g for g in _ATTENTION_GATES if "cross" not in g)),
        mlp_gate=first(_MLP_GATES),
        mlp_row_mask="full_text_row_masked_out_mask" if first(("cross_attn_mlp_gate",)) else "",
        cross_attention=cross,
        cross_output_projection=below(cross, _OUTPUT),
        cross_query=below(cross, _QUERY) or (f"{cross_fused}#0" if cross_fused else ""),
        cross_key=below(cross, _KEY) or (f"{cross_fused}#1" if cross_fused else ""),
        cross_value=below(cross, _VALUE) or (f"{cross_fused}#2" if cross_fused else ""),
        cross_gate=first(("tanh(cross_attn_attn_gate)",)),
        weights=2 if attention.startswith("layer.0.") else 1,
    )


def bare(name: str) -> str:
    """Return the path of a gate without its function: ``tanh(gate_attn)`` -> ``gate_attn``."""
    return name.removeprefix("tanh(").removesuffix(")")


def _has(layer: nn.Module, name: str) -> bool:
    return isinstance(find(layer, bare(name)), nn.Module | nn.Parameter)


def _is_layer(module: nn.Module) -> bool:
    parents = [name for name in (*_ATTENTION, *_CROSS) if find(module, name) is not None]
    return any(isinstance(find(module, f"{p}.{o}"), nn.Linear) for p in parents for o in _OUTPUT)


def _stack(spec: FamilySpec, model: nn.Module, name: str, layers: str) -> StackSpec:
    stack = spec.stack(name)
    if stack.layers:
        return replace(stack, layers=_without_absent(stack.layers))
    if layers:
        return describe_stack(model, layers)
    if name == "vision":
        return StackSpec()
    msg = _not_detected(spec, model, name, "no list of layers with an attention and its output projection")
    raise ModelError(msg)


def _without_absent(path: str) -> str:
    """Return a path; empty if the spec states that the family has no such part."""
    return "" if path == ABSENT else path


def _not_detected(spec: FamilySpec, model: nn.Module, field: str, missing: str) -> str:
    return (
        f"family '{spec.model_type}': {missing} found in {type(model).__name__}; set the path in "
        f"FamilySpec('{spec.model_type}', {field}=…), and pass it as spec=…; its modules are\n{tree(model)}"
    )


def _output_embeddings(model: nn.Module) -> Any:
    get = getattr(model, "get_output_embeddings", None)
    return (get() if get else None) or find(
        model, "lm_head|language_model.lm_head|llama_model.lm_head|language.lm_head"
    )


def _path_of(model: nn.Module, module: Any) -> str:
    return next((path for path, other in model.named_modules() if other is module), "") if module is not None else ""


def _projector(model: nn.Module) -> str:
    for name in _PROJECTOR:
        for root in ("", "model.", "transformer."):
            if isinstance(find(model, root + name), nn.Module):
                return root + name
    return ""


def _final_norm(model: nn.Module, decoder: StackSpec) -> str:
    parent = decoder.layers.split("+")[-1].rpartition(".")[0]
    root = find(model, parent) if parent else model
    name = next((n for n in _FINAL_NORM if isinstance(getattr(root, n, None), nn.Module)), "")
    return f"{parent}.{name}".lstrip(".") if name else ""


def _class_tokens(model: nn.Module, vision: StackSpec) -> int:
    """Return 1 if the vision tower has a class token, else 0."""
    parts = vision.layers.split("+")[0].split(".")
    while parts and parts[-1] in _INNER:
        parts.pop()
    tower = find(model, ".".join(parts)) if parts else None
    names = [n for n, _ in (tower or nn.Module()).named_parameters()] if isinstance(tower, nn.Module) else []
    return int(any(n.endswith(("class_embedding", "cls_token")) for n in names))


def text_config(config: Any) -> Any:
    """Return the configuration of the text model, for releases of transformers from 4.40 on."""
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    if text is not config:
        return text
    names = ("text_config", "language_config", "llm_config")  # the last two in families' own code
    return next((part for name in names if (part := getattr(config, name, None)) is not None), config)


_HEADS = ("num_attention_heads", "decoder_attention_heads", "attention_heads", "num_heads", "n_head", "heads")


def heads_of(config: Any, other: Any) -> int:
    """Return the number of attention heads in a configuration, or else in `other`, under any of the usual names."""
    count = _integer(config, _HEADS) or _integer(other, _HEADS)
    if count is None:
        msg = f"{type(config).__name__} has no number of attention heads; set one of {', '.join(_HEADS)}"
        raise ModelError(msg)
    return count


def vision_heads(spec: FamilySpec, model: Any, layers: Sequence[nn.Module]) -> int:
    """Return the number of attention heads in a layer of the vision tower; 0 for a tower without layers.

    If the configuration has no single number, because stages of the tower differ, attributes of the attention modules are used.

    Raises
    ------
    ModelError
        If the number is unknown, or the layers differ.
    """
    if not layers:
        return 0
    config = getattr(model.config, "vision_config", None)
    count = _integer(config, _HEADS)
    if count is not None:
        return count
    counts = {_integer(find(layer, spec.vision.attention), (*_HEADS, "groups")) for layer in layers}
    if None in counts:
        return heads_of(config, None)
    if len(counts) > 1:
        msg = (
            f"family '{spec.model_type}': the layers at '{spec.vision.layers}' have {counts} heads; override "
            "FamilySpec.vision.layers with layers that have the same number of heads"
        )
        raise ModelError(msg)
    return int(counts.pop() or 0)


def _integer(holder: Any, names: Sequence[str]) -> int | None:
    """Return the first integer attribute of an object; None if it has none of the names."""
    return next((value for name in names if isinstance(value := getattr(holder, name, None), int)), None)
