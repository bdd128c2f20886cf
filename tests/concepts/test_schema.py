"""Examples without an image, with several images, and labels that are numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from concepts import ConceptDataset, Example, NoImage, scenes
from concepts.schema import require_one_image
from groundscope.core.errors import DataError


@pytest.fixture(scope="module")
def example() -> Example:
    return scenes.dataset(10)[0]


def test_images_are_none_one_or_several(example: Example) -> None:
    other = scenes.dataset(10, seed=1)[0].image
    assert example.images == (example.image,)
    assert replace(example, further_images=(other,)).images == (example.image, other)
    assert replace(example, image=NoImage()).images == ()


def test_records_hold_new_fields_only_where_they_are_set(example: Example) -> None:
    assert not {"further_images", "aliases"} & example.record().keys()
    other = scenes.dataset(10, seed=1)[0].image
    record = replace(example, further_images=(other,), aliases=("yep",)).record()
    assert record["further_images"] == [other.identity]
    assert record["aliases"] == ["yep"]
    assert ConceptDataset("d", (example,)).digest != ConceptDataset("d", (replace(example, aliases=("yep",)),)).digest


def test_an_absent_image_says_so_when_it_is_needed(example: Example) -> None:
    with pytest.raises(DataError, match="without an image is used where an image is needed; leave it out"):
        replace(example, image=NoImage()).image.load()
    with pytest.raises(DataError, match="example 'a' has further_images but no image"):
        ConceptDataset("d", (replace(example, id="a", image=NoImage(), further_images=(example.image,)),))


def test_methods_about_one_image_name_the_example(example: Example) -> None:
    require_one_image([example], "the diagnosis")
    for other, count in (
        (replace(example, image=NoImage()), "no image"),
        (replace(example, further_images=(example.image,)), "2"),
    ):
        with pytest.raises(
            DataError, match=f"the diagnosis needs questions about one image, and example '.*' has {count}"
        ):
            require_one_image([example, other], "the diagnosis")
