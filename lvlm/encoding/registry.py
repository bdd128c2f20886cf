"""Image encodings by name: how a family turns an image into tokens. `FamilySpec.view` names one of them."""

from __future__ import annotations

from groundscope.core.errors import ModelError
from groundscope.core.registry import Registry
from lvlm.encoding.extra_inputs import image_position_mask, qformer_question, tile_attention_mask
from lvlm.encoding.fixed_size import florence, kosmos, resampled, whole
from lvlm.encoding.image_token_masks import by_position_mask, by_token_id, without_class_token, without_row_ends
from lvlm.encoding.llama4 import llama4
from lvlm.encoding.mllama import mllama
from lvlm.encoding.packed import packed, rows
from lvlm.encoding.tiled import anyres, crops, split
from lvlm.interfaces import ImageEncoding

image_encodings: Registry[ImageEncoding] = Registry(
    "image encoding",
    {
        "whole": ImageEncoding(whole, image_token_mask=without_class_token),
        "resampled": ImageEncoding(resampled, extra_inputs=qformer_question, image_token_mask=by_token_id),
        "kosmos": ImageEncoding(
            kosmos, extra_inputs=image_position_mask, image_token_mask=by_position_mask, runs_without_image=False
        ),
        "florence": ImageEncoding(florence),
        "anyres": ImageEncoding(anyres, pads=True, image_token_mask=without_row_ends),
        "split": ImageEncoding(split, axis=1, image_token_mask=by_token_id),
        "crops": ImageEncoding(crops, image_token_mask=by_token_id),
        "packed": ImageEncoding(packed, image_token_mask=by_token_id),
        # The tower returns one sequence for all rows.
        "rows": ImageEncoding(rows, pads=True, separable=False, image_token_mask=by_token_id),
        "llama4": ImageEncoding(llama4, image_token_mask=by_token_id),
        "mllama": ImageEncoding(mllama, axis=1, extra_inputs=tile_attention_mask),
    },
    error=ModelError,
)
"""Image encodings by name; `register` adds one, for a new family or an own model."""
