"""Words of a method's prompt that a model's tokenizer does not know."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lvlm.model import Lvlm


def unknown_words(model: Lvlm, text: str) -> tuple[str, ...]:
    """Return the words of a text that contain the tokenizer's token for unknown words, each once.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.prompt_words import unknown_words
    >>> unknown_words(gs.load_lvlm("tiny"), "Describe the confused image.")
    ('confused',)
    """
    tokenizer = model.processor.tokenizer
    if tokenizer.unk_token_id is None:
        return ()
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return tuple(dict.fromkeys(text[a:b].strip() for token, (a, b) in pairs if token == tokenizer.unk_token_id))


def words_problem(model: Lvlm, text: str) -> str | None:
    """Return why a model cannot read a prompt, as in `TrainingFree.problem`; None if it knows all words.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.prompt_words import words_problem
    >>> words_problem(gs.load_lvlm("tiny"), "Describe the confused image.")
    'not applicable: 1 prompt words unknown (confused)'
    """
    words = unknown_words(model, text)
    if not words:
        return None
    listed = ", ".join(words[:5]) + (", …" if len(words) > 5 else "")
    return f"not applicable: {len(words)} prompt words unknown ({listed})"
