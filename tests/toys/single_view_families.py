"""Tiny random models of families that see an image as one picture of fixed size."""

from __future__ import annotations

from typing import Any

import transformers as hf

from tests.toys.model_parts import ID, TEXT, WIDTH, clip, parts, pil, siglip, tokenizer


def llava() -> tuple[Any, Any]:
    config = hf.LlavaConfig(
        vision_config=clip(),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_index=ID["<image>"],
        vision_feature_layer=-1,
    )
    processor = hf.LlavaProcessor(
        image_processor=pil("clip", "CLIPImageProcessorPil")(
            size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}
        ),
        tokenizer=tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )
    return hf.LlavaForConditionalGeneration(config), processor


def _paligemma(text: Any) -> tuple[Any, Any]:
    config = hf.PaliGemmaConfig(
        vision_config=siglip(num_image_tokens=16),
        text_config=text,
        image_token_index=ID["<image>"],
        projection_dim=WIDTH,
    )
    pictures = pil("siglip", "SiglipImageProcessorPil")(size={"height": 56, "width": 56})
    pictures.image_seq_length = 16
    network = hf.PaliGemmaForConditionalGeneration(config)
    return network, hf.PaliGemmaProcessor(pictures, tokenizer(image_token="<image>"))


def paligemma() -> tuple[Any, Any]:
    return _paligemma(hf.GemmaConfig(**{**TEXT, "head_dim": 8, "tie_word_embeddings": True}))


def paligemma2() -> tuple[Any, Any]:
    return _paligemma(
        hf.Gemma2Config(
            **{**TEXT, "head_dim": 8, "tie_word_embeddings": True, "sliding_window": 16, "query_pre_attn_scalar": 8}
        )
    )


def gemma3() -> tuple[Any, Any]:
    config = hf.Gemma3Config(
        vision_config=siglip(),
        text_config=hf.Gemma3TextConfig(
            **{**TEXT, "head_dim": 8, "tie_word_embeddings": True, "sliding_window": 16, "query_pre_attn_scalar": 8}
        ),
        mm_tokens_per_image=4,
        boi_token_index=ID["<start_of_image>"],
        eoi_token_index=ID["<end_of_image>"],
        image_token_index=ID["<image_soft_token>"],
    )
    pictures = pil("gemma3", "Gemma3ImageProcessorPil")(size={"height": 56, "width": 56})
    words = tokenizer(boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>")
    return hf.Gemma3ForConditionalGeneration(config), hf.Gemma3Processor(pictures, words, image_seq_length=4)


def deepseek_vl() -> tuple[Any, Any]:
    config = hf.DeepseekVLConfig(
        vision_config=siglip(), text_config=hf.LlamaConfig(**TEXT), image_token_id=ID["<image_placeholder>"]
    )
    pictures = pil("deepseek_vl", "DeepseekVLImageProcessorPil")(size={"height": 56, "width": 56}, min_size=14)
    words = tokenizer(image_token="<image_placeholder>")
    return hf.DeepseekVLForConditionalGeneration(config), hf.DeepseekVLProcessor(pictures, words, num_image_tokens=16)


def janus() -> tuple[Any, Any]:
    config = hf.JanusConfig(
        vision_config={
            "hidden_size": 24,
            "mlp_ratio": 2.0,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
            "projection_dim": WIDTH,
            "depth": 2,
            "num_image_tokens": 16,
        },
        vq_config={
            "embed_dim": 8,
            "num_embeddings": 32,
            "z_channels": 16,
            "latent_channels": 16,
            "base_channels": 32,
            "num_patches": 4,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "projection_dim": WIDTH,
            "image_token_embed_dim": WIDTH,
        },
        text_config=hf.LlamaConfig(**TEXT),
        image_token_id=ID["<image_placeholder>"],
    )
    pictures = pil("janus", "JanusImageProcessorPil")(size={"height": 56, "width": 56}, min_size=14)
    words = tokenizer(image_token="<image_placeholder>", boi_token="<begin>", eoi_token="<end>")
    return hf.JanusForConditionalGeneration(config), hf.JanusProcessor(pictures, words, num_image_tokens=16)


def chameleon() -> tuple[Any, Any]:
    mapping = {"<image>": ID["<image>"], **{f"IMGIMG{chr(65 + i)}Z": 180 + i for i in range(8)}}
    config = hf.ChameleonConfig(
        **{**TEXT, "swin_norm": False},
        vq_config={
            "embed_dim": 8,
            "num_embeddings": 8,
            "latent_channels": 8,
            "resolution": 56,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1],
            "num_res_blocks": 1,
        },
        vocabulary_map=mapping,
    )
    pictures = pil("chameleon", "ChameleonImageProcessorPil")(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}
    )
    return hf.ChameleonForConditionalGeneration(config), parts(pictures, "<image>")
