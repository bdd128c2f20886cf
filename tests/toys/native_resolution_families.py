"""Tiny random models of families that see an image at its own resolution."""

from __future__ import annotations

from typing import Any

import transformers as hf

from tests.toys.model_parts import CLIP, ID, TEXT, WIDTH, parts, pil

_QWEN_VISION: dict[str, Any] = {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3}
_QWEN_TOKENS: dict[str, Any] = {
    "image_token_id": ID["<|image_pad|>"],
    "video_token_id": ID["<|video_pad|>"],
    "vision_start_token_id": ID["<|vision_start|>"],
    "vision_end_token_id": ID["<|vision_end|>"],
}
_ROPE: dict[str, Any] = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}


def _qwen_pictures(patch: int = 14) -> Any:
    return pil("qwen2_vl", "Qwen2VLImageProcessorPil")(
        min_pixels=4 * patch * patch,
        max_pixels=64 * patch * patch * 4,
        patch_size=patch,
        merge_size=2,
        temporal_patch_size=2,
    )


def qwen2_vl() -> tuple[Any, Any]:
    config = hf.Qwen2VLConfig(
        vision_config={
            **_QWEN_VISION,
            "depth": 2,
            "embed_dim": 24,
            "hidden_size": WIDTH,
            "num_heads": 2,
            "mlp_ratio": 2,
        },
        text_config={**TEXT, "rope_parameters": _ROPE},
        **_QWEN_TOKENS,
    )
    return hf.Qwen2VLForConditionalGeneration(config), parts(_qwen_pictures(), "<|image_pad|>")


def qwen2_5_vl() -> tuple[Any, Any]:
    config = hf.Qwen2_5_VLConfig(
        vision_config={
            **_QWEN_VISION,
            "depth": 3,
            "hidden_size": 24,
            "out_hidden_size": WIDTH,
            "num_heads": 2,
            "intermediate_size": 40,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        text_config={**TEXT, "rope_parameters": _ROPE},
        **_QWEN_TOKENS,
    )
    return hf.Qwen2_5_VLForConditionalGeneration(config), parts(_qwen_pictures(), "<|image_pad|>")


def qwen3_vl() -> tuple[Any, Any]:
    config = hf.Qwen3VLConfig(
        vision_config={
            **_QWEN_VISION,
            "patch_size": 16,
            "depth": 3,
            "hidden_size": 24,
            "out_hidden_size": WIDTH,
            "num_heads": 2,
            "intermediate_size": 40,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        text_config={**TEXT, "head_dim": 8, "rope_parameters": _ROPE},
        **_QWEN_TOKENS,
    )
    return hf.Qwen3VLForConditionalGeneration(config), parts(_qwen_pictures(16), "<|image_pad|>")


def glm4v() -> tuple[Any, Any]:
    config = hf.Glm4vConfig(
        vision_config={
            **_QWEN_VISION,
            "depth": 2,
            "hidden_size": 24,
            "out_hidden_size": WIDTH,
            "num_heads": 2,
            "intermediate_size": 40,
            "image_size": 112,
        },
        text_config={**TEXT, "rope_parameters": {**_ROPE, "partial_rotary_factor": 1.0}},
        image_token_id=ID["<|image|>"],
        video_token_id=ID["<|video_pad|>"],
        image_start_token_id=ID["<|begin_of_image|>"],
        image_end_token_id=ID["<|end_of_image|>"],
    )
    pictures = pil("glm4v", "Glm4vImageProcessorPil")(
        size={"shortest_edge": 28 * 28 * 2, "longest_edge": 28 * 28 * 2 * 20},
        patch_size=14,
        merge_size=2,
        temporal_patch_size=2,
    )
    return hf.Glm4vForConditionalGeneration(config), parts(pictures, "<|image|>")


def mistral3() -> tuple[Any, Any]:
    config = hf.Mistral3Config(
        vision_config=hf.PixtralVisionConfig(
            **{
                **CLIP,
                "image_size": 112,
                "head_dim": 12,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            }
        ),
        text_config=hf.MistralConfig(**{**TEXT, "head_dim": 8}),
        image_token_index=ID["[IMG]"],
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    pictures = pil("pixtral", "PixtralImageProcessorPil")(
        size={"longest_edge": 112}, patch_size={"height": 14, "width": 14}
    )
    return hf.Mistral3ForConditionalGeneration(config), parts(pictures, "[IMG]")
