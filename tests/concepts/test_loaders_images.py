"""Image files under a folder: what may be named, what can be read, what they are called."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from concepts.image_files import FileImage, resolve_inside
from groundscope.core.errors import DataError


def noise(seed: int = 0, size: tuple[int, int] = (8, 6)) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, size=(size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = tmp_path / "images"
    (images / "val").mkdir(parents=True)
    noise().save(images / "val" / "a.png")
    noise(1).save(tmp_path / "outside.png")
    return images


@pytest.mark.parametrize("name", ["val/a.png", "./val/a.png", "val/../val/a.png", "val\\a.png"])
def test_a_file_inside_is_found_however_it_is_written(folder: Path, name: str) -> None:
    assert resolve_inside(folder, name) == (folder / "val" / "a.png").resolve()


@pytest.mark.parametrize(
    "name",
    ["../outside.png", "val/../../outside.png", "..\\outside.png", "/etc/passwd", "C:\\a.png", "", " ", ".", "a\0b"],
)
def test_a_path_that_leaves_the_folder_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(DataError, match="image path"):
        resolve_inside(folder, name)


def test_a_link_that_leaves_the_folder_is_refused(folder: Path) -> None:
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    with pytest.raises(DataError, match="leaves the image folder"):
        resolve_inside(folder, "link.png")
    with pytest.raises(DataError, match=r"image path 'loop.png'"):
        resolve_inside(folder, "loop.png")


def test_the_folder_itself_may_be_a_link(folder: Path) -> None:
    alias = folder.parent / "alias"
    alias.symlink_to(folder)
    assert resolve_inside(alias, "val/a.png").is_file()


def test_an_image_loads_as_rgb_and_is_known_by_name_and_content(folder: Path) -> None:
    path = folder / "val" / "a.png"
    image = FileImage(path, "val/a.png")
    assert np.array_equal(np.asarray(image.load()), np.asarray(noise()))
    assert json.loads(image.identity) == {
        "file": "val/a.png",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    digest = image.digest
    path.unlink()
    assert image.digest == digest


def test_every_mode_becomes_rgb(tmp_path: Path) -> None:
    for mode in ("L", "LA", "P", "RGBA", "1", "CMYK"):
        path = tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}"
        noise().convert(mode).save(path)
        assert FileImage(path, mode).load().mode == "RGB"
    path = tmp_path / "transparent.png"
    noise().convert("P").save(path, transparency=bytes(range(200)))
    assert FileImage(path, "P").load().mode == "RGB"


def test_an_image_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    noise().save(tmp_path / "turned.png", exif=exif)
    assert FileImage(tmp_path / "turned.png", "turned.png").load().size == (6, 8)


def test_files_that_are_not_images_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "text.png").write_text("not an image")
    whole = (folder / "val" / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    for name, words in (("text.png", "cannot be read"), ("none.png", "does not exist"), ("val", "is not a file")):
        with pytest.raises(DataError, match=f"{name}' {words}"):
            FileImage(folder / name, name).check()
        with pytest.raises(DataError, match=f"{name}' {words}"):
            FileImage(folder / name, name).load()
    with pytest.raises(DataError, match=r"cut.png' cannot be read"):
        FileImage(folder / "cut.png", "cut.png").load()
    with pytest.raises(DataError, match=r"none.png' cannot be read"):
        _ = FileImage(folder / "none.png", "none.png").digest
    for limit in (30, 10):  # Pillow warns above its limit and refuses above twice that
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(DataError, match=r"a.png' is refused as a decompression bomb"):
            FileImage(folder / "val" / "a.png", "a.png").check()
