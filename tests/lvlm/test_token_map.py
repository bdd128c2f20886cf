"""Token maps: boxes and tokens both ways for images of any size, and prompts about several images."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from concepts.annotated_object import Box
from groundscope.core.errors import DataError, SiteError
from lvlm import TokenSelection
from lvlm.encoding.registry import image_encodings
from lvlm.token_map import TokenMap
from tests.toys.examples import QUESTION, picture
from tests.toys.families import PLACED, model

SIZES = st.tuples(st.integers(40, 220), st.integers(40, 220))
SHARES = st.tuples(st.floats(0, 0.9), st.floats(0, 0.9), st.floats(0.02, 1), st.floats(0.02, 1))
SETTINGS = settings(max_examples=8)


def boxed(size: tuple[int, int], shares: tuple[float, float, float, float]) -> Box:
    x, y, w, h = shares
    return Box(x * size[0], y * size[1], min(1.0, x + w) * size[0], min(1.0, y + h) * size[1])


def mapped(family: str, size: tuple[int, int], box: Box) -> TokenMap:
    lvlm = model(family)
    text = lvlm.prompt(QUESTION)
    return lvlm.encode_prompt(text, [picture(size)], question=QUESTION, boxes={"o": (0, box)}, subject="o")[1]


@pytest.mark.parametrize("family", PLACED)
@SETTINGS
@given(SIZES, SHARES)
def test_boxes_to_tokens_to_boxes(
    family: str, size: tuple[int, int], shares: tuple[float, float, float, float]
) -> None:
    box = boxed(size, shares)
    tokens = mapped(family, size, box)
    for stack in ("decoder", "vision", "projector"):
        tiles = [v for v in tokens.views[stack] if v.grid is not None]
        assert tiles
        for kind in {v.kind for v in tiles}:
            views = [v.grid for v in tiles if v.kind == kind and v.grid is not None]
            visible = sum(g.box(i).intersection(box) for g in views for i in range(g.count))
            # Every pixel of the box that a kind of view shows is in the box of exactly one token of it ...
            covered = sum(g.box(i).intersection(box) for g in views for i in g.touching(box))
            assert covered == pytest.approx(visible, rel=1e-6)
            assert visible <= box.area * (1 + 1e-6)
            for g in views:
                # ... and at least a quarter of the area of a token that belongs to it is covered, unless it is the best match.
                shares_of = [g.box(i).intersection(box) / g.box(i).area for i in range(g.count)]
                chosen = g.patches(box)
                assert set(chosen) >= {i for i, share in enumerate(shares_of) if share >= 0.25}
                assert all(shares_of[i] > 0 for i in chosen)
    whole = max(
        sum(
            v.grid.box(i).intersection(box)
            for v in tokens.views["vision"]
            if v.kind == k and v.grid
            for i in range(v.grid.count)
        )
        for k in {v.kind for v in tokens.views["vision"]}
    )
    if family != "llava":  # which crops the middle out of an image
        assert whole >= 0.9 * box.area
    for stack, views in tokens.views.items():
        positions = [p for v in views for p in v.positions]
        assert len(set(positions)) == len(positions)
        assert max(positions) < (tokens.length if stack == "decoder" else tokens.sequence[stack])
    assert not set(tokens.separators) & set(tokens.image)
    assert not set(tokens.question) & (set(tokens.image) | set(tokens.separators))


SEVERAL = [*PLACED, "mllama"]


@pytest.mark.parametrize("family", SEVERAL)
def test_tokens_of_several_images_are_distinguished(family: str) -> None:
    lvlm = model(family)
    sizes = (
        [(112, 112), (112, 112)]
        if image_encodings[lvlm.spec.view].axis == 0 and lvlm.spec.view != "packed"
        else [(112, 70), (60, 90)]
    )
    images = [picture(size, i) for i, size in enumerate(sizes)]
    boxes = {f"o{i}": (i, Box(0, 0, size[0] / 2, size[1] / 2)) for i, size in enumerate(sizes)}
    inputs, tokens = lvlm.encode_prompt(lvlm.prompt(QUESTION, 2), images, question=QUESTION, boxes=boxes, subject="o1")
    assert lvlm.logits(inputs).shape[0] == 1
    vision = [{p for v in tokens.views["vision"] if v.image == i for p in v.positions} for i in (0, 1)]
    assert vision[0]
    assert not vision[0] & vision[1]
    assert set(tokens.object("o1", "vision")) <= vision[1]
    alone = lvlm.encode_prompt(lvlm.prompt(QUESTION), images[:1], question=QUESTION)[1]
    assert [v.grid for v in tokens.views["vision"] if v.image == 0] == [v.grid for v in alone.views["vision"]]
    if family != "mllama":
        ids = inputs["input_ids"][0]
        marked = {i for i in range(len(ids)) if int(ids[i]) == lvlm.content_id}
        assert marked == (set(tokens.image) | set(tokens.separators)) & marked
        assert set(tokens.image) <= marked


@pytest.mark.parametrize("family", ["llava", "mllama", "qwen2_vl", "mistral3"])
def test_images_unlike_placeholders_are_refused(family: str) -> None:
    lvlm = model(family)
    with pytest.raises(DataError, match=r"has 2 image placeholders .* but 1 image"):
        lvlm.encode_prompt(lvlm.prompt(QUESTION, 2), [picture((60, 60))])
    with pytest.raises(DataError, match=r"has 1 image placeholders .* but 0 images"):
        lvlm.encode_prompt(lvlm.prompt(QUESTION), [])


def test_row_ends_and_thumbnails_are_no_patches() -> None:
    size = (140, 100)
    newline = mapped("llava_next", size, Box(0, 0, 10, 10))
    thumbnail, joined = newline.views["decoder"]
    assert (thumbnail.kind, joined.kind) == ("thumbnail", "view")
    assert joined.grid is not None
    assert len(newline.separators) == joined.grid.rows
    assert [p + 1 for p in joined.positions[joined.grid.columns - 1 :: joined.grid.columns]] == list(newline.separators)
    rows = mapped("mistral3", size, Box(0, 0, 10, 10))
    assert rows.grid.rows == len(rows.separators)
    tiles = mapped("idefics3", size, Box(0, 0, 10, 10)).views["decoder"]
    assert [v.kind for v in tiles].count("thumbnail") == 1
    assert len({v.grid.patch for v in tiles if v.grid is not None and v.kind == "tile"}) == len(tiles) - 1


def test_tokens_without_a_place_are_not_an_objects() -> None:
    tokens = mapped("blip2_opt", (80, 80), Box(0, 0, 40, 40))
    with pytest.raises(SiteError, match="have no place in the image; use 'image:mean'"):
        tokens.positions(TokenSelection.parse("object:mean"))
    assert tokens.positions(TokenSelection.parse("object:mean"), "vision")
    with pytest.raises(SiteError, match="the image is not in its sequence"):
        mapped("mllama", (80, 80), Box(0, 0, 40, 40)).positions(TokenSelection.parse("image:mean"))
    with pytest.raises(SiteError, match="an encoder reads the prompt"):
        mapped("florence2", (80, 80), Box(0, 0, 40, 40)).positions(TokenSelection.parse("question:mean"))
