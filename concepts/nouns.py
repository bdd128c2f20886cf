"""Grammar and synonyms of English nouns: number, article, yes-no questions, and names of the same object.

Used to word questions, to choose absent objects, to score captions (CHAIR) and to find the object of a question.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Literal

Number = Literal["singular", "plural", "mass"]

_MASS = frozenset(
    """air asparagus asphalt bacon baggage beef beer bread broccoli butter cabbage cardboard celery cement chalk cheese
    chess clothing coffee concrete corn couscous cutlery debris denim dirt dust equipment fabric flour foam fog
    foliage food frosting fur furniture garbage garlic gold graffiti grass gravel grease greenery guacamole hair ham
    hardware hay homework honey hummus ice icing ivy jewelry juice ketchup laundry leather lettuce linen luggage
    lumber makeup mayonnaise meat merchandise metal milk money moss mud mulch music mustard news paint parsley pasta
    plastic pollen pork produce rice rust salt sand scenery seafood seaweed shrubbery silverware smoke snow soil
    spaghetti spinach steam steel straw stuff sugar sunlight sunshine syrup tableware tea tennis tinsel toast
    traffic trash underwear vegetation wallpaper water wax weather wine wood wool""".split()
)
"""Mass nouns: without article and plural."""
_NO_SINGULAR = frozenset(
    """binoculars bleachers briefs capris clothes eyeglasses goggles jeans khakis leggings overalls pajamas panties pants
    pliers pyjamas scissors scrubs shears shorts skis slacks sunglasses suspenders sweatpants tights tongs trousers
    trunks tweezers underpants undies""".split()
)
"""Plurals that name a single object; their singular means something else, or is not a word."""
_NO_PLURAL = frozenset(
    "aircraft spacecraft deer moose sheep fish salmon trout bison shrimp swine elk series species".split()
)
_ENDS_IN_S = frozenset(
    """abacus airbus alias arthritis asbestos atlas axis basis bias bus cactus callus campus canvas chaos chassis christmas
    circus citrus cosmos crocus cyclops discus eucalyptus fetus focus fungus gas genius hibiscus hippopotamus ibis
    iris lens lexus lotus lupus mantis minibus mucus narcissus news nexus nucleus octopus omnibus pancreas papyrus
    pelvis penis platypus plus portcullis prius rhinoceros status stimulus stylus surplus syllabus taurus tennis
    texas thermos torus trellis trolleybus uterus venus virus walrus""".split()
)
"""Singular nouns that end in a single s."""
_ENDS_IN_VOWEL_S = frozenset("menus emus gnus gurus".split())
"""Plurals that end in -us."""
_ADDS_S = """ache avalanche beanie birdie bowtie brownie cache calorie canoe chaise collie cookie doe doggie eyrie floe foe genie
headache hippie hoagie hoe hoodie horseshoe magpie moustache movie mustache necktie niche oboe onesie pie pinkie pixie potpie
prairie quiche rookie selfie shoe smoothie snowshoe stair tie toe veggie zombie""".split()
"""Nouns in -e, and others, whose plural only adds an s: "pies" is the plural of "pie", not of "py"."""
_IRREGULAR: Mapping[str, str] = MappingProxyType(
    {f"{word}s": word for word in _ADDS_S}
    | {
        pair.partition(":")[0]: pair.partition(":")[2]
        for pair in """appendices:appendix axes:axe bacteria:bacterium bureaux:bureau busses:bus cacti:cactus calves:calf
        children:child criteria:criterion dice:die dwarves:dwarf elves:elf feet:foot fungi:fungus geese:goose
        halves:half hippopotami:hippopotamus hooves:hoof knives:knife leaves:leaf lice:louse lives:life
        loaves:loaf matrices:matrix media:medium men:man mice:mouse octopi:octopus oxen:ox passersby:passerby
        people:person plateaux:plateau quizzes:quiz scarves:scarf selves:self sheaves:sheaf shelves:shelf
        skies:sky taxis:taxi teeth:tooth thieves:thief vertebrae:vertebra vertices:vertex wharves:wharf
        wives:wife wolves:wolf women:woman""".split()
    }
)
_COMPOUNDS = tuple("men children people mice geese teeth knives wives wolves shelves loaves leaves cookies".split())
"""Irregular plurals that end compound words, such as "policemen"."""
_NO_COMPOUNDS = frozenset("abdomen acumen amen hymen lumen omen ramen regimen semen specimen stamen yemen".split())
_VOWEL_SOUND = ("heir", "herb", "honest", "honor", "honour", "hour")
_CONSONANT_SOUND = tuple("euca euro ewe once one u- ufo uku uni uri usa usb use usu ute util".split())
_NOT_UNI = ("unid", "unim", "unin")
"""Exceptions, with a vowel sound: un- before a word that begins with i."""
_SPELLED = frozenset("atm hdtv lcd led mp3 mri rv suv suvs x-ray xray".split())
"""Words spoken letter by letter, even in lower case."""
_LETTERS = frozenset("aefhilmnorsx")
"""Letters whose names begin with a vowel sound."""

SYNONYMS: tuple[tuple[str, ...], ...] = tuple(
    tuple(" ".join(word.split()) for word in group.split(","))
    for group in """person, man, woman, boy, girl, child, kid, baby, infant, toddler, adult, human, guy, lady,
    gentleman, male, female, teenager, player, skier, snowboarder, surfer, skateboarder, rider, biker, cyclist,
    bicyclist, pedestrian, passenger, driver, worker, officer, policeman, policewoman, cop, fireman, firefighter,
    soldier, chef, waiter, waitress, student, teacher, tourist, shopper, spectator, catcher, umpire, referee, bride,
    groom, cowboy, mother, father, sister, brother, son, daughter, husband, wife, swimmer, runner, jogger, farmer,
    fisherman, businessman, vendor, customer, athlete; bicycle, bike, pushbike; motorcycle, motorbike, motor bike,
    motor cycle, moped; car, automobile, sedan, suv, minivan, hatchback, taxi, cab, taxicab, jeep, limousine, limo;
    airplane, aeroplane, plane, aircraft, jet, jetliner, airliner, air plane; bus, minibus; train, locomotive;
    truck, pickup, pickup truck, lorry; boat, ship, sailboat, rowboat, canoe, kayak, yacht, ferry, speedboat,
    motorboat; traffic light, stoplight, stop light, traffic signal, streetlight, street light; fire hydrant,
    hydrant; stop sign; parking meter; bench, pew; cat, kitten, kitty; dog, puppy, pup, doggie, doggy; horse, pony,
    colt, foal, mare, stallion; sheep, lamb, ram, ewe; cow, cattle, bull, calf, ox, heifer; bird, seagull, gull,
    pigeon, duck, goose, swan, parrot, owl, eagle, pelican, sparrow, crow, hen, rooster, peacock, flamingo, ostrich,
    heron; bear, panda, polar bear, cub; backpack, knapsack, rucksack; handbag, purse; tie, necktie, bow tie,
    bowtie; suitcase, suit case, luggage, baggage; frisbee, flying disc; skis, ski; sports ball, ball, soccer ball,
    tennis ball, football, baseball, basketball; baseball bat, bat; baseball glove, mitt; surfboard; tennis racket,
    racket, tennis racquet, racquet; wine glass, wineglass; cup, mug; knife, pocketknife; sandwich, burger,
    hamburger, cheeseburger; hot dog, hotdog; donut, doughnut; cake, cupcake, cheesecake; chair, armchair, stool;
    couch, sofa, loveseat; potted plant, houseplant, pot plant; dining table, table, desk, dinner table; toilet,
    urinal, commode; tv, television, tv monitor, television set, monitor; laptop, laptop computer, notebook
    computer; mouse, computer mouse; remote, remote control, remote controller; keyboard, computer keyboard; cell
    phone, cellphone, mobile phone, mobile, smartphone, phone, telephone; microwave, microwave oven; oven, stove,
    stovetop, stove top, stove top oven; refrigerator, fridge, freezer; teddy bear, teddybear, stuffed bear; hair
    drier, hair dryer, hairdryer, hairdrier, blow dryer; toothbrush; picture, photo, photograph; trash can, garbage
    can, trashcan, trash bin, waste basket, wastebasket; sidewalk, pavement; street, road; sunglasses, shades;
    eyeglasses, spectacles; lady bug, ladybug; pants, trousers; sneaker, tennis shoe; tree, palm tree, pine tree;
    rug, carpet; curtain, drape; building, house; rock, stone, boulder; ocean, sea; forest, woods; bucket, pail;
    faucet, tap; plate, dish; lamp, light; pillow, cushion; cap, hat; shrub, bush; cooktop, hob; sink, basin""".split(
        ";"
    )
)
"""Groups of words for the same object, in the singular if they have one; the first word is the name of the object.

The groups of COCO's 80 categories come first. A group also contains broader and narrower words, because annotators use
either."""


def _head(noun: str) -> tuple[str, str, str]:
    """Split a noun phrase at its head: "big pair of shoes" into "big ", "pair" and " of shoes"."""
    for preposition in (" of ", " with ", " in ", " on "):
        before, separator, after = noun.partition(preposition)
        if separator and before:
            start, space, head = before.rpartition(" ")
            return start + space, head, preposition + after
    start, space, head = noun.rpartition(" ")
    return start + space, head, ""


@lru_cache(maxsize=1 << 16)
def singular(noun: str) -> str:
    """Return a noun phrase in the singular; mass nouns, and plurals without a singular, are returned unchanged.

    >>> from concepts.nouns import singular
    >>> singular("women"), singular("wine glasses"), singular("bus"), singular("scissors"), singular("loaves of bread")
    ('woman', 'wine glass', 'bus', 'scissors', 'loaf of bread')
    """
    before, head, after = _head(noun)
    return f"{before}{_singular(head)}{after}"


def _singular(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    ending = next((plural for plural in _COMPOUNDS if word.endswith(plural)), "")
    if ending and word.removesuffix(ending)[-1:].isalpha() and word not in _NO_COMPOUNDS:
        return word.removesuffix(ending) + _IRREGULAR[ending]
    if _is_plural_by_ending(word):
        for end, single in (("ies", "y"), ("oes", "o"), ("ches", "ch"), ("shes", "sh"), ("xes", "x"), ("sses", "ss")):
            if word.endswith(end) and len(word) > len(end) + 1:
                return word.removesuffix(end) + single
        if word.endswith("es") and word[:-2] in _ENDS_IN_S:
            return word[:-2]
        return word[:-1]
    return word


def _is_plural_by_ending(word: str) -> bool:
    if not word.endswith("s") or len(word) < 3 or word in _NO_SINGULAR | _NO_PLURAL | _MASS | _ENDS_IN_S:
        return False
    return word in _ENDS_IN_VOWEL_S or not word.endswith(("ss", "us", "sis"))


@lru_cache(maxsize=1 << 16)
def number(noun: str) -> Number:
    """Return the grammatical number of a noun phrase: ``singular``, ``plural`` or ``mass``.

    >>> from concepts.nouns import number
    >>> number("bananas"), number("people"), number("grass"), number("bus"), number("pair of shoes")
    ('plural', 'plural', 'mass', 'singular', 'singular')
    """
    head = _head(noun.strip().lower())[1]
    if head in _MASS:
        return "mass"
    if head in _NO_SINGULAR or head == "cattle" or _singular(head) != head:
        return "plural"
    return "singular"


def article(noun: str) -> str:
    """Return ``a`` or ``an``, according to the first sound of a word or phrase.

    >>> from concepts.nouns import article
    >>> [f"{article(noun)} {noun}" for noun in ("apple", "hour glass", "uniform", "red umbrella", "SUV", "one-way sign")]
    ['an apple', 'an hour glass', 'a uniform', 'a red umbrella', 'an SUV', 'a one-way sign']
    """
    first = noun.split()[0] if noun.split() else ""
    word = first.lower()
    if word in _SPELLED or first.isupper() or len(first) == 1:
        return "an" if word[0] in _LETTERS else "a"
    if word.startswith(_VOWEL_SOUND):
        return "an"
    if word.startswith(_CONSONANT_SOUND) and not word.startswith(_NOT_UNI):
        return "a"
    return "an" if word[:1] in tuple("aeiou8") else "a"


def existence_question(noun: str) -> str:
    """Return the question whether an object is in the image, in POPE's wording, with the number of the noun.

    >>> from concepts.nouns import existence_question
    >>> for noun in ("apple", "bananas", "grass"):
    ...     print(existence_question(noun))
    Is there an apple in the image?
    Are there bananas in the image?
    Is there grass in the image?
    """
    return f"{be(noun).capitalize()} there {_with_article(noun)} in the image?"


def be(noun: str) -> str:
    """Return the form of "to be" that agrees with a noun.

    >>> from concepts.nouns import be
    >>> be("apple"), be("bananas")
    ('is', 'are')
    """
    return "are" if number(noun) == "plural" else "is"


def is_the(noun: str) -> str:
    """Return the beginning of a yes-no question about an object.

    >>> from concepts.nouns import is_the
    >>> is_the("apple"), is_the("bananas")
    ('Is the apple', 'Are the bananas')
    """
    return f"{be(noun).capitalize()} the {noun}"


_EXISTENCE = re.compile(
    r"\s*(?:is there(?: an?| any)?|are there(?: any)?) (\S.*?) in the iman?ge\s*\??\s*", re.IGNORECASE
)
# "imange" is in published files: the release of POPE replaced every "a" of its template by "an".


def asked_noun(question: str) -> str | None:
    """Return the noun of a question in the wording of `existence_question` or of POPE; None for other questions.

    >>> from concepts.nouns import asked_noun
    >>> asked_noun("Is there an apple in the image?"), asked_noun("Is the apple red?")
    ('apple', None)
    """
    match = _EXISTENCE.fullmatch(question)
    return match[1] if match else None


def existence_clause(noun: str) -> str:
    """Return the clause that an object is in the image.

    >>> from concepts.nouns import existence_clause
    >>> existence_clause("apple"), existence_clause("bananas")
    ('there is an apple', 'there are bananas')
    """
    return f"there {be(noun)} {_with_article(noun)}"


def absence_clause(noun: str) -> str:
    """Return the clause that an object is not in the image.

    >>> from concepts.nouns import absence_clause
    >>> absence_clause("apple"), absence_clause("bananas")
    ('there is no apple', 'there are no bananas')
    """
    return f"there {be(noun)} no {noun}"


def _with_article(noun: str) -> str:
    return f"{article(noun)} {noun}" if number(noun) == "singular" else noun


_IDIOMS = frozenset(
    {"hot dog", "teddy bear", "lady bug", "sea lion", "sea horse", "stuffed animal", "toy", "home plate"}
)
"""Phrases that do not name a kind of their last word: a hot dog is not a dog."""
_KEYS: Mapping[str, str] = MappingProxyType({word: group[0] for group in reversed(SYNONYMS) for word in group})


@lru_cache(maxsize=1 << 16)
def canonical_noun(noun: str) -> str:
    """Return the canonical name of an object: the same for singular and plural, and for all synonyms.

    >>> from concepts.nouns import canonical_noun
    >>> canonical_noun("bananas"), canonical_noun("Women"), canonical_noun("television"), canonical_noun("toaster")
    ('banana', 'person', 'tv', 'toaster')
    """
    words = " ".join(noun.lower().split())
    single = singular(words)
    return _KEYS.get(words) or _KEYS.get(single, single)


@lru_cache(maxsize=1 << 16)
def broader_nouns(noun: str) -> frozenset[str]:
    """Return the canonical names of an object and of its broader terms: the phrase without its first words.

    >>> from concepts.nouns import broader_nouns
    >>> sorted(broader_nouns("coffee tables")), sorted(broader_nouns("young man"))
    (['coffee table', 'dining table'], ['person', 'young man'])
    """
    whole = canonical_noun(noun)
    if whole in _IDIOMS:
        return frozenset({whole})
    words = singular(" ".join(noun.lower().split())).split(" of ")[0].split()
    return frozenset({whole, *(canonical_noun(" ".join(words[start:])) for start in range(len(words)))})


class PresentNouns:
    """The nouns that an image is annotated with, to decide which other nouns name absent objects.

    >>> from concepts.nouns import PresentNouns
    >>> present = PresentNouns(["bananas", "man", "coffee table", "hot dog"])
    >>> [noun for noun in ("banana", "person", "table", "dog", "apple") if not present.includes(noun)]
    ['dog', 'apple']
    """

    def __init__(self, nouns: Iterable[str]) -> None:
        names = list(nouns)
        self._names = frozenset(canonical_noun(noun) for noun in names)
        self._broader = frozenset(name for noun in names for name in broader_nouns(noun))

    def includes(self, noun: str) -> bool:
        """Whether a noun may name an annotated object: in another number, by a synonym, or a broader or narrower term."""
        return canonical_noun(noun) in self._broader or not broader_nouns(noun).isdisjoint(self._names)
