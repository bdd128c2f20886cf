"""A LLaVA of real width with few, thin layers, and a tracker of the bytes that its tensors take."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from lvlm import Lvlm, wrap_lvlm
from lvlm.tiny.architecture import IMAGE, build_tokenizer, vocabulary

WIDTH, HEADS, PATCH = 1024, 8, 14


def wide(layers: int, side: int = 24, *, vocabulary_size: int = 512, validate: bool = False) -> Lvlm:
    """A random LLaVA with a decoder of width 1024 that reads ``side x side`` image tokens."""
    words = vocabulary()
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            image_size=PATCH * side, patch_size=PATCH, projection_dim=32,
        ),
        text_config=LlamaConfig(
            vocab_size=vocabulary_size, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=layers,
            num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=1024,
            tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        ),
        image_token_index=words.index(IMAGE),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=side * side,
    )  # fmt: skip
    pictures = CLIPImageProcessorPil(
        do_resize=True, size={"height": PATCH * side, "width": PATCH * side}, do_center_crop=False
    )
    words_of = build_tokenizer()
    words_of.model_max_length = 2048
    processor = LlavaProcessor(pictures, words_of, PATCH, "default", image_token=IMAGE, num_additional_image_tokens=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return wrap_lvlm(LlavaForConditionalGeneration(config), processor, name="wide", validate=validate)


class Live(TorchDispatchMode):
    """Counts the bytes of storages that were made while it is on, and the most of them that lived at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.largest = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        inputs = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and not x.is_meta:
                storage = x.untyped_storage()
                if id(storage) in inputs or id(storage) in self._known:
                    continue
                size = storage.nbytes()
                self._known[id(storage)] = weakref.ref(storage, self._forget(id(storage), size))
                self.now += size
                self.peak, self.largest = max(self.peak, self.now), max(self.largest, size)
        return out

    def _forget(self, key: int, size: int) -> Callable[[object], None]:
        def forget(_: object) -> None:
            self._known.pop(key, None)
            self.now -= size

        return forget


def peak_of(work: Callable[[], object]) -> int:
    """The most bytes that tensors made by some work took at once."""
    with Live() as live:
        work()
    return live.peak
