"""CHAIR: which objects a caption names that are not in the image (Rohrbach et al. 2018, arXiv 1809.02156)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from concepts.errors import ConfigError, DataError

# `import behavior` imports this module, so numpy and what needs it wait until something is scored.
if TYPE_CHECKING:
    import pandas as pd

    from concepts.statistics import Estimate

VARIANTS = ("paper", "release")
_WORD = re.compile(r"[^\W_]+")
_PLURALS = (("ies", "y"), ("ves", "f"), ("ves", "fe"), ("es", ""), ("s", ""))
"""Ending of a plural to that of its singular, tried in this order."""


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
    meaning = {_plain(word): _plain(noun) for word, noun in (synonyms or {}).items()}
    chained = [noun for noun in meaning.values() if meaning.get(noun, noun) != noun]
    if chained:
        msg = f"synonyms: '{chained[0]}' is what a word means and means '{meaning[chained[0]]}' itself; give the object"
        raise ConfigError(msg)

    def named(noun: str) -> str:
        return meaning.get(_plain(noun), _plain(noun))

    there = {name: dict.fromkeys(named(noun) for noun in objects[name]) for name in captions}
    nouns = {_plain(n): named(n) for n in (*vocabulary, *meaning.values(), *(n for o in objects.values() for n in o))}
    lexicon = {**nouns, **meaning}
    longest = max((len(words.split()) for words in lexicon), default=1)
    found = tuple(_caption(name, text, there[name], lexicon, longest) for name, text in captions.items())

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


def _plain(words: str) -> str:
    return " ".join(_WORD.findall(words.lower()))


def _caption(
    name: str, text: str, there: Mapping[str, object], lexicon: Mapping[str, str], longest: int
) -> CaptionObjects:
    words = _WORD.findall(text.lower())
    mentioned: list[str] = []
    start = 0
    while start < len(words):
        for length in range(min(longest, len(words) - start), 0, -1):
            noun = _meaning(" ".join(words[start : start + length]), lexicon)
            if noun is not None:
                mentioned.append(noun)
                start += length
                break
        else:
            start += 1
    wrong = tuple(noun for noun in mentioned if noun not in there)
    missed = tuple(noun for noun in there if noun not in mentioned)
    return CaptionObjects(name, tuple(mentioned), wrong, missed)


def _meaning(words: str, lexicon: Mapping[str, str]) -> str | None:
    """Return the object that words mean, as they are or as a plural."""
    if words in lexicon:
        return lexicon[words]
    for ending, singular in _PLURALS:
        if (
            words.endswith(ending)
            and len(words) > len(ending)
            and (single := words.removesuffix(ending) + singular) in lexicon
        ):
            return lexicon[single]
    return None
