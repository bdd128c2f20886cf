"""Pairs of photographs against hand-made truth: what an edit changes, what it must not change, and what the answers are."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage.color import rgb2lab

from concepts import counterfactuals, loaders, scenes
from concepts.annotated_object import AnnotatedObject, Box
from concepts.counterfactuals.photographs.canvas import placement
from concepts.counterfactuals.photographs.color_names import HUES, PROTOTYPES, color_name
from concepts.counterfactuals.photographs.inpaint import InpaintedImage, filled_mask
from concepts.counterfactuals.photographs.mirror import mirror_box
from concepts.counterfactuals.photographs.recolor import RecoloredImage
from concepts.counterfactuals.photographs.regions import region_mask
from concepts.image_files import FileImage
from concepts.image_source import NoImage
from concepts.schema import ConceptDataset, Example
from groundscope.core.errors import ConfigError, DataError
from groundscope.testing.scene_photographs import save_as_photographs

YES_NO = ("yes", "no")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> ConceptDataset:
    return save_as_photographs(scenes.dataset(60), tmp_path_factory.mktemp("photographs"))


def image_file(folder: Path, name: str, pixels: np.ndarray) -> FileImage:
    path = folder / f"{name}.png"
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return FileImage(path, path.name)


def question(
    image: FileImage, text: str, answer: str, kind: str, objects: tuple[AnnotatedObject, ...] = (), **more: object
) -> Example:
    level = {"existence": "object", "color": "attribute", "relation": "relation"}[kind]
    fields = {"labels": {}, "subject": None, "split": "neutral", "group": image.name, **more}
    return Example(
        id=f"{image.name}/{text}", image=image, question=text, answer=answer, candidates=YES_NO, level=level, kind=kind,
        objects=objects, **fields,
    )  # fmt: skip


def shaded_square(color: tuple[int, int, int]) -> np.ndarray:
    """A gray image with a square whose lightness varies by row."""
    pixels = np.full((40, 60, 3), 120.0)
    shade = np.linspace(0.8, 1.1, 16)[:, None, None]
    pixels[10:26, 20:36] = np.clip(np.array(color) * shade, 0, 255)
    return pixels


@pytest.mark.parametrize("target", sorted(set(HUES) - {"red"}))
def test_recoloring_moves_the_mean_in_lab_and_changes_no_other_pixel(tmp_path: Path, target: str) -> None:
    image = image_file(tmp_path, "square", shaded_square(PROTOTYPES["red"]))
    recolored = RecoloredImage(image, Box(16, 6, 40, 30), "red", target)
    before, after, mask = np.asarray(image.load()), np.asarray(recolored.load()), recolored.mask()
    inside = np.zeros((40, 60), bool)
    inside[10:26, 20:36] = True
    assert (mask == inside).all()
    assert (after[~mask] == before[~mask]).all()
    assert color_name(recolored.median_color()) == target
    # The written formula: deviations from the mean stay, where the result is a color that a screen has.
    lab = rgb2lab(before / 255)
    goal = rgb2lab(np.array([[PROTOTYPES[target]]]) / 255)[0, 0]
    expected = lab[mask] - lab[mask].mean(axis=0) + goal
    error = np.abs(rgb2lab(after / 255)[mask] - expected).max(axis=1)
    assert np.median(error) < 1.5


def test_recolored_pairs_show_what_their_answers_say(photographs: ConceptDataset) -> None:
    pairs = counterfactuals.pairs(photographs, "color", method="recolor")
    assert len(pairs) > 20
    for pair in list(pairs)[:20]:
        color = pair.clean.question.rstrip("?").rsplit(" ", 1)[-1]
        subject = pair.corrupt.named_object()
        assert subject is not None
        assert pair.corrupt.answer == ("yes" if subject.attributes["color"] == color else "no") != pair.clean.answer
        assert pair.corrupt.labels["attribute:named"] is (pair.corrupt.answer == "yes")
        assert isinstance(pair.corrupt.image, RecoloredImage)
        assert color_name(pair.corrupt.image.median_color()) == subject.attributes["color"]


def test_mirrored_pairs_flip_pixels_boxes_and_left_and_right_only(photographs: ConceptDataset) -> None:
    pairs = counterfactuals.pairs(photographs, "relation", method="mirror")
    for pair in list(pairs)[:10]:
        clean, corrupt = (np.asarray(e.image.load()) for e in (pair.clean, pair.corrupt))
        assert (corrupt == clean[:, ::-1]).all()
        assert " left of the " in pair.clean.question or " right of the " in pair.clean.question
        assert {pair.clean.answer, pair.corrupt.answer} == {"yes", "no"}
        first, second = (
            next(o for o in pair.corrupt.objects if o.noun == noun) for noun in _nouns(pair.clean.question)
        )
        is_left = first.require_box().center[0] < second.require_box().center[0]
        assert (pair.corrupt.answer == "yes") is (is_left is (" left of the " in pair.clean.question))
    placebo = counterfactuals.pairs(photographs, "relation", method="mirror", placebo=True, limit=30)
    assert all(p.placebo and p.clean.answer == p.corrupt.answer for p in placebo)
    assert all(" left of the " not in p.clean.question and " right of the " not in p.clean.question for p in placebo)


def _nouns(text: str) -> tuple[str, str]:
    words = text.removeprefix("Is the ").rstrip("?")
    side = " left of the " if " left of the " in words else " right of the "
    first, second = words.split(side)
    return first, second


def test_a_box_is_mirrored_twice_to_itself() -> None:
    box = Box(3, 5, 20, 40)
    assert mirror_box(box, 100) == Box(80, 5, 97, 40)
    assert mirror_box(mirror_box(box, 100), 100) == box


@pytest.mark.parametrize(
    ("text", "answer", "labels", "reason"),
    [
        ("Is the cat to the left of the dog?", "yes", {}, None),
        ('Is the statement "A cat at the right side of a dog." true of the image?', "yes", {}, None),
        ("Is the cat to the left of the dog?", "no", {"relation:to the right of": True}, None),
        ("Is the cat to the left of the dog?", "no", {"relation:right of": True}, None),
        # The cat may be above the dog: it is then on neither side of it in the mirrored image too.
        ("Is the cat to the left of the dog?", "no", {"relation:to the left of": False}, "do not say that the object"),
        ("Is the cat above the dog?", "yes", {}, "other relations than left and right"),
        ("Is the cat on the left side left of the dog?", "yes", {}, "other relations than left and right"),
    ],
)
def test_only_questions_whose_mirrored_answer_is_certain_are_mirrored(
    tmp_path: Path, text: str, answer: str, labels: dict[str, bool], reason: str | None
) -> None:
    image = image_file(tmp_path, "cat", np.zeros((8, 8, 3)))
    data = ConceptDataset("cats", (question(image, text, answer, "relation", labels=labels),))
    if reason is not None:
        with pytest.raises(DataError, match=reason):
            counterfactuals.pairs(data, "relation", method="mirror")
        return
    pair = counterfactuals.pairs(data, "relation", method="mirror")[0]
    assert {answer, pair.corrupt.answer} == {"yes", "no"}
    assert all(pair.corrupt.labels[name] is not truth for name, truth in labels.items())


def test_questions_about_sides_are_no_placebos(tmp_path: Path) -> None:
    image = image_file(tmp_path, "cat", np.zeros((8, 8, 3)))
    texts = ("Is the cat facing left?", "Is the rightmost cat black?", "Is the cat bright?")
    data = ConceptDataset("cats", tuple(question(image, text, "yes", "relation") for text in texts))
    placebos = counterfactuals.pairs(data, "relation", method="mirror", placebo=True)
    assert [p.clean.question for p in placebos] == ["Is the cat bright?"]


def test_questions_without_an_image_or_with_several_are_left_out(tmp_path: Path) -> None:
    image = image_file(tmp_path, "cat", np.zeros((8, 8, 3)))
    first = question(image, "Is the cat to the left of the dog?", "yes", "relation")
    several = replace(first, id="several", further_images=(image,))
    data = ConceptDataset("cats", (replace(first, id="none", image=NoImage()), several, first))
    pairs = counterfactuals.pairs(data, "relation", method="mirror")
    assert [p.clean.id for p in pairs] == [first.id]
    assert pairs.left_out == {"questions without an image": 1, "questions about several images": 1}
    placed = counterfactuals.on_canvas(data, (16, 8))
    assert [[i.load().size for i in e.images] for e in placed] == [[], [(16, 8)] * 2, [(16, 8)]]
    assert {p.clean.id for p in counterfactuals.pairs(data, "blank")} == {"several", first.id}


def test_images_with_writing_are_not_mirrored(tmp_path: Path) -> None:
    image = image_file(tmp_path, "sign", np.zeros((8, 8, 3)))
    objects = (AnnotatedObject("1", "stop signs", Box(0, 0, 4, 4)), AnnotatedObject("2", "dog", Box(4, 4, 8, 8)))
    data = ConceptDataset(
        "signs", (question(image, "Is the dog to the right of the stop signs?", "yes", "relation", objects),)
    )
    with pytest.raises(DataError, match=r"images with objects that look wrong when mirrored \(1\)"):
        counterfactuals.pairs(data, "relation", method="mirror")


def test_a_filled_region_is_the_background_and_no_other_pixel_changes(tmp_path: Path) -> None:
    ramp = np.repeat(np.linspace(60, 180, 80)[None, :, None], 60, axis=0).repeat(3, axis=2)
    with_object = ramp.copy()
    with_object[24:32, 30:40] = (200, 30, 30)
    image = image_file(tmp_path, "ramp", with_object)
    box = Box(30, 24, 40, 32)
    filled = np.asarray(InpaintedImage(image, box).load()).astype(int)
    mask = filled_mask((80, 60), box)
    assert mask[21:35, 30:40].all()
    assert (filled[~mask] == np.asarray(image.load())[~mask]).all()
    # A plane is biharmonic, so the ramp is restored to rounding.
    assert np.abs(filled - np.rint(ramp))[mask].max() <= 1


def test_removed_objects_are_alone_small_and_on_smooth_ground(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    smooth = np.full((120, 160, 3), 140.0)
    smooth[50:62, 70:82] = (200, 30, 30)
    rough = rng.uniform(0, 255, (120, 160, 3))
    ball = AnnotatedObject("1", "ball", Box(70, 50, 82, 62), {"color": "red"})
    text = "Is there a ball in the image?"

    def example(name: str, pixels: np.ndarray, *objects: AnnotatedObject) -> Example:
        labels = {"object:named": True, "object:ball": True}
        return question(
            image_file(tmp_path, name, pixels), text, "yes", "existence", objects, labels=labels, subject="1"
        )

    data = ConceptDataset(
        "balls",
        (
            example("good", smooth, ball),
            example("rough", rough, ball),
            example("several", smooth, ball, AnnotatedObject("2", "balls", Box(1, 1, 9, 9))),
            example("large", smooth, replace(ball, box=Box(10, 10, 110, 110))),
            example("hidden", smooth, ball, AnnotatedObject("2", "dog", Box(60, 40, 90, 70))),
        ),
    )
    pairs = counterfactuals.pairs(data, "object", method="inpaint")
    assert [p.clean.group for p in pairs] == ["good.png"]
    assert pairs[0].corrupt.answer == "no"
    assert pairs[0].corrupt.labels == {"object:named": False, "object:ball": False}
    assert pairs[0].corrupt.objects == ()
    assert pairs.left_out == {
        "objects on a background that is not smooth": 1, "objects of which the image has several": 1,
        "objects too large to fill": 1, "objects in front of or behind another object": 1,
    }  # fmt: skip
    placebo = counterfactuals.pairs(data, "object", method="inpaint", placebo=True)
    image = placebo[0].corrupt.image
    assert isinstance(image, InpaintedImage)
    assert image.box.area == ball.require_box().area
    assert image.box.intersection(ball.require_box()) == 0
    assert placebo[0].corrupt.answer == "yes"


@pytest.mark.parametrize("kind", ["object", "color", "relation"])
@pytest.mark.parametrize("placebo", [False, True])
def test_swapped_pairs_have_the_truth_of_the_other_photograph(
    photographs: ConceptDataset, kind: str, placebo: bool
) -> None:
    try:
        pairs = counterfactuals.pairs(photographs, kind, method="swap", placebo=placebo)
    except DataError:
        assert kind == "relation"
        assert placebo  # few scenes ask the same relation
        return
    # Truth by an independent way: the objects that the other scene was drawn with.
    objects_of = {e.image.load().tobytes(): e.objects for e in photographs}
    directions: Counter[tuple[str, ...]] = Counter()
    for pair in pairs:
        objects = objects_of[pair.corrupt.image.load().tobytes()]
        words = pair.clean.question.rstrip("?").split()
        if kind == "object":
            truth = words[-4] in {o.noun for o in objects}
        elif kind == "color":
            truth = next(o for o in objects if o.noun == words[2]).attributes["color"] == words[-1]
        else:
            truth = pair.corrupt.labels["relation:named"]
        assert pair.corrupt.answer == ("yes" if truth else "no")
        assert (pair.corrupt.answer == pair.clean.answer) is placebo is pair.placebo
        assert pair.clean.question == pair.corrupt.question
        assert pair.corrupt.group == pair.clean.group
        directions[tuple(pair.change.removeprefix("photograph ").split(" -> "))] += 1
    # A photograph is in one couple only, so that no photograph is on both sides of a split by group.
    images = [name for couple in {frozenset(names) for names in directions} for name in couple]
    assert len(images) == len(set(images))
    if not placebo:  # either photograph of a couple is the clean one as often as the other
        assert all(directions[names] == directions[names[::-1]] for names in directions)
        assert Counter(p.clean.answer for p in pairs) == {"yes": len(pairs) // 2, "no": len(pairs) // 2}
        assert len({p.clean.id for p in pairs}) == len({p.corrupt.id for p in pairs}) == len(pairs)
        assert {p.clean.image.load().tobytes() for p in pairs} == {p.corrupt.image.load().tobytes() for p in pairs}


def test_swapped_photographs_have_one_size(tmp_path: Path) -> None:
    images = [image_file(tmp_path, name, np.zeros(shape)) for name, shape in (("a", (8, 8, 3)), ("b", (8, 9, 3)))]
    text = "Is there a dog in the image?"
    data = ConceptDataset(
        "sizes", (question(images[0], text, "yes", "existence"), question(images[1], text, "no", "existence"))
    )
    with pytest.raises(DataError, match="only on photographs of another size"):
        counterfactuals.pairs(data, "object", method="swap")
    pair = counterfactuals.pairs(counterfactuals.on_canvas(data, (32, 32)), "object", method="swap")[0]
    assert pair.clean.image.load().size == pair.corrupt.image.load().size == (32, 32)


def test_a_canvas_moves_boxes_with_the_pixels(tmp_path: Path) -> None:
    pixels = np.zeros((20, 40, 3))
    pixels[4:8, 10:20] = 255
    image = image_file(tmp_path, "box", pixels)
    data = ConceptDataset(
        "one", (question(image, "Is the cup red?", "no", "color", (AnnotatedObject("1", "cup", Box(10, 4, 20, 8)),)),)
    )
    example = counterfactuals.on_canvas(data, (80, 80))[0]
    assert placement((40, 20), (80, 80)) == (80, 40, 0, 20)
    box = example.objects[0].require_box()
    assert box == Box(20, 28, 40, 36)
    assert np.asarray(example.image.load())[region_mask((80, 80), box)].mean() > 200
    with pytest.raises(ConfigError, match="at least 1"):
        counterfactuals.on_canvas(data, (0, 80))


def test_a_canvas_keeps_the_two_images_of_a_pair_apart(tmp_path: Path) -> None:
    path = pairs_file(tmp_path, "a.png,wide.png,Is the wall red?,yes,no,color,wider")
    data = counterfactuals.on_canvas(loaders.pairs(path, tmp_path, equal_size=False), (16, 16))
    pair = counterfactuals.pairs(data, "color")[0]
    assert pair.clean.image.load().size == pair.corrupt.image.load().size == (16, 16)
    assert pair.clean.image.load() != pair.corrupt.image.load()
    assert pair.clean.group == pair.corrupt.group


@pytest.mark.parametrize("kind", ["object", "color", "relation"])
def test_both_examples_of_a_pair_are_in_one_fold(photographs: ConceptDataset, kind: str) -> None:
    for method, entry in counterfactuals.METHODS.items():
        if kind not in entry.kinds or method == "given":
            continue
        pairs = counterfactuals.balanced_pairs(photographs, kind, method=method, limit=20)
        images_of: dict[str, set[str]] = {}
        for pair in pairs:
            assert pair.clean.group == pair.corrupt.group == pair.group
            images_of.setdefault(pair.group, set()).update({pair.clean.image.identity, pair.corrupt.image.identity})
        # A split by group divides no pair, and no image is on both of its sides.
        every = [image for images in images_of.values() for image in images]
        assert len(every) == len(set(every))


def test_the_method_that_makes_most_pairs_is_used(photographs: ConceptDataset) -> None:
    counts = {
        method: len(counterfactuals.balanced_pairs(photographs, "relation", method=method, limit=30))
        for method in ("swap", "mirror")
    }
    best = counterfactuals.balanced_pairs(photographs, "relation", limit=30)
    assert (len(best), best.method) == (max(counts.values()), max(counts, key=lambda name: counts[name]))
    few = counterfactuals.balanced_pairs(photographs, "relation", method=("mirror", "swap"), limit=2)
    assert few.method == "mirror"
    assert best.left_out["further pairs of the same image"] > 0
    with pytest.raises(
        ConfigError, match="none of the methods mirror, recolor makes pairs of kind 'object'; choose from"
    ):
        counterfactuals.balanced_pairs(photographs, "object", method=["mirror", "recolor"], limit=2)


def test_scenes_are_drawn_again_and_photographs_take_the_first_method(photographs: ConceptDataset) -> None:
    assert counterfactuals.pairs(scenes.dataset(10), "color").method == ""
    assert counterfactuals.pairs(photographs, "color").method == "swap"
    assert counterfactuals.balanced_pairs(photographs, "object", limit=6).method == "swap"


def test_wrong_methods_are_one_sentence(photographs: ConceptDataset) -> None:
    with pytest.raises(ConfigError, match=r"unknown method of pairs 'recolour'.*did you mean recolor"):
        counterfactuals.pairs(photographs, "color", method="recolour")
    with pytest.raises(ConfigError, match="method 'mirror' makes pairs of kind relation, not 'color'"):
        counterfactuals.pairs(photographs, "color", method="mirror")
    with pytest.raises(ConfigError, match=r"unknown kind of pair 'colour'; .*did you mean color"):
        counterfactuals.pairs(photographs, "colour")
    with pytest.raises(ConfigError, match="pairs of kind 'blank' have no placebo"):
        counterfactuals.pairs(photographs, "blank", placebo=True)


def test_a_pair_set_prints_in_two_lines(photographs: ConceptDataset) -> None:
    pairs = counterfactuals.pairs(photographs, "color", method="recolor", limit=5)
    assert repr(pairs).count("\n") <= 1
    assert pairs[:2].kind == "color"
    assert list(pairs.frame()["method"]) == ["recolor"] * 5


HEADER = "clean_image,corrupt_image,question,clean_answer,corrupt_answer,kind,change"


def pairs_file(folder: Path, *rows: str, name: str = "pairs.csv") -> Path:
    for image, size in (("a", (8, 8)), ("b", (8, 8)), ("wide", (9, 8))):
        Image.new("RGB", size, "red").save(folder / f"{image}.png")
    path = folder / name
    path.write_text("\n".join((HEADER, *rows)) + "\n", encoding="utf-8")
    return path


def test_a_table_of_pairs_is_read_as_written(tmp_path: Path) -> None:
    path = pairs_file(
        tmp_path,
        "a.png,b.png,Is the wall red?,yes,no,color,wall: red -> blue",
        "b.png,a.png,What is on the wall?,picture,clock,object,picture -> clock",
    )
    data = loaders.pairs(path, tmp_path)
    color, other = (counterfactuals.pairs(data, kind)[0] for kind in ("color", "object"))
    assert (color.clean.answer, color.corrupt.answer, color.change) == ("yes", "no", "wall: red -> blue")
    assert (color.method, color.clean.candidates, color.clean.labels) == ("given", YES_NO, {"attribute:named": True})
    assert other.clean.candidates == ("picture", "clock")
    assert other.corrupt.group == other.clean.group == "b.png"
    with pytest.raises(DataError, match="no example that allows a pair of kind 'relation'"):
        counterfactuals.pairs(data, "relation")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a.png,b.png,Is it red?,yes,yes,color,none", "'clean_answer' and 'corrupt_answer' are both 'yes'"),
        ("a.png,b.png,Is it red?,yes,no,colour,none", "field 'kind' is 'colour'; choose from object, color"),
        (
            "a.png,wide.png,Is it red?,yes,no,color,none",
            r"two images of different sizes in 1 of 1 pair: '1' \(8 x 8 and 9 x 8 pixels\); save both with one size",
        ),
        ("a.png,c.png,Is it red?,yes,no,color,none", "c.png"),
        ("a.png,../b.png,Is it red?,yes,no,color,none", "leaves the image folder"),
        ("a.png,b.png,,yes,no,color,none", "'question'"),
    ],
)
def test_bad_rows_of_a_table_of_pairs_are_named(tmp_path: Path, row: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        loaders.pairs(pairs_file(tmp_path, row), tmp_path)
    assert "pairs.csv" in str(error.value)


def test_candidates_of_a_pair_contain_both_answers(tmp_path: Path) -> None:
    path = pairs_file(tmp_path)
    path = path.rename(tmp_path / "pairs.jsonl")
    row = dict(zip(HEADER.split(","), ("a.png", "b.png", "Which?", "red", "blue", "color", "red -> blue"), strict=True))
    path.write_text(json.dumps({**row, "candidates": ["red", "green", "blue"]}) + "\n", encoding="utf-8")
    assert loaders.pairs(path, tmp_path)[0].candidates == ("red", "green", "blue")
    path.write_text(json.dumps({**row, "candidates": ["red", "green"]}) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="'candidates' must contain different answers, including 'red' and 'blue'"):
        loaders.pairs(path, tmp_path)


def test_siblings_of_whatsup_are_pairs_of_relations(tmp_path: Path) -> None:
    records = []
    for first, second in (("mug", "plate"), ("book", "chair"), ("cap", "table"), ("dog", "bed")):
        words = {"left_of": "to the left of", "right_of": "to the right of", "on": "on", "under": "under"}
        captions = {prep: f"A {first} {text} a {second}" for prep, text in words.items()}
        for number, prep in enumerate(words):
            name = f"{first}_{prep}_{second}.png"
            Image.new("RGB", (8, 8), (len(records), number, 0)).save(tmp_path / name)
            true = captions[prep]
            records.append(
                {"image_path": name, "caption_options": [true, *(c for c in captions.values() if c != true)]}
            )
    (tmp_path / "controlled.json").write_text(json.dumps(records))
    data = loaders.whatsup(tmp_path / "controlled.json", tmp_path)
    pairs = counterfactuals.pairs(data, "relation", method="swap")
    assert len(pairs) >= 4
    for pair in pairs:
        clean, corrupt = pair.change.removeprefix("photograph ").removesuffix(".png").split(".png -> ")
        assert clean.split("_")[0] == corrupt.split("_")[0]
        assert clean.split("_")[-1] == corrupt.split("_")[-1]
        statement = pair.clean.question.split('"')[1]
        for example, name in ((pair.clean, clean), (pair.corrupt, corrupt)):
            place = " ".join(name.split("_")[1:-1])
            place = f"to the {place}" if " of" in place else place
            assert example.answer == ("yes" if f" {place} a " in statement else "no")
    mirrored = counterfactuals.pairs(data, "relation", method="mirror")
    # Of the questions with the answer no, only those about the other side are certain in the mirror.
    assert all(" of a " in p.clean.question for p in mirrored)
    for pair in mirrored:
        if pair.clean.answer == "no":
            assert ("left_of" in pair.group) is ("right of" in pair.clean.question)
