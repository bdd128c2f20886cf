"""Faults planted in a data set, with the truth, to test audits of data."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from PIL import Image, ImageEnhance, ImageFilter

from concepts.image_files import BytesImage
from concepts.nouns import SYNONYMS, asked_noun, existence_question, singular
from concepts.schema import ConceptDataset, Example
from groundscope.core.errors import ConfigError

_COPIES: Mapping[str, Callable[[Image.Image], Image.Image]] = MappingProxyType(
    {
        "equal": lambda image: image,
        "recompressed": lambda image: _jpeg(image, 60),
        "smaller": lambda image: image.resize((image.width * 4 // 5, image.height * 4 // 5), Image.Resampling.LANCZOS),
        "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.06),
    }
)
"""Kind of duplicate to the function that makes it."""


@dataclass(frozen=True)
class DataFaults:
    """A data set with planted faults.

    Examples
    --------
    >>> from concepts import scenes
    >>> from groundscope.testing.data_faults import plant_data_faults
    >>> faults = plant_data_faults(scenes.dataset(40), share=0.1, seed=0)
    >>> sorted(faults.examples)[:2]
    ['blurred images', 'contradictions']
    """

    data: ConceptDataset
    examples: Mapping[str, frozenset[str]]
    """Cause of `behavior.data_audit.CAUSES` to the ids of the examples that have the fault; for faults of images, one
    example of each image."""


def plant_data_faults(data: ConceptDataset, *, share: float = 0.1, seed: int = 0) -> DataFaults:
    """Plant duplicates, blur, contradictions, swapped captions, and absent objects that are present under another name.

    Parameters
    ----------
    data
        Data with existence questions, annotated objects and captions; one image for each group.
    share
        Share of the images that get each fault; the images of faults do not overlap.
    seed
        Seed of the choices.

    Returns
    -------
    DataFaults
        The data, and which examples have which fault: duplicates are equal, recompressed, smaller or brighter copies under
        another name; blurred images are blurred by 2 to 4 % of their longer side; contradictions are repeated questions with
        the other answer.

    Raises
    ------
    ConfigError
        If the share is not between 0 and 0.2.

    Examples
    --------
    >>> from concepts import scenes
    >>> from groundscope.testing.data_faults import plant_data_faults
    >>> data = scenes.dataset(40)
    >>> len(plant_data_faults(data, share=0.1).data) > len(data)
    True
    """
    if not 0 < share <= 0.2:
        msg = (
            f"share={share}; give a share above 0 and at most 0.2, since five kinds of faults need images of their own"
        )
        raise ConfigError(msg)
    rng = random.Random(seed)
    images: dict[str, list[Example]] = {}
    for example in data:
        images.setdefault(example.group, []).append(example)
    captioned = [g for g, rows in images.items() if any(e.kind == "caption" for e in rows)]
    plain = [g for g in images if g not in set(captioned)]
    rng.shuffle(captioned)
    rng.shuffle(plain)
    count = max(2, round(share * len(images)))
    swapped = captioned[: min(count, len(captioned))]
    chosen = [plain[i * count : (i + 1) * count] for i in range(4)]
    if len(captioned) > len(swapped) and len(plain) < 4 * count:
        plain += captioned[len(swapped) :]
        chosen = [plain[i * count : (i + 1) * count] for i in range(4)]
    duplicated, blurred, contradicted, renamed = chosen
    rows = {e.id: e for e in data}
    truth: dict[str, frozenset[str]] = {}
    truth["duplicate images"] = _duplicate(rows, images, duplicated, rng)
    truth["blurred images"] = _blur(rows, images, blurred, rng)
    truth["contradictions"] = _contradict(rows, images, contradicted, rng)
    truth["present under another name"] = _rename(rows, images, renamed, rng)
    truth["swapped captions"] = _swap(rows, images, swapped, rng)
    return DataFaults(ConceptDataset(f"{data.name} with faults", tuple(rows.values()), data.provenance), truth)


def _duplicate(
    rows: dict[str, Example], images: Mapping[str, list[Example]], groups: list[str], rng: random.Random
) -> frozenset[str]:
    truth = set()
    for i, group in enumerate(groups):
        copy = _COPIES[list(_COPIES)[i % len(_COPIES)]](images[group][0].image.load())
        source = _png(copy, f"copy of {group}")
        scale = copy.width / images[group][0].image.load().width
        example = rng.choice([e for e in images[group] if e.kind == "existence"] or images[group])
        if scale != 1:  # boxes are in pixels
            example = replace(example, objects=tuple(replace(o, box=None, outline=()) for o in example.objects))
        added = replace(example, id=f"{example.id} (copy)", group=f"{group}-copy", image=source)
        rows[added.id] = added
        truth |= {added.id, images[group][0].id}
    return frozenset(truth)


def _blur(
    rows: dict[str, Example], images: Mapping[str, list[Example]], groups: list[str], rng: random.Random
) -> frozenset[str]:
    for group in groups:
        image = images[group][0].image.load()
        radius = rng.uniform(0.02, 0.04) * max(image.size)
        source = _png(image.filter(ImageFilter.GaussianBlur(radius)), f"blurred {group}")
        for example in images[group]:
            rows[example.id] = replace(rows[example.id], image=source)
    return frozenset(images[group][0].id for group in groups)


def _contradict(
    rows: dict[str, Example], images: Mapping[str, list[Example]], groups: list[str], rng: random.Random
) -> frozenset[str]:
    truth = set()
    for group in groups:
        eligible = [e for e in images[group] if set(e.candidates) == {"yes", "no"} and asked_noun(e.question) is None]
        eligible = eligible or [e for e in images[group] if set(e.candidates) == {"yes", "no"} and e.answer == "yes"]
        if eligible:
            example = rng.choice(eligible)
            other = "no" if example.answer == "yes" else "yes"
            added = replace(example, id=f"{example.id} (again)", question=example.question.upper(), answer=other)
            rows[added.id] = added
            truth.add(added.id)
    return frozenset(truth)


def _rename(
    rows: dict[str, Example], images: Mapping[str, list[Example]], groups: list[str], rng: random.Random
) -> frozenset[str]:
    truth = set()
    for group in groups:
        example = next((e for e in images[group] if e.objects), None)
        named = [(o.noun, name) for o in (example.objects if example else ()) for name in _other_names(o.noun)]
        if example is None or not named:
            continue
        noun, name = rng.choice(named)
        added = replace(
            example, id=f"{example.id} ({noun} as {name})", question=existence_question(name), answer="no",
            candidates=("yes", "no"), level="object", kind="existence", split="random", subject=None, labels={},
        )  # fmt: skip
        rows[added.id] = added
        truth.add(added.id)
    return frozenset(truth)


def _other_names(noun: str) -> list[str]:
    single = singular(noun)
    synonyms = [name for group in SYNONYMS if single in group for name in group if name != single]
    return [*synonyms[:6], f"{single}s"]


def _swap(
    rows: dict[str, Example], images: Mapping[str, list[Example]], groups: list[str], rng: random.Random
) -> frozenset[str]:
    captions = [e for group in groups for e in images[group] if e.kind == "caption"]
    if len(captions) < 2:
        return frozenset()
    rng.shuffle(captions)
    for example, other in zip(captions, [*captions[1:], captions[0]], strict=True):
        rows[example.id] = replace(rows[example.id], answer=other.answer)
    return frozenset(e.id for e in captions)


def _png(image: Image.Image, name: str) -> BytesImage:
    data = io.BytesIO()
    image.save(data, format="PNG")
    return BytesImage(data.getvalue(), name)


def _jpeg(image: Image.Image, quality: int) -> Image.Image:
    data = io.BytesIO()
    image.save(data, format="JPEG", quality=quality)
    return BytesImage(data.getvalue(), "JPEG").load()
