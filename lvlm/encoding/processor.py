"""Assemble a processor from its parts if transformers' own processor needs torchvision.

Processors of several families require a video processor, which needs torchvision. Images and text need only a tokenizer, an image
processor based on Pillow, and the placeholder in the configuration.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groundscope.core.errors import ModelError
from groundscope.core.user_files import read_json, read_text
from lvlm.family.specification import FamilySpec
from lvlm.model_files import hub_file

_MAX_TEMPLATE = 1 << 22


@dataclass
class Parts:
    """A tokenizer, an image processor and an image placeholder; stores record the name and module of this class."""

    tokenizer: Any
    image_processor: Any
    image_token: str
    chat_template: str | None = None

    def apply_chat_template(self, turns: list[dict[str, Any]], **options: Any) -> Any:
        """Return the text of a conversation, by the model's template."""
        return self.tokenizer.apply_chat_template(turns, chat_template=self.chat_template, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the parts to a folder from which `assemble` can load them."""
        self.tokenizer.save_pretrained(folder)
        if self.image_processor is not None:
            self.image_processor.save_pretrained(folder)
        if self.chat_template is not None:
            (Path(folder) / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")


def assemble(where: str, config: Any, spec: FamilySpec, options: dict[str, Any]) -> Parts:
    """Load a model's tokenizer and Pillow image processor.

    Raises
    ------
    ModelError
        If there is no tokenizer, or its vocabulary lacks the configuration's image token.
    """
    from transformers import AutoImageProcessor, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(where, **options)
    pictures = None
    if spec.view != "llama4":  # its image processor in transformers needs torchvision, so its encoding replaces it
        pictures = AutoImageProcessor.from_pretrained(where, backend="pil", **options)
    identity = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    token = spec.placeholder or (tokenizer.convert_ids_to_tokens(identity) if identity is not None else None)
    if token is None:
        msg = (
            f"the tokenizer of '{where}' has no image token (id {'unknown' if identity is None else identity}); set "
            "FamilySpec.placeholder"
        )
        raise ModelError(msg)
    template = _template(where, options) or getattr(tokenizer, "chat_template", None)
    return Parts(tokenizer, pictures, token, template)


def _template(where: str, options: dict[str, Any]) -> str | None:
    """Return the chat template of a model's processor, from its folder, the cache or the Hub; None if it has none.

    Raises
    ------
    ModelError
        If the file is not a chat template.
    """
    plain = hub_file(where, "chat_template.jinja", options)
    if plain is not None:
        return read_text(plain, limit=_MAX_TEMPLATE, error=ModelError)
    wrapped = hub_file(where, "chat_template.json", options)
    if wrapped is None:
        return None
    return read_json(wrapped, check=_not_a_template, limit=_MAX_TEMPLATE, error=ModelError)["chat_template"]


def _not_a_template(document: Any) -> str | None:
    if isinstance(document, dict) and isinstance(document.get("chat_template"), str):
        return None
    return 'no chat template: the file must be an object whose "chat_template" is text'
