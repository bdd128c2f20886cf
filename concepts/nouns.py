"""English nouns: number, article, and which names mean the same thing.

One table for whatever compares or writes names of objects: loaders that ask about what is absent, the wording of questions,
CHAIR, and the search for a concept in a question.
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
"""Nouns without article and plural."""
_NO_SINGULAR = frozenset(
    """binoculars bleachers briefs capris clothes eyeglasses goggles jeans khakis leggings overalls pajamas panties pants
    pliers pyjamas scissors scrubs shears shorts skis slacks sunglasses suspenders sweatpants tights tongs trousers
    trunks tweezers underpants undies""".split()
)
"""Plurals that name one thing; their singular is another thing, or no word."""
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
"""Singulars that end in a single s."""
_ENDS_IN_VOWEL_S = frozenset("menus emus gnus gurus".split())
"""Plurals that end as singulars do."""
_ADDS_S = """ache avalanche beanie birdie bowtie brownie cache calorie canoe chaise collie cookie doe doggie eyrie floe foe genie
headache hippie hoagie hoe hoodie horseshoe magpie moustache movie mustache necktie niche oboe onesie pie pinkie pixie potpie
prairie quiche rookie selfie shoe smoothie snowshoe stair tie toe veggie zombie""".split()
"""Nouns that only add an s, though their plurals end as if they added more."""
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
"""Irregular plurals that other words end with, as in "policemen"."""
_NO_COMPOUNDS = frozenset("abdomen acumen amen hymen lumen omen ramen regimen semen specimen stamen yemen".split())
_VOWEL_SOUND = ("heir", "herb", "honest", "honor", "honour", "hour")
_CONSONANT_SOUND = tuple("euca euro ewe once one u- ufo uku uni uri usa usb use usu ute util".split())
_NOT_UNI = ("unid", "unim", "unin")
"""A vowel sound again: un- before a word that begins with an i."""
_SPELLED = frozenset("atm hdtv lcd led mp3 mri rv suv suvs x-ray xray".split())
"""Words that are spoken letter by letter also where they are written in lower case."""
_LETTERS = frozenset("aefhilmnorsx")
"""Letters whose names begin with a vowel."""

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
"""Names of one thing, in the singular (but for words that have none): the first is the name of the thing. Those of COCO's
80 categories come first; broader and narrower words stand together, since who sees the one may write the other."""


def _head(noun: str) -> tuple[str, str, str]:
    """Divide a noun phrase into what is before its head, the head, and what is after it ("pair", " of shoes")."""
    for link in (" of ", " with ", " in ", " on "):
        before, found, after = noun.partition(link)
        if found and before:
            start, blank, head = before.rpartition(" ")
            return start + blank, head, link + after
    start, blank, head = noun.rpartition(" ")
    return start + blank, head, ""


@lru_cache(maxsize=1 << 16)
def singular(noun: str) -> str:
    """Return a noun, or a phrase that ends with one, in the singular; what has no other number is returned unchanged.

    >>> from concepts.nouns import singular
    >>> singular("women"), singular("wine glasses"), singular("bus"), singular("scissors"), singular("loaves of bread")
    ('woman', 'wine glass', 'bus', 'scissors', 'loaf of bread')
    """
    before, head, after = _head(noun)
    return f"{before}{_singular(head)}{after}"


def _singular(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    ending = next((one for one in _COMPOUNDS if word.endswith(one)), "")
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
    """Return the grammatical number of a noun phrase; ``mass`` for what takes neither article nor plural.

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
    """Return ``a`` or ``an``, by the sound that a word or phrase begins with.

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
    """Return the question whether something is in the image, in POPE's words with the grammar of the noun.

    >>> from concepts.nouns import existence_question
    >>> for noun in ("apple", "bananas", "grass"):
    ...     print(existence_question(noun))
    Is there an apple in the image?
    Are there bananas in the image?
    Is there grass in the image?
    """
    return f"{be(noun).capitalize()} there {_with_article(noun)} in the image?"


def be(noun: str) -> str:
    """Return the verb that agrees with a noun: ``is`` or ``are``."""
    return "are" if number(noun) == "plural" else "is"


def is_the(noun: str) -> str:
    """Return the beginning of a question about something in the image: ``Is the apple``, ``Are the bananas``."""
    return f"{be(noun).capitalize()} the {noun}"


_EXISTENCE = re.compile(
    r"\s*(?:is there(?: an?| any)?|are there(?: any)?) (\S.*?) in the iman?ge\s*\??\s*", re.IGNORECASE
)
# "imange" is in published files: the release of POPE wrote "an" for every "a" of its template.


def asked_noun(question: str) -> str | None:
    """Return the noun of a question in the words of `existence_question` or of POPE; None for other questions."""
    match = _EXISTENCE.fullmatch(question)
    return match[1] if match else None


def existence_clause(noun: str) -> str:
    """Return that something is there, as a clause: ``there is an apple``, ``there are bananas``."""
    return f"there {be(noun)} {_with_article(noun)}"


def absence_clause(noun: str) -> str:
    """Return that something is not there, as a clause: ``there is no apple``, ``there are no bananas``."""
    return f"there {be(noun)} no {noun}"


def _with_article(noun: str) -> str:
    return f"{article(noun)} {noun}" if number(noun) == "singular" else noun


_IDIOMS = frozenset(
    {"hot dog", "teddy bear", "lady bug", "sea lion", "sea horse", "stuffed animal", "toy", "home plate"}
)
"""Things that are not what their last word says."""
_KEYS: Mapping[str, str] = MappingProxyType({word: group[0] for group in reversed(SYNONYMS) for word in group})


@lru_cache(maxsize=1 << 16)
def thing(noun: str) -> str:
    """Return the name of the thing that a noun means: equal for singular and plural, and for synonyms.

    >>> from concepts.nouns import thing
    >>> thing("bananas") == thing("banana"), thing("Women"), thing("television"), thing("toaster")
    (True, 'person', 'tv', 'toaster')
    """
    words = " ".join(noun.lower().split())
    single = singular(words)
    return _KEYS.get(words) or _KEYS.get(single, single)


@lru_cache(maxsize=1 << 16)
def broader(noun: str) -> frozenset[str]:
    """Return the things that a noun names: itself, and what is left of a phrase without its first words.

    "coffee tables" are a coffee table and a table; so is whoever is called "young man" a person.
    """
    whole = thing(noun)
    if whole in _IDIOMS:
        return frozenset({whole})
    words = singular(" ".join(noun.lower().split())).split(" of ")[0].split()
    return frozenset({whole, *(thing(" ".join(words[start:])) for start in range(len(words)))})


class Present:
    """The nouns that an image is annotated with, to decide which others are absent.

    >>> from concepts.nouns import Present
    >>> image = Present(["bananas", "man", "coffee table", "hot dog"])
    >>> [noun for noun in ("banana", "person", "table", "dog", "apple") if not image.includes(noun)]
    ['dog', 'apple']
    """

    def __init__(self, nouns: Iterable[str]) -> None:
        names = list(nouns)
        self._things = frozenset(thing(noun) for noun in names)
        self._broader = frozenset(name for noun in names for name in broader(noun))

    def includes(self, noun: str) -> bool:
        """Whether a noun may name something annotated: in another number, a synonym, a broader or a narrower word."""
        return thing(noun) in self._broader or not broader(noun).isdisjoint(self._things)
