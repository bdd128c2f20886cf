"""Where things are inside a family of models, and the proof that they are there.

A `FamilySpec` names modules by dotted path; `validate` runs one small forward and checks the identities every later
result rests on. A family whose tensors are elsewhere fails at load, with the name of what to override.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from concepts.errors import ModelError

if TYPE_CHECKING:
    from lvlm.model import Encoding, Lvlm

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float64: 1e-9}
"""Largest allowed error of an identity, relative to the largest value compared."""


@dataclass(frozen=True)
class StackSpec:
    """Paths of one transformer stack; all but `layers` are relative to a layer."""

    layers: str
    attention: str = "self_attn"
    output_projection: str = "self_attn.o_proj"
    mid_norm: str = "post_attention_layernorm"
    """The norm whose input is the residual stream between attention and MLP."""
    mlp: str = "mlp"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"


@dataclass(frozen=True)
class FamilySpec:
    """Where the decoder, the vision tower and the projector of a family are, by dotted path from the model."""

    model_type: str
    """`config.model_type` of the Hugging Face class."""
    decoder: StackSpec
    vision: StackSpec
    projector: str
    final_norm: str
    unembedding: str
    vision_prefix: int = 1
    """Tokens of the vision tower before the first patch (1 for a class token)."""
    template: str = "USER: {image}\n{question} ASSISTANT:"
    """Prompt used where the processor has no chat template."""

    def stack(self, name: str) -> StackSpec:
        """Return the paths of ``decoder`` or ``vision``."""
        return self.decoder if name == "decoder" else self.vision


def resolve(root: nn.Module, path: str, spec: FamilySpec) -> nn.Module:
    """Return the module at a dotted path; raises `ModelError` naming the part of the path that is not there."""
    module = root
    for done, part in enumerate(path.split(".")):
        found = getattr(module, part, None)
        if not isinstance(found, nn.Module):
            here = ".".join(path.split(".")[:done]) or type(root).__name__
            children = ", ".join(name for name, _ in module.named_children()) or "nothing"
            msg = (
                f"family '{spec.model_type}': no module '{path}' ('{here}' has {children}); "
                "pass a FamilySpec with the right path"
            )
            raise ModelError(msg)
        module = found
    return module


@torch.no_grad()
def validate(model: Lvlm, encoding: Encoding) -> dict[str, float]:
    """Check that the spec points at the right tensors.

    Identities, each relative to its largest value: the heads' contributions ``z_h W_O^h`` add up to the attention
    output; ``resid_pre + attn_out + mlp_out == resid_post``; one layer's ``resid_post`` is the next one's
    ``resid_pre``; the unembedding of the normed last residual is the logits.

    Parameters
    ----------
    model
        A loaded model.
    encoding
        Any encoded example.

    Returns
    -------
    dict
        Largest relative error by identity.

    Raises
    ------
    ModelError
        Naming the identity, the module and the override to write, where one fails.
    """
    seen: dict[str, Tensor] = {}
    hooks = []
    for stack, count in (("decoder", model.n_layers), ("vision", model.n_vision_layers)):
        for layer in range(count):
            for component in ("resid_pre", "resid_post", "attn_out", "mlp_out", "z"):
                place = model.place(stack, layer, component)
                hooks.append(
                    place.watch(lambda x, name=f"{stack}.L{layer}.{component}": seen.update({name: x.clone()}))
                )
    try:
        logits = model.logits(encoding.inputs)
    finally:
        for hook in hooks:
            hook.remove()
    errors: dict[str, float] = {}

    def check(name: str, left: Tensor, right: Tensor, override: str) -> None:
        scale = max(float(right.abs().max()), 1e-6)
        error = float((left.float() - right.float()).abs().max()) / scale
        errors[name] = max(error, errors.get(name, 0.0))
        if not error <= TOLERANCE[model.dtype]:
            msg = f"family '{model.spec.model_type}': {name} fails by {error:.1e}; override FamilySpec.{override}"
            raise ModelError(msg)

    for stack, count, heads in (
        ("decoder", model.n_layers, model.n_heads),
        ("vision", model.n_vision_layers, model.n_vision_heads),
    ):
        for layer in range(count):
            get = attrgetter("__getitem__")(seen)
            name = f"{stack}.L{layer}"
            projection = model.output_projection(stack, layer)
            z = get(f"{name}.z")
            by_head = z.unflatten(-1, (heads, -1)).unsqueeze(-2)  # [..., H, 1, head_dim]
            weight = projection.weight.T.unflatten(0, (heads, -1))  # [H, head_dim, D]
            total = (by_head @ weight).squeeze(-2).sum(-2)
            if projection.bias is not None:
                total = total + projection.bias
            check(f"{name}: sum of heads = attn_out", total, get(f"{name}.attn_out"), f"{stack}.output_projection")
            parts = get(f"{name}.resid_pre") + get(f"{name}.attn_out") + get(f"{name}.mlp_out")
            check(f"{name}: pre + attn_out + mlp_out = post", parts, get(f"{name}.resid_post"), f"{stack}.mlp")
            if layer:
                before = get(f"{stack}.L{layer - 1}.resid_post")
                check(f"{name}: resid_pre = previous resid_post", get(f"{name}.resid_pre"), before, f"{stack}.layers")
    last = seen[f"decoder.L{model.n_layers - 1}.resid_post"][:, -1:]
    check("unembedding = logits", model.unembed(last)[:, 0], logits, "final_norm")
    return errors
