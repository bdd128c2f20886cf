"""Families by model type; each entry states only what cannot be detected from the model.

A package adds a family without changing this one, by an entry point whose name is the model type::

    [project.entry-points."groundscope.families"]
    my_llava = "my_package:SPEC"
"""

from __future__ import annotations

from torch import nn

from groundscope.core.errors import ModelError
from groundscope.core.registry import Registry
from groundscope.core.text import nearest
from lvlm.family.module_detection import tree
from lvlm.family.specification import ABSENT, FamilySpec, StackSpec

_NONE = StackSpec(ABSENT)
_BART = StackSpec(
    "model.language_model.decoder.layers",
    output_projection="self_attn.out_proj",
    mid_norm="fc1",
    mlp="fc2",
    attention_post_norm="self_attn_layer_norm",
    mlp_post_norm="final_layer_norm",
    cross_attention="encoder_attn",
    cross_output_projection="encoder_attn.out_proj",
    cross_query="encoder_attn.q_proj",
    cross_key="encoder_attn.k_proj",
    cross_value="encoder_attn.v_proj",
    cross_post_norm="encoder_attn_layer_norm",
)
_DAVIT = StackSpec(
    "model.vision_tower.blocks.-1.*",
    attention="window_attn|channel_attn",
    output_projection="window_attn.proj|channel_attn.proj",
    mid_norm="conv2",
    mlp="ffn",
    query="window_attn.qkv|channel_attn.qkv#0",
    key="window_attn.qkv|channel_attn.qkv#1",
    value="window_attn.qkv|channel_attn.qkv#2",
    attention_conv="conv1",
    mlp_conv="conv2",
    layout="picture",
    window="window_attn.window_size",
)
_QWEN_VISUAL = StackSpec(
    "transformer.visual.transformer.resblocks",
    attention="attn",
    output_projection="attn.out_proj",
    mid_norm="ln_2",
    query="attn.in_proj#0/heads",
    key="attn.in_proj#1/heads",
    value="attn.in_proj#2/heads",
    layout="tokens first",
)
_CHATML = "<|im_start|>user\n{image}{question}<|im_end|>\n<|im_start|>assistant\n"
_BRACKETS = "<|vision_start|>{image}<|vision_end|>"

families: Registry[FamilySpec] = Registry(
    "family",
    {
        spec.model_type: spec
        for spec in (
            FamilySpec("llava"),
            FamilySpec("llava_next", "anyres", template="[INST] {image}\n{question} [/INST]", notes="images x tiles"),
            FamilySpec("llava_onevision", "anyres", template=_CHATML, notes="images x tiles"),
            FamilySpec("qwen2_vl", "packed", template=_CHATML, around=_BRACKETS, notes="packed patches, M-RoPE"),
            FamilySpec(
                "qwen2_5_vl",
                "packed",
                template=_CHATML,
                around=_BRACKETS,
                notes="packed, ordered by window",
            ),
            FamilySpec(
                "qwen3_vl",
                "packed",
                template=_CHATML,
                around=_BRACKETS,
                added_after="vision_config.deepstack_visual_indexes",
                notes="DeepStack adds at image positions between the first layers",
            ),
            FamilySpec(
                "glm4v",
                "packed",
                template="[gMASK]<sop><|user|>\n{image}{question}<|assistant|>\n",
                around="<|begin_of_image|>{image}<|end_of_image|>",
                special_tokens=False,
                notes="sandwich norms",
            ),
            FamilySpec("idefics3", "split", template="User:{image}{question}\nAssistant:", notes="tiles and thumbnail"),
            FamilySpec("smolvlm", "split", template="User:{image}{question}\nAssistant:", notes="tiles and thumbnail"),
            FamilySpec("internvl", "crops", template=_CHATML, notes="scaled contributions in the vision tower"),
            FamilySpec(
                "paligemma",
                template="{image}{bos}{question}\n",
                special_tokens=False,
                token_types=False,  # they separate the prompt, with bidirectional attention, from an answer to train on
                notes="the prompt is read both ways",
            ),
            FamilySpec(
                "gemma3",
                template="<start_of_turn>user\n{image}{question}<end_of_turn>\n<start_of_turn>model\n",
                notes="sandwich norms, sliding windows",
            ),
            FamilySpec(
                "mllama", "mllama", template="{image}{bos}{question}", notes="cross-attention layers with gates"
            ),
            FamilySpec(
                "blip-2", "resampled", template="Question: {question} Answer:", image_first=True, notes="Q-Former"
            ),
            FamilySpec("instructblip", "resampled", template="{question}", image_first=True, notes="Q-Former"),
            FamilySpec("deepseek_vl", template="User: {image}{question}\n\nAssistant:"),
            FamilySpec("janus", template="USER: {image}\n{question}\n\nASSISTANT:"),
            FamilySpec(
                "kosmos-2",
                "kosmos",
                placeholder="<image>",
                template="{image} Question: {question} Answer:",
                notes="norm before out_proj",
            ),
            FamilySpec(
                "florence2",
                "florence",
                decoder=_BART,
                vision=_DAVIT,
                final_norm=ABSENT,
                template="{image}{bos}{question}{eos}",
                special_tokens=False,
                notes="encoder-decoder, post-norm; of DaViT's stages the last: window and channel attention in turn",
            ),
            FamilySpec(
                "chameleon",
                template="{image}{question}{sep}",
                vision=_NONE,
                projector=ABSENT,
                lacks=(
                    "its VQ encoder (model.vqmodel) is convolutions on pictures of changing size, rounded to codes that are "
                    "words of the vocabulary, and has no residual stream of tokens; what the decoder is given for an "
                    "image is 'decoder.L0.resid_pre' at 'image:all'"
                ),
                notes="images are vocabulary, from a convolutional encoder without sites",
            ),
            FamilySpec(
                "llama4",
                "llama4",
                vision_prefix=0,
                placeholder="<|image|>",
                template="{image}{question}",
                notes="mixture of experts; class token after the patches",
            ),
            # The next three have their own code (trust_remote_code), for older releases of transformers.
            FamilySpec(
                "minigpt4",
                "resampled",
                template="###Human: {image} {question}###Assistant:",
                around="<Img>{image}</Img>",
                notes="own code; Q-Former and one linear map to Vicuna",
            ),
            FamilySpec(
                "deepseek_vl_v2",
                template="<|User|>: {image}\n{question}\n\n<|Assistant|>:",
                notes="own code; mixture of experts, latent attention",
            ),
            FamilySpec(
                "qwen",
                "resampled",
                vision=_QWEN_VISUAL,
                projector="transformer.visual",  # includes the norm and the map after the resampler
                template="{image}{question} Answer:",
                around="Picture: <img>{image}</img>\n",
                notes="own code; fused queries, keys and values",
            ),
            FamilySpec("mistral3", "rows", template="[INST]{image}{question}[/INST]", notes="row separators"),
        )
    },
    group="groundscope.families",
    check=lambda spec: None if isinstance(spec, FamilySpec) else f"it is a {type(spec).__name__}, not a FamilySpec",
    error=ModelError,
)
"""Families by model type: built-in, registered, and of installed packages (entry-point group ``groundscope.families``)."""


def family(model_type: str, model: nn.Module | None = None) -> FamilySpec:
    """Return the spec of a family.

    Raises
    ------
    ModelError
        For an unknown family; the message lists the families, how to write one, and the modules of `model`.
    """
    if model_type not in families:
        msg = (
            f"unknown family '{model_type}'; choose from {', '.join(families)}{nearest(model_type, families)}; or pass "
            f"spec=FamilySpec('{model_type}', view=…), whose other fields are detected from the model"
        )
        raise ModelError(f"{msg}; its modules are\n{tree(model)}" if model is not None else msg)
    return families[model_type]
