"""CHAIR: which objects a caption names that are not in the image (Rohrbach et al. 2018, arXiv 1809.02156).

``variant="release"``, the default, counts and reads captions as the released scorer (LisaAnne/Hallucination,
``utils/chair.py``), so that figures compare with published ones. That includes its slips:

- the singular of some words is wrong, and the object is not found: "bus" ("buses" is found), "ties", "doggies", "collies",
  "wine glasses'", and every word of a list that ends in s, such as "glass", "dress" and "lens";
- entries of its list ``data/synonyms.txt`` with a second blank before them or a capital are never found: "motor bike",
  "cheesecake", "iPhone"; neither are pairs of words that its code does not name, and "stove top oven" counts as two ovens;
- after a period without a blank ("a dog.A cat") the word before it is not found;
- endings that only look like a plural become other words: "our" is "my", "police" is "polouse".

``variant="paper"`` is the better reading: an object counts once a caption, as the paper defines it, entries are compared
without regard to capitals and blanks, and the singular is that of `concepts.nouns`. Its CHAIR_i is larger than the
release's by a factor that depends on how often captions repeat themselves (1.3 to 1.9 on twelve published sets of captions).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from concepts.captions import named_objects, words_of
from concepts.nouns import SYNONYMS, singular
from groundscope.core.errors import ConfigError, DataError

# `import behavior` imports this module, so numpy and what needs it wait until something is scored.
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
"""The 80 categories that captions are scored for."""
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
"""Words that stand together, and the words they count as in COCO, by the rules of the release: the young of an animal are no
person, a toilet's seat is no chair; a home plate and a train track are no objects. "wine glas" is its "wine glass"."""
COCO_SYNONYMS: Mapping[str, str] = MappingProxyType(
    {word: group[0] for group in SYNONYMS if group[0] in COCO_CATEGORIES for word in group}
    | {name: name for name in COCO_CATEGORIES}
)
"""Words for COCO's categories: our list. Figures that are compared with published ones need the list of the release
(`read_synonyms`), which names no licence and is therefore not included."""


@dataclass(frozen=True)
class CaptionObjects:
    """The objects of one caption, by their names in the vocabulary."""

    id: str
    mentioned: tuple[str, ...]
    """In order, as often as they are named."""
    hallucinated: tuple[str, ...]
    """Those of them that are not in the image, as often as they are named."""
    missed: tuple[str, ...]
    """Objects of the image that are not named."""


@dataclass(frozen=True)
class ChairResult:
    """CHAIR over captions, with 95 % intervals over images; NaN where there was nothing to count."""

    chair_i: Estimate
    """Hallucinated objects among the objects mentioned."""
    chair_s: Estimate
    """Captions with at least one hallucinated object among all captions."""
    recall: Estimate
    """Objects mentioned among the objects there are, over all images together."""
    captions: tuple[CaptionObjects, ...]
    variant: str
    unreachable: tuple[str, ...] = ()
    """Words of the synonyms, vocabulary and objects that this variant finds in no caption (`behavior.chair` says why)."""

    def frame(self) -> pd.DataFrame:
        """Return one row a caption."""
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
        Image to what is in it; may hold more images than `captions`.
    synonyms
        Word or words to the object they mean, ``{"puppy": "dog"}``; for the objects of `objects` too. `COCO_SYNONYMS`, or
        the list of the release (`read_synonyms`).
    vocabulary
        Objects a caption may name that are in none of the images. Only words of the vocabulary, of the synonyms and of
        `objects` are objects at all: without it, what no image shows cannot be hallucinated.
    phrases
        Words that stand together to the words they count as, `COCO_PHRASES` for COCO; what these mean is looked up among
        synonyms and objects, and is nothing where it is neither. With phrases, "seat" is no object in a caption that
        names a toilet, and for ``release`` no other words count together.
    variant
        ``release``: read and counted as by the released scorer, slips included. ``paper``: the better reading; an object
        counts once a caption. `behavior.chair` lists the differences.

    Raises
    ------
    DataError
        Where there are no captions, or one of an image whose objects are not known.
    ConfigError
        For an unknown variant, or a synonym of a synonym.

    Examples
    --------
    >>> result = chair({"1": "Two women and a dog."}, {"1": ["person"]}, COCO_SYNONYMS, phrases=COCO_PHRASES)
    >>> result.captions[0].mentioned, result.captions[0].hallucinated, result.chair_i.value
    (('person', 'dog'), ('dog',), 0.5)
    """
    from behavior.released_words import released_objects
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
        msg = f"caption of image '{unknown[0]}': the objects of this image are not given ({len(unknown)} such images)"
        raise DataError(msg)
    meaning = {_plain(word): _plain(noun) for word, noun in (synonyms or {}).items()}
    chained = [noun for noun in meaning.values() if meaning.get(noun, noun) != noun]
    if chained:
        msg = f"synonyms: '{chained[0]}' is what a word means and means '{meaning[chained[0]]}' itself; give the object"
        raise ConfigError(msg)

    def named(noun: str) -> str:
        return meaning.get(_plain(noun), _plain(noun))

    there = {name: dict.fromkeys(named(noun) for noun in objects[name]) for name in captions}
    nouns = {_plain(n): named(n) for n in (*vocabulary, *meaning.values(), *(n for o in objects.values() for n in o))}
    if variant == "release":
        released = {**nouns, **{word: _plain(noun) for word, noun in (synonyms or {}).items()}}

        def read(text: str) -> tuple[str, ...]:
            return released_objects(text, released, phrases)
    else:
        words = {**nouns, **meaning}
        pairs = {_plain(phrase): words.get(_plain(means), "") for phrase, means in (phrases or {}).items()}
        lexicon = {**words, **pairs}
        seatless = {word: noun for word, noun in lexicon.items() if word != "seat"}

        def read(text: str) -> tuple[str, ...]:
            toilet = phrases is not None and any(singular(word) == "toilet" for word in words_of(text))
            return named_objects(text, seatless if toilet else lexicon)

    scored = tuple(_caption(name, read(text), there[name]) for name, text in captions.items())

    def count(items: tuple[str, ...]) -> int:
        return len(items) if variant == "release" else len(set(items))

    names = [c.id for c in scored]
    sizes = [len(there[c.id]) for c in scored]
    return ChairResult(
        chair_i=estimate([count(c.hallucinated) for c in scored], names, [count(c.mentioned) for c in scored]),
        chair_s=estimate([bool(c.hallucinated) for c in scored], names),
        recall=estimate([size - len(c.missed) for size, c in zip(sizes, scored, strict=True)], names, sizes),
        captions=scored,
        variant=variant,
        unreachable=tuple(sorted(word for word in {*nouns, *(synonyms or {})} if not read(word))),
    )


def read_synonyms(path: Path | str) -> dict[str, str]:
    """Read a list of synonyms in the layout of the release: a line for each object, its name first, commas between.

    The release's own list for COCO is ``data/synonyms.txt`` of LisaAnne/Hallucination: 80 lines. Entries are kept as they
    are written, capitals and a second blank after a comma included: with those the release does not find them.

    Raises
    ------
    DataError
        Naming file and line: it is missing, is not a regular UTF-8 file, has a line without a name, or a word means two
        objects.
    """
    from concepts.reading.records import readable
    from groundscope.core.user_files import read_text

    file = Path(path)
    objects: dict[str, str] = {}
    homes: dict[str, int] = {}
    with readable(file):
        lines = read_text(file).splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        entries = [entry.removeprefix(" ") for entry in line.strip().split(",")]
        if not entries[0].strip():
            msg = f"{file}: line {number} begins without the name of an object"
            raise DataError(msg)
        for entry in entries:
            if not entry.strip():
                continue
            if homes.setdefault(_plain(entry), number) != number:
                home = homes[_plain(entry)]
                msg = f"{file}: line {number}: '{entry}' already means another object, by line {home}"
                raise DataError(msg)
            objects[entry] = _plain(entries[0])
    if not objects:
        msg = f"{file}: there is no object in it"
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
    """Score the captions among answers; what is in an image are its annotated objects, and those its captions name.

    Parameters
    ----------
    answers
        Answers to `data`, of a model or read by `behavior.answer_files.answered_elsewhere`.
    data
        With questions of kind ``caption``, whose true answer is what people wrote, a caption a line, as
        `concepts.loaders.coco` gives it.
    synonyms, vocabulary, phrases, variant
        As for `chair`.

    Raises
    ------
    DataError
        Where there is no caption; else as `chair`.
    """
    texts = {a.id: a.text or "" for a in answers.answers if a.kind == "caption"}
    examples = {e.id: e for e in data if e.id in texts}
    missing = [number for number in texts if number not in examples]
    if missing or not texts:
        msg = (
            f"caption '{missing[0]}' is not of '{data.name}'" if missing else "there are no captions among the answers"
        )
        raise DataError(msg)
    annotated = {number: [o.noun for o in e.objects] for number, e in examples.items()}
    every = [*vocabulary, *(noun for nouns in annotated.values() for noun in nouns)]
    lines = {(number, i): line for number, e in examples.items() for i, line in enumerate(e.answer.splitlines())}
    people = {f"{i}/{number}": line for (number, i), line in lines.items()}
    # Captions of people are read as those of the model, with nothing in the image: each object is "mentioned".
    read = chair(people, dict.fromkeys(people, ()), synonyms, vocabulary=every, phrases=phrases, variant=variant)
    there = {number: list(nouns) for number, nouns in annotated.items()}
    for (number, _), caption in zip(lines, read.captions, strict=True):
        there[number] += caption.mentioned
    return chair(texts, there, synonyms, vocabulary=every, phrases=phrases, variant=variant)


def _plain(words: str) -> str:
    """Return words in lower case with single blanks."""
    return " ".join(words.lower().split())


def _caption(name: str, mentioned: tuple[str, ...], there: Mapping[str, object]) -> CaptionObjects:
    wrong = tuple(noun for noun in mentioned if noun not in there)
    missed = tuple(noun for noun in there if noun not in mentioned)
    return CaptionObjects(name, mentioned, wrong, missed)
