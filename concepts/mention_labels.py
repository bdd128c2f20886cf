"""Written texts with the objects that they mention, each labeled as present or hallucinated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from concepts.answer_prefix import join_words
from concepts.mention import Mention
from concepts.object_mentions import caption_lexicon, find_mentions, normalize_words
from concepts.schema import ConceptDataset, Example
from groundscope.core.errors import DataError


def with_mentions(
    data: ConceptDataset,
    texts: Mapping[str, str],
    synonyms: Mapping[str, str] | None = None,
    *,
    vocabulary: Iterable[str] = (),
    phrases: Mapping[str, str] | None = None,
) -> ConceptDataset:
    """Return examples whose answer is already written, with every object that it mentions.

    The text becomes the prefix of its example, so a forward pass reads it as if the model had just written it, and the token
    selections ``mention:before``, ``mention:first`` and ``mention:last`` have one row for each mention. An object is present if
    it is annotated, or if a reference caption names it; otherwise it is hallucinated.

    Parameters
    ----------
    data
        Examples with annotated objects; those without a text are left out. For questions of kind ``caption`` the true answer
        contains reference captions, one per line.
    texts
        Example id to the text: captions of a model (`behavior.BehaviorResult.texts`), or any others.
    synonyms, vocabulary, phrases
        Words for objects, objects that a text may name but no image contains, and word pairs, as for `behavior.chair`.

    Returns
    -------
    ConceptDataset
        The examples with a text, in order, without candidates.

    Raises
    ------
    DataError
        If a text belongs to no example or is empty, no text is given, or no text mentions an object.

    Examples
    --------
    >>> import groundscope as gs
    >>> data = gs.scenes.dataset(10, splits=["caption"])[:1]
    >>> [(o.noun, o.attributes["color"]) for o in data[0].objects]
    [('banana', 'yellow'), ('guitar', 'yellow'), ('bus', 'blue'), ('tulip', 'purple')]
    >>> written = gs.with_mentions(data, {data[0].id: "A blue bus and a dog."}, vocabulary=["dog"])
    >>> [(mention.noun, mention.present) for mention in written[0].mentions]
    [('bus', True), ('dog', False)]
    """
    ids = {example.id for example in data}
    unknown = [name for name in texts if name not in ids]
    if unknown or not texts:
        problem = f"the text of '{unknown[0]}' belongs to no example of" if unknown else "there is no text for"
        msg = f"{problem} dataset '{data.name}'; give texts by example id"
        raise DataError(msg)
    empty = next((name for name, text in texts.items() if not isinstance(text, str) or not text.strip()), None)
    if empty is not None:
        msg = f"the text of example '{empty}' is empty; leave the example out"
        raise DataError(msg)
    written = [example for example in data if example.id in texts]
    nouns = [*vocabulary, *(o.noun for example in written for o in example.objects)]
    lexicon = caption_lexicon(nouns, synonyms, phrases)
    examples = tuple(_with_text(example, texts[example.id], lexicon) for example in written)
    if not any(example.mentions for example in examples):
        msg = (
            f"no text of dataset '{data.name}' mentions an object that is annotated or in the vocabulary; give synonyms or a "
            "vocabulary of the objects that texts name"
        )
        raise DataError(msg)
    return ConceptDataset(data.name, examples, data.provenance)


def _with_text(example: Example, text: str, lexicon: Mapping[str, str]) -> Example:
    references = example.answer if example.kind == "caption" else ""
    present = {lexicon.get(normalize_words(o.noun), normalize_words(o.noun)) for o in example.objects}
    present |= {noun for line in references.splitlines() for noun, _, _ in find_mentions(line, lexicon)}
    prefix = join_words(example.prefix, text.strip())
    offset = len(prefix) - len(text.strip())
    mentions = tuple(
        Mention(noun, offset + start, offset + stop, noun in present)
        for noun, start, stop in find_mentions(text.strip(), lexicon)
    )
    return replace(example, prefix=prefix, candidates=(), mentions=mentions)
