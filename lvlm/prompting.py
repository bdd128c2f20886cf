"""The text that a model reads for a question, by its chat template or its family's."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

from groundscope.core.errors import ModelError

if TYPE_CHECKING:
    from lvlm.model import Lvlm

MAX_PROMPT = 1 << 20
"""Longest prompt in characters."""
MAX_STEPS = 100_000
"""Most lines of a compiled chat template that are run for one prompt; usual templates run a few hundred."""
_TEMPLATE_FILES = ("<template>", "<unknown>")


class _Endless(Exception):
    """A template that does not come to an end."""


def prompt_of(model: Lvlm, question: str, images: int) -> str:
    """Return the text a model reads, up to where its answer begins; each placeholder stands for an image.

    Raises
    ------
    ModelError
        Where the chat template fails, does not end, or writes no text or too much of it.
    """
    if not getattr(model.processor, "chat_template", None):
        words = {n: getattr(model.processor.tokenizer, f"{n}_token") or "" for n in ("bos", "eos", "sep")}
        shown = model.spec.around.format(image=model.placeholder) * images
        return model.spec.template.format(image=shown, question=question, **words)
    content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
    turn = [{"role": "user", "content": content}]

    def write() -> Any:
        return model.processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)

    try:
        text = _bounded(write)
    except _Endless:
        why = f"it runs more than {MAX_STEPS} steps"
    except MemoryError:
        why = "it needs more memory than there is"
    except Exception as error:  # noqa: BLE001  # a template raises whatever it wants to, in Jinja's classes or Python's
        lines = str(error).strip().splitlines()
        why = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    else:
        if isinstance(text, str) and len(text) <= MAX_PROMPT:
            return text
        why = f"it writes {f'{len(text)} characters' if isinstance(text, str) else f'a {type(text).__name__}'}"
    msg = (
        f"the chat template of {model.name} fails for the question '{question}': {why}; set processor.chat_template to one "
        'that takes turns whose content is a list of {"type": "image"} and {"type": "text", "text": ...}'
    )
    raise ModelError(msg)


def find_question(text: str, question: str) -> tuple[int, int] | None:
    """Return where a question stands in a prompt, its last occurrence; None where the template changed its words.

    Upper and lower case may differ.
    """
    wanted = question.strip()
    if not wanted:
        return 0, 0
    start = text.rfind(wanted)
    lower = text.lower()
    if start < 0 and len(lower) == len(text) and len(wanted.lower()) == len(wanted):
        start = lower.rfind(wanted.lower())
    return None if start < 0 else (start, start + len(wanted))


def _bounded(write: Callable[[], Any]) -> Any:
    """Call a function and stop it once compiled templates have run `MAX_STEPS` lines in it."""
    steps = 0

    def line(_frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal steps
        steps += event == "line"
        if steps > MAX_STEPS:
            raise _Endless
        return line

    def call(frame: FrameType, _event: str, _argument: Any) -> Any:
        return line if frame.f_code.co_filename in _TEMPLATE_FILES else None

    before = sys.gettrace()
    if before is not None:  # a debugger or a coverage tool is at work: leave it in place
        return write()
    sys.settrace(call)
    try:
        return write()
    finally:
        sys.settrace(None)
