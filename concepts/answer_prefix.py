"""Join the prefix of an answer and the words that follow it, with a space where the script needs one."""

from __future__ import annotations

_NO_SPACE_AFTER = "([{<\u00ab\u201c\u2018\u201e\u00bf\u00a1-/"
"""Opening brackets, quotation marks and inverted marks; hyphen and slash."""
_QUOTES = "\"'`"
_SCRIPTS_WITHOUT_SPACES = (
    ("\u0e00", "\u0eff"),  # Thai, Lao
    ("\u1000", "\u109f"),  # Burmese
    ("\u1780", "\u17ff"),  # Khmer
    ("\u3000", "\u30ff"),  # CJK punctuation, Hiragana, Katakana
    ("\u3400", "\u9fff"),  # Chinese characters
    ("\uf900", "\ufaff"),
    ("\uff00", "\uffef"),
)
"""First and last characters of blocks."""


def join_words(start: str, words: str) -> str:
    """Return the prefix of an answer followed by more words, as one text.

    The next word follows directly after white space. Otherwise a space comes between, except after an opening bracket or
    quotation mark, a hyphen or a slash, and between characters of scripts without spaces.

    Parameters
    ----------
    start
        The start, such as `concepts.schema.Example.prefix`; may be empty.
    words
        What follows.

    Examples
    --------
    >>> from concepts.answer_prefix import join_words
    >>> join_words("The apple is", "red"), join_words("The apple is ", "red"), join_words("a hot-", "dog")
    ('The apple is red', 'The apple is red', 'a hot-dog')
    """
    if not start or start[-1].isspace() or not words or words[0].isspace():
        return start + words
    opens_quotation = start[-1] in _QUOTES and (len(start) == 1 or start[-2].isspace())
    adjacent = start[-1] in _NO_SPACE_AFTER or opens_quotation or (_unspaced(start[-1]) and _unspaced(words[0]))
    return start + words if adjacent else f"{start} {words}"


def _unspaced(character: str) -> bool:
    return any(first <= character <= last for first, last in _SCRIPTS_WITHOUT_SPACES)
