"""Random transforms against written definitions: torchvision's, with loops and float64."""

from __future__ import annotations

import colorsys
import math

import numpy as np
import pytest
from PIL import Image

from mitigation.training_free.random_transforms import KINDS, Transform, TransformedImage, draw
from tests.toys.examples import example, picture


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


IMAGE = picture((20, 15))


def test_flips_reverse_columns_and_rows() -> None:
    values = pixels(IMAGE)
    assert np.array_equal(pixels(Transform("horizontal flip").apply(IMAGE)), values[:, ::-1])
    assert np.array_equal(pixels(Transform("vertical flip").apply(IMAGE)), values[::-1])


@pytest.mark.parametrize("angle", [0.0, 90.0, 180.0, -37.5])
def test_rotation_takes_the_nearest_pixel_and_black_outside(angle: float) -> None:
    image = picture((16, 16))
    values, out = pixels(image), pixels(Transform("rotation", (angle,)).apply(image))
    a = math.radians(angle)
    agreements = 0
    for row in range(16):
        for column in range(16):
            # Centers of pixels, turned back around the center of the image; y points down.
            x, y = column + 0.5 - 8, row + 0.5 - 8
            u, v = math.cos(a) * x - math.sin(a) * y + 8, math.sin(a) * x + math.cos(a) * y + 8
            inside = 0 <= u < 16 and 0 <= v < 16
            expected = values[int(v), int(u)] if inside else np.zeros(3)
            agreements += np.array_equal(out[row, column], expected)
    assert agreements >= 254  # at the border between two pixels rounding decides


def luma(rgb: np.ndarray) -> np.ndarray:
    """ITU-R 601-2, as Pillow's conversion to ``L`` computes it."""
    return (rgb @ np.array([19595, 38470, 7471]) + 0x8000) >> 16


@pytest.mark.parametrize("factor", [0.0, 0.4, 1.7])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_brightness_contrast_and_saturation_blend_with_black_mean_and_gray(part: int, factor: float) -> None:
    values = pixels(IMAGE)
    gray = luma(values)
    base = [np.zeros_like(values), np.full_like(values, int(gray.mean() + 0.5)), np.repeat(gray[..., None], 3, 2)][part]
    expected = np.clip(base + factor * (values - base), 0, 255)
    factors = [1.0, 1.0, 1.0, 0.0]
    factors[part] = factor
    out = pixels(Transform("color jitter", tuple(factors), (part,)).apply(IMAGE))
    assert np.abs(out - expected).max() <= 1  # Pillow truncates or rounds


@pytest.mark.parametrize("shift", [0.0, 0.25, -0.4])
def test_the_hue_is_turned(shift: float) -> None:
    colors = np.array([[[200, 30, 40], [10, 180, 60], [90, 90, 90], [20, 40, 220]]], dtype=np.uint8)
    out = pixels(Transform("color jitter", (1, 1, 1, shift), (3,)).apply(Image.fromarray(colors)))
    for got, color in zip(out[0], colors[0] / 255, strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*color)
        expected = 255 * np.array(colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value))
        assert np.abs(got - expected).max() <= 10  # two steps of a hue of 8 bits


def test_jitter_is_applied_in_the_drawn_order() -> None:
    values = (1.9, 0.2, 1.0, 0.0)
    first = Transform("color jitter", values, (0, 1)).apply(IMAGE)
    second = Transform("color jitter", values, (1, 0)).apply(IMAGE)
    assert not np.array_equal(pixels(first), pixels(second))
    step = Transform("color jitter", values, (0,)).apply(IMAGE)
    assert np.array_equal(pixels(first), pixels(Transform("color jitter", values, (1,)).apply(step)))


def test_the_blur_is_a_convolution_with_reflected_borders() -> None:
    sigma, values = 1.7, pixels(IMAGE)
    weights = [math.exp(-((i - 6) ** 2) / (2 * sigma**2)) for i in range(13)]
    kernel = np.outer(weights, weights) / sum(weights) ** 2
    out = pixels(Transform("gaussian blur", (13, sigma)).apply(IMAGE))

    def reflected(i: int, n: int) -> int:
        return -i if i < 0 else 2 * (n - 1) - i if i >= n else i

    for row in range(0, 15, 2):
        for column in range(0, 20, 3):
            total = sum(
                kernel[i, j] * values[reflected(row + i - 6, 15), reflected(column + j - 6, 20)]
                for i in range(13)
                for j in range(13)
            )
            assert np.array_equal(out[row, column], np.rint(total))


def test_a_crop_is_cut_and_resized() -> None:
    out = Transform("crop", (3, 2, 8, 6, 10)).apply(IMAGE)
    part = Image.fromarray(np.asarray(IMAGE)[2:8, 3:11])
    assert out.size == (10, 10)
    assert np.array_equal(pixels(out), pixels(part.resize((10, 10), Image.Resampling.BILINEAR)))


def test_parameters_are_drawn_from_the_ranges_of_the_release() -> None:
    rng = np.random.default_rng(0)
    size = (200, 120)
    angles = [draw("rotation", size, rng).values[0] for _ in range(300)]
    assert -180 <= min(angles) < -150
    assert 150 < max(angles) <= 180
    sigmas = [draw("gaussian blur", size, rng).values[1] for _ in range(100)]
    assert 1.5 <= min(sigmas) < 1.55
    assert 1.95 < max(sigmas) <= 2
    jitters = [draw("color jitter", size, rng) for _ in range(300)]
    factors = np.array([j.values for j in jitters])
    assert factors[:, :3].min() >= 0
    assert 1.9 < factors[:, :3].max() <= 2
    assert 0.45 < np.abs(factors[:, 3]).max() <= 0.5
    assert len({j.order for j in jitters}) == 24
    crops = np.array([draw("crop", size, rng).values for _ in range(500)])
    left, top, width, height, side = crops.T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (left + width <= 200).all()
    assert (top + height <= 120).all()
    assert set(side) == {336}
    shares, ratios = width * height / (200 * 120), width / height
    assert shares.min() > 0.07
    assert shares.max() > 0.6
    assert 0.72 < ratios.min() < 0.85
    assert 1.2 < ratios.max() < 1.37


@pytest.mark.parametrize(("size", "expected"), [((400, 4), (5, 4)), ((4, 400), (4, 5))])
def test_a_crop_of_a_very_long_image_is_its_center(size: tuple[int, int], expected: tuple[int, int]) -> None:
    crops = [draw("crop", size, np.random.default_rng(seed)).values for seed in range(30)]
    assert {(int(w), int(h)) for _, _, w, h, _ in crops} == {expected}
    left, top, width, height, _ = crops[0]
    assert (left, top) == ((size[0] - width) // 2, (size[1] - height) // 2)


def test_equal_transforms_of_one_image_have_one_identity() -> None:
    source = example(0).image
    images = [TransformedImage(source, Transform(kind)) for kind in KINDS[:2]]
    assert images[0].identity == TransformedImage(source, Transform(KINDS[0])).identity
    assert len({image.identity for image in (*images, source)}) == 3
    assert images[0].load().size == source.load().size
