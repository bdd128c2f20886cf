"""Cut generated tokens after a number of whole words."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def cut_tokens(tokens: Sequence[int], words: int, text: Callable[[Sequence[int]], str]) -> list[int]:
    """Return the longest prefix of `tokens` whose text has at most `words` words.

    Examples
    --------
    >>> from mitigation.training_free.word_limit import cut_tokens
    >>> pieces = ["a", " ba", "na", "na", " and"]
    >>> cut_tokens(range(5), 2, lambda tokens: "".join(pieces[i] for i in tokens))
    [0, 1, 2, 3]
    """
    low, high = 0, len(tokens)
    while low < high:  # the number of words does not decrease with the number of tokens
        middle = (low + high + 1) // 2
        if len(text(tokens[:middle]).split()) <= words:
            low = middle
        else:
            high = middle - 1
    return list(tokens[:low])
