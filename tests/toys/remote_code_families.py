"""Small models with the module trees of families whose code is not part of transformers.

Only the names and how parts hang together are those of the originals; every part is as small as can be. What each is
modelled on: MiniGPT-4 (`minigpt4/models/mini_gpt4.py`: visual_encoder, Qformer, llama_proj, llama_model), DeepSeek-VL2
(`deepseek_vl2/models/modeling_deepseek_vl_v2.py`: vision, projector, language with a mixture of experts and latent
attention), Qwen-VL (`modeling_qwen.py`: transformer.visual, transformer.h, a fused c_attn).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers import PretrainedConfig  # the name that every release has

from lvlm.encoding.processor import Parts
from tests.toys.model_parts import ID, fixed, tokenizer

WIDTH, HEADS, LAYERS, VISION = 32, 4, 3, 24
IMAGE = "<image>"


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _attend(qkv: Any, heads: int, *, causal: bool) -> Tensor:
    q, k, v = qkv
    out = scaled_dot_product_attention(_heads(q, heads), _heads(k, heads), _heads(v, heads), is_causal=causal)
    return out.transpose(1, 2).flatten(2)


class Config(PretrainedConfig):
    """What the library asks of a configuration."""

    model_type = "stand_in"
    text = SimpleNamespace(num_attention_heads=HEADS, is_encoder_decoder=False)
    vision_config = SimpleNamespace(num_attention_heads=2, patch_size=14)

    def get_text_config(self, decoder: Any = None, encoder: Any = None) -> Any:
        return self.text


def config(model_type: str, **more: Any) -> Any:
    configuration: Any = Config()
    configuration.image_token_id = ID[IMAGE]
    for name, value in more.items():
        setattr(configuration, name, value)
    configuration.model_type = model_type
    return configuration


class VisionAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(VISION, 3 * VISION), nn.Linear(VISION, VISION)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(_attend(self.qkv(x).chunk(3, -1), 2, causal=False))


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 40), nn.Linear(40, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(silu(self.fc1(x)))


class Block(nn.Module):
    """A block as timm and EVA write it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(VISION), VisionAttention()
        self.norm2, self.mlp = nn.LayerNorm(VISION), Mlp(VISION)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Tower(nn.Module):
    def __init__(self, name: str, class_token: bool) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, VISION, 14, 14)
        self.cls_token = nn.Parameter(torch.randn(1, 1, VISION)) if class_token else None
        self.name = name
        setattr(self, name, nn.ModuleList(Block() for _ in range(2)))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed(pixels).flatten(2).transpose(1, 2)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        for block in getattr(self, self.name):
            x = block(x)
        return x


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.v_proj, self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        x = hidden_states
        return self.o_proj(_attend((self.q_proj(x), self.k_proj(x), self.v_proj(x)), HEADS, causal=True)), None


class LatentAttention(nn.Module):
    """Keys and values from a latent of their own; head width of the values unlike that of the keys."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, HEADS * 12, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(WIDTH, 10, bias=False)
        self.kv_b_proj = nn.Linear(10, HEADS * (12 + 6), bias=False)
        self.o_proj = nn.Linear(HEADS * 6, WIDTH, bias=False)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None, None]:
        kv = _heads(self.kv_b_proj(self.kv_a_proj_with_mqa(hidden_states)), HEADS)
        out = scaled_dot_product_attention(
            _heads(self.q_proj(hidden_states), HEADS), kv[..., :12], kv[..., 12:], is_causal=True
        )
        return self.o_proj(out.transpose(1, 2).flatten(2)), None, None


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 2)
        self.experts = nn.ModuleList(Mlp(WIDTH) for _ in range(2))
        self.shared_experts = Mlp(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        shares = self.gate(x).softmax(-1)
        return self.shared_experts(x) + sum(shares[..., i : i + 1] * e(x) for i, e in enumerate(self.experts))


class DecoderLayer(nn.Module):
    def __init__(self, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.self_attn, self.mlp = attention, mlp
        self.input_layernorm, self.post_attention_layernorm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
        x = hidden_states + self.self_attn(hidden_states=self.input_layernorm(hidden_states))[0]
        return (x + self.mlp(self.post_attention_layernorm(x)),)


class Trunk(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(256, WIDTH)
        self.layers, self.norm = nn.ModuleList(layers), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)[0]
        return self.norm(x)


class CausalLM(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.model, self.lm_head = Trunk(layers), nn.Linear(WIDTH, 256, bias=False)


def _mixed(embeddings: Tensor, ids: Tensor, image: Tensor) -> Tensor:
    return embeddings.masked_scatter((ids == ID[IMAGE])[..., None], image.to(embeddings.dtype))


class MiniGPT4(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = config("minigpt4", num_query_tokens=4)
        self.visual_encoder, self.ln_vision = Tower("blocks", True), nn.LayerNorm(VISION)
        self.query_tokens = nn.Parameter(torch.randn(1, 4, VISION))
        self.Qformer = nn.MultiheadAttention(VISION, 2, batch_first=True)
        self.llama_proj = nn.Linear(VISION, WIDTH)
        self.llama_model = CausalLM([DecoderLayer(Attention(), Mlp(WIDTH)) for _ in range(LAYERS)])

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor, use_cache: bool = False) -> Any:
        patches = self.ln_vision(self.visual_encoder(pixel_values))
        queries = self.Qformer(self.query_tokens.expand(len(patches), -1, -1), patches, patches)[0]
        x = _mixed(self.llama_model.model.embed_tokens(input_ids), input_ids, self.llama_proj(queries))
        return SimpleNamespace(logits=self.llama_model.lm_head(self.llama_model.model(x)))


class DeepseekVL2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = config("deepseek_vl_v2")
        self.vision, self.projector = Tower("blocks", False), nn.Linear(VISION, WIDTH)
        first = DecoderLayer(LatentAttention(), Mlp(WIDTH))
        self.language = CausalLM([first, *(DecoderLayer(LatentAttention(), Experts()) for _ in range(LAYERS - 1))])

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor, use_cache: bool = False) -> Any:
        image = self.projector(self.vision(pixel_values))
        x = _mixed(self.language.model.embed_tokens(input_ids), input_ids, image)
        return SimpleNamespace(logits=self.language.lm_head(self.language.model(x)))


class FusedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        return self.c_proj(_attend(self.c_attn(hidden_states).chunk(3, -1), HEADS, causal=True)), None


class QwenMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.c_proj = nn.Linear(WIDTH, 40), nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.w1(x) * silu(self.w2(x)))


class QwenBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2, self.mlp = (
            nn.LayerNorm(WIDTH),
            FusedAttention(),
            nn.LayerNorm(WIDTH),
            QwenMlp(),
        )

    def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
        x = hidden_states + self.attn(self.ln_1(hidden_states))[0]
        return (x + self.mlp(self.ln_2(x)),)


class ResidualBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2, self.attn = nn.LayerNorm(VISION), nn.LayerNorm(VISION), VisualAttention()
        self.mlp = Mlp(VISION)

    def forward(self, q_x: Tensor) -> Tensor:
        normed = self.ln_1(q_x)
        x = q_x + self.attn(normed, normed, normed)
        return x + self.mlp(self.ln_2(x))


class VisualAttention(nn.Module):
    """Tokens first, examples second; queries, keys and values of one head side by side, then those of the next."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(VISION, 3 * VISION), nn.Linear(VISION, VISION)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = self.in_proj(query).unflatten(-1, (2, 3 * VISION // 2)).split(VISION // 2, -1)  # [T, B, H, head_dim]
        heads = scaled_dot_product_attention(*(x.permute(1, 2, 0, 3) for x in (q, k, v)))
        return self.out_proj(heads.permute(2, 0, 1, 3).flatten(2))


class Resampler(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.kv_proj = nn.Parameter(torch.randn(4, WIDTH)), nn.Linear(VISION, WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        keys = self.kv_proj(x)
        return self.attn(self.query.expand(len(x), -1, -1), keys, keys)[0]


class Visual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, VISION, 14, 14)
        self.transformer: Any = nn.Module()
        self.transformer.resblocks = nn.ModuleList(ResidualBlock() for _ in range(2))
        self.attn_pool, self.ln_post = Resampler(), nn.LayerNorm(WIDTH)
        self.proj = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv1(pixels).flatten(2).permute(2, 0, 1)  # [T, B, D]
        for block in self.transformer.resblocks:
            x = block(x)
        return self.ln_post(self.attn_pool(x.transpose(0, 1))) @ self.proj


class QwenVL(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = config("qwen", num_query_tokens=4)
        self.transformer: Any = nn.Module()
        self.transformer.wte, self.transformer.ln_f = nn.Embedding(256, WIDTH), nn.LayerNorm(WIDTH)
        self.transformer.h = nn.ModuleList(QwenBlock() for _ in range(LAYERS))
        self.transformer.visual = Visual()
        self.lm_head = nn.Linear(WIDTH, 256, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor, use_cache: bool = False) -> Any:
        x = _mixed(self.transformer.wte(input_ids), input_ids, self.transformer.visual(pixel_values))
        for block in self.transformer.h:
            x = block(x)[0]
        return SimpleNamespace(logits=self.lm_head(self.transformer.ln_f(x)))


STAND_INS = {"minigpt4": MiniGPT4, "deepseek_vl_v2": DeepseekVL2, "qwen": QwenVL}


def build_stand_in(name: str) -> tuple[Any, Any]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = STAND_INS[name]()
    return model.eval(), Parts(tokenizer(), fixed(), IMAGE)
