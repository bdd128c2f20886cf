"""Causes in images: duplicates, blur, compression, size.

Duplicates are searched by a difference hash (Krawetz 2013, "Kind of like that"): 256 signs of horizontal differences of a 17
x 16 gray thumbnail. Hashes that differ in at most `DUPLICATE_BITS` share one of `DUPLICATE_BITS` + 1 bands, so not all pairs
are compared; candidates whose color thumbnails differ are no duplicates. Blur is `skimage.measure.blur_effect` (Crete et al.
2007): how little an image changes if it is blurred again.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from behavior.data_audit.finding import AuditedData, Finding, NotMeasuredError
from groundscope.core.progress import step_bar

DUPLICATE_BITS = 24
"""Largest number of different bits of 256 of near duplicates."""
DUPLICATE_DIFFERENCE = 12.0
"""Largest root mean square difference of the thumbnails of near duplicates, of 255."""
BLUR = 0.55
"""Smallest `blur_effect` of a blurred image, from 0 (sharp) to 1, at most `SIDE` pixels a side."""
SIDE = 256
BLOCKINESS = 1.5
"""Smallest ratio of steps at the borders of 8 x 8 blocks to steps elsewhere of an image with compression artifacts."""
SMALL = 64
"""Images with a shorter side of fewer pixels are small."""


@dataclass(frozen=True)
class ImageMeasures:
    """Measures of the pixels of one image."""

    digest: str
    """Of the decoded pixels."""
    bits: bytes
    """Difference hash, 32 bytes."""
    thumbnail: bytes
    """RGB, 16 x 16."""
    contrast: float
    """Standard deviation of the gray values, of 255."""
    blur: float
    blockiness: float
    size: tuple[int, int]


def measure_image(image: Image.Image) -> ImageMeasures:
    """Return the measures of an image.

    Examples
    --------
    >>> from PIL import Image
    >>> from behavior.data_audit.images import measure_image
    >>> measure_image(Image.new("RGB", (40, 30), "red")).size
    (40, 30)
    """
    gray = np.asarray(image.convert("L"), dtype=np.float64)
    small = np.asarray(image.convert("L").resize((17, 16), Image.Resampling.BOX), dtype=np.int16)
    # Differences of one gray level are noise of compression.
    bits = np.packbits(np.diff(small, axis=1) > 1).tobytes()
    thumbnail = np.asarray(image.convert("RGB").resize((16, 16), Image.Resampling.BOX), dtype=np.uint8).tobytes()
    digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
    return ImageMeasures(
        digest, bits, thumbnail, float(gray.std()), blur_of(image), blockiness_of(gray), image.size
    )  # fmt: skip


def blur_of(image: Image.Image) -> float:
    """Return the blur of an image from 0 to 1; 0 for an image of one color.

    Examples
    --------
    >>> from PIL import ImageFilter
    >>> import groundscope as gs
    >>> from behavior.data_audit.images import blur_of
    >>> image = gs.scenes.dataset(10)[0].image.load()
    >>> blur_of(image) < 0.5 < blur_of(image.filter(ImageFilter.GaussianBlur(3)))
    True
    """
    from skimage.measure import blur_effect

    gray = image.convert("L")
    scale = SIDE / max(gray.size)
    if scale < 1:
        gray = gray.resize(
            (max(1, round(gray.width * scale)), max(1, round(gray.height * scale))), Image.Resampling.BOX
        )
    pixels = np.asarray(gray, dtype=np.float64) / 255
    if min(pixels.shape) < 3 or pixels.std() < 1 / 255:
        return 0.0
    value = float(np.asarray(blur_effect(pixels, h_size=11)))
    return value if np.isfinite(value) else 0.0


def blockiness_of(gray: NDArray[np.float64]) -> float:
    """Return the mean absolute step at borders of 8 x 8 blocks divided by the largest at other places, gray ``[H, W]``.

    Examples
    --------
    >>> import numpy as np
    >>> from behavior.data_audit.images import blockiness_of
    >>> blockiness_of(np.kron(np.arange(16.0).reshape(4, 4), np.ones((8, 8))) + 0.1 * np.indices((32, 32)).sum(0)) > 10
    True
    """
    if min(gray.shape) < 24:
        return 1.0
    ratios = []
    for steps in (np.abs(np.diff(gray, axis=1)).mean(axis=0), np.abs(np.diff(gray, axis=0)).mean(axis=1)):
        phases = [float(steps[phase::8].mean()) for phase in range(8)]
        elsewhere = max(phases[:7])
        ratios.append(phases[7] / elsewhere if elsewhere > 0.05 else 1.0)
    return float(min(ratios))


def measures_of(audited: AuditedData) -> dict[str, ImageMeasures]:
    """Return the measures of every image; each is decoded once."""
    return audited.once("measures", lambda: _measure_all(audited))


def _measure_all(audited: AuditedData) -> dict[str, ImageMeasures]:
    images = {name: rows[0] for name, rows in audited.by_image.items() if rows[0].images}
    if not images:
        msg = "the data have no images"
        raise NotMeasuredError(msg)
    measures = {}
    with step_bar("measuring images", len(images)) as advance:
        for name, example in images.items():
            measures[name] = measure_image(example.image.load())
            advance()
    return measures


def find_duplicates(audited: AuditedData) -> tuple[list[Finding], dict[str, float]]:
    """Find images that are equal or nearly equal under different names."""
    measures = measures_of(audited)
    findings = []
    for first, second, distance in duplicate_pairs(measures):
        if audited.by_image[first][0].group == audited.by_image[second][0].group:
            continue  # variants of one image, such as counterfactual ones
        same = measures[first].digest == measures[second].digest
        message = f"'{first}' and '{second}' have " + (
            "equal pixels" if same else f"nearly equal pixels ({distance} of 256 bits)"
        )
        findings.append(Finding((*audited.ids(first), *audited.ids(second)), (first, second), message, distance))
    return findings, {"images": len(measures)}


def duplicate_pairs(measures: dict[str, ImageMeasures]) -> list[tuple[str, str, int]]:
    """Return pairs of near duplicates with the number of different bits."""
    names = list(measures)
    pairs = set(_candidates([measures[name].bits for name in names]))
    by_digest: dict[str, list[int]] = defaultdict(list)
    for i, name in enumerate(names):
        by_digest[measures[name].digest].append(i)
    pairs |= {(same[0], other) for same in by_digest.values() for other in same[1:]}
    result = []
    for i, j in sorted(pairs):
        a, b = measures[names[i]], measures[names[j]]
        distance = (int.from_bytes(a.bits, "big") ^ int.from_bytes(b.bits, "big")).bit_count()
        if a.digest == b.digest or (
            distance <= DUPLICATE_BITS and _difference(a, b) <= DUPLICATE_DIFFERENCE and a.contrast > 3
        ):
            result.append((names[i], names[j], distance))
    return result


def _candidates(hashes: list[bytes]) -> Iterator[tuple[int, int]]:
    """Yield pairs whose hashes are equal in one of `DUPLICATE_BITS` + 1 bands: all with at most `DUPLICATE_BITS` differences."""
    bits = np.unpackbits(np.frombuffer(b"".join(hashes), dtype=np.uint8).reshape(len(hashes), -1), axis=1)
    for band in np.array_split(np.arange(bits.shape[1]), DUPLICATE_BITS + 1):
        buckets: dict[bytes, list[int]] = defaultdict(list)
        for i, row in enumerate(bits[:, band]):
            buckets[row.tobytes()].append(i)
        for members in buckets.values():
            if len(members) > _CROWDED:  # a band of flat images says nothing
                continue
            yield from ((i, j) for k, i in enumerate(members) for j in members[k + 1 :])


_CROWDED = 400


def _difference(a: ImageMeasures, b: ImageMeasures) -> float:
    first, second = (np.frombuffer(m.thumbnail, dtype=np.uint8).astype(np.float64) for m in (a, b))
    return float(np.sqrt(((first - second) ** 2).mean()))


def find_blur(audited: AuditedData) -> tuple[list[Finding], dict[str, float]]:
    """Find blurred images."""
    measures = measures_of(audited)
    values = {name: m.blur for name, m in measures.items()}
    findings = [
        Finding(audited.ids(name), (name,), f"'{name}' is blurred ({value:.2f} of 1)", value)
        for name, value in values.items()
        if value >= BLUR
    ]
    return findings, {"median blur": float(np.median(list(values.values())))}


def find_compression(audited: AuditedData) -> tuple[list[Finding], dict[str, float]]:
    """Find images with visible blocks of JPEG compression."""
    values = {name: m.blockiness for name, m in measures_of(audited).items()}
    findings = [
        Finding(
            audited.ids(name), (name,), f"'{name}' has visible 8 x 8 blocks (steps {value:.1f} times larger)", value
        )
        for name, value in values.items()
        if value >= BLOCKINESS
    ]
    return findings, {"median blockiness": float(np.median(list(values.values())))}


def find_small_images(audited: AuditedData) -> tuple[list[Finding], dict[str, float]]:
    """Find images with a short side below `SMALL` pixels."""
    if not audited.sizes:
        msg = "the data have no images"
        raise NotMeasuredError(msg)
    findings = [
        Finding(audited.ids(name), (name,), f"'{name}' has {width} x {height} pixels", min(width, height))
        for name, (width, height) in audited.sizes.items()
        if min(width, height) < SMALL
    ]
    return findings, {"median short side": float(np.median([min(size) for size in audited.sizes.values()]))}
