"""Parse descriptions to objects, attributes and relations, with the places of their words.

A rule parser over word lists, not a statistical one: models of spaCy or other parsers are separate downloads, which not every
machine may make, and whose versions change results. `benchmarks/free_text.py` measures it on annotated sentences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

from behavior.free_text import noun_phrases, predicates
from behavior.free_text.phrases import group_tokens
from behavior.free_text.sentence_state import SentenceState
from behavior.free_text.spans import Description, Span
from behavior.free_text.tokens import Lexicon, split_sentences
from groundscope.core.errors import DataError

READERS: Mapping[str, Callable[[SentenceState, int], int]] = MappingProxyType(
    {
        "thing": noun_phrases.read_thing,
        "other_noun": noun_phrases.read_other_noun,
        "pronoun": noun_phrases.read_pronoun,
        "verb": predicates.read_verb,
        "auxiliary": predicates.read_auxiliary,
        "report": predicates.read_report,
        "preposition": predicates.read_preposition,
        "attribute": predicates.read_attribute,
        "comma": predicates.close_predicate,
        "conjunction": predicates.close_predicate,
        "link": predicates.read_link,
        "relative": predicates.read_relative,
    }
)
"""Kind of an item to the function that reads it and returns the index of the next item; other kinds are skipped."""


def parse_description(text: str, *, nouns: Iterable[str] = (), id: str = "") -> Description:  # name of the field
    """Parse a description in English to spans of objects, attributes and relations.

    Objects are names of visible things: those in the lists of the parser, and `nouns`. Attributes are visible properties and
    actions of an object; relations are prepositions and verbs between two objects of a sentence. Pronouns are not resolved,
    and what a sentence denies ("no dogs") is not marked. `tests/toys/free_text/GUIDELINE.md` states what counts.

    Parameters
    ----------
    text
        The description.
    nouns
        Further names of things, such as those of a data set's annotations.
    id
        Id of the description.

    Raises
    ------
    DataError
        If the text is not a string.

    Examples
    --------
    >>> from behavior.free_text import parse_description
    >>> for span in parse_description("A man in a red shirt is riding a horse.").spans:
    ...     print(span.level, span.start, span.end)
    object 2 5
    object 15 20
    object 33 38
    attribute 11 14
    relation 6 8
    relation 24 30
    """
    if not isinstance(text, str):
        msg = f"description '{id}': it must be text, not {type(text).__name__}"
        raise DataError(msg)
    lexicon = Lexicon(nouns)
    spans: list[Span] = []
    for start, sentence in split_sentences(text):
        spans += _read_sentence(SentenceState(group_tokens(lexicon.tokenize(sentence, start))))
    order = {"object": 0, "attribute": 1, "relation": 2}
    return Description(
        id, text, tuple(sorted(dict.fromkeys(spans), key=lambda s: (order[s.level], s.start, s.arguments)))
    )


def _read_sentence(state: SentenceState) -> list[Span]:
    i = 0
    while i < len(state.items):
        step = READERS.get(state.items[i].kind)
        i = step(state, i) if step is not None else i + 1
    state.close_verb()
    return state.spans()
