"""Written files, read by naive readers made from the formats, by our readers, and malformed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from concepts import FileImage
from concepts.image_source import NoImage
from groundscope.core.errors import ConfigError, DataError
from mitigation import PreferenceData, PreferenceFormat, preference_formats, read_preferences, write_preferences
from mitigation.preference.formats.ha_dpo_descriptions import PROMPTS
from tests.toys import preferences as toys
from tests.toys.preferences import Row, image, pair, pixels, preferences

NAIVE: dict[str, Callable[[Path], list[Row]]] = {
    "trl": toys.naive_trl,
    "csr": toys.naive_csr,
    "rlaif_v": toys.naive_rlaif_v,
    "ha_dpo_pope": lambda file: toys.naive_pope(file, "reject"),
}


def rows_of(data: PreferenceData) -> list[Row]:
    return [(p.prompt, p.chosen, p.rejected, [np.asarray(i.load()) for i in p.images]) for p in data]


def check_equal(first: list[Row], second: list[Row]) -> None:
    assert [r[:3] for r in first] == [r[:3] for r in second]
    for a, b in zip(first, second, strict=True):
        assert len(a[3]) == len(b[3])
        for x, y in zip(a[3], b[3], strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("form", NAIVE)
def test_a_file_is_read_back_by_a_naive_reader_and_by_ours(form: str, tmp_path: Path) -> None:
    data = preferences()
    file = write_preferences(data, tmp_path / "out", form)
    assert file.name == preference_formats[form].file
    expected = [(p.prompt, p.chosen, p.rejected, [pixels(i // 2)]) for i, p in enumerate(data)]
    check_equal(NAIVE[form](file), expected)
    loaded = read_preferences(file, form)
    check_equal(rows_of(loaded), expected)
    assert len({p.group for p in loaded}) == 3  # two pairs about each image
    text = file.read_bytes()
    assert write_preferences(data, tmp_path / "out", form).read_bytes() == text
    moved = tmp_path / "moved"
    (tmp_path / "out").rename(moved)
    check_equal(NAIVE[form](moved / file.name), expected)
    assert str(tmp_path).encode() not in text


def test_trl_files_hold_no_image_several_images_and_a_system_prompt(tmp_path: Path) -> None:
    pairs = (pair(0, images=()), pair(1, images=(image(1), image(2))), pair(2, system="Be brief."))
    loaded = read_preferences(write_preferences(PreferenceData("all", pairs), tmp_path))
    assert [len(p.images) for p in loaded] == [0, 2, 1]
    assert [p.system for p in loaded] == [None, None, "Be brief."]
    assert [p.id for p in loaded] == ["p0", "p1", "p2"]


def test_variants_of_ha_dpo(tmp_path: Path) -> None:
    data = preferences()
    file = write_preferences(data, tmp_path, "ha_dpo_pope", variant="instructblip")
    expected = [(p.prompt, p.chosen, p.rejected, [pixels(i // 2)]) for i, p in enumerate(data)]
    check_equal(toys.naive_pope(file, "rejected"), expected)
    check_equal(rows_of(read_preferences(file, "ha_dpo_pope", variant="instructblip")), expected)
    with pytest.raises(DataError, match=r"record 1: it has 'rejected' and not 'reject'.*variant='instructblip'"):
        read_preferences(file, "ha_dpo_pope")
    with pytest.raises(ConfigError, match="unknown variant 'blip'"):
        write_preferences(data, tmp_path, "ha_dpo_pope", variant="blip")
    rows = json.loads(file.read_text())
    rows[0]["correct"] = True
    for row in rows:
        row["reject"] = row.pop("rejected")
    file.write_text(json.dumps(rows))
    wrong_only = read_preferences(file, "ha_dpo_pope")
    assert len(wrong_only) == 5
    assert wrong_only.provenance["left_out"] == {"rows_with_correct_true": 1}
    assert len(read_preferences(file, "ha_dpo_pope", variant="minigpt4")) == 6


@pytest.mark.parametrize(("variant", "kind"), [("llava", dict), ("minigpt4", list), ("instructblip", list)])
def test_descriptions_of_ha_dpo(variant: str, kind: type, tmp_path: Path) -> None:
    texts = [("a cup", "a dog"), ("a cup on a table", "a dog"), ("a hat", "a cat and a hat")]
    pairs = [
        pair(i, images=(image(i // 2),), prompt=PROMPTS[0], chosen=c, rejected=r) for i, (c, r) in enumerate(texts)
    ]
    data = PreferenceData("captions", tuple(pairs))
    file = write_preferences(data, tmp_path, "ha_dpo_descriptions", variant=variant)
    assert type(json.loads(file.read_text())) is kind
    (first, second) = toys.naive_descriptions(file)
    assert first[1:] == (["a cup", "a cup on a table"], ["a dog"])
    assert second[1:] == (["a hat"], ["a cat and a hat"])
    np.testing.assert_array_equal(first[0], pixels(0))
    check_equal(rows_of(read_preferences(file, "ha_dpo_descriptions")), rows_of(data))
    # Both files of HA-DPO share the index of images.
    write_preferences(preferences(), tmp_path, "ha_dpo_pope")
    assert len(read_preferences(file, "ha_dpo_descriptions")) == 3


def test_photographs_are_copied_only_if_every_reader_sees_the_same_pixels(tmp_path: Path) -> None:
    plain, rotated, gray = (tmp_path / f"{name}.jpg" for name in ("plain", "rotated", "gray"))
    Image.fromarray(pixels(1, (16, 8))).save(plain)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels(2, (16, 8))).save(rotated, exif=exif)
    Image.fromarray(pixels(3, (16, 8))).convert("L").save(gray)
    images = [FileImage(path) for path in (plain, rotated, gray)]
    data = PreferenceData("photographs", tuple(pair(i, images=(x,)) for i, x in enumerate(images)))
    written = toys.naive_trl(write_preferences(data, tmp_path / "out"))
    for row, source in zip(written, images, strict=True):
        np.testing.assert_array_equal(row[3][0], np.asarray(source.load()))
    assert sorted(p.suffix for p in (tmp_path / "out" / "images").iterdir()) == [".jpg", ".png", ".png"]
    assert plain.read_bytes() in [p.read_bytes() for p in (tmp_path / "out" / "images").iterdir()]


def test_images_are_never_written_outside_the_folder(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "images").symlink_to(outside)
    with pytest.raises(DataError, match="images"):
        write_preferences(preferences(), tmp_path / "out")
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize("form", ["csr", "rlaif_v", "ha_dpo_pope", "ha_dpo_descriptions"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": ()}, "it has no images"),
        ({"images": (image(0), image(1))}, "it has 2 images"),
        ({"system": "Be brief."}, "system prompt"),
        ({"prompt": "<image> What?"}, "contains '<image>'"),
    ],
)
def test_what_a_format_cannot_represent_is_refused(
    form: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=f"preference 'p0' cannot be written as '{form}': .*{message}"):
        write_preferences(PreferenceData("one", (pair(0, **changes),)), tmp_path, form)
    assert list(tmp_path.iterdir()) == []


def test_descriptions_need_a_prompt_of_the_release_and_one_preference(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"asks 'What is at place 0\?', but desc_data.json has no prompts"):
        write_preferences(preferences(), tmp_path, "ha_dpo_descriptions")
    both = [
        pair(i, images=(image(0),), prompt=PROMPTS[0], chosen=c, rejected=r) for i, (c, r) in enumerate(["ab", "bc"])
    ]
    with pytest.raises(
        DataError, match="preference 'p1': a description of its image is chosen in one pair and rejected"
    ):
        write_preferences(PreferenceData("both", tuple(both)), tmp_path, "ha_dpo_descriptions")


def test_unknown_formats_options_and_empty_data(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown preference format 'trll'.*did you mean trl"):
        write_preferences(preferences(), tmp_path, "trll")
    with pytest.raises(ConfigError, match="format 'csr' has no option 'variant'; its options: none"):
        write_preferences(preferences(), tmp_path, "csr", variant="llava")
    with pytest.raises(DataError, match="have no pairs to write"):
        write_preferences(preferences(0), tmp_path)


def test_formats_can_be_registered(tmp_path: Path) -> None:
    def write(data: PreferenceData, folder: Path) -> Path:
        (folder / "n.txt").write_text(str(len(data)))
        return folder / "n.txt"

    preference_formats.register("count", PreferenceFormat("n.txt", write, lambda file, images: preferences(0)))
    try:
        assert write_preferences(preferences(), tmp_path, "count").read_text() == "6"
    finally:
        preference_formats.unregister("count")
    with pytest.raises(ConfigError, match=r"must be a mitigation\.PreferenceFormat"):
        preference_formats.register("bad", write)  # pyright: ignore[reportArgumentType]


# ---- malformed files


def trl_row(**changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "images": ["a.png"],
        "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}],
        "rejected": "a dog",
    }
    return {k: v for k, v in (row | changes).items() if v is not None}


TWO_IMAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What?"}]}]
TEXT_FIRST = [{"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image"}]}]
TURN = {"from": "human", "value": "<image>\nWhat?"}
GOOD: dict[str, dict[str, Any]] = {
    "trl": trl_row(),
    "csr": {
        "id": 1,
        "image": "a.png",
        "conversations": [TURN, {"from": "gpt", "value": "a"}],
        "rejected_conversations": [TURN, {"from": "gpt", "value": "b"}],
    },
    "ha_dpo_pope": {
        "image_id": 7,
        "question": "What?",
        "answer": "a",
        "correct": False,
        "chosen": "a",
        "reject": "b",
    },
}


def conversation(question: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": "a"}]


MALFORMED: list[tuple[str, dict[str, Any], str]] = [
    ("trl", {"prompt": TWO_IMAGES}, "must have 1 image parts and then one text part"),
    ("trl", {"prompt": TEXT_FIRST}, "must have 1 image parts and then one text part"),
    ("trl", {"prompt": "What?"}, "one part of type 'image' for each image"),
    ("trl", {"prompt": []}, "must hold one user message"),
    ("trl", {"prompt": [*TWO_IMAGES, {"role": "assistant", "content": "x"}]}, "must hold one user message"),
    ("trl", {"chosen": None}, "field 'chosen' must hold a list"),
    ("trl", {"chosen": []}, "field 'chosen' must hold one assistant message"),
    ("trl", {"rejected": "a cat"}, "chosen and rejected are both 'a cat'"),
    ("trl", {"images": "a.png"}, "field 'images' must hold a list"),
    ("trl", {"images": ["/etc/passwd"]}, "must be relative"),
    ("trl", {"images": ["../a.png"]}, "leaves the image folder"),
    ("trl", {"images": ["missing.png"]}, "line 1: image .*missing.png' cannot be read"),
    ("trl", {"image": "a.png"}, "both 'image' and 'images'"),
    ("csr", {"conversations": [TURN]}, "one turn of 'human' and one of 'gpt'"),
    ("csr", {"conversations": conversation("What?")}, "'<image>' once"),
    ("csr", {"conversations": conversation("<image>\nWho?")}, "different questions"),
    ("csr", {"conversations": conversation("<image> a <image>")}, "'<image>' once"),
    ("csr", {"image": "/a.png"}, "must be relative"),
    ("csr", {"id": None}, "field 'id'"),
    ("ha_dpo_pope", {"correct": "no"}, "field 'correct' must be true or false"),
    ("ha_dpo_pope", {"correct": True}, "no preference pairs; left out: rows with correct true .1."),
    ("ha_dpo_pope", {"image_id": 8}, "image_id 8 is not in"),
    ("ha_dpo_pope", {"image_id": "x"}, "image_id 'x' is not a whole number"),
    ("ha_dpo_pope", {"rejected": "b"}, "both 'reject' and 'rejected'"),
    ("ha_dpo_pope", {"question": ""}, "field 'question' must hold text"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "changes", "message"), MALFORMED)
def test_malformed_records_give_one_sentence_with_their_place(
    form: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    image(0).load().save(tmp_path / "a.png")
    (tmp_path / "image_data.json").write_text(json.dumps([{"image_id": 7, "url": "https://host/images/a.png"}]))
    (tmp_path / "images").mkdir()
    image(0).load().save(tmp_path / "images" / "a.png")
    file = tmp_path / preference_formats[form].file
    row = GOOD[form] | changes
    file.write_text(json.dumps(row) + "\n" if form == "trl" else json.dumps([row]))
    with pytest.raises(DataError, match=message) as error:
        read_preferences(file, form)
    assert str(error.value).startswith(str(file))
    assert "\n" not in str(error.value)
    file.write_text(json.dumps(GOOD[form]) + "\n" if form == "trl" else json.dumps([GOOD[form]]))
    assert len(read_preferences(file, form)) == 1


@pytest.mark.parametrize("form", preference_formats)
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 5000, b'{"a": {"chosen": [], "rejected": ["x"]}}']
)
def test_other_files_give_one_sentence(form: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "image_data.json").write_text("[]")
    file = tmp_path / preference_formats[form].file
    file.write_bytes(content)
    with pytest.raises(DataError) as error:
        read_preferences(file, form)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
    file.unlink()
    with pytest.raises(DataError, match=r"cannot be read|does not exist"):
        read_preferences(file, form)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "What?", "chosen": "a", "rejected": "b", "image": {"bytes": b"no image", "path": "a.png"}},
            "not an image",
        ),
        (
            {"question": "What?", "chosen": "a", "rejected": "b", "image": {"bytes": None, "path": "../a.png"}},
            "leaves the image",
        ),
        ({"question": "What?", "chosen": "a", "rejected": "b", "image": 3}, "must hold 'bytes' and 'path'"),
        ({"question": "What?", "chosen": "a", "image": "a.png"}, "no field 'rejected'"),
    ],
)
def test_malformed_parquet_rows(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=f"x.parquet: row 1.*{message}"):
        read_preferences(tmp_path / "x.parquet", "rlaif_v")


def test_a_pair_without_an_image_encodes_as_one() -> None:
    assert isinstance(pair(0, images=()).example().image, NoImage)
