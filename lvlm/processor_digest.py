"""Digests of a processor: what decides on the pixels of an image and on the tokens of a text."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def pixel_settings(processor: Any) -> str:
    """Return a digest of every setting of a processor that decides on the pixels and tokens of an image."""
    pictures = getattr(processor, "image_processor", None)
    return _digest([type(pictures), _settings(pictures), type(processor), _plain(processor)])


def processor_digest(processor: Any) -> str:
    """Return a digest of all that decides on pixels and tokens: image settings, the whole tokenizer, the chat template.

    Of the tokenizer everything counts: vocabulary, merges, normalizer, pre-tokenizer, added and special tokens.
    """
    tokenizer = getattr(processor, "tokenizer", None)
    templates = [getattr(part, "chat_template", None) for part in (processor, tokenizer)]
    return _digest([pixel_settings(processor), type(tokenizer), _tokenizer(tokenizer), templates])


def sampled_processor_digest(processor: Any) -> str:
    """Return what earlier releases recorded: image settings, vocabulary and chat template, not how text is divided."""
    pictures, tokenizer = (getattr(processor, part, None) for part in ("image_processor", "tokenizer"))
    settings = {
        "pictures": pictures.to_dict() if pictures is not None else None,
        "vocabulary": tokenizer.get_vocab() if tokenizer is not None else None,
        "chat_template": getattr(processor, "chat_template", None),
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def _tokenizer(tokenizer: Any) -> Any:
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer in Python
        whole: Any = {"vocabulary": tokenizer.get_vocab(), "options": getattr(tokenizer, "init_kwargs", {})}
    else:
        whole = json.loads(backend.to_str())
        # How the last call padded and cut off, not what the tokenizer is.
        whole = {name: part for name, part in whole.items() if name not in {"padding", "truncation"}}
    adds = {name: getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token")}
    return [whole, tokenizer.special_tokens_map, adds]


def _settings(part: Any) -> Any:
    return part.to_dict() if hasattr(part, "to_dict") else None if part is None else _plain(part)


def _plain(part: Any) -> dict[str, Any]:
    """Return the attributes of an object that are plain values."""
    known = {k: v for k, v in vars(part).items() if v is None or isinstance(v, str | int | float | bool)}
    return {k: v for k, v in known.items() if k != "chat_template"}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
