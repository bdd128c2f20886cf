"""The prompt of a question, from the processor's chat template or the family's template."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from groundscope.core.errors import ModelError
from lvlm.interfaces import Model

MAX_PROMPT = 1 << 20
"""Largest length of a prompt, in characters."""
MAX_STEPS = 100_000
"""Largest number of lines of a compiled chat template that run for one prompt; usual templates run a few hundred."""
_TEMPLATE_FILES = ("<template>", "<unknown>")


class _StepLimit(Exception):
    """A chat template ran too many lines."""


def prompt_of(model: Model, question: str, images: int, system: str | None = None) -> str:
    """Return the text up to where the model's answer begins, with one placeholder per image.

    Parameters
    ----------
    model
        The model.
    question
        Text of the user.
    images
        Number of images before it.
    system
        System prompt; None for that of the chat template, if it has one.

    Raises
    ------
    ModelError
        If the chat template fails, does not end, or returns no text or too much; or if it has no place for a system prompt.
    """
    if not getattr(model.processor, "chat_template", None):
        if system is not None:
            msg = (
                f"{model.name} has no chat template, so a system prompt has no place: write the text into the suffix, or set "
                "processor.chat_template"
            )
            raise ModelError(msg)
        special = {n: getattr(model.processor.tokenizer, f"{n}_token") or "" for n in ("bos", "eos", "sep")}
        image = model.spec.around.format(image=model.placeholder) * images
        return model.spec.template.format(image=image, question=question, **special)
    content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
    turn = [{"role": "user", "content": content}]
    if system is None:
        return _apply_template(model, turn, question)
    # Templates read the content of a system turn as a list of parts, or as text.
    for form in ([{"type": "text", "text": system}], system):
        text = _apply_template(model, [{"role": "system", "content": form}, *turn], question)
        if system.strip() in text and not any(mark in text for mark in ("{'type'", '{"type"')):
            return text
    msg = (
        f"the chat template of {model.name} has no place for a system prompt: write the text into the suffix, or set "
        "processor.chat_template to a template that repeats it"
    )
    raise ModelError(msg)


def _apply_template(model: Model, turns: list[dict[str, Any]], question: str) -> str:
    """Return the text of the chat template for some turns; raise `ModelError` if it fails."""

    def write() -> Any:
        return model.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)

    try:
        text = _with_step_limit(write)
    except _StepLimit:
        why = f"it runs more than {MAX_STEPS} steps"
    except MemoryError:
        why = "it runs out of memory"
    except Exception as error:  # noqa: BLE001  # a template can raise any class
        lines = str(error).strip().splitlines()
        why = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    else:
        if isinstance(text, str) and len(text) <= MAX_PROMPT:
            return text
        why = f"it returns {f'{len(text)} characters' if isinstance(text, str) else f'a {type(text).__name__}'}"
    msg = (
        f"the chat template of {model.name} fails for the question '{question}': {why}; set processor.chat_template to a "
        'template for turns whose content is a list of {"type": "image"} and {"type": "text", "text": ...}'
    )
    raise ModelError(msg)


def check_placeholder(model: Model) -> None:
    """Raise `ModelError` if the prompt of a question about an image does not contain the image's placeholder."""
    if model.spec.image_first or model.placeholder in prompt_of(model, "question", 1):
        return
    msg = (
        f"the chat template of {model.name} writes no placeholder of an image ('{model.placeholder}') into a question about an "
        "image; set processor.chat_template to a template that does, or FamilySpec.placeholder to what it writes"
    )
    raise ModelError(msg)


def find_question(text: str, question: str) -> tuple[int, int] | None:
    """Return the span of the last occurrence of a question in a prompt, ignoring case; None if the template changed its words."""
    words = question.strip()
    if not words:
        return 0, 0
    start = text.rfind(words)
    lower = text.lower()
    if start < 0 and len(lower) == len(text) and len(words.lower()) == len(words):
        start = lower.rfind(words.lower())
    return None if start < 0 else (start, start + len(words))


def _with_step_limit(write: Callable[[], Any]) -> Any:
    """Call a function, and interrupt it after `MAX_STEPS` lines of compiled templates."""
    steps = 0

    def line(_frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal steps
        steps += event == "line"
        if steps > MAX_STEPS:
            raise _StepLimit
        return line

    def call(frame: FrameType, _event: str, _argument: Any) -> Any:
        return line if frame.f_code.co_filename in _TEMPLATE_FILES else None

    if sys.gettrace() is not None:  # a debugger or coverage tool is active, and there is only one trace function
        return write()
    sys.settrace(call)
    try:
        return write()
    finally:
        sys.settrace(None)
