"""A processor put together from its parts where transformers will not build it without torchvision.

Several families' processors ask for a video processor, which only exists on torchvision. Images and text need neither: a
tokenizer, an image processor that works with Pillow, and the placeholder that the configuration names.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groundscope.core.errors import ModelError
from lvlm.family.specification import FamilySpec


@dataclass
class Parts:
    """A tokenizer, an image processor and an image placeholder: all that a model under study needs of a processor."""

    tokenizer: Any
    image_processor: Any
    image_token: str
    chat_template: str | None = None

    def apply_chat_template(self, turns: list[dict[str, Any]], **options: Any) -> Any:
        """Write turns as the model's template has them."""
        return self.tokenizer.apply_chat_template(turns, chat_template=self.chat_template, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the parts where `assemble` finds them."""
        self.tokenizer.save_pretrained(folder)
        if self.image_processor is not None:
            self.image_processor.save_pretrained(folder)


def assemble(where: str, config: Any, spec: FamilySpec, options: dict[str, Any]) -> Parts:
    """Load a model's tokenizer and Pillow image processor.

    Raises
    ------
    ModelError
        Where there is no tokenizer, or its vocabulary lacks the configuration's image token.
    """
    from transformers import AutoImageProcessor, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(where, **options)
    pictures = None
    if spec.view != "llama4":  # whose only image processor in transformers needs torchvision; the view has its own
        pictures = AutoImageProcessor.from_pretrained(where, backend="pil", **options)
    identity = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    token = spec.placeholder or (tokenizer.convert_ids_to_tokens(identity) if identity is not None else None)
    if token is None:
        msg = (
            f"the tokenizer of '{where}' has no image token: its configuration names "
            f"{'none' if identity is None else f'number {identity}'}; say FamilySpec.placeholder"
        )
        raise ModelError(msg)
    return Parts(tokenizer, pictures, token, _template(where) or getattr(tokenizer, "chat_template", None))


def _template(where: str) -> str | None:
    """Return the chat template that lies beside a model, where that is a folder."""
    folder = Path(where)
    plain, wrapped = folder / "chat_template.jinja", folder / "chat_template.json"
    if plain.is_file():
        return plain.read_text(encoding="utf-8")
    if wrapped.is_file():
        return json.loads(wrapped.read_text(encoding="utf-8")).get("chat_template")
    return None
