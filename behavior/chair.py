"""CHAIR: objects that a caption names but the image does not contain (Rohrbach et al. 2018, arXiv 1809.02156).

``variant="release"``, the default, parses and counts captions exactly as the released scorer (LisaAnne/Hallucination,
``utils/chair.py``), so that figures are comparable with published ones. This reproduces its errors:

- some singular forms are wrong, so the object is missed: "bus" ("buses" is detected), "ties", "doggies", "collies",
  "wine glasses'", and every listed word that ends in s, such as "glass", "dress" and "lens";
- entries of its list ``data/synonyms.txt`` with two spaces before them or a capital letter are never detected: "motor
  bike", "cheesecake", "iPhone"; nor are word pairs that its code does not list, and "stove top oven" counts as two ovens;
- after a period without a space ("a dog.A cat") the word before it is missed;
- words that only look like plurals are changed: "our" becomes "my", "police" becomes "polouse".

``variant="paper"`` is more accurate: an object counts once per caption, as the paper defines it, entries are compared
ignoring case and spacing, and singular forms come from `concepts.nouns`. Its CHAIR_i exceeds the release's by a factor that
depends on how often captions repeat objects (1.3 to 1.9 on twelve published sets of captions).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from concepts.nouns import SYNONYMS, singular
from concepts.object_mentions import caption_lexicon, mentioned_objects, normalize_words, tokenize_words
from groundscope.core.errors import ConfigError, DataError
from groundscope.core.short_repr import short_repr
from groundscope.core.text import format_count

# `import behavior` imports this module, so numpy and modules that need it are imported when scoring.
if TYPE_CHECKING:
    import pandas as pd

    from behavior.result import BehaviorResult
    from concepts.schema import ConceptDataset
    from groundscope.core.statistics import Estimate

VARIANTS = ("release", "paper")
COCO_CATEGORIES = tuple(
    name.strip()
    for name in """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
    parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag, tie,
    suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket,
    bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut,
    cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard, cell phone, microwave,
    oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush""".split(",")
)
"""COCO's 80 object categories, which captions are scored for."""
_ANIMALS = "bird cat dog horse sheep cow elephant bear zebra giraffe animal cub".split()
_PAIRS = """motor bike, motor cycle, air plane, traffic light, street light, traffic signal, stop light, fire hydrant, stop sign,
parking meter, suit case, sports ball, baseball bat, baseball glove, tennis racket, wine glass, hot dog, cell phone, mobile phone,
teddy bear, hair drier, potted plant, stove top oven, home plate, train track"""
COCO_PHRASES: Mapping[str, str] = MappingProxyType(
    {
        **{pair.strip(): pair.strip() for pair in _PAIRS.split(",")},
        **{f"{age} {animal}": animal for animal in _ANIMALS for age in ("baby", "adult")},
        **{f"passenger {vehicle}": vehicle for vehicle in ("jet", "train")},
        "bow tie": "tie",
        "laptop computer": "laptop",
        "toilet seat": "toilet",
        "wine glas": "wine glass",
    }
)
"""Word pairs and the words they count as in COCO, by the rules of the release: "baby cat" is a cat and not a person, "toilet
seat" is not a chair; "home plate" and "train track" are not objects. "wine glas" is the release's singular of "wine glasses"."""
COCO_SYNONYMS: Mapping[str, str] = MappingProxyType(
    {word: group[0] for group in SYNONYMS if group[0] in COCO_CATEGORIES for word in group}
    | {name: name for name in COCO_CATEGORIES}
)
"""Words for COCO's categories: this project's list. Figures comparable with published ones need the release's list
(`read_synonyms`), which has no stated license and is therefore not included."""


@dataclass(frozen=True)
class CaptionObjects:
    """The objects of one caption, by their names in the vocabulary."""

    id: str
    mentioned: tuple[str, ...]
    """Objects in order of mention, with repetitions."""
    hallucinated: tuple[str, ...]
    """Mentioned objects that are not in the image, with repetitions."""
    missed: tuple[str, ...]
    """Objects of the image that the caption does not mention."""


@dataclass(frozen=True)
class ChairResult:
    """CHAIR over captions, with 95 % intervals over images; NaN if the denominator is 0.

    Examples
    --------
    >>> from behavior import chair
    >>> result = chair({"1": "A cat and a dog."}, {"1": ["cat", "car"]}, vocabulary=["dog"])
    >>> result.chair_i.value, result.chair_s.value, result.recall.value
    (0.5, 1.0, 0.5)
    """

    chair_i: Estimate
    """Share of mentioned objects that are hallucinated."""
    chair_s: Estimate
    """Share of captions with at least one hallucinated object."""
    recall: Estimate
    """Share of the images' objects that captions mention, pooled over images."""
    captions: tuple[CaptionObjects, ...]
    variant: str
    unreachable: tuple[str, ...] = ()
    """Words of the synonyms, vocabulary and objects that this variant cannot detect in any caption (`behavior.chair`)."""

    __repr__ = short_repr

    def frame(self) -> pd.DataFrame:
        """Return one row per caption."""
        import pandas as pd

        return pd.DataFrame([asdict(c) for c in self.captions])


def chair(
    captions: Mapping[str, str],
    objects: Mapping[str, Iterable[str]],
    synonyms: Mapping[str, str] | None = None,
    *,
    vocabulary: Iterable[str] = (),
    phrases: Mapping[str, str] | None = None,
    variant: str = "release",
) -> ChairResult:
    """Score captions against the objects of their images.

    Parameters
    ----------
    captions
        Image to its caption.
    objects
        Image to the objects in it; may contain more images than `captions`.
    synonyms
        Word or phrase to the object it means, ``{"puppy": "dog"}``; also applied to `objects`. `COCO_SYNONYMS`, or the
        list of the release (`read_synonyms`).
    vocabulary
        Objects that a caption may name but no image contains. Only words of the vocabulary, the synonyms and `objects`
        count as objects; without a vocabulary, an object that no image contains cannot be hallucinated.
    phrases
        Word pair to the word it counts as, `COCO_PHRASES` for COCO; that word is looked up in synonyms and objects, and
        ignored if it is in neither. With phrases, "seat" is not an object in a caption that names a toilet, and in
        variant ``release`` no other word pairs are joined.
    variant
        ``release``: parse and count as the released scorer does, errors included. ``paper``: more accurate; an object
        counts once per caption. The module docstring lists the differences.

    Raises
    ------
    DataError
        If there are no captions, or the objects of a caption's image are missing.
    ConfigError
        For an unknown variant, or a synonym of a synonym.

    Examples
    --------
    >>> from behavior import chair
    >>> from behavior.chair import COCO_PHRASES, COCO_SYNONYMS
    >>> result = chair({"1": "Two women and a dog."}, {"1": ["person"]}, COCO_SYNONYMS, phrases=COCO_PHRASES)
    >>> result.captions[0].mentioned, result.captions[0].hallucinated, result.chair_i.value
    (('person', 'dog'), ('dog',), 0.5)
    """
    from behavior.chair_released_objects import released_objects
    from groundscope.core.statistics import estimate

    if variant not in VARIANTS:
        msg = f"unknown variant '{variant}'; choose from {', '.join(VARIANTS)}"
        raise ConfigError(msg)
    if not captions:
        msg = "there are no captions to score"
        raise DataError(msg)
    wrong = next((name for name, caption in captions.items() if not isinstance(caption, str)), None)
    if wrong is not None:
        msg = f"caption of image '{wrong}': it must be text, not {type(captions[wrong]).__name__}"
        raise DataError(msg)
    listed = next((name for name in captions if isinstance(objects.get(name), str)), None)
    if listed is not None:
        msg = f"objects of image '{listed}': give a list of nouns, not one text"
        raise DataError(msg)
    unknown = [name for name in captions if name not in objects]
    if unknown:
        msg = (
            f"caption of image '{unknown[0]}': no objects for this image ({format_count(len(unknown), 'such image')}); "
            "add them to objects"
        )
        raise DataError(msg)
    meaning = {normalize_words(word): normalize_words(noun) for word, noun in (synonyms or {}).items()}
    chained = [noun for noun in meaning.values() if meaning.get(noun, noun) != noun]
    if chained:
        msg = f"synonyms: a word maps to '{chained[0]}', which maps to '{meaning[chained[0]]}'; map each word to its object"
        raise ConfigError(msg)

    def object_of(noun: str) -> str:
        return meaning.get(normalize_words(noun), normalize_words(noun))

    present = {name: dict.fromkeys(object_of(noun) for noun in objects[name]) for name in captions}
    objects_of_word = {
        normalize_words(n): object_of(n)
        for n in (*vocabulary, *meaning.values(), *(n for o in objects.values() for n in o))
    }
    if variant == "release":
        released = {**objects_of_word, **{word: normalize_words(noun) for word, noun in (synonyms or {}).items()}}

        def read(text: str) -> tuple[str, ...]:
            return released_objects(text, released, phrases)
    else:
        lexicon = caption_lexicon(objects_of_word, synonyms, phrases)
        without_seat = {word: noun for word, noun in lexicon.items() if word != "seat"}

        def read(text: str) -> tuple[str, ...]:
            toilet = phrases is not None and any(singular(word) == "toilet" for word in tokenize_words(text))
            return mentioned_objects(text, without_seat if toilet else lexicon)

    scored = tuple(_caption(name, read(text), present[name]) for name, text in captions.items())

    def count(items: tuple[str, ...]) -> int:
        return len(items) if variant == "release" else len(set(items))

    names = [c.id for c in scored]
    sizes = [len(present[c.id]) for c in scored]
    return ChairResult(
        chair_i=estimate([count(c.hallucinated) for c in scored], names, [count(c.mentioned) for c in scored]),
        chair_s=estimate([bool(c.hallucinated) for c in scored], names),
        recall=estimate([size - len(c.missed) for size, c in zip(sizes, scored, strict=True)], names, sizes),
        captions=scored,
        variant=variant,
        unreachable=tuple(sorted(word for word in {*objects_of_word, *(synonyms or {})} if not read(word))),
    )


def read_synonyms(path: Path | str) -> dict[str, str]:
    """Read a synonym list in the layout of the release: one line per object, its name first, separated by commas.

    The release's list for COCO is ``data/synonyms.txt`` of LisaAnne/Hallucination: 80 lines. Entries are not normalized:
    capital letters and a second space after a comma remain, because the release does not detect such entries.

    Raises
    ------
    DataError
        Names the file and line: if it is missing, is not a regular UTF-8 file, has a line without a name, or a word
        means two objects.
    """
    from concepts.reading.text_files import readable
    from groundscope.core.user_files import read_text

    file = Path(path)
    objects: dict[str, str] = {}
    line_of_entry: dict[str, int] = {}
    with readable(file):
        lines = read_text(file).splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        entries = [entry.removeprefix(" ") for entry in line.strip().split(",")]
        if not entries[0].strip():
            msg = f"{file}: line {number} does not begin with the name of an object"
            raise DataError(msg)
        for entry in entries:
            if not entry.strip():
                continue
            if line_of_entry.setdefault(normalize_words(entry), number) != number:
                first_line = line_of_entry[normalize_words(entry)]
                msg = f"{file}: line {number}: '{entry}' already means another object, in line {first_line}"
                raise DataError(msg)
            objects[entry] = normalize_words(entries[0])
    if not objects:
        msg = f"{file}: the file contains no objects"
        raise DataError(msg)
    return objects


def score_captions(
    answers: BehaviorResult,
    data: ConceptDataset,
    synonyms: Mapping[str, str] | None = None,
    *,
    vocabulary: Iterable[str] = (),
    phrases: Mapping[str, str] | None = None,
    variant: str = "release",
) -> ChairResult:
    """Score the captions among answers; an image's objects are the annotated ones and those in its reference captions.

    Parameters
    ----------
    answers
        Answers to `data`, from a model or read by `behavior.answer_files.load_answers`.
    data
        Dataset with questions of kind ``caption``; the true answer contains the human captions, one per line, as
        `concepts.loaders.coco` loads them.
    synonyms, vocabulary, phrases, variant
        As for `chair`.

    Raises
    ------
    DataError
        If there is no caption; otherwise as for `chair`.
    """
    texts = {a.id: a.text or "" for a in answers.answers if a.kind == "caption"}
    examples = {e.id: e for e in data if e.id in texts}
    missing = [number for number in texts if number not in examples]
    if missing or not texts:
        msg = f"caption '{missing[0]}' is not in dataset '{data.name}'" if missing else "no captions among the answers"
        raise DataError(msg)
    annotated = {number: [o.noun for o in e.objects] for number, e in examples.items()}
    vocabulary_and_objects = [*vocabulary, *(noun for nouns in annotated.values() for noun in nouns)]
    lines = {(number, i): line for number, e in examples.items() for i, line in enumerate(e.answer.splitlines())}
    human_captions = {f"{i}/{number}": line for (number, i), line in lines.items()}
    present = {number: list(nouns) for number, nouns in annotated.items()}
    if human_captions:
        # Parse human captions like the model's, with an empty image: every object counts as "mentioned".
        parsed = chair(
            human_captions,
            dict.fromkeys(human_captions, ()),
            synonyms,
            vocabulary=vocabulary_and_objects,
            phrases=phrases,
            variant=variant,
        )
        for (number, _), caption in zip(lines, parsed.captions, strict=True):
            present[number] += caption.mentioned
    return chair(texts, present, synonyms, vocabulary=vocabulary_and_objects, phrases=phrases, variant=variant)


def _caption(name: str, mentioned: tuple[str, ...], present: Mapping[str, object]) -> CaptionObjects:
    hallucinated = tuple(noun for noun in mentioned if noun not in present)
    missed = tuple(noun for noun in present if noun not in mentioned)
    return CaptionObjects(name, mentioned, hallucinated, missed)
