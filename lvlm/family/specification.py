"""Where things are inside a family of models, as a description that code fills in and a user can override.

A `FamilySpec` names modules by dotted path. What it leaves open (None) is found in the model itself by
`lvlm.family.discovery`; what it says is taken as it is, and `lvlm.spec_validation` proves at load that the result is right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from groundscope.core.errors import ModelError
from groundscope.core.user_files import read_text

MAX_BYTES = 1 << 20
"""Largest file that describes a family."""
ABSENT = "-"
"""What a spec says of a part that its family does not have."""
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float64: 1e-5}
"""Largest allowed error of an identity, relative to the largest value compared; transformers computes norms and attention
weights in float32 whatever the model's own precision is."""


@dataclass(frozen=True)
class StackSpec:
    """Paths of one transformer stack; all but `layers` are relative to a layer.

    A path is made of attribute names and list indices joined by dots. Where the layers of a stack differ,
    ``one|other`` names the first that a layer has. An empty path means that the stack has no such thing.
    """

    layers: str = ""
    """The list of layers; several that are run one after the other are joined by ``+``, and ``blocks.-1.*`` means the
    children of each member of the last of `blocks`. Empty: to be found, with all else about the stack; ``-``: the family
    has no such stack."""
    attention: str = "self_attn"
    output_projection: str = "self_attn.o_proj"
    mid_norm: str = "post_attention_layernorm"
    """The module whose input is the residual stream between attention and MLP (nearly always a norm)."""
    mlp: str = "mlp"
    query: str = "self_attn.q_proj"
    """Where queries come out, before any rotation by position (as TransformerLens' ``hook_q``); ``attn.qkv#0`` is the first
    third of a fused projection, ``attn.qkv#0/heads`` the first third of what it gives to each head."""
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    attention_out: str = ""
    """The module whose output is added to the residual stream, where that is not `attention` (a norm after it, say)."""
    mlp_out: str = ""
    """The same for `mlp`."""
    attention_gate: str = ""
    """Parameter that scales what attention adds: ``lambda_1``, or ``tanh(gate_attn)``."""
    mlp_gate: str = ""
    mlp_row_mask: str = ""
    """Argument of a layer's call that masks rows of what the MLP adds."""
    attention_post_norm: str = ""
    """Norm of the residual stream itself after attention was added to it (post-norm transformers)."""
    mlp_post_norm: str = ""
    attention_conv: str = ""
    """Convolution whose output is added to the residual stream before attention, beside the sites (DaViT)."""
    mlp_conv: str = ""
    """The same before the MLP."""
    layout: str = ""
    """How hidden states lie: ``[examples, tokens, width]`` where empty, ``tokens first``, or ``picture`` for
    ``[examples, width, rows, columns]`` between layers. Sites always have examples first and width last."""
    window: str = ""
    """Where a layer says how many tokens a side of its attention's windows has; inside them tokens stand window by window."""
    cross_attention: str = ""
    """Attention to the image, or to an encoder."""
    cross_output_projection: str = ""
    cross_query: str = ""
    cross_key: str = ""
    cross_value: str = ""
    cross_gate: str = ""
    cross_post_norm: str = ""
    weights: int = 1
    """Which element of the attention's output holds its weights."""


@dataclass(frozen=True)
class FamilySpec:
    """Where the decoder, the vision tower and the projector of a family are, by dotted path from the model.

    Fields that are left empty are found in the model; ``-`` says that the family has no such thing. A family that
    transformers does not know can be described here, or in a yaml file with the same names (`FamilySpec.from_yaml`), and
    given to `load_lvlm` or `wrap_lvlm`.
    """

    model_type: str
    """`config.model_type` of the Hugging Face class."""
    view: str = "whole"
    """How an image becomes tokens: a name of `lvlm.encoding.registry.VIEWS`."""
    decoder: StackSpec = StackSpec()
    vision: StackSpec = StackSpec()
    projector: str = ""
    """The module that turns vision tokens into the decoder's width."""
    final_norm: str = ""
    """Norm before the unembedding."""
    unembedding: str = ""
    vision_prefix: int | None = None
    """Tokens of the vision tower before the first patch (1 for a class token)."""
    template: str = "USER: {image}\n{question} ASSISTANT:"
    """Prompt where the processor has no chat template; may also name {bos}, {eos} and {sep}."""
    around: str = "{image}"
    """What stands around each image's placeholder in a prompt."""
    placeholder: str = ""
    """What stands for an image in a prompt, where the processor does not say and it is not the image token itself."""
    special_tokens: bool = True
    """Whether the tokenizer adds its own (the first token, say) to the prompt."""
    image_first: bool = False
    """Whether the image's tokens stand before everything else, the first token included."""
    token_types: bool = True
    """Whether image tokens are marked where the model asks for token types."""
    added_after: str = ""
    """Where in the configuration the list stands whose length says after how many of the first decoder layers something
    is added at image positions (DeepStack): ``resid_post`` of such a layer is not the next one's ``resid_pre`` there."""
    lacks: str = ""
    """Why the family has no vision sites, for the error of who asks for one."""
    notes: str = ""
    """What differs, for people."""

    def stack(self, name: str) -> StackSpec:
        """Return the paths of ``decoder`` or ``vision``."""
        return self.decoder if name == "decoder" else self.vision

    @classmethod
    def from_mapping(cls, record: Mapping[str, Any]) -> FamilySpec:
        """Make a spec of plain values; raises `ModelError` naming a field that does not exist or fit."""
        known = {f.name for f in fields(cls)}
        values: dict[str, Any] = dict(record)
        _check_names("FamilySpec", values, known, "model_type")
        for name in ("decoder", "vision"):
            if name in values:
                if not isinstance(values[name], Mapping):
                    msg = f"FamilySpec.{name} is {values[name]!r}: give the fields of a StackSpec"
                    raise ModelError(msg)
                _check_names(f"FamilySpec.{name}", values[name], {f.name for f in fields(StackSpec)}, "layers")
                values[name] = StackSpec(**values[name])
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | Path) -> FamilySpec:
        """Read a spec from a yaml file; raises `ModelError` where it cannot be read or names what does not exist."""
        import yaml

        try:
            record = yaml.safe_load(read_text(path, limit=MAX_BYTES, error=ModelError))
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            msg = f"family file '{path}' cannot be read: {error}"
            raise ModelError(msg) from error
        if not isinstance(record, Mapping):
            msg = f"family file '{path}' holds no mapping: write the fields of a FamilySpec, model_type first"
            raise ModelError(msg)
        return cls.from_mapping(record)


def _check_names(what: str, given: Mapping[str, Any], known: set[str], needed: str) -> None:
    wrong = sorted(str(name) for name in given.keys() - known)
    if wrong or needed not in given:
        msg = f"{what}: {f'no field {wrong[0]!r}' if wrong else f'{needed!r} is missing'}; there are {', '.join(sorted(known))}"
        raise ModelError(msg)
    for name, value in given.items():
        if not isinstance(value, str | int | bool | Mapping):
            msg = f"{what}.{name} is {value!r}: give text, a number, or fields of a stack"
            raise ModelError(msg)


def find(root: Any, path: str) -> Any:
    """Return what a dotted path leads to, of ``one|other`` the first there is; None where there is none."""
    for way in path.split("|"):
        found = root
        for part in way.split("."):
            if isinstance(found, nn.ModuleList | nn.Sequential) and part.startswith("-") and part[1:].isdecimal():
                part = str(len(found) - int(part[1:]))  # the last of a list, whatever its length
            found = getattr(found, part, None)
            if found is None:
                break
        if found is not None and found is not root:
            return found
    return None


def resolve(root: nn.Module, path: str, spec: FamilySpec) -> nn.Module:
    """Return the module at a dotted path; raises `ModelError` naming the part of the path that is not there."""
    found = find(root, path)
    if isinstance(found, nn.Module):
        return found
    module, done = root, []
    for part in path.split("|")[0].split("."):
        step = getattr(module, part, None)
        if not isinstance(step, nn.Module):
            break
        module = step
        done.append(part)
    here = ".".join(done) or type(root).__name__
    children = ", ".join(name for name, _ in module.named_children()) or "nothing"
    msg = f"family '{spec.model_type}': no module '{path}' ('{here}' has {children}); pass a FamilySpec with the right path"
    raise ModelError(msg)


def layer_list(root: nn.Module, path: str, spec: FamilySpec) -> tuple[nn.Module, ...]:
    """Return the layers of a stack in the order they run; raises `ModelError` where the path is wrong."""
    return tuple(layer for one in path.split("+") if path for layer in _members(root, one, spec))


def _members(root: nn.Module, path: str, spec: FamilySpec) -> list[nn.Module]:
    found = resolve(root, path.removesuffix(".*"), spec)
    if not isinstance(found, nn.ModuleList | nn.Sequential):
        msg = f"family '{spec.model_type}': '{path}' is a {type(found).__name__}, not a list of layers"
        raise ModelError(msg)
    return [child for one in found for child in one.children()] if path.endswith(".*") else list(found)
