"""Architecture, vocabulary and processor of the embedded model: a LLaVA with 3 M parameters.

CLIP vision tower (112 x 112 pixels, 7 x 7 patches, 4 layers) -> two-layer projector -> Llama decoder (6 layers, 8 heads).
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from concepts.scenes.icons import COLORS, NOUNS
from concepts.scenes.scene import SIDE

PATCH = 16
EMBEDDING_SCALE = 10.0
"""Factor of the usual initialization of word embeddings; their length is then about that of a layer's contribution."""
GRID = SIDE // PATCH
LIKENESS_SCALE = 3.0
"""Factor of the usual initialization of query weights in the layers that read the image."""
READING = 2
"""First layer that reads the image."""
BOS, EOS, PAD, UNK, IMAGE = "<s>", "</s>", "<pad>", "<unk>", "<image>"
TEMPLATE = "USER: {image}{question} ASSISTANT:"
"""Prompt, up to where the answer begins."""

_WORDS = (
    "USER ASSISTANT : ? . , Is Are What Which Where Describe Answer there a an the in image color column row is of "
    "left right above below top middle bottom yes no and big small object not it this with on you see can do "
    "picture show shows to or one Please"
).split()


def vocabulary() -> list[str]:
    """Return all tokens in the order of their ids."""
    return list(dict.fromkeys(chain((PAD, BOS, EOS, UNK, IMAGE), _WORDS, COLORS, NOUNS)))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the word-level tokenizer: each word and each punctuation mark is a token; ``<s>`` is prepended."""
    ids = {word: i for i, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[^\w\s]"), "isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, ids[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_max_length=256,
    )


def build_processor() -> LlavaProcessor:
    """Return the processor, which needs only Pillow and numpy."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    pictures = CLIPImageProcessorPil(
        do_resize=True,
        size={"height": SIDE, "width": SIDE},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
    )


def build_config() -> LlavaConfig:
    """Return the model's configuration."""
    words = vocabulary()
    special: dict[str, Any] = {
        f"{name}_token_id": words.index(token) for name, token in (("bos", BOS), ("eos", EOS), ("pad", PAD))
    }
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=SIDE,
            patch_size=PATCH,
            projection_dim=128,
        ),
        text_config=LlamaConfig(
            vocab_size=len(words),
            hidden_size=192,
            intermediate_size=384,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            **special,
        ),
        image_token_index=words.index(IMAGE),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=GRID * GRID,
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
        **special,
    )


def build_model(seed: int = 0) -> LlavaForConditionalGeneration:
    """Return an untrained model with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(build_config())
    with torch.no_grad():
        # With the usual length, the first layers, trained on text alone, dominate the embeddings: "big" and "small" became 90 %
        # similar, and with these layers frozen, later layers did not learn to distinguish them.
        model.model.language_model.embed_tokens.weight.mul_(EMBEDDING_SCALE)
        # A head that initially attends to tokens similar to the query matches words and patches earlier in training. With
        # independent queries and keys training also succeeds, somewhat later.
        for layer in model.model.language_model.layers[READING:]:
            layer.self_attn.q_proj.weight.mul_(LIKENESS_SCALE)
            layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)
    return model.eval()
