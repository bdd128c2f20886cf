"""Digests of a processor: of the settings that determine the pixels of an image and the tokens of a text."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def pixel_settings(processor: Any) -> str:
    """Return a digest of every setting of a processor that determines the pixels and tokens of an image."""
    image_processor = getattr(processor, "image_processor", None)
    return _digest([type(image_processor), _settings(image_processor), type(processor), _plain_attributes(processor)])


def pixel_settings_key(processor: Any) -> tuple[type, str, type, str]:
    """Return a key of the same settings for a cache in memory, which is cheap enough to compute for each image."""
    image_processor = getattr(processor, "image_processor", None)
    attributes = "" if image_processor is None else repr(sorted(vars(image_processor).items()))
    return type(image_processor), attributes, type(processor), repr(_plain_attributes(processor))


def processor_digest(processor: Any) -> str:
    """Return a digest of image settings, tokenizer and chat template, which determine pixels and tokens.

    The tokenizer is included in full: vocabulary, merges, normalizer, pre-tokenizer, added and special tokens.
    """
    tokenizer = getattr(processor, "tokenizer", None)
    templates = [getattr(part, "chat_template", None) for part in (processor, tokenizer)]
    return _digest([pixel_settings(processor), type(tokenizer), _tokenizer(tokenizer), templates])


def sampled_processor_digest(processor: Any) -> str:
    """Return the digest of earlier releases: of image settings, vocabulary and chat template, without tokenizer rules."""
    image_processor, tokenizer = (getattr(processor, part, None) for part in ("image_processor", "tokenizer"))
    settings = {
        "pictures": image_processor.to_dict() if image_processor is not None else None,
        "vocabulary": tokenizer.get_vocab() if tokenizer is not None else None,
        "chat_template": getattr(processor, "chat_template", None),
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def _tokenizer(tokenizer: Any) -> Any:
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # not a fast tokenizer
        content: Any = {"vocabulary": tokenizer.get_vocab(), "options": getattr(tokenizer, "init_kwargs", {})}
    else:
        content = json.loads(backend.to_str())
        # Padding and truncation are those of the last call.
        content = {name: part for name, part in content.items() if name not in {"padding", "truncation"}}
    adds = {name: getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token")}
    return [content, tokenizer.special_tokens_map, adds]


def _settings(part: Any) -> Any:
    return part.to_dict() if hasattr(part, "to_dict") else None if part is None else _plain_attributes(part)


def _plain_attributes(part: Any) -> dict[str, Any]:
    """Return the attributes of an object that are text, numbers, booleans or None, without the chat template."""
    plain = {k: v for k, v in vars(part).items() if v is None or isinstance(v, str | int | float | bool)}
    return {k: v for k, v in plain.items() if k != "chat_template"}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
