"""Tiny random models of families whose decoder reads queries, or an encoder."""

from __future__ import annotations

from typing import Any

import transformers as hf

from tests.toys.model_parts import CLIP, HEADS, ID, LAYERS, TEXT, WIDTH, fixed, parts, pil, tokenizer

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
    configuration = config(
        vision_config=dict(CLIP),
        qformer_config=dict(_QFORMER),
        text_config=text.to_dict(),
        num_query_tokens=4,
        image_token_index=ID["<image>"],
        image_token_id=ID["<image>"],
    )
    return network(configuration), processor


def _blip_pictures() -> Any:
    return pil("blip", "BlipImageProcessorPil")(size={"height": 56, "width": 56})


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
    return hf.Kosmos2ForConditionalGeneration(config), parts(fixed(), "<image>")


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
    return hf.Florence2ForConditionalGeneration(config), parts(fixed(), "<image>")
