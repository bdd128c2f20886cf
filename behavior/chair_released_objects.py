"""Extract the objects of a caption exactly as the released CHAIR scorer does, errors included.

LisaAnne/Hallucination, ``utils/chair.py``: tokenize with NLTK, singularize each word with ``pattern.en.singularize``, join
word pairs, and look up the result in the synonym list. `singularize` applies the rules that pattern.en publishes
(clips/pattern, ``pattern/text/en/inflect.py``, BSD; after the inflector of Bermi Ferrer Martinez).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

from concepts.object_mentions import match_lexicon, tokenize_words

_PREPOSITIONS = frozenset(
    """about above across after among around at athwart before behind below beneath beside besides between betwixt beyond
    but by during except for from in into near of off on onto out over since till to under until unto upon with""".split()
)
_UNCHANGED = tuple(
    """bison bream breeches britches carp chassis christmas clippers cod contretemps corps debris diabetes djinn eland elk
    flounder gallows georgia graffiti headquarters herpes high-jinks homework innings jackanapes mackerel measles mews mumps
    news pincers pliers proceedings rabies salmon scissors series shears species swine swiss trout tuna whiting wildebeest
    advice bread butter cheese electricity equipment fruit furniture garbage gravel happiness information ketchup knowledge
    love luggage mathematics mayonnaise meat mustard progress research rice sand software understanding water""".split()
)
"""Words without a plural form; every suffix of these words is treated the same way."""
_ENDS_IN_IE = tuple(
    f"{word}s"
    for word in """alergie auntie beanie birdie bogie bombie collie cookie cutie doggie eyrie freebie goonie groupie hankie
    hippie hoagie hottie indie junkie laddie laramie lingerie meanie newbie nightie oldie pixie quickie reverie rookie softie
    sortie stoolie sweetie techie toughie valkyrie veggie weenie yuppie zombie""".split()
)
"""Plurals that are returned unchanged: the release's rule for them returns the word itself instead of removing the s."""
_IRREGULAR = tuple(
    tuple(pair.split(":"))
    for pair in """atlantes:atlas atlases:atlas axes:axe beeves:beef brethren:brother children:child corpora:corpus
    corpuses:corpus ephemerides:ephemeris feet:foot ganglia:ganglion geese:goose genera:genus genii:genie graffiti:graffito
    helves:helve kine:cow leaves:leaf loaves:loaf men:man mongooses:mongoose monies:money moves:move mythoi:mythos
    numena:numen occipita:occiput octopodes:octopus opera:opus opuses:opus our:my oxen:ox penes:penis penises:penis
    people:person sexes:sex soliloquies:soliloquy teeth:tooth testes:testis trilbys:trilby turves:turf zoa:zoon""".split()
)
"""Plural endings and their replacements; the first match is used."""
_RULES = tuple(
    (re.compile(pattern), ending)
    for pattern, ending in (
        (r"(.)ae$", r"\1a"),
        (r"(.)itis$", r"\1itis"),
        (r"(.)eaux$", r"\1eau"),
        (r"(quiz)zes$", r"\1"),
        (r"(matr)ices$", r"\1ix"),
        (r"(ap|vert|ind)ices$", r"\1ex"),
        (r"^(ox)en", r"\1"),
        (r"(alias|status)es$", r"\1"),
        (r"([octp|vir])i$", r"\1us"),
        (r"(cris|ax|test)es$", r"\1is"),
        (r"(shoe)s$", r"\1"),
        (r"(o|bus)es$", r"\1"),
        (r"([m|l])ice$", r"\1ouse"),
        (r"(x|ch|ss|sh)es$", r"\1"),
        (r"(m)ovies$", r"\1ovie"),
        (r"(.)ombies$", r"\1ombie"),
        (r"(s)eries$", r"\1eries"),
        (r"([^aeiouy]|qu)ies$", r"\1y"),
        (r"([aeo]l|[^d]ea|ar)ves$", r"\1f"),
        (r"erves$", "erve"),
        (r"([nlw]i)ves$", r"\1fe"),
        (r"([lr])ves$", r"\1f"),
        (r"([aeo])ves$", r"\1ve"),
        (r"(sive|tive|hive)s$", r"\1"),
        (r"([^f])ves$", r"\1fe"),
        (r"(^analy|analy|ba|diagno|parenthe|progno|synop|the)ses$", r"\1sis"),
        (r"(.)opses$", r"\1opsis"),
        (r"(.)yses$", r"\1ysis"),
        (r"(h|d|r|o|n|b|cl|p)oses$", r"\1ose"),
        (r"(fruct|gluc|galact|lact|ket|malt|rib|sacchar|cellul)ose$", r"\1ose"),
        (r"(.)oses$", r"\1osis"),
        (r"([ti])a$", r"\1um"),
        (r"(n)ews$", r"\1ews"),
        (r"s$", ""),
    )
)
"""Patterns and replacements; the first match is used."""


@lru_cache(maxsize=1 << 16)
def singularize(word: str) -> str:
    """Return pattern.en's singular of a lower-case word, correct or not: "men" becomes "man", but "bus" becomes "bu"."""
    parts = word.split("-")
    if len(parts) > 1 and parts[1] in _PREPOSITIONS:
        return "-".join([singularize(parts[0]), *parts[1:]])
    if word.endswith("'"):
        return singularize(word[:-1]) + "'s"
    if word.endswith(_ENDS_IN_IE) or any(other.endswith(word) for other in _UNCHANGED):
        return word
    for ending, single in _IRREGULAR:
        if word.endswith(ending):
            return word.removesuffix(ending) + single
    for pattern, ending in _RULES:
        if pattern.search(word):
            return pattern.sub(ending, word)
    return word


def released_objects(text: str, lexicon: Mapping[str, str], phrases: Mapping[str, str] | None) -> tuple[str, ...]:
    """Return the objects that a caption names, in order, with repetitions.

    Parameters
    ----------
    text
        A caption.
    lexicon
        Entry to object; lower-case words are compared with the entries, which are not normalized.
    phrases
        Word pair to the word it counts as; no other pair is joined, and "seat" is ignored in captions with "toilet".
        Without phrases (which the release always uses), entries of several words are matched wherever they occur.
    """
    words = [singularize(word) for word in tokenize_words(text)]
    if phrases is None:
        return match_lexicon(words, lexicon, plurals=False)
    joined: list[str] = []
    start = 0
    while start < len(words):
        pair = phrases.get(" ".join(words[start : start + 2])) if start + 1 < len(words) else None
        joined.append(words[start] if pair is None else pair)
        start += 1 if pair is None else 2
    if "toilet" in joined:
        joined = [word for word in joined if word != "seat"]
    return tuple(lexicon[word] for word in joined if word in lexicon)
