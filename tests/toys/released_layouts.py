"""Folders of models as their releases have them: legacy settings and names, sharded half-precision weights, real tokenizers.

Weights are random and sizes small; all else has the names, ids and files of the release: ``config.json`` with the keys of its
time, ``preprocessor_config.json`` apart from ``processor_config.json``, the chat template in the file where the release has it.

Chat templates are written for these tests: for a conversation of text and images they give the same text as the released one. The
field `Release.source` names the file in which the released template can be read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.toys.reduce_tokenizers import HERE

_MEAN = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
_TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
}
_CLIP: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
    "projection_dim": 24,
    "vocab_size": 32000,
}
_VICUNA = """
{%- for turn in messages -%}
{{- turn['role'] | upper ~ ': ' if turn['role'] != 'system' -}}
{%- for part in turn['content'] if part['type'] == 'image' -%}{{- '<image>\\n' -}}{%- endfor -%}
{%- for part in turn['content'] if part['type'] == 'text' -%}
{%- if turn['role'] == 'assistant' -%}{%- generation -%}{{- part['text'] ~ ' ' -}}{%- endgeneration -%}
{%- else -%}{{- part['text'] ~ ' ' -}}{%- endif -%}
{%- endfor -%}
{%- endfor -%}
{{- 'ASSISTANT:' if add_generation_prompt -}}
"""
_MISTRAL = """
{%- for turn in messages -%}
{%- if turn['role'] == 'user' -%}
{{- '[INST] ' -}}
{%- for part in turn['content'] if part['type'] == 'image' -%}{{- '<image>\\n' -}}{%- endfor -%}
{%- for part in turn['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
{{- ' [/INST]' -}}
{%- elif turn['role'] == 'assistant' -%}{{- ' ' ~ turn['content'][0]['text'] ~ '</s> ' -}}
{%- else -%}{{- raise_exception('only the roles user and assistant are known') -}}{%- endif -%}
{%- endfor -%}
"""
_QWEN = """
{%- set seen = namespace(pictures=0) -%}
{%- for turn in messages -%}
{%- if loop.first and turn['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{{- '<|im_start|>' ~ turn['role'] ~ '\\n' -}}
{%- if turn['content'] is string -%}{{- turn['content'] -}}
{%- else -%}
{%- for part in turn['content'] -%}
{%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}
{%- set seen.pictures = seen.pictures + 1 -%}
{{- 'Picture ' ~ seen.pictures ~ ': ' if add_vision_id -}}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif 'text' in part -%}{{- part['text'] -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{{- '<|im_start|>assistant\\n' if add_generation_prompt -}}
"""
_LLAMA = """
{{- bos_token -}}
{%- set first = messages[0] -%}
{%- set found = namespace(image=false) -%}
{%- for turn in messages -%}{%- for part in turn['content'] -%}
{%- if part['type'] == 'image' -%}{%- set found.image = true -%}{%- endif -%}
{%- endfor -%}{%- endfor -%}
{%- if found.image and first['role'] == 'system' -%}
{{- raise_exception('a prompt with images cannot have a system message') -}}
{%- endif -%}
{%- if not found.image -%}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\nToday Date: ' -}}
{{- (strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024') ~ '\\n\\n<|eot_id|>' -}}
{%- endif -%}
{%- for turn in messages -%}
{{- '<|start_header_id|>' ~ turn['role'] ~ '<|end_header_id|>\\n\\n' -}}
{%- if turn['content'] is string -%}{{- turn['content'] -}}
{%- else -%}
{%- for part in turn['content'] -%}{{- '<|image|>' if part['type'] == 'image' else part['text'] -}}{%- endfor -%}
{%- endif -%}
{{- '<|eot_id|>' -}}
{%- endfor -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' if add_generation_prompt -}}
"""
_INTERN = """
{%- for turn in messages -%}
{{- '<|im_start|>' ~ turn['role'] ~ '\\n' -}}
{%- if turn['content'] is string -%}{{- turn['content'] -}}
{%- else -%}
{%- for part in turn['content'] -%}
{{- '<IMG_CONTEXT>\\n' if part['type'] == 'image' else part['text'] -}}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{{- '<|im_start|>assistant\\n' if add_generation_prompt -}}
"""
_OUTER = {r"^model\.language_model\.": "language_model.model.", r"^lm_head\.": "language_model.lm_head."}
_INNER = {r"^model\.language_model\.": "model.", r"^model\.visual\.": "visual."}
_LLAVA_NAMES = {
    **_OUTER,
    r"^model\.vision_tower\.": "vision_tower.vision_model.",
    r"^model\.(multi_modal_projector|image_newline)": r"\1",
}


@dataclass(frozen=True)
class Release:
    """One released layout."""

    model_type: str
    tokenizer: str
    """Name of a tokenizer of `reduce_tokenizers`."""
    tokenizer_config: Mapping[str, Any]
    config: Mapping[str, Any]
    pictures: Mapping[str, Any]
    """``preprocessor_config.json``."""
    template: str
    source: str
    """Where the released template can be read."""
    prompt: str
    """Prompt of the question ``Is there a dog?``, as the released template writes it."""
    image: str
    """Text of the image token."""
    names: Mapping[str, str]
    """Patterns of names of weights, and how the release writes them."""
    template_in: str = "chat_template.json"
    """File with the template: also ``chat_template.jinja`` or ``tokenizer_config.json``."""
    processor: Mapping[str, Any] | None = None
    """``processor_config.json``, if the release has one."""
    added: Mapping[str, int] = field(default_factory=dict)
    """Further added tokens, with their ids."""
    leftovers: tuple[str, ...] = ()
    """Tensors in the release that the model does not use."""
    dtype: str = "bfloat16"


RELEASES: dict[str, Release] = {
    "LLaVA-1.5": Release(
        model_type="llava",
        tokenizer="llama2",
        tokenizer_config={
            "tokenizer_class": "LlamaTokenizer",
            "legacy": False,
            "add_bos_token": True,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
            "image_token": "<image>",
            "processor_class": "LlavaProcessor",
        },
        config={
            "architectures": ["LlavaForConditionalGeneration"],
            "ignore_index": -100,
            "image_token_index": 32000,
            "image_seq_length": 16,
            "pad_token_id": 32001,
            "projector_hidden_act": "gelu",
            "text_config": {
                **_TEXT,
                "model_type": "llama",
                "vocab_size": 32064,
                "_name_or_path": "lmsys/vicuna-7b-v1.5",
            },
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "vision_config": _CLIP,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "vocab_size": 32064,
        },
        pictures={
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "LlavaProcessor",
            "size": {"shortest_edge": 56},
            "crop_size": {"height": 56, "width": 56},
            "do_center_crop": True,
            "resample": 3,
            "rescale_factor": 0.00392156862745098,
            **_MEAN,
        },
        processor={
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": 14,
            "processor_class": "LlavaProcessor",
            "vision_feature_select_strategy": "default",
        },
        template=_VICUNA,
        source="huggingface/transformers: tests/models/llava/test_processing_llava.py",
        prompt="USER: <image>\nIs there a dog? ASSISTANT:",
        image="<image>",
        names=_LLAVA_NAMES,
        leftovers=("language_model.model.layers.0.self_attn.rotary_emb.inv_freq",),
        dtype="float16",
    ),
    "LLaVA-NeXT": Release(
        model_type="llava_next",
        tokenizer="mistral",
        tokenizer_config={
            "tokenizer_class": "LlamaTokenizer",
            "legacy": True,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
            "processor_class": "LlavaNextProcessor",
        },
        config={
            "architectures": ["LlavaNextForConditionalGeneration"],
            "ignore_index": -100,
            "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]],
            "image_token_index": 32000,
            "projector_hidden_act": "gelu",
            "text_config": {**_TEXT, "model_type": "mistral", "vocab_size": 32064, "sliding_window": None},
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "use_image_newline_parameter": True,
            "vision_config": _CLIP,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
        },
        pictures={
            "image_processor_type": "LlavaNextImageProcessor",
            "aspect_ratio_setting": "anyres",
            "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]],
            "size": {"shortest_edge": 56},
            "crop_size": {"height": 56, "width": 56},
            "do_pad": True,
            "resample": 3,
            **_MEAN,
        },
        processor={
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": 14,
            "processor_class": "LlavaNextProcessor",
            "vision_feature_select_strategy": "default",
        },
        template=_MISTRAL,
        source="from memory; its prompt is in huggingface/transformers: docs/source/en/model_doc/llava_next.md",
        prompt="[INST] <image>\nIs there a dog? [/INST]",
        image="<image>",
        names=_LLAVA_NAMES,
        dtype="float16",
    ),
    "Qwen2-VL": Release(
        model_type="qwen2_vl",
        tokenizer="qwen3",
        tokenizer_config={
            "tokenizer_class": "Qwen2Tokenizer",
            "add_prefix_space": False,
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
        },
        config={
            "architectures": ["Qwen2VLForConditionalGeneration"],
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "vision_start_token_id": 151652,
            "vision_end_token_id": 151653,
            "vision_token_id": 151654,
            "image_token_id": 151655,
            "video_token_id": 151656,
            **_TEXT,
            "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "use_sliding_window": False,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "vision_config": {
                "depth": 2,
                "embed_dim": 24,
                "mlp_ratio": 2,
                "num_heads": 2,
                "in_chans": 3,
                "hidden_size": 32,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "spatial_patch_size": 14,
                "temporal_patch_size": 2,
            },
            "vocab_size": 151936,
        },
        pictures={
            "min_pixels": 3136,
            "max_pixels": 12845056,
            "size": {"min_pixels": 3136, "max_pixels": 12845056},
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2VLProcessor",
            **_MEAN,
        },
        template=_QWEN,
        source="wangqi/Jinja: Tests/Templates/VisionTests.swift",
        prompt=(
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|>"
            "<|vision_end|>Is there a dog?<|im_end|>\n<|im_start|>assistant\n"
        ),
        image="<|image_pad|>",
        names=_INNER,
        template_in="tokenizer_config.json",
    ),
    "Qwen2.5-VL": Release(
        model_type="qwen2_5_vl",
        tokenizer="qwen3",
        tokenizer_config={
            "tokenizer_class": "Qwen2Tokenizer",
            "add_bos_token": False,
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
        },
        config={
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "vision_start_token_id": 151652,
            "vision_end_token_id": 151653,
            "vision_token_id": 151654,
            "image_token_id": 151655,
            "video_token_id": 151656,
            **_TEXT,
            "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
            "rope_theta": 1000000.0,
            "use_sliding_window": False,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vision_config": {
                "depth": 3,
                "hidden_act": "silu",
                "hidden_size": 24,
                "intermediate_size": 40,
                "num_heads": 2,
                "in_chans": 3,
                "out_hidden_size": 32,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "spatial_patch_size": 14,
                "window_size": 56,
                "fullatt_block_indexes": [1],
                "tokens_per_second": 2,
                "temporal_patch_size": 2,
            },
            "vocab_size": 152064,
        },
        pictures={
            "min_pixels": 3136,
            "max_pixels": 12845056,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
            **_MEAN,
        },
        template=_QWEN,
        source="wangqi/Jinja: Tests/Templates/VisionTests.swift (the template of Qwen2-VL, which Qwen2.5-VL has too)",
        prompt=(
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|>"
            "<|vision_end|>Is there a dog?<|im_end|>\n<|im_start|>assistant\n"
        ),
        image="<|image_pad|>",
        names=_INNER,
    ),
    "Llama-3.2-Vision": Release(
        model_type="mllama",
        tokenizer="llama3_1",
        tokenizer_config={
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|eot_id|>",
            "pad_token": "<|reserved_special_token_2|>",
            "model_input_names": ["input_ids", "attention_mask"],
        },
        config={
            "architectures": ["MllamaForConditionalGeneration"],
            "image_token_index": 128256,
            "text_config": {
                **_TEXT,
                "model_type": "mllama_text_model",
                "num_hidden_layers": 4,
                "cross_attention_layers": [1, 3],
                "bos_token_id": 128000,
                "eos_token_id": [128001, 128008, 128009],
                "pad_token_id": 128004,
                "rope_scaling": {
                    "factor": 8.0,
                    "high_freq_factor": 4.0,
                    "low_freq_factor": 1.0,
                    "original_max_position_embeddings": 8192,
                    "rope_type": "llama3",
                },
                "rope_theta": 500000.0,
                "tie_word_embeddings": False,
                "torch_dtype": "bfloat16",
                "vocab_size": 128256,
            },
            "torch_dtype": "bfloat16",
            "vision_config": {
                "model_type": "mllama_vision_model",
                "attention_heads": 2,
                "hidden_size": 24,
                "image_size": 56,
                "intermediate_size": 40,
                "intermediate_layers_indices": [0, 1],
                "max_num_tiles": 4,
                "num_global_layers": 1,
                "num_hidden_layers": 2,
                "patch_size": 14,
                "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
                "vision_output_dim": 72,
            },
        },
        pictures={
            "image_processor_type": "MllamaImageProcessor",
            "size": {"height": 56, "width": 56},
            "max_image_tiles": 4,
            "do_pad": True,
            "resample": 2,
            **_MEAN,
        },
        template=_LLAMA,
        source="wangqi/Jinja: Tests/Templates/VisionTests.swift",
        prompt=(
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<|image|>Is there a dog?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
        image="<|image|>",
        names={**_OUTER, r"^model\.(vision_model|multi_modal_projector)\.": r"\1."},
    ),
    "InternVL3": Release(
        model_type="internvl",
        tokenizer="qwen3",
        tokenizer_config={
            "tokenizer_class": "Qwen2Tokenizer",
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
            "extra_special_tokens": {
                "context_image_token": "<IMG_CONTEXT>",
                "start_image_token": "<img>",
                "end_image_token": "</img>",
                "video_token": "<video>",
            },
            "processor_class": "InternVLProcessor",
        },
        config={
            "architectures": ["InternVLForConditionalGeneration"],
            "downsample_ratio": 0.5,
            "image_seq_length": 4,
            "image_token_id": 151667,
            "projector_hidden_act": "gelu",
            "text_config": {
                **_TEXT,
                "model_type": "qwen2",
                "vocab_size": 151674,
                "bos_token_id": 151643,
                "eos_token_id": 151645,
                "tie_word_embeddings": True,
            },
            "torch_dtype": "bfloat16",
            "vision_config": {
                "model_type": "internvl_vision",
                "attention_bias": True,
                "hidden_size": 24,
                "image_size": [56, 56],
                "intermediate_size": 40,
                "layer_scale_init_value": 0.1,
                "num_attention_heads": 2,
                "num_hidden_layers": 2,
                "patch_size": [14, 14],
                "use_absolute_position_embeddings": True,
            },
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default",
        },
        pictures={
            "image_processor_type": "GotOcr2ImageProcessor",
            "crop_to_patches": False,
            "size": {"height": 56, "width": 56},
            "min_patches": 1,
            "max_patches": 12,
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
            "processor_class": "InternVLProcessor",
        },
        processor={"image_seq_length": 4, "processor_class": "InternVLProcessor"},
        template=_INTERN,
        source="huggingface/transformers: src/transformers/models/internvl/convert_internvl_weights_to_hf.py",
        prompt="<|im_start|>user\n<IMG_CONTEXT>\nIs there a dog?<|im_end|>\n<|im_start|>assistant\n",
        image="<IMG_CONTEXT>",
        names={**_OUTER, r"^model\.(vision_tower|multi_modal_projector)\.": r"\1."},
        template_in="chat_template.jinja",
        added={"<img>": 151665, "</img>": 151666, "<IMG_CONTEXT>": 151667, "<video>": 151674},
    ),
}


def write_release(name: str, folder: Path, document: Mapping[str, Any] | None = None) -> Release:
    """Write the folder of a release; `document` is its full tokenizer, by default the reduced one."""
    release = RELEASES[name]
    folder.mkdir(parents=True, exist_ok=True)
    write_texts(release, folder, document)
    _write_weights(release, folder)
    return release


def write_texts(release: Release, folder: Path, document: Mapping[str, Any] | None = None) -> None:
    """Write all files of a release except its weights."""
    words = _with_tokens(
        release, document or json.loads((HERE / f"{release.tokenizer}.json").read_text(encoding="utf-8"))
    )
    added = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in words["added_tokens"]}
    settings = {**release.tokenizer_config, "added_tokens_decoder": added, "model_max_length": 4096}
    template = release.template.strip()
    if release.template_in == "tokenizer_config.json":
        settings["chat_template"] = template
    elif release.template_in == "chat_template.json":
        _write(folder / "chat_template.json", {"chat_template": template})
    else:
        (folder / release.template_in).write_text(template, encoding="utf-8")
    _write(
        folder / "config.json", {**release.config, "model_type": release.model_type, "transformers_version": "4.41.0"}
    )
    _write(folder / "preprocessor_config.json", release.pictures)
    if release.processor is not None:
        _write(folder / "processor_config.json", release.processor)
    _write(folder / "tokenizer.json", words)
    _write(folder / "tokenizer_config.json", settings)


def _with_tokens(release: Release, document: Mapping[str, Any]) -> dict[str, Any]:
    """Add a release's own tokens in place of those that the tokenizer has at their ids."""
    model, ids = document["model"], {*release.added.values()}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    mine = [{"id": i, "content": token, **flags, "special": True} for token, i in release.added.items()]
    others = [token for token in document["added_tokens"] if token["id"] not in ids]
    vocabulary = {token: i for token, i in model["vocab"].items() if i not in ids} | dict(release.added)
    added = sorted([*others, *mine], key=lambda token: token["id"])
    return {**document, "added_tokens": added, "model": {**model, "vocab": vocabulary}}


@cache
def _weights(model_type: str, config: str) -> dict[str, torch.Tensor]:
    """Return random weights of a model with this configuration, under the names of this release of transformers."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    loaded = AutoConfig.for_model(model_type, **json.loads(config))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = AutoModelForImageTextToText.from_config(loaded, dtype=torch.float32)
        for parameter in network.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.02)
    tied = {"lm_head.weight"} if network.lm_head.weight is network.get_input_embeddings().weight else set()
    return {k: v for k, v in network.state_dict().items() if k not in tied}


def released_name(release: Release, name: str) -> str:
    """Return the name of a weight in the release's files."""
    for pattern, written in release.names.items():
        name = re.sub(pattern, written, name)
    return name


def _write_weights(release: Release, folder: Path) -> None:
    """Write the weights in two files with an index, in the release's number type."""
    config = json.dumps({k: v for k, v in release.config.items() if k not in ("architectures", "torch_dtype")})
    dtype: Callable[[torch.Tensor], torch.Tensor] = lambda x: x.to(getattr(torch, release.dtype)).contiguous()  # noqa: E731
    weights = {released_name(release, k): dtype(v) for k, v in _weights(release.model_type, config).items()}
    weights |= {name: torch.ones(4) for name in release.leftovers}
    names, index = sorted(weights), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({n: weights[n] for n in part}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    size = sum(w.nbytes for w in weights.values())
    _write(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": index})


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, ensure_ascii=False, indent=1), encoding="utf-8")
