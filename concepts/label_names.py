"""Which columns of a table of examples can hold labels."""

from __future__ import annotations

EXAMPLE_COLUMNS = frozenset(
    {"id", "group", "question", "answer", "split", "kind", "level", "subject", "prior_answer", "model_answer", "margin"}
    | {"correct", "n_tokens", "boxes", "box_ids", "box_nouns", "image", "generated", "images", "candidates", "objects"}
    | {"aliases", "prefix", "mentions"}
)
"""Columns of tables of examples that are fields or results, not labels, and names with ``span:`` or ``mention:`` before."""


def is_label_name(name: str) -> bool:
    """Whether a column of a table of examples can hold labels, judged by its name.

    Examples
    --------
    >>> from concepts.label_names import is_label_name
    >>> [is_label_name(name) for name in ("object:dog", "hallucinated", "scene:indoor", "question", "span:image")]
    [True, True, True, False, False]
    """
    return name not in EXAMPLE_COLUMNS and not name.startswith(("span:", "mention:"))
