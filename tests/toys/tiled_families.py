"""Tiny random models of families that cut an image into tiles."""

from __future__ import annotations

from typing import Any

import transformers as hf

from tests.toys.model_parts import CLIP, ID, TEXT, clip, parts, pil, siglip, tokenizer

PINPOINTS = [[56, 112], [112, 56], [112, 112]]


def llava_next() -> tuple[Any, Any]:
    config = hf.LlavaNextConfig(
        vision_config=clip(),
        text_config=hf.MistralConfig(**TEXT),
        image_token_index=ID["<image>"],
        vision_feature_layer=-1,
        image_grid_pinpoints=PINPOINTS,
    )
    processor = hf.LlavaNextProcessor(
        image_processor=pil("llava_next", "LlavaNextImageProcessorPil")(
            size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=PINPOINTS
        ),
        tokenizer=tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )
    return hf.LlavaNextForConditionalGeneration(config), processor


def llava_onevision() -> tuple[Any, Any]:
    config = hf.LlavaOnevisionConfig(
        vision_config=siglip(),
        text_config=hf.Qwen2Config(**TEXT),
        image_token_index=ID["<image>"],
        video_token_index=255,
        vision_feature_layer=-1,
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_9",
    )
    pictures = pil("llava_onevision", "LlavaOnevisionImageProcessorPil")(
        size={"height": 56, "width": 56}, image_grid_pinpoints=PINPOINTS
    )
    return hf.LlavaOnevisionForConditionalGeneration(config), parts(pictures, "<image>")


def _idefics(kind: str) -> tuple[Any, Any]:
    make = {"idefics3": hf.Idefics3Config, "smolvlm": hf.SmolVLMConfig}[kind]
    network = {"idefics3": hf.Idefics3ForConditionalGeneration, "smolvlm": hf.SmolVLMForConditionalGeneration}[kind]
    config = make(
        vision_config={**CLIP, "image_size": 56},
        text_config=hf.LlamaConfig(**TEXT),
        image_token_id=ID["<image>"],
        scale_factor=2,
        pad_token_id=ID["<pad>"],
    )
    name = {"idefics3": "Idefics3ImageProcessorPil", "smolvlm": "SmolVLMImageProcessorPil"}[kind]
    pictures = pil(kind, name)(size={"longest_edge": 112}, max_image_size={"longest_edge": 56})
    if kind == "idefics3":
        return network(config), hf.Idefics3Processor(pictures, tokenizer(), image_seq_len=4)
    return network(config), parts(pictures, "<image>")


def idefics3() -> tuple[Any, Any]:
    return _idefics("idefics3")


def smolvlm() -> tuple[Any, Any]:
    return _idefics("smolvlm")


def internvl() -> tuple[Any, Any]:
    config = hf.InternVLConfig(
        vision_config={**CLIP, "image_size": [56, 56], "patch_size": [14, 14]},
        text_config=hf.Qwen2Config(**TEXT),
        image_token_id=ID["<IMG_CONTEXT>"],
        downsample_ratio=0.5,
        vision_feature_layer=-1,
    )
    pictures = pil("got_ocr2", "GotOcr2ImageProcessorPil")(
        size={"height": 56, "width": 56}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    return hf.InternVLForConditionalGeneration(config), parts(pictures, "<IMG_CONTEXT>")


def mllama() -> tuple[Any, Any]:
    config = hf.MllamaConfig(
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
            "max_num_tiles": 4,
            "intermediate_layers_indices": [0, 1],
            "vision_output_dim": 72,
            "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
        },
        text_config={
            **TEXT,
            "num_hidden_layers": 4,
            "cross_attention_layers": [1, 3],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        image_token_index=ID["<|image|>"],
    )
    pictures = pil("mllama", "MllamaImageProcessorPil")(size={"height": 56, "width": 56}, max_image_tiles=4)
    return hf.MllamaForConditionalGeneration(config), hf.MllamaProcessor(pictures, tokenizer(image_token="<|image|>"))


def llama4() -> tuple[Any, Any]:
    config = hf.Llama4Config(
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
            "pixel_shuffle_ratio": 0.5,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "vision_output_dim": 32,
        },
        text_config={
            **TEXT,
            "num_hidden_layers": 4,
            "intermediate_size_mlp": 48,
            "head_dim": 8,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "attn_temperature_tuning": False,
        },
        image_token_index=ID["<|patch|>"],
        boi_token_index=ID["<|image_start|>"],
        eoi_token_index=ID["<|image_end|>"],
    )
    return hf.Llama4ForConditionalGeneration(config), parts(None, "<|image|>")
