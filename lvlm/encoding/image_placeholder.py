"""The image token of a model: its text in a prompt, and its id."""

from __future__ import annotations

from groundscope.core.errors import ModelError
from lvlm.interfaces import Model


def placeholder(model: Model) -> str:
    """Return the text that stands for an image in a prompt."""
    token = model.spec.placeholder or model.processor.image_token
    return str(getattr(token, "content", token))


def content_id(model: Model) -> int:
    """Return the id of the image token, whose embeddings are replaced by those of the image."""
    config = model.hf.config
    for name in ("image_token_id", "image_token_index"):
        if isinstance(identity := getattr(config, name, None), int):
            return identity
    return int(model.processor.tokenizer.convert_tokens_to_ids(placeholder(model)))


def content_token(model: Model) -> str:
    """Return the text of the image token; raises `ModelError` if the tokenizer has no such token."""
    identity = content_id(model)
    token = model.processor.tokenizer.convert_ids_to_tokens(identity)
    if token is None:
        msg = (
            f"the tokenizer of {model.name} has no token {identity}, the configuration's image token; use the "
            "tokenizer that belongs to the model"
        )
        raise ModelError(msg)
    return str(token)
