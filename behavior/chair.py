"""CHAIR: which objects a caption names that are not in the image (Rohrbach et al. 2018, arXiv 1809.02156)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from concepts.captions import named_objects, plain
from groundscope.core.errors import ConfigError, DataError

# `import behavior` imports this module, so numpy and what needs it wait until something is scored.
if TYPE_CHECKING:
    import pandas as pd

    from behavior.result import BehaviorResult
    from concepts.schema import ConceptDataset
    from groundscope.core.statistics import Estimate

VARIANTS = ("paper", "release")
_ANIMALS = "bird cat dog horse sheep cow elephant bear zebra giraffe animal cub".split()
COCO_PHRASES: Mapping[str, str] = MappingProxyType(
    {
        **{f"{age} {animal}": animal for animal in _ANIMALS for age in ("baby", "adult")},
        **{f"passenger {vehicle}": vehicle for vehicle in ("jet", "train")},
        "bow tie": "tie",
        "toilet seat": "toilet",
        "home plate": "",
        "laptop computer": "laptop",
        "stove top oven": "oven",
    }
)
"""Pairs of words that are one thing in COCO, by the rules of the release (LisaAnne/Hallucination, ``utils/chair.py``):
the young of an animal are no person, a toilet's seat no chair, a home plate no dish."""


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
    variant: str = "paper",
) -> ChairResult:
    """Score captions against the objects of their images.

    Words are runs of letters and digits, in lower case. What is looked for may be several words; the longest is found
    first, so that a "hot dog" is no dog. A word that is not known is tried without a plural's ending (ies -> y, ves -> f
    or fe, es, s). Plurals that are irregular are given as synonyms.

    Parameters
    ----------
    captions
        Image to its caption.
    objects
        Image to what is in it; may hold more images than `captions`.
    synonyms
        Word or words to the object they mean, ``{"puppy": "dog", "men": "person"}``; for the objects of `objects` too.
    vocabulary
        Objects a caption may name that are in none of the images. Only words of the vocabulary, of the synonyms and of
        `objects` are objects at all: without it, what no image shows cannot be hallucinated.
    phrases
        Words that stand together to the words they count as, `COCO_PHRASES` for COCO; what these mean is looked up among
        synonyms and objects, and is nothing where it is neither. With phrases, "seat" is no object in a caption that
        names a toilet, as in the release.
    variant
        ``paper``: an object counts once a caption. ``release``: as often as it is named (LisaAnne/Hallucination,
        ``utils/chair.py``).

    Raises
    ------
    DataError
        Where there are no captions, or one of an image whose objects are not known.
    ConfigError
        For an unknown variant, or a synonym of a synonym.
    """
    from groundscope.core.statistics import estimate

    if variant not in VARIANTS:
        msg = f"no variant '{variant}': there are {', '.join(VARIANTS)}"
        raise ConfigError(msg)
    if not captions:
        msg = "there are no captions to score"
        raise DataError(msg)
    unknown = [name for name in captions if name not in objects]
    if unknown:
        msg = f"caption of image '{unknown[0]}': the objects of this image are not given ({len(unknown)} such images)"
        raise DataError(msg)
    meaning = {plain(word): plain(noun) for word, noun in (synonyms or {}).items()}
    chained = [noun for noun in meaning.values() if meaning.get(noun, noun) != noun]
    if chained:
        msg = f"synonyms: '{chained[0]}' is what a word means and means '{meaning[chained[0]]}' itself; give the object"
        raise ConfigError(msg)

    def named(noun: str) -> str:
        return meaning.get(plain(noun), plain(noun))

    there = {name: dict.fromkeys(named(noun) for noun in objects[name]) for name in captions}
    nouns = {plain(n): named(n) for n in (*vocabulary, *meaning.values(), *(n for o in objects.values() for n in o))}
    words = {**nouns, **meaning}
    pairs = {plain(phrase): words.get(plain(means), "") for phrase, means in (phrases or {}).items()}
    lexicon = {**words, **pairs}
    seatless = {word: noun for word, noun in lexicon.items() if word != "seat"} if pairs else lexicon

    def known(text: str) -> Mapping[str, str]:
        return seatless if pairs and "toilet" in plain(text).split() else lexicon

    found = tuple(_caption(name, text, there[name], known(text)) for name, text in captions.items())

    def count(items: tuple[str, ...]) -> int:
        return len(items) if variant == "release" else len(set(items))

    names = [c.id for c in found]
    sizes = [len(there[c.id]) for c in found]
    return ChairResult(
        chair_i=estimate([count(c.hallucinated) for c in found], names, [count(c.mentioned) for c in found]),
        chair_s=estimate([bool(c.hallucinated) for c in found], names),
        recall=estimate([size - len(c.missed) for size, c in zip(sizes, found, strict=True)], names, sizes),
        captions=found,
        variant=variant,
    )


def read_synonyms(path: Path | str) -> dict[str, str]:
    """Read a list of synonyms in the layout of the release: a line for each object, its name first, commas between.

    The release's own list for COCO is ``data/synonyms.txt`` of LisaAnne/Hallucination: 80 lines.

    Raises
    ------
    DataError
        Naming file and line: it cannot be read, has a line without a name, or a word means two objects.
    """
    from concepts.reading.records import readable

    file = Path(path)
    found: dict[str, str] = {}
    homes: dict[str, int] = {}
    with readable(file):
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            msg = f"{file}: not UTF-8 at byte {error.start + 1}"
            raise DataError(msg) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        words = [plain(word) for word in line.split(",")]
        if not words[0]:
            msg = f"{file}: line {number} begins without the name of an object"
            raise DataError(msg)
        for word in filter(None, words):
            if homes.setdefault(word, number) != number:
                msg = f"{file}: line {number}: '{word}' already means '{found[word]}', by line {homes[word]}"
                raise DataError(msg)
            found[word] = words[0]
    if not found:
        msg = f"{file}: there is no object in it"
        raise DataError(msg)
    return found


def score_captions(
    answers: BehaviorResult,
    data: ConceptDataset,
    synonyms: Mapping[str, str] | None = None,
    *,
    vocabulary: Iterable[str] = (),
    phrases: Mapping[str, str] | None = None,
    variant: str = "paper",
) -> ChairResult:
    """Score the captions among answers; what is in an image are its annotated objects, and those its captions name.

    Parameters
    ----------
    answers
        Answers to `data`, of a model or read by `behavior.answer_files.answered_elsewhere`.
    data
        With questions of kind ``caption``, whose true answer is what people wrote, as `concepts.loaders.coco` gives it.
    synonyms, vocabulary, phrases, variant
        As for `chair`.

    Raises
    ------
    DataError
        Where there is no caption; else as `chair`.
    """
    told = {a.id: a.text or "" for a in answers.answers if a.kind == "caption"}
    asked = {e.id: e for e in data if e.id in told}
    missing = [number for number in told if number not in asked]
    if missing or not told:
        msg = (
            f"caption '{missing[0]}' is not of '{data.name}'" if missing else "there are no captions among the answers"
        )
        raise DataError(msg)
    annotated = {number: [o.noun for o in e.objects] for number, e in asked.items()}
    every = [*vocabulary, *(noun for nouns in annotated.values() for noun in nouns)]
    people = {number: e.answer for number, e in asked.items()}
    # What people wrote is read just as what the model wrote is, with nothing in the image: all of it is then "named".
    read = chair(people, dict.fromkeys(people, ()), synonyms, vocabulary=every, phrases=phrases, variant=variant)
    there = {c.id: [*annotated[c.id], *c.mentioned] for c in read.captions}
    return chair(told, there, synonyms, vocabulary=every, phrases=phrases, variant=variant)


def _caption(name: str, text: str, there: Mapping[str, object], lexicon: Mapping[str, str]) -> CaptionObjects:
    mentioned = named_objects(text, lexicon)
    wrong = tuple(noun for noun in mentioned if noun not in there)
    missed = tuple(noun for noun in there if noun not in mentioned)
    return CaptionObjects(name, mentioned, wrong, missed)
