"""Specs of model families: paths of modules, the prompt, and how images become tokens.

A `FamilySpec` names modules by dotted path. `lvlm.family.module_detection` detects empty fields, and `lvlm.identity_checks`
checks at load that the paths are right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from groundscope.core.errors import ModelError
from groundscope.core.text import nearest
from groundscope.core.user_files import read_text

MAX_BYTES = 1 << 20
"""Largest size of a spec file, in bytes."""
ABSENT = "-"
"""Path of a part that a family does not have."""
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float64: 1e-5}
"""Largest allowed error of an identity, relative to the largest value compared; transformers computes norms and attention
weights in float32 whatever the model's own precision is."""


@dataclass(frozen=True)
class StackSpec:
    """Paths of one transformer stack; all except `layers` are relative to a layer.

    A path consists of attribute names and list indices, joined by dots. If layers differ, write alternatives as ``a|b``:
    each layer uses the first path that it has. An empty path means that the stack has no such part.

    Examples
    --------
    >>> from lvlm import StackSpec
    >>> StackSpec("model.language_model.layers", mlp="feed_forward").attention
    'self_attn'
    """

    layers: str = ""
    """List of layers; lists that run one after the other are joined by ``+``, and ``blocks.-1.*`` means the children of each
    member of the last of `blocks`. Empty: detect all fields of the stack; ``-``: the family has no such stack."""
    attention: str = "self_attn"
    output_projection: str = "self_attn.o_proj"
    mid_norm: str = "post_attention_layernorm"
    """Module whose input is the residual stream between attention and MLP (usually a norm)."""
    mlp: str = "mlp"
    query: str = "self_attn.q_proj"
    """Module whose output are the queries, before rotary embedding (as TransformerLens' ``hook_q``); ``attn.qkv#0`` is the
    first third of a fused projection, ``attn.qkv#0/heads`` the first third of its output for each head."""
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    attention_out: str = ""
    """Module whose output is added to the residual stream, if it is not `attention` (for example a norm after it)."""
    mlp_out: str = ""
    """The same for `mlp`."""
    attention_gate: str = ""
    """Parameter that scales the attention output: ``lambda_1``, or ``tanh(gate_attn)``."""
    mlp_gate: str = ""
    mlp_row_mask: str = ""
    """Argument of a layer that masks rows of the MLP output."""
    attention_post_norm: str = ""
    """Norm of the residual stream after the attention output is added (post-norm transformers)."""
    mlp_post_norm: str = ""
    attention_conv: str = ""
    """Convolution whose output is added to the residual stream before attention; not a site (DaViT)."""
    mlp_conv: str = ""
    """The same before the MLP."""
    layout: str = ""
    """Layout of hidden states: empty for ``[examples, tokens, width]``, ``tokens first``, or ``picture`` for
    ``[examples, width, rows, columns]`` between layers. Sites are always ``[examples, tokens, width]``."""
    window: str = ""
    """Attribute of a layer with the side length of its attention windows, by which its attention orders tokens."""
    cross_attention: str = ""
    """Attention to the image, or to an encoder."""
    cross_output_projection: str = ""
    cross_query: str = ""
    cross_key: str = ""
    cross_value: str = ""
    cross_gate: str = ""
    cross_post_norm: str = ""
    weights: int = 1
    """Index of the attention weights in the attention's output."""


@dataclass(frozen=True)
class FamilySpec:
    """Parts of a model family, as dotted paths from the model; how an image becomes tokens; and the prompt.

    Empty fields are detected in the model; ``-`` states that the family has no such part. Pass a spec, or a yaml file with the
    same fields (`from_yaml`), to `load_lvlm` or `wrap_lvlm`, or register it: `lvlm.families`.

    Examples
    --------
    >>> from lvlm import FamilySpec, families
    >>> families["qwen2_vl"].view
    'packed'
    >>> FamilySpec("my_llava", template="Human: {image}{question} Assistant:").decoder.layers  # detected at load
    ''
    """

    model_type: str
    """``config.model_type`` of the Hugging Face model."""
    view: str = "whole"
    """How an image becomes tokens: a name of `lvlm.encoding.registry.image_encodings`."""
    decoder: StackSpec = StackSpec()
    vision: StackSpec = StackSpec()
    projector: str = ""
    """Module that maps vision tokens to the width of the decoder."""
    final_norm: str = ""
    """Norm before the unembedding."""
    unembedding: str = ""
    vision_prefix: int | None = None
    """Number of tokens of the vision tower before the first patch (1 for a class token)."""
    template: str = "USER: {image}\n{question} ASSISTANT:"
    """Prompt, if the processor has no chat template; may also contain {bos}, {eos} and {sep}."""
    around: str = "{image}"
    """Text around each image's placeholder in the prompt."""
    placeholder: str = ""
    """Text that stands for an image in a prompt, if it is neither the processor's nor the image token."""
    special_tokens: bool = True
    """Whether the tokenizer adds its special tokens (for example the first) to the prompt."""
    image_first: bool = False
    """Whether the image tokens precede all other tokens, also the first token."""
    token_types: bool = True
    """Whether the model's token types mark image tokens."""
    added_after: str = ""
    """Path, in the configuration, of a list with one entry for each of the first decoder layers after which the model adds
    features at image positions (DeepStack); there ``resid_post`` of the layer is not the next layer's ``resid_pre``."""
    lacks: str = ""
    """Why the family has no vision sites, for error messages."""
    notes: str = ""
    """Peculiarities of the family, for the table of families."""

    def stack(self, name: str) -> StackSpec:
        """Return the paths of ``decoder`` or ``vision``."""
        return self.decoder if name == "decoder" else self.vision

    @classmethod
    def from_mapping(cls, record: Mapping[str, Any]) -> FamilySpec:
        """Return a spec from plain values; raises `ModelError` for an unknown field or a value of a wrong type."""
        values: dict[str, Any] = dict(record)
        _check_fields("FamilySpec", values, [f.name for f in fields(cls)], "model_type")
        for name in ("decoder", "vision"):
            if name in values:
                if not isinstance(values[name], Mapping):
                    msg = f"FamilySpec.{name} is {values[name]!r}; it must be a mapping with the fields of a StackSpec"
                    raise ModelError(msg)
                _check_fields(f"FamilySpec.{name}", values[name], [f.name for f in fields(StackSpec)], "layers")
                values[name] = StackSpec(**values[name])
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | Path) -> FamilySpec:
        """Read a spec from a yaml file; raises `ModelError` if it cannot be read or has an unknown or invalid field."""
        import yaml

        try:
            record = yaml.safe_load(read_text(path, limit=MAX_BYTES, error=ModelError))
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            msg = f"family file '{path}' cannot be read: {error}"
            raise ModelError(msg) from error
        if not isinstance(record, Mapping):
            msg = f"family file '{path}' is not a mapping; write the fields of a FamilySpec, model_type first"
            raise ModelError(msg)
        return cls.from_mapping(record)


def _check_fields(what: str, values: Mapping[str, Any], fields: Sequence[str], required: str) -> None:
    unknown = sorted(str(name) for name in values.keys() - set(fields))
    if unknown:
        msg = f"{what}: unknown field '{unknown[0]}'; choose from {', '.join(sorted(fields))}{nearest(unknown[0], fields)}"
        raise ModelError(msg)
    if required not in values:
        msg = f"{what}: the field '{required}' is missing"
        raise ModelError(msg)
    for name, value in values.items():
        if not isinstance(value, str | int | bool | Mapping):
            msg = f"{what}.{name} is {value!r}; it must be text, a number, or the fields of a stack"
            raise ModelError(msg)


def find(root: Any, path: str) -> Any:
    """Return the attribute at a dotted path, of ``a|b`` the first that exists; None if none exists."""
    for alternative in path.split("|"):
        value = root
        for part in alternative.split("."):
            if isinstance(value, nn.ModuleList | nn.Sequential) and part.startswith("-") and part[1:].isdecimal():
                part = str(len(value) - int(part[1:]))  # counted from the end of a list
            value = getattr(value, part, None)
            if value is None:
                break
        if value is not None and value is not root:
            return value
    return None


def resolve(root: nn.Module, path: str, spec: FamilySpec) -> nn.Module:
    """Return the module at a dotted path; raises `ModelError` that names the part of the path that does not exist."""
    target = find(root, path)
    if isinstance(target, nn.Module):
        return target
    module, done = root, []
    for part in path.split("|")[0].split("."):
        step = getattr(module, part, None)
        if not isinstance(step, nn.Module):
            break
        module = step
        done.append(part)
    parent = ".".join(done) or type(root).__name__
    children = ", ".join(name for name, _ in module.named_children()) or "no modules"
    msg = f"family '{spec.model_type}': no module '{path}' ('{parent}' has {children}); pass a FamilySpec with the right path"
    raise ModelError(msg)


def layer_list(root: nn.Module, path: str, spec: FamilySpec) -> tuple[nn.Module, ...]:
    """Return the layers of a stack in the order in which they run; raises `ModelError` for a wrong path."""
    return tuple(layer for part in path.split("+") if path for layer in _members(root, part, spec))


def _members(root: nn.Module, path: str, spec: FamilySpec) -> list[nn.Module]:
    module = resolve(root, path.removesuffix(".*"), spec)
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        msg = f"family '{spec.model_type}': '{path}' is a {type(module).__name__}, not a list of layers"
        raise ModelError(msg)
    return [child for member in module for child in member.children()] if path.endswith(".*") else list(module)
