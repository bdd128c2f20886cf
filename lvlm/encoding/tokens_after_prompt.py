"""Tokens of a text that follows a prompt: an answer, or the prefix of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from concepts.answer_prefix import join_words
from groundscope.core.errors import DataError
from lvlm.interfaces import Model


@dataclass(frozen=True)
class TextTokens:
    """Tokens of a text."""

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    """First character of each token in the text, and the one after the last; a token can begin with the space before it."""

    def positions(self, start: int, stop: int) -> tuple[int, ...]:
        """Return the tokens that overlap characters ``start .. stop-1`` of the text."""
        return tuple(i for i, (a, b) in enumerate(self.spans) if b > a and a < stop and b > start)


def tokens_after(model: Model, prompt: str, text: str) -> TextTokens:
    """Return the tokens of a text after a prompt.

    Prompt and text are tokenized together; the tokens after those of the prompt are the text's. They are separated by a space
    unless the prompt ends in white space or in a token that is not text (``<sep>``). The decoder of an encoder-decoder receives
    no prompt, so the text is tokenized alone.

    Parameters
    ----------
    model
        The model.
    prompt
        The prompt, with placeholders of images.
    text
        The text.
    """
    tokenizer = model.processor.tokenizer
    fast = bool(getattr(tokenizer, "is_fast", False))

    def tokenize(written: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoded = tokenizer(written, add_special_tokens=False, return_offsets_mapping=fast)
        return encoded["input_ids"], encoded["offset_mapping"] if fast else [(0, 0)] * len(encoded["input_ids"])

    if not model.encoder_decoder:
        before, _ = tokenize(prompt)
        not_text = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        adjacent = prompt[-1:].isspace() or not before or before[-1] in not_text
        start = prompt if adjacent else f"{prompt} "
        ids, spans = tokenize(start + text)
        # The tokenizer may merge a space at the end of the prompt into the text's first token; the model reads the prompt alone
        # and continues without that space.
        if ids[: len(before)] == before:
            own = [(a - len(start), b - len(start)) for a, b in spans[len(before) :]]
            return TextTokens(tuple(ids[len(before) :]), tuple(own))
    ids, spans = tokenize(text)
    return TextTokens(tuple(ids), tuple(spans))


def prefix_tokens(model: Model, prompt: str, prefix: str, name: str) -> TextTokens:
    """Return the tokens of an example's prefix; spaces at its end belong to the token of the next word.

    Parameters
    ----------
    model, prompt
        As for `tokens_after`.
    prefix
        `concepts.schema.Example.prefix`.
    name
        Name of the example, for error messages.

    Raises
    ------
    DataError
        If the prefix is white space, or contains words that the tokenizer does not know, or special tokens.
    """
    if not prefix.strip():
        msg = (
            f"example '{name}': its prefix is white space; give the words that are already written, or an empty prefix"
        )
        raise DataError(msg)
    tokens = tokens_after(model, prompt, prefix.rstrip(" "))
    tokenizer = model.processor.tokenizer
    special = next((t for t in tokens.ids if t in {*tokenizer.all_special_ids, model.content_id}), None)
    if special is None:
        return tokens
    if special == tokenizer.unk_token_id:
        start, stop = tokens.spans[tokens.ids.index(special)]
        problem = f"the tokenizer of {model.name} does not know '{prefix[max(start, 0) : stop].strip()}'"
    else:
        problem = f"it contains the special token '{tokenizer.convert_ids_to_tokens(special)}'"
    msg = f"example '{name}': the prefix '{prefix}' cannot be read: {problem}; give the words of an answer as text"
    raise DataError(msg)


def tokens_after_prefix(model: Model, prompt: str, prefix: str, words: str) -> tuple[int, ...]:
    """Return the tokens of words after a prompt and a prefix, as in the whole text; empty if they are no tokens of their own.

    Words and prefix are joined by `concepts.answer_prefix.join_words`. If the tokenizer merges the beginning of the words with
    the end of the prefix (``hot d`` and ``og``), the words do not start a token there, and the result is empty.
    """
    before = tokens_after(model, prompt, prefix.rstrip(" ")).ids
    both = tokens_after(model, prompt, join_words(prefix, words)).ids
    return _continuation(both, before)


def _continuation(both: Sequence[int], before: Sequence[int]) -> tuple[int, ...]:
    return tuple(both[len(before) :]) if tuple(both[: len(before)]) == tuple(before) else ()
