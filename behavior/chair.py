"""CHAIR: which objects a caption names that are not in the image (Rohrbach et al. 2018, arXiv 1809.02156)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from concepts.captions import named_objects, plain
from concepts.errors import ConfigError, DataError

# `import behavior` imports this module, so numpy and what needs it wait until something is scored.
if TYPE_CHECKING:
    import pandas as pd

    from concepts.statistics import Estimate

VARIANTS = ("paper", "release")


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
    from concepts.statistics import estimate

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
    lexicon = {**nouns, **meaning}
    found = tuple(_caption(name, text, there[name], lexicon) for name, text in captions.items())

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


def _caption(name: str, text: str, there: Mapping[str, object], lexicon: Mapping[str, str]) -> CaptionObjects:
    mentioned = named_objects(text, lexicon)
    wrong = tuple(noun for noun in mentioned if noun not in there)
    missed = tuple(noun for noun in there if noun not in mentioned)
    return CaptionObjects(name, mentioned, wrong, missed)
