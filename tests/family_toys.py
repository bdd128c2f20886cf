"""A tiny random model of every family, with a processor that needs Pillow only."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers as hf
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lvlm.processing import Parts
from lvlm.tiny.architecture import vocabulary

WIDTH, LAYERS, HEADS = 32, 3, 4
SPECIAL = (
    "<image>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<fake_token_around_image>",
    "<global-img>",
    *(f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5)),
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
    "<image_placeholder>",
    "</image>",
    "<|image_start|>",
    "<|image_end|>",
    "<|patch|>",
    "<|tile_x_separator|>",
    "<|tile_y_separator|>",
    "[IMG]",
    "[IMG_BREAK]",
    "[IMG_END]",
    "\n",
    "<sep>",
)
WORDS = tuple(dict.fromkeys((*vocabulary(), *SPECIAL)))
ID = {word: i for i, word in enumerate(WORDS)}
TEXT: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": ID["<s>"],
    "eos_token_id": ID["</s>"],
    "pad_token_id": ID["<pad>"],
    "tie_word_embeddings": False,
}
CLIP: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}


def tokenizer(**extra: str) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that knows the placeholders of every family."""
    made = Tokenizer(models.WordLevel(dict(ID), unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[^\w\s]"), "isolated")]
    )
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", ID["<s>"])]
    )
    made.add_special_tokens([AddedToken(word, normalized=False) for word in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        sep_token="<sep>",
        extra_special_tokens=extra or None,
        model_max_length=4096,
    )


def _pil(module: str, name: str) -> Any:
    from importlib import import_module

    return getattr(import_module(f"transformers.models.{module}.image_processing_pil_{module}"), name)


def _fixed(side: int = 56, **more: Any) -> Any:
    return _pil("clip", "CLIPImageProcessorPil")(
        do_resize=True, size={"height": side, "width": side}, do_center_crop=False, **more
    )


def _parts(image_processor: Any, image_token: str) -> Any:
    return Parts(tokenizer(), image_processor, image_token)


def _clip(**more: Any) -> Any:
    return hf.CLIPVisionConfig(**{**CLIP, "projection_dim": 24, **more})


def _siglip(**more: Any) -> Any:
    return hf.SiglipVisionConfig(**{**CLIP, "vision_use_head": False, **more})


# -- the families ------------------------------------------------------------------------------------------------------


def llava() -> tuple[Any, Any]:
    config = hf.LlavaConfig(
        vision_config=_clip(),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_index=ID["<image>"],
        vision_feature_layer=-1,
    )
    processor = hf.LlavaProcessor(
        image_processor=_pil("clip", "CLIPImageProcessorPil")(
            size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}
        ),
        tokenizer=tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )
    return hf.LlavaForConditionalGeneration(config), processor


PINPOINTS = [[56, 112], [112, 56], [112, 112]]


def llava_next() -> tuple[Any, Any]:
    config = hf.LlavaNextConfig(
        vision_config=_clip(),
        text_config=hf.MistralConfig(**TEXT),
        image_token_index=ID["<image>"],
        vision_feature_layer=-1,
        image_grid_pinpoints=PINPOINTS,
    )
    processor = hf.LlavaNextProcessor(
        image_processor=_pil("llava_next", "LlavaNextImageProcessorPil")(
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
        vision_config=_siglip(),
        text_config=hf.Qwen2Config(**TEXT),
        image_token_index=ID["<image>"],
        video_token_index=255,
        vision_feature_layer=-1,
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_9",
    )
    pictures = _pil("llava_onevision", "LlavaOnevisionImageProcessorPil")(
        size={"height": 56, "width": 56}, image_grid_pinpoints=PINPOINTS
    )
    return hf.LlavaOnevisionForConditionalGeneration(config), _parts(pictures, "<image>")


_QWEN_VISION: dict[str, Any] = {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3}
_QWEN_TOKENS: dict[str, Any] = {
    "image_token_id": ID["<|image_pad|>"],
    "video_token_id": ID["<|video_pad|>"],
    "vision_start_token_id": ID["<|vision_start|>"],
    "vision_end_token_id": ID["<|vision_end|>"],
}
_ROPE: dict[str, Any] = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}


def _qwen_pictures(patch: int = 14) -> Any:
    return _pil("qwen2_vl", "Qwen2VLImageProcessorPil")(
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
    return hf.Qwen2VLForConditionalGeneration(config), _parts(_qwen_pictures(), "<|image_pad|>")


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
    return hf.Qwen2_5_VLForConditionalGeneration(config), _parts(_qwen_pictures(), "<|image_pad|>")


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
    return hf.Qwen3VLForConditionalGeneration(config), _parts(_qwen_pictures(16), "<|image_pad|>")


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
    pictures = _pil("glm4v", "Glm4vImageProcessorPil")(
        size={"shortest_edge": 28 * 28 * 2, "longest_edge": 28 * 28 * 2 * 20},
        patch_size=14,
        merge_size=2,
        temporal_patch_size=2,
    )
    return hf.Glm4vForConditionalGeneration(config), _parts(pictures, "<|image|>")


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
    pictures = _pil(kind, name)(size={"longest_edge": 112}, max_image_size={"longest_edge": 56})
    if kind == "idefics3":
        return network(config), hf.Idefics3Processor(pictures, tokenizer(), image_seq_len=4)
    return network(config), _parts(pictures, "<image>")


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
    pictures = _pil("got_ocr2", "GotOcr2ImageProcessorPil")(
        size={"height": 56, "width": 56}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    return hf.InternVLForConditionalGeneration(config), _parts(pictures, "<IMG_CONTEXT>")


def _paligemma(text: Any) -> tuple[Any, Any]:
    config = hf.PaliGemmaConfig(
        vision_config=_siglip(num_image_tokens=16),
        text_config=text,
        image_token_index=ID["<image>"],
        projection_dim=WIDTH,
    )
    pictures = _pil("siglip", "SiglipImageProcessorPil")(size={"height": 56, "width": 56})
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
        vision_config=_siglip(),
        text_config=hf.Gemma3TextConfig(
            **{**TEXT, "head_dim": 8, "tie_word_embeddings": True, "sliding_window": 16, "query_pre_attn_scalar": 8}
        ),
        mm_tokens_per_image=4,
        boi_token_index=ID["<start_of_image>"],
        eoi_token_index=ID["<end_of_image>"],
        image_token_index=ID["<image_soft_token>"],
    )
    pictures = _pil("gemma3", "Gemma3ImageProcessorPil")(size={"height": 56, "width": 56})
    words = tokenizer(boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>")
    return hf.Gemma3ForConditionalGeneration(config), hf.Gemma3Processor(pictures, words, image_seq_length=4)


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
    pictures = _pil("mllama", "MllamaImageProcessorPil")(size={"height": 56, "width": 56}, max_image_tiles=4)
    return hf.MllamaForConditionalGeneration(config), hf.MllamaProcessor(pictures, tokenizer(image_token="<|image|>"))


_QFORMER: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "encoder_hidden_size": 24,
    "vocab_size": 256,
}


def _opt() -> Any:
    return hf.OPTConfig(
        vocab_size=256,
        hidden_size=WIDTH,
        word_embed_proj_dim=WIDTH,
        ffn_dim=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=256,
        bos_token_id=ID["<s>"],
        eos_token_id=ID["</s>"],
        pad_token_id=ID["<pad>"],
    )


def _blip(network: Any, config: Any, text: Any, processor: Any) -> tuple[Any, Any]:
    made = config(
        vision_config=dict(CLIP),
        qformer_config=dict(_QFORMER),
        text_config=text.to_dict(),
        num_query_tokens=4,
        image_token_index=ID["<image>"],
        image_token_id=ID["<image>"],
    )
    return network(made), processor


def _blip_pictures() -> Any:
    return _pil("blip", "BlipImageProcessorPil")(size={"height": 56, "width": 56})


def blip2_opt() -> tuple[Any, Any]:
    return _blip(
        hf.Blip2ForConditionalGeneration,
        hf.Blip2Config,
        _opt(),
        hf.Blip2Processor(_blip_pictures(), tokenizer(), num_query_tokens=4),
    )


def blip2_llama() -> tuple[Any, Any]:
    return _blip(
        hf.Blip2ForConditionalGeneration,
        hf.Blip2Config,
        hf.LlamaConfig(**TEXT),
        hf.Blip2Processor(_blip_pictures(), tokenizer(), num_query_tokens=4),
    )


def _t5() -> Any:
    settings: dict[str, Any] = {
        "vocab_size": 256,
        "d_model": WIDTH,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": LAYERS,
        "num_decoder_layers": LAYERS,
        "num_heads": HEADS,
        "pad_token_id": ID["<pad>"],
        "eos_token_id": ID["</s>"],
        "decoder_start_token_id": ID["<pad>"],
    }
    return hf.T5Config(**settings)


def _instruct(text: Any) -> tuple[Any, Any]:
    processor = hf.InstructBlipProcessor(
        _blip_pictures(), tokenizer(image_token="<image>"), tokenizer(), num_query_tokens=4
    )
    return _blip(hf.InstructBlipForConditionalGeneration, hf.InstructBlipConfig, text, processor)


def instructblip_llama() -> tuple[Any, Any]:
    return _instruct(hf.LlamaConfig(**TEXT))


def instructblip_t5() -> tuple[Any, Any]:
    return _instruct(_t5())


def deepseek_vl() -> tuple[Any, Any]:
    config = hf.DeepseekVLConfig(
        vision_config=_siglip(), text_config=hf.LlamaConfig(**TEXT), image_token_id=ID["<image_placeholder>"]
    )
    pictures = _pil("deepseek_vl", "DeepseekVLImageProcessorPil")(size={"height": 56, "width": 56}, min_size=14)
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
    pictures = _pil("janus", "JanusImageProcessorPil")(size={"height": 56, "width": 56}, min_size=14)
    words = tokenizer(image_token="<image_placeholder>", boi_token="<begin>", eoi_token="<end>")
    return hf.JanusForConditionalGeneration(config), hf.JanusProcessor(pictures, words, num_image_tokens=16)


def kosmos2() -> tuple[Any, Any]:
    config = hf.Kosmos2Config(
        text_config={
            "vocab_size": 256,
            "embed_dim": WIDTH,
            "layers": LAYERS,
            "ffn_dim": 48,
            "attention_heads": HEADS,
            "max_position_embeddings": 256,
            "pad_token_id": ID["<pad>"],
            "bos_token_id": ID["<s>"],
            "eos_token_id": ID["</s>"],
        },
        vision_config=dict(CLIP),
        latent_query_num=4,
    )
    return hf.Kosmos2ForConditionalGeneration(config), _parts(_fixed(), "<image>")


def florence2() -> tuple[Any, Any]:
    config = hf.Florence2Config(
        vision_config={
            "depths": [1, 1],
            "patch_size": [7, 3],
            "patch_stride": [4, 2],
            "patch_padding": [3, 1],
            "patch_prenorm": [False, True],
            "embed_dim": [16, 32],
            "num_heads": [2, 4],
            "num_groups": [2, 4],
            "window_size": 4,
            "projection_dim": WIDTH,
            "max_temporal_embeddings": 4,
            "max_position_embeddings": 16,
            "drop_path_rate": 0.0,
        },
        text_config={
            "model_type": "bart",
            "vocab_size": 256,
            "d_model": WIDTH,
            "encoder_layers": 2,
            "decoder_layers": LAYERS,
            "encoder_attention_heads": HEADS,
            "decoder_attention_heads": HEADS,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 256,
            "pad_token_id": ID["<pad>"],
            "bos_token_id": ID["<s>"],
            "eos_token_id": ID["</s>"],
            "decoder_start_token_id": ID["</s>"],
            "forced_bos_token_id": None,
        },
        image_token_id=ID["<image>"],
    )
    return hf.Florence2ForConditionalGeneration(config), _parts(_fixed(), "<image>")


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
    pictures = _pil("chameleon", "ChameleonImageProcessorPil")(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}
    )
    return hf.ChameleonForConditionalGeneration(config), _parts(pictures, "<image>")


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
    return hf.Llama4ForConditionalGeneration(config), _parts(None, "<|image|>")


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
    pictures = _pil("pixtral", "PixtralImageProcessorPil")(
        size={"longest_edge": 112}, patch_size={"height": 14, "width": 14}
    )
    return hf.Mistral3ForConditionalGeneration(config), _parts(pictures, "[IMG]")


BUILDERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    f.__name__: f
    for f in (
        llava,
        llava_next,
        llava_onevision,
        qwen2_vl,
        qwen2_5_vl,
        qwen3_vl,
        glm4v,
        idefics3,
        smolvlm,
        internvl,
        paligemma,
        paligemma2,
        gemma3,
        mllama,
        blip2_opt,
        blip2_llama,
        instructblip_llama,
        instructblip_t5,
        deepseek_vl,
        janus,
        kosmos2,
        florence2,
        chameleon,
        llama4,
        mistral3,
    )
}


@cache
def build(name: str) -> tuple[Any, Any]:
    """Return a family's model, with weights that matter, and its processor."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, processor = BUILDERS[name]()
        with torch.no_grad():
            for parameter in model.parameters():
                # At initialisation gates are closed, biases nothing and norms the same everywhere: errors would not show.
                parameter.add_(torch.randn_like(parameter) * (0.05 if parameter.ndim > 1 else 0.2))
    return model.eval(), processor
