"""The table of families: one entry each. A new family is one entry here."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from concepts.errors import ModelError
from lvlm.family import FamilySpec, StackSpec

_CLIP = StackSpec("model.vision_tower.encoder.layers", output_projection="self_attn.out_proj", mid_norm="layer_norm2")

FAMILIES: Mapping[str, FamilySpec] = MappingProxyType(
    {
        spec.model_type: spec
        for spec in (
            FamilySpec(
                "llava",
                decoder=StackSpec("model.language_model.layers"),
                vision=_CLIP,
                projector="model.multi_modal_projector",
                final_norm="model.language_model.norm",
                unembedding="lm_head",
            ),
        )
    }
)


def family(model_type: str) -> FamilySpec:
    """Return the spec of a family; raises `ModelError` listing those there are."""
    if model_type not in FAMILIES:
        msg = f"no FamilySpec for model type '{model_type}': there are {', '.join(FAMILIES)}; pass your own as spec=…"
        raise ModelError(msg)
    return FAMILIES[model_type]
