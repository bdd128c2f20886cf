"""Values of attributes (except color) and actions that exclude other values: if one is annotated, the others are false.

Annotations such as those of GQA and Visual Genome are incomplete: that no annotator wrote "wooden" does not mean that a table is
not wooden. A question with the answer no is therefore made only where the annotation excludes it: by another value of an
exclusive set, by the opposite of an antonym, or by another action of an exclusive set. The tables are ours; ambiguous words,
such as "short" (not tall, or not long), are not in them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from concepts.nouns import canonical_noun

EXCLUSIVE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "material": tuple("wooden metal plastic glass leather brick stone concrete paper ceramic fabric".split()),
        "shape": tuple("round square rectangular triangular oval".split()),
        "pattern": tuple("striped plaid floral dotted plain".split()),
        "pose": tuple("standing sitting lying".split()),
        "count": tuple("two three four five six".split()),
    }
)
"""Kind of attribute to values of which an object has only one, if exactly one is annotated."""
ANTONYMS: Mapping[str, tuple[tuple[str, str], ...]] = MappingProxyType(
    {
        "size": (("big", "small"),),
        "height": (("tall", "short"),),
        "length": (("long", "short"),),
        "state": (
            ("open", "closed"), ("full", "empty"), ("wet", "dry"), ("clean", "dirty"), ("on", "off"), ("lit", "unlit"),
            ("cooked", "raw"), ("folded", "unfolded"), ("covered", "uncovered"),
        ),
        "age": (("old", "new"), ("old", "young")),
        "thickness": (("thick", "thin"),),
        "width": (("wide", "narrow"),),
        "texture": (("rough", "smooth"),),
        "form": (("straight", "curved"), ("straight", "curly")),
        "sex": (("male", "female"),),
    }
)  # fmt: skip
"""Kind of attribute to pairs of values of which one is false if the other is true."""
_SPELLINGS: Mapping[str, str] = MappingProxyType(
    {
        "wood": "wooden", "metallic": "metal", "steel": "metal", "iron": "metal", "aluminum": "metal", "bricks": "brick",
        "porcelain": "ceramic", "cloth": "fabric", "circular": "round", "squared": "square", "checkered": "plaid",
        "spotted": "dotted", "polka dot": "dotted", "flowered": "floral", "stripes": "striped", "seated": "sitting",
        "sitting down": "sitting", "lying down": "lying", "laying": "lying", "laying down": "lying",
        "large": "big", "huge": "big", "little": "small", "tiny": "small", "opened": "open", "shut": "closed",
        "turned on": "on", "turned off": "off", "illuminated": "lit", "uncooked": "raw", "2": "two", "3": "three",
    }
)  # fmt: skip
"""Word of an annotation to the value, where they differ."""
_PERSON = "person"
_ONE_SIDED = frozenset({"short"})
"""Values that are the opposite of two others: a question about them is certain only where one of these is annotated."""

ACTION_SETS: tuple[tuple[str, ...], ...] = (
    ("riding", "pushing", "carrying"),
    ("driving", "pushing"),
    ("eating", "cutting"),
    ("wearing", "holding"),
    ("throwing", "catching", "hitting", "kicking"),
    ("pushing", "pulling"),
    ("leading", "following"),
    ("sitting on", "standing on", "lying on"),
    ("sitting in", "standing in", "lying in"),
    ("sitting at", "standing at"),
    ("sitting on", "walking on"),
    ("getting on", "getting off"),
    ("entering", "leaving"),
    ("looking at", "looking away from"),
)
"""Actions of which one subject does at most one with one object at a time."""
ACTIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        verb: tuple(dict.fromkeys(other for group in ACTION_SETS if verb in group for other in group if other != verb))
        for group in ACTION_SETS
        for verb in group
    }
)
"""Action to the actions that it excludes."""
ACTION_NAMES: Mapping[str, str] = MappingProxyType(
    {**{name: name for name in ACTIONS}, "laying on": "lying on", "laying in": "lying in", "rides": "riding", "wears": "wearing",
     "holds": "holding", "carries": "carrying", "eats": "eating", "wear": "wearing", "ride": "riding", "hold": "holding",
     "looking towards": "looking at", "watching": "looking at"}
)  # fmt: skip
"""Word of an annotation to the action."""


def attribute_kinds(words: Sequence[str], noun: str) -> dict[str, str]:
    """Return the annotated attributes of an object, by kind, that make other values false; color is not among them.

    Parameters
    ----------
    words
        Annotated words in lower case.
    noun
        The noun of the object: people are old or young, things old or new.

    Returns
    -------
    dict
        Kind of attribute to value; kinds with two contradicting values, or with two of an exclusive set, are missing.

    Examples
    --------
    >>> from concepts.reading.exclusive_values import attribute_kinds
    >>> attribute_kinds(["wood", "big", "open"], "door")
    {'material': 'wooden', 'size': 'big', 'state': 'open'}
    >>> attribute_kinds(["metal", "wooden", "short"], "door")
    {}
    """
    values = dict.fromkeys(_SPELLINGS.get(word, word) for word in words)
    result: dict[str, str] = {}
    for kind, options in EXCLUSIVE.items():
        chosen = [value for value in values if value in options]
        if len(chosen) == 1:
            result[kind] = chosen[0]
    for kind, pairs in ANTONYMS.items():
        chosen = [value for value in values if any(value in pair for pair in pairs) and value not in _ONE_SIDED]
        if len(chosen) == 1 and opposite(kind, chosen[0], noun) not in values:
            result[kind] = chosen[0]
    return result


def opposite(kind: str, value: str, noun: str) -> str | None:
    """Return the value that is false where `value` is true; None for exclusive sets, whose other values are all false.

    >>> from concepts.reading.exclusive_values import opposite
    >>> opposite("age", "old", "woman"), opposite("age", "old", "car"), opposite("state", "open", "door")
    ('young', 'new', 'closed')
    """
    others = [a if value == b else b for a, b in ANTONYMS.get(kind, ()) if value in (a, b)]
    if kind == "age" and value == "old":
        return "young" if canonical_noun(noun) == _PERSON else "new"
    if kind == "form" and value == "straight":
        return "curly" if canonical_noun(noun) in {"hair", "fur"} else "curved"
    return others[0] if others else None


def alternatives(kind: str, value: str, noun: str) -> tuple[str, ...]:
    """Return the values that are false where `value` is true.

    >>> from concepts.reading.exclusive_values import alternatives
    >>> alternatives("shape", "round", "table")
    ('square', 'rectangular', 'triangular', 'oval')
    """
    if kind in EXCLUSIVE:
        return tuple(other for other in EXCLUSIVE[kind] if other != value)
    other = opposite(kind, value, noun)
    return () if other is None else (other,)
