"""CHAIR's default against what the released scorer finds in captions: right values were made by its own code.

LisaAnne/Hallucination 6e4d33c with NLTK 3.10 and pattern.en (clips/pattern d25511f), run by ``benchmarks/chair_agreement.py``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from behavior import BehaviorResult, chair
from behavior.answer_files import load_answers, read_answers, row_of
from behavior.chair import COCO_CATEGORIES, COCO_PHRASES, COCO_SYNONYMS, read_synonyms, score_captions
from behavior.chair_released_objects import singularize
from behavior.metrics import compute_metrics
from behavior.parsing import PARSERS
from behavior.result import Cost
from concepts import ConceptDataset, loaders
from concepts.object_mentions import tokenize_words
from groundscope.core.errors import ConfigError, DataError

SYNONYMS = """person, man, woman, child, children, people, policeman, gentleman, worker, baby, adult, player
motorcycle, scooter,  motor bike, motor cycle, motorbike
airplane, jet, plane, air plane
bus, minibus
train, locomotive
bench
bird, goose
horse
dog, doggie, collie
cat
cow, oxen, ox, calf, bison\x20
skis, ski
tie, bow, bow tie
kite
chair, seat
couch, sofa
toilet
oven, stovetop, stove, stove top oven
knife, knive
mouse
clock
wine glass
tennis racket, racket
sports ball, ball
cake,  cheesecake, cupcake
cell phone, phone, iPhone
laptop, laptop computer
potted plant, houseplant
hot dog
teddy bear
traffic light, stop light
scissors
dining table, table
"""

RELEASED = {
    "Two men sit on a bench.": ["person", "bench"],
    "Three women with two children.": ["person", "person"],
    "Policemen and the gentlemen.": ["person", "person"],
    "Mice and a mouse.": ["mouse", "mouse"],
    "Geese near the buses, oxen and calves.": ["bird", "bus", "cow", "cow"],
    "Wine glasses, knives and couches.": ["wine glass", "knife", "couch"],
    "A wine glass and a glass.": ["wine glass"],
    "The women's team.": ["person"],
    "The woman\u2019s horse; the dogs' cat.": ["person", "horse", "dog", "cat"],
    "A horse-drawn carriage at five o'clock by a man-made lake.": [],
    "A T-shirt and a hot-dog.": [],
    "A kite-flying man.": ["person"],
    "A passenger train on train tracks.": ["train"],
    "A train track.": [],
    "Blue skies.": [],
    "Two toilets with their seats up.": ["toilet"],
    "A stove top oven.": ["oven", "oven"],
    "A baby horse, two adult dogs and a baby.": ["horse", "dog", "person"],
    "A bow tie, a laptop computer, a tennis racket, a sports ball.": ["tie", "laptop", "tennis racket", "sports ball"],
    'She said "a dog". (A cat.) A kite!': ["dog", "cat", "kite"],
    "dog... cat, kite: horse/dog -- clock": ["dog", "cat", "kite", "clock"],
    # Slips of the release, which behavior.chair lists.
    "A bus and a minibus.": [],
    "Two ties, doggies and collies.": [],
    "A cheesecake, an iPhone, a motor bike.": [],
    "a dog.A cat.": ["cat"],
}


@pytest.fixture(scope="module")
def synonyms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    path = tmp_path_factory.mktemp("words") / "synonyms.txt"
    path.write_text(SYNONYMS)
    return read_synonyms(path)


@pytest.mark.parametrize("caption", RELEASED)
def test_objects_are_those_of_the_released_scorer(synonyms: dict[str, str], caption: str) -> None:
    result = chair({"1": caption}, {"1": ()}, synonyms, phrases=COCO_PHRASES)
    assert list(result.captions[0].mentioned) == RELEASED[caption]


def test_the_better_reading_has_none_of_the_slips(synonyms: dict[str, str]) -> None:
    captions = {
        "A bus and a minibus, a cheesecake, an iPhone.": ["bus", "bus", "cake", "cell phone"],
        "Two ties, doggies and collies; motor bikes.": ["tie", "dog", "dog", "motorcycle"],
        "A stove top oven and a train track.": ["oven"],
        "Two toilets with their seats up.": ["toilet"],
        "Police by a slice of bread.": [],
    }
    result = chair(
        {c: c for c in captions}, dict.fromkeys(captions, ()), synonyms, phrases=COCO_PHRASES, variant="paper"
    )
    assert {c.id: list(c.mentioned) for c in result.captions} == captions
    assert result.unreachable == ()


def test_words_that_the_release_never_finds_are_named(synonyms: dict[str, str]) -> None:
    result = chair({"1": "A dog."}, {"1": ()}, synonyms, phrases=COCO_PHRASES)
    assert set(result.unreachable) == {" cheesecake", " motor bike", "iPhone", "bus", "minibus"}


def test_singulars_of_the_release_right_and_wrong() -> None:
    pairs = """men:man women:woman mice:mouse geese:goose people:person oxen:ox buses:bus bus:bu glass:glas knives:knife
    calves:calf olives:olife shoes:shoe tomatoes:tomato skies:sky skis:ski ties:ty doggies:doggies scissors:scissors
    our:my police:polouse bases:basis mothers-in-law:mother-in-law dogs':dog's""".split()
    assert {pair: singularize(pair.partition(":")[0]) for pair in pairs} == {
        pair: pair.partition(":")[2] for pair in pairs
    }


def test_words_are_those_of_nltk() -> None:
    text = "The man's dog isn't 3.5 m tall, e.g. 1,000 'cats'... said \"Mr. Fox\". (Yes.) It's 5:30--so what?"
    assert tokenize_words(text) == (
        "the man 's dog is n't 3.5 m tall , e.g . 1,000 ' cats ' ... said \" mr . fox \" . ( yes . ) it 's 5:30 -- so what ?"
    ).split()  # fmt: skip


def test_counting_by_hand(synonyms: dict[str, str]) -> None:
    """The release counts each mention: 3 of 4 are not in the image; the paper each object: 1 of 2."""
    captions, objects = {"1": "A dog, a dog, two dogs and a cat."}, {"1": ["cat"]}
    assert chair(captions, objects, synonyms, phrases=COCO_PHRASES).chair_i.value == 3 / 4
    assert chair(captions, objects, synonyms, phrases=COCO_PHRASES, variant="paper").chair_i.value == 1 / 2


def test_lists_that_are_no_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(DataError, match="not a regular file but a FIFO"):
        read_synonyms(tmp_path / "fifo")


# ---- COCO --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> ConceptDataset:
    """Two images with captions; no object is annotated in the second."""
    folder = tmp_path_factory.mktemp("coco")
    for name in ("1", "2"):
        Image.new("RGB", (10, 10)).save(folder / f"{name}.jpg")
    categories = [{"id": i, "name": name} for i, name in enumerate(COCO_CATEGORIES, 1)]
    dog = next(c["id"] for c in categories if c["name"] == "dog")
    instances = {
        "images": [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": dog, "bbox": [0, 0, 5, 5]}],
        "categories": categories,
    }
    captions = [(1, "A puppy on a hot"), (1, "dog bed."), (2, "A cat on grass.")]
    written = {"annotations": [{"id": i, "image_id": image, "caption": c} for i, (image, c) in enumerate(captions)]}
    (folder / "instances.json").write_text(json.dumps(instances))
    (folder / "captions.json").write_text(json.dumps(written))
    return loaders.coco(folder / "instances.json", folder, folder / "captions.json")


def test_images_without_objects_keep_their_captions(coco: ConceptDataset) -> None:
    assert [(e.id, e.answer) for e in coco.where(kind="caption")] == [
        ("1/caption", "A puppy on a hot\ndog bed."),
        ("2/caption", "A cat on grass."),
    ]


def _caption_result(coco: ConceptDataset, *texts: str) -> BehaviorResult:
    examples = coco.where(kind="caption")
    rows = tuple(row_of(e, text, PARSERS["strict"]) for e, text in zip(examples, texts, strict=True))
    return BehaviorResult(rows, Cost(None, None, 2))


def test_captions_of_people_are_read_one_by_one(coco: ConceptDataset) -> None:
    """ "a hot" and "dog bed." are two captions: there is a bed, and no hot dog."""
    result = score_captions(
        _caption_result(coco, "A dog on a bed", "A cat, a tie and a hot dog."), coco, COCO_SYNONYMS,
        vocabulary=COCO_CATEGORIES, phrases=COCO_PHRASES,
    )  # fmt: skip
    assert [c.hallucinated for c in result.captions] == [(), ("tie", "hot dog")]
    assert (result.chair_i.value, result.chair_s.value) == (2 / 5, 1 / 2)


def test_a_run_on_coco_counts_cocos_objects(coco: ConceptDataset) -> None:
    """Women, a fork and a sofa are no icons; before, captions of COCO were searched for icons alone."""
    captions = _caption_result(coco, "Two women with a puppy and forks.", "A cat on a sofa, a cat.")
    rates = compute_metrics(captions, coco)
    assert rates["caption: invented of named (CHAIR_i)"].value == 3 / 6
    assert rates["caption: with something invented (CHAIR_s)"].value == 1
    assert rates["caption: named of shown (recall)"].value == 2 / 3
    words = {"dog": "dog", "puppy": "dog", "fork": "fork"}
    assert compute_metrics(captions, coco, synonyms=words)["caption: invented of named (CHAIR_i)"].value == 1 / 4


def test_caption_files_of_other_scorers_are_read(coco: ConceptDataset, tmp_path: Path) -> None:
    path = tmp_path / "captions.jsonl"
    path.write_text('{"image_id": 2, "caption": "A cat."}\n{"image_id": 1, "caption": "A dog."}\n')
    assert [(a.id, a.text) for a in read_answers(path)] == [("2", "A cat."), ("1", "A dog.")]
    result = load_answers(coco.where(kind="caption"), path)
    assert [(a.id, a.text) for a in result.answers] == [("1/caption", "A dog."), ("2/caption", "A cat.")]


def test_a_run_without_coco_refuses_synonyms() -> None:
    from experiments.config import RunConfig
    from experiments.run.context import Context
    from experiments.stages.evaluate import check

    config = RunConfig()
    config.evaluate.synonyms = "words.txt"
    with pytest.raises(ConfigError, match=r"evaluate\.synonyms=words\.txt: captions of data=scenes"):
        check(Context(config, None, None))  # pyright: ignore[reportArgumentType]
