"""What tiny random models of all families are made of: words, sizes, towers, and processors that need Pillow only."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import transformers as hf
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lvlm.encoding.processor import Parts
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
    words = Tokenizer(models.WordLevel(dict(ID), unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[^\w\s]"), "isolated")]
    )
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", ID["<s>"])]
    )
    words.add_special_tokens([AddedToken(word, normalized=False) for word in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        sep_token="<sep>",
        extra_special_tokens=extra or None,
        model_max_length=4096,
    )


def pil(module: str, name: str) -> Any:
    try:
        return getattr(import_module(f"transformers.models.{module}.image_processing_pil_{module}"), name)
    except ModuleNotFoundError:  # before release 5 the one without a suffix is Pillow's
        return getattr(import_module(f"transformers.models.{module}.image_processing_{module}"), name[:-3])


def fixed(side: int = 56, **more: Any) -> Any:
    return pil("clip", "CLIPImageProcessorPil")(
        do_resize=True, size={"height": side, "width": side}, do_center_crop=False, **more
    )


def parts(image_processor: Any, image_token: str) -> Any:
    return Parts(tokenizer(), image_processor, image_token)


def clip(**more: Any) -> Any:
    return hf.CLIPVisionConfig(**{**CLIP, "projection_dim": 24, **more})


def siglip(**more: Any) -> Any:
    return hf.SiglipVisionConfig(**{**CLIP, "vision_use_head": False, **more})
