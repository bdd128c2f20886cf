"""A LLaVA of medium size with random weights, and questions for it; used by benchmarks of cost.

By default the decoder has 16 layers of 8 heads (hidden size 512) and an image has 256 tokens.
"""

from __future__ import annotations

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from concepts import ConceptDataset
from concepts.question import Question
from concepts.scenes.questions import YES_NO, as_example
from concepts.scenes.scene import TEST, generator, sample_scene
from lvlm.tiny.architecture import IMAGE, build_tokenizer, vocabulary

BATCH_SIZE = 8
TEXT = f"Is there a big cat {'or a dog ' * 6}in the image?"
"""A question of 32 tokens, including those of the prompt template."""
HEAD_WIDTH, PATCH_SIZE = 64, 14


def build_network(
    layers: int = 16, heads: int = 8, image_side: int = 16, seed: int = 0, words: int = 8192
) -> LlavaForConditionalGeneration:
    """Build the model with random weights and a vocabulary of `words`; an image has ``image_side ** 2`` tokens."""
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=6,
            num_attention_heads=4,
            image_size=PATCH_SIZE * image_side,
            patch_size=PATCH_SIZE,
            projection_dim=256,
        ),
        text_config=LlamaConfig(
            vocab_size=words,
            hidden_size=HEAD_WIDTH * heads,
            intermediate_size=172 * heads,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=2048,
        ),
        image_token_index=vocabulary().index(IMAGE),
        vision_feature_layer=-1,
        image_seq_length=image_side**2,
    )
    return LlavaForConditionalGeneration(config).eval()


def build_processor(image_side: int = 16) -> LlavaProcessor:
    """Build the model's processor; its image processor needs only Pillow and numpy."""
    side = PATCH_SIZE * image_side
    image_processor = CLIPImageProcessorPil(do_resize=True, size={"height": side, "width": side}, do_center_crop=False)
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 2048
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
    )


def make_questions(count: int, text: str = TEXT) -> ConceptDataset:
    """Return the same question about `count` random scenes."""
    scenes = [sample_scene(generator(TEST, 0, i), f"b{i}") for i in range(count)]
    question = Question(text, "yes", YES_NO, "object", "existence")
    return ConceptDataset("benchmark", tuple(as_example(scene, question, "neutral") for scene in scenes))
