"""Objects that written texts mention: places, truth and counts by hand, and the same objects as CHAIR's."""

from __future__ import annotations

from dataclasses import replace

import pytest

from behavior import chair
from behavior.chair import COCO_PHRASES, COCO_SYNONYMS
from concepts import AnnotatedObject, ConceptDataset, scenes, with_mentions
from concepts.object_mentions import find_mentions, mentioned_objects
from groundscope.core.errors import DataError

LEXICON = {"dog": "dog", "puppy": "dog", "hot dog": "hot dog", "wine glass": "wine glass", "table": "table"}
CAPTIONS = [
    "Two puppies eat a hot dog, near the wine glasses.",
    "A DOG's table",
    "  a hot\n dog (on a table)... \u201cdog\u201d.dog",
    "\u0130stanbul has a dog",  # its first letter is two characters in lower case
    "nothing",
]
WORDS = [
    ["puppies", "hot dog", "wine glasses"],
    ["DOG", "table"],
    ["hot\n dog", "table", "dog"],
    ["dog"],
    [],
]


@pytest.mark.parametrize(("text", "words"), list(zip(CAPTIONS, WORDS, strict=True)))
def test_a_mention_is_where_its_words_are(text: str, words: list[str]) -> None:
    mentions = find_mentions(text, LEXICON)
    assert [text[start:stop] for _, start, stop in mentions] == words
    assert tuple(noun for noun, _, _ in mentions) == mentioned_objects(text, LEXICON)


@pytest.fixture(scope="module")
def data() -> ConceptDataset:
    captions = scenes.dataset(30, splits=["caption"])[:2]
    things = tuple(AnnotatedObject(n, n, None) for n in ("man", "cat"))
    changed = replace(captions[0], objects=things, answer="A woman with a bicycle.\nA kitten.", prefix="")
    return ConceptDataset("captions", (changed, *captions[1:]))


def test_truth_comes_from_annotations_and_references(data: ConceptDataset) -> None:
    texts = {data[0].id: "Two women, a kitten, a bike and a baby dog. A person.", data[1].id: "No idea."}
    written = with_mentions(data, texts, COCO_SYNONYMS, phrases=COCO_PHRASES)
    assert [e.id for e in written] == [data[0].id, data[1].id]
    assert [(m.noun, m.present) for m in written[0].mentions] == [
        ("person", True), ("cat", True), ("bicycle", True), ("dog", False), ("person", True),
    ]  # fmt: skip
    assert written[0].prefix == texts[data[0].id]
    assert written[0].candidates == written[1].mentions == ()
    scored = chair(
        texts, {data[0].id: ["person", "cat", "bicycle"], data[1].id: []}, COCO_SYNONYMS, phrases=COCO_PHRASES,
        variant="paper",
    )  # fmt: skip
    for example, caption in zip(written, scored.captions, strict=True):
        assert tuple(m.noun for m in example.mentions) == caption.mentioned
        assert tuple(m.noun for m in example.mentions if not m.present) == caption.hallucinated


def test_a_text_continues_the_prefix(data: ConceptDataset) -> None:
    prefixed = ConceptDataset("p", (replace(data[0], prefix="I see a man and"),))
    example = with_mentions(prefixed, {data[0].id: " a dog"}, vocabulary=["dog"])[0]
    assert example.prefix == "I see a man and a dog"
    (mention,) = example.mentions
    assert example.prefix[mention.start : mention.stop] == "dog"


def test_texts_that_cannot_be_used_are_refused(data: ConceptDataset) -> None:
    for texts, message in [
        ({}, "there is no text for dataset 'captions'"),
        ({"zz": "a dog"}, "the text of 'zz' belongs to no example of dataset 'captions'"),
        ({data[0].id: " "}, f"the text of example '{data[0].id}' is empty"),
        ({data[0].id: "a zebra"}, "no text of dataset 'captions' mentions an object"),
    ]:
        with pytest.raises(DataError, match=message.replace("?", ".")):
            with_mentions(data, texts)
