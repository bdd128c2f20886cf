"""Image files as people have them: which are opened, and what their pixels are as 8-bit RGB."""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from concepts.image_files import FORMATS, BytesImage, FileImage
from groundscope.core.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
RAMP = np.tile(np.linspace(0, 1, 64)[None], (8, 1))
"""From black to white in 64 columns."""
COLUMNS = [0, 16, 32, 63]


def load(path: Path) -> np.ndarray:
    return np.asarray(FileImage(path, path.name).load()).astype(int)


def ramp_file(folder: Path, name: str) -> Path:
    """Write the ramp in one of the kinds of files that show it."""
    gray = Image.fromarray(np.rint(RAMP * 255).astype(np.uint8))
    sixteen = Image.fromarray(np.rint(RAMP * 65535).astype(np.uint16))
    big_endian = Image.frombytes("I;16B", (64, 8), np.rint(RAMP * 65535).astype(">u2").tobytes())
    images = {
        "gray8.png": gray,
        "gray16.png": sixteen,
        "gray16.tif": sixteen,
        "gray16_big_endian.tif": big_endian,
        "gray16.pgm": sixteen,
        "rgb.bmp": gray.convert("RGB"),
        "palette.gif": gray.convert("P"),
        "cmyk.jpg": gray.convert("CMYK"),
        "rgb.webp": gray.convert("RGB"),
    }
    options = {"lossless": True} if name.endswith("webp") else {"quality": 95} if name.endswith("jpg") else {}
    images[name].save(folder / name, **options)
    return folder / name


@pytest.mark.parametrize(
    "name",
    ["gray8.png", "gray16.png", "gray16.tif", "gray16_big_endian.tif", "gray16.pgm", "rgb.bmp", "palette.gif", "cmyk.jpg",
     "rgb.webp"],
)  # fmt: skip
def test_a_ramp_is_a_ramp_in_every_kind_of_file(tmp_path: Path, name: str) -> None:
    pixels = load(ramp_file(tmp_path, name))
    assert pixels.shape == (8, 64, 3)
    assert np.abs(pixels[4, COLUMNS] - np.array([0, 65, 130, 255])[:, None]).max() <= 4


def test_sixteen_bits_are_divided_by_257(tmp_path: Path) -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(values).save(tmp_path / "all.png")
    pixels = load(tmp_path / "all.png")
    assert np.abs(pixels - values[..., None] / 257).max() <= 0.5 + 1e-9
    Image.fromarray(values).save(tmp_path / "inverted.tif", tiffinfo={262: 0})  # WhiteIsZero
    assert np.array_equal(load(tmp_path / "inverted.tif"), 255 - pixels)


def test_a_transparent_pixel_is_white(tmp_path: Path) -> None:
    rgba = np.zeros((8, 64, 4), np.uint8)
    rgba[..., 0], rgba[..., 3] = 255, (RAMP * 255).astype(np.uint8)  # red, from clear to full
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    expected = np.array([(255, 255, 255), (255, 191, 191), (255, 126, 126), (255, 0, 0)])
    assert np.abs(load(tmp_path / "rgba.png")[4, COLUMNS] - expected).max() <= 1
    la = np.zeros((8, 64, 2), np.uint8)
    la[:, 32:] = (200, 255)
    Image.fromarray(la).save(tmp_path / "la.png")
    assert load(tmp_path / "la.png")[4, COLUMNS].tolist() == [[255] * 3, [255] * 3, [200] * 3, [200] * 3]
    indices = Image.fromarray(np.repeat(np.uint8([[0, 1]]), 8, axis=0), mode="P")
    indices.putpalette([10, 20, 30, 40, 50, 60])
    indices.save(tmp_path / "palette.png", transparency=bytes([0, 255]))
    indices.save(tmp_path / "palette.gif", transparency=0)
    for name in ("palette.png", "palette.gif"):
        assert load(tmp_path / name)[0].tolist() == [[255] * 3, [40, 50, 60]]
    gray = Image.fromarray(np.uint8([[7, 9]]))
    gray.save(tmp_path / "one_color.png", transparency=7)
    assert load(tmp_path / "one_color.png")[0].tolist() == [[255] * 3, [9] * 3]
    sixteen = Image.fromarray(np.uint16([[7 * 257, 9 * 257]]))
    sixteen.save(tmp_path / "one_gray16.png", transparency=7 * 257)
    assert load(tmp_path / "one_gray16.png")[0].tolist() == [[255] * 3, [9] * 3]


def test_an_opaque_image_is_unchanged_by_its_alpha(tmp_path: Path) -> None:
    rgb = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    rgb[..., 1] = rgb[..., 1][::-1]
    Image.fromarray(rgb).convert("RGBA").save(tmp_path / "opaque.png")
    assert np.array_equal(load(tmp_path / "opaque.png"), rgb)


def test_an_animation_shows_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((8, 8), v, np.uint8)) for v in (10, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert np.unique(load(tmp_path / "a.gif")).tolist() == [10]


@pytest.mark.parametrize(
    ("values", "kind"),
    [((RAMP * 65535).astype(np.int32), "32-bit integers"), (RAMP.astype(np.float32), "32-bit floating-point numbers")],
)
def test_values_without_a_range_are_refused_by_the_header(tmp_path: Path, values: np.ndarray, kind: str) -> None:
    Image.fromarray(values).save(tmp_path / "a.tif")
    image = FileImage(tmp_path / "a.tif", "a.tif")
    for read in (image.check, image.load):
        with pytest.raises(
            DataError, match=rf"a\.tif' contains {kind}, .* convert it to gray or RGB with 8 or 16 bits"
        ):
            read()


def test_postscript_under_another_name_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark, programs = tmp_path / "started", tmp_path / "bin"
    programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\ntouch {mark}\necho 10.0\n")
    (programs / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    file = tmp_path / "a.png"
    file.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n")
    for read in (FileImage(file, "a.png").check, FileImage(file, "a.png").load):
        with pytest.raises(DataError, match=r"a\.png' cannot be read: not an image in one of the formats PNG, JPEG"):
            read()
    assert not mark.exists()


def test_files_that_are_not_regular_are_refused_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", Path("/dev/zero"), tmp_path):
        image = FileImage(path, "a.png")
        with pytest.raises(DataError, match="is not a file"):
            image.check()
        with pytest.raises(DataError, match="is not a file"):
            image.load()
        with pytest.raises(DataError, match="not a regular file but a"):
            _ = image.digest


def turned_png(path: Path, *, late: bool) -> bytes:
    """Write a PNG of 8 x 6 pixels with an EXIF orientation of a quarter turn, before or after its pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = exif.tobytes()[6:]  # a chunk has no "Exif" mark
    body = b"eXIf" + data
    chunk = struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))
    Image.new("RGB", (8, 6), "red").save(path)
    plain = path.read_bytes()
    place = plain.index(b"IEND" if late else b"IDAT") - 4
    path.write_bytes(plain[:place] + chunk + plain[place:])
    return plain


@pytest.mark.parametrize("late", [False, True])
def test_the_header_has_the_size_of_the_loaded_image(tmp_path: Path, late: bool) -> None:
    turned_png(tmp_path / "a.png", late=late)
    image = FileImage(tmp_path / "a.png", "a.png")
    assert (image.header.size, image.header.orientation) == ((8, 6), 6)
    assert image.header.upright_size == image.load().size == (6, 8)


def test_the_header_is_read_without_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plain.png").write_bytes(turned_png(tmp_path / "early.png", late=False))

    def refuse(_: object) -> None:
        pytest.fail("pixels were decoded")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", refuse)
    assert FileImage(tmp_path / "plain.png", "").header.orientation == 1
    assert FileImage(tmp_path / "early.png", "").header.orientation == 6


def test_an_image_that_was_read_right_is_the_same(tmp_path: Path) -> None:
    """8-bit RGB and gray without transparency: the pixels of the file, turned by EXIF."""
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise).save(tmp_path / "a.png")
    Image.fromarray(noise).save(tmp_path / "b.png", exif=exif)
    Image.fromarray(noise).convert("L").save(tmp_path / "c.png")
    expected = (noise, np.rot90(noise, -1), np.asarray(Image.fromarray(noise).convert("L"))[..., None].repeat(3, 2))
    for name, pixels in zip("abc", expected, strict=True):
        loaded = FileImage(tmp_path / f"{name}.png", name).load().tobytes()
        assert hashlib.sha256(loaded).digest() == hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).digest()


def test_every_image_of_a_user_is_opened_by_one_function() -> None:
    rooms = [p for p in ROOT.iterdir() if p.is_dir() and p.name not in {"tests", ".venv"}]
    files = [p for room in rooms if not room.name.startswith(".") for p in room.rglob("*.py")]
    calls = {
        str(p.relative_to(ROOT)): line.strip()
        for p in files
        for line in p.read_text(encoding="utf-8").splitlines()
        if "Image.open(" in line or "imread(" in line
    }
    assert set(calls) == {"concepts/image_files.py", "concepts/scenes/icons/__init__.py"}
    assert all("formats=" in line for line in calls.values())
    assert not set(FORMATS) & {"EPS", "WMF", "FPX", "MIC"}


@pytest.mark.parametrize("name", ["gray16.tif", "palette.gif", "rgb.bmp"])
def test_bytes_give_the_pixels_of_the_file(tmp_path: Path, name: str) -> None:
    path = ramp_file(tmp_path, name)
    image = BytesImage(path.read_bytes(), "row 3")
    np.testing.assert_array_equal(np.asarray(image.load()), np.asarray(FileImage(path).load()))
    assert image.header == FileImage(path).header
    assert image.digest == FileImage(path).digest
    assert "bytes, 'row 3'" in repr(image)  # not the bytes themselves


def test_bytes_that_are_no_image_are_named() -> None:
    with pytest.raises(DataError, match="image 'row 3' cannot be read: not an image in one of the formats"):
        BytesImage(b"no image", "row 3").check()
