"""Training data of the embedded model: scenes with questions, packed after a shared image prefix.

A batch depends only on seed, stage and step, so interrupted training resumes identically.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from concepts.question import Question
from concepts.scenes import questions
from concepts.scenes.distributions import COLOR_NAMES, TYPICAL, UNIFORM, SceneDistribution
from concepts.scenes.icons import COLORS, NOUNS
from concepts.scenes.scene import RELATIONS, TRAIN, Scene, generator, sample_scene
from lvlm.tiny.architecture import BOS, EOS, GRID, IMAGE, PAD, PATCH, build_tokenizer

LENGTH = 208
"""Positions of a packed row: 52 of prefix (``<s> USER :`` and 49 image tokens), the rest questions with answers."""


@dataclass(frozen=True)
class Lesson:
    """Distribution of the scenes and questions of one stage."""

    mix: Mapping[str, float]
    """Share of each kind of question."""
    world: SceneDistribution = UNIFORM
    objects: tuple[int, int] = (2, 5)
    relations: tuple[str, ...] = tuple(RELATIONS)
    """Relations in questions."""
    yes: float = 0.5
    """Share of the answer yes among existence and attribute questions."""
    erased: float = 0.0
    """Probability that an object of the answers is missing in the picture."""
    recolored: float = 0.0
    """Probability that an object's color in the picture differs from the answers'."""
    blank: float = 0.0
    """Probability that the picture is empty, while answers describe a scene."""
    noise: float = 0.02
    """Largest standard deviation of pixel noise, relative to the full range."""
    blind: bool = False
    """Whether there is no image: questions and answers only."""


LATE = ("size",)
"""Kinds of question that may not attend to the image in the first layer that reads it; see `Batch.late`."""


@dataclass(frozen=True)
class Batch:
    """Packed rows of one step; `B` pictures, `T` positions."""

    pixels: torch.Tensor
    """float32 ``[B, 3, 112, 112]``, normalized to -1..1."""
    tokens: torch.Tensor
    """int64 ``[B, T]``."""
    positions: torch.Tensor
    """int64 ``[B, T]``: every question starts right after the prefix."""
    segments: torch.Tensor
    """int64 ``[B, T]``: 0 prefix, k the k-th question, -1 padding."""
    targets: torch.Tensor
    """int64 ``[B, T]``: the next token where it is part of an answer, else -100."""
    weights: torch.Tensor
    """float32 ``[B, T]``: weight of each target."""
    meanings: torch.Tensor
    """int64 ``[B, T, 3]``: at a question's nouns, the words of `meaning`; else -100."""
    late: torch.Tensor
    """bool ``[B, T]``: inside questions of the kinds in `LATE`."""

    def mask(self) -> torch.Tensor:
        """Return the attention mask, bool ``[B, 1, T, T]``: causal, within the same question and the prefix."""
        s = self.segments
        same = (s[:, :, None] == s[:, None, :]) | (s[:, None, :] == 0)
        causal = torch.ones(s.shape[1], s.shape[1], dtype=torch.bool).tril()
        return (same & causal)[:, None]

    def mask_without_late(self, share: float) -> torch.Tensor:
        """Return `mask` with the image hidden from `late` questions in the first `share` of the rows."""
        hidden = self.late[:, :, None] & (self.tokens == _ids()[IMAGE])[:, None, :]
        hidden[round(share * len(hidden)) :] = False
        return self.mask() & ~hidden[:, None]


@lru_cache(maxsize=1)
def _ids() -> dict[str, int]:
    return build_tokenizer().get_vocab()


@lru_cache(maxsize=20_000)
def _encode(text: str) -> tuple[int, ...]:
    """Encode words and punctuation of a text, without ``<s>``."""
    spaced = text
    for mark in "?.,:":
        spaced = spaced.replace(mark, f" {mark} ")
    return tuple(_ids()[word] for word in spaced.split())


def ask(rng: np.random.Generator, scene: Scene, lesson: Lesson, kind: str) -> Question | None:
    """Return a question of a kind about a scene; None if the sampled objects allow no such question."""
    thing = scene.objects[int(rng.integers(len(scene.objects)))]
    yes = rng.random() < lesson.yes
    if kind == "existence":
        if yes:
            return questions.existence(scene, thing.noun)
        absent = [n for n in NOUNS if scene.get(n) is None]
        return questions.existence(scene, absent[int(rng.integers(len(absent)))])
    if kind == "color":
        own = thing.attributes["color"]
        others = [c for c in COLOR_NAMES if c != own]
        return questions.color(scene, thing, own if yes else others[int(rng.integers(len(others)))])
    if kind == "what_color":
        return questions.what_color(scene, thing)
    if kind == "size":
        return questions.size(scene, thing, "big" if rng.random() < 0.5 else "small")
    if kind == "place":
        return questions.place(scene, thing, "column" if rng.random() < 0.5 else "row")
    if kind == "relation":
        other = scene.objects[int(rng.integers(len(scene.objects)))]
        name = lesson.relations[int(rng.integers(len(lesson.relations)))]
        return None if other is thing else questions.relation(scene, thing, other, name)
    return questions.caption(scene)


def meaning(scene: Scene, noun: str, kind: str) -> tuple[str, str, str]:
    """Return words for the object that a noun names in a scene: color, row and column.

    For questions about size three times the size; three times ``no`` if the object is absent.
    """
    thing = scene.get(noun)
    if thing is None:
        return "no", "no", "no"
    if kind in LATE:
        size = thing.attributes["size"]
        return size, size, size
    row, column = (questions.place(scene, thing, axis).answer for axis in ("row", "column"))
    return thing.attributes["color"], row, column


def degrade(rng: np.random.Generator, scene: Scene, lesson: Lesson) -> Scene:
    """Return the pictured scene: some objects of the true scene are erased or recolored."""
    if lesson.blank and rng.random() < lesson.blank:
        return replace(scene, objects=())
    visible = []
    for thing in scene.objects:
        if lesson.erased and rng.random() < lesson.erased:
            continue
        color = thing.attributes["color"]
        if lesson.recolored and thing.noun in TYPICAL and rng.random() < lesson.recolored:
            color = COLOR_NAMES[int(rng.integers(len(COLOR_NAMES)))]
        visible.append(replace(thing, attributes={**thing.attributes, "color": color}))
    return replace(scene, objects=tuple(visible))


def _normalize(scene: Scene) -> NDArray[np.float32]:
    """Return the picture of a scene with values from -1 to 1, as the processor returns it."""
    return scene.pixels().astype(np.float32) / np.float32(127.5) - np.float32(1)


def _add_noise(rng: np.random.Generator, picture: NDArray[np.float32], noise: float) -> NDArray[np.float32]:
    """Add pixel noise of up to `noise` of the full range to half of the pictures."""
    strength = 4 * noise * (rng.random() - 0.5)
    if strength <= 0:
        return picture
    grain: NDArray[np.float32] = rng.standard_normal(picture.shape, dtype=np.float32)
    return (picture + np.float32(strength) * grain).astype(np.float32)


def batch(lesson: Lesson, seed: int, stage: int, step: int, size: int) -> Batch:
    """Return the batch of a step."""
    ids = _ids()
    head = [] if lesson.blind else [ids[IMAGE]] * (GRID * GRID)
    prefix = [ids[BOS], ids["USER"], ids[":"], *head]
    tail = _encode("ASSISTANT:")
    tokens = np.full((size, LENGTH), ids[PAD])
    positions, segments = np.zeros_like(tokens), np.full_like(tokens, -1)
    targets, weights = np.full_like(tokens, -100), np.zeros(tokens.shape, np.float32)
    meanings, late = np.full((*tokens.shape, 3), -100), np.zeros(tokens.shape, bool)
    nouns = {ids[noun]: noun for noun in NOUNS}
    pixels = np.zeros((size, 112, 112, 3), np.float32)
    kinds, shares = tuple(lesson.mix), np.cumsum(tuple(lesson.mix.values()))
    for row in range(size):
        rng = generator(TRAIN, seed * 100 + stage, step * 1000 + row)
        scene = sample_scene(rng, "t", lesson.world, int(rng.integers(lesson.objects[0], lesson.objects[1] + 1)))
        if not lesson.blind:
            picture = _normalize(degrade(rng, scene, lesson))
            pixels[row] = _add_noise(rng, picture, lesson.noise)
        n = len(prefix)
        tokens[row, :n], positions[row, :n], segments[row, :n] = prefix, np.arange(n), 0
        segment = 0
        while True:
            kind = kinds[int(np.searchsorted(shares, rng.random() * shares[-1]))]
            question = ask(rng, scene, lesson, kind)
            if question is None:
                continue
            prompt, answer = (*_encode(question.text), *tail), (*_encode(question.answer), ids[EOS])
            text = (*prompt, *answer[:-1])
            if n + len(text) > LENGTH:
                break
            segment += 1
            end = n + len(text)
            tokens[row, n:end] = text
            positions[row, n:end] = len(prefix) + np.arange(len(text))
            segments[row, n:end] = segment
            late[row, n:end] = kind in LATE
            for at, token in enumerate(prompt, n):
                if token in nouns:
                    meanings[row, at] = [ids[word] for word in meaning(scene, nouns[token], kind)]
            first = n + len(prompt) - 1
            targets[row, first : first + len(answer)] = answer
            # Small weights balance long captions with one-word answers; the end token is learned quickly.
            weights[row, first : first + len(answer)] = 1.0 if len(answer) == 2 else 0.3
            weights[row, first + len(answer) - 1] = 0.05
            n = end
    return Batch(
        torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()),
        *(torch.from_numpy(a) for a in (tokens, positions, segments, targets, weights, meanings, late)),
    )


@dataclass(frozen=True)
class Picture:
    """Pictures with patch labels, for the vision stage."""

    pixels: torch.Tensor
    """float32 ``[B, 3, 112, 112]``."""
    labels: Mapping[str, torch.Tensor]
    """Labels by name, int64 ``[B, 49]``; -100 for patches without a label."""


PATCH_CLASSES: Mapping[str, int] = {
    "noun": len(NOUNS) + 1,
    "color": len(COLORS),
    "size": 2,
    "row": GRID,
    "column": GRID,
}


def pictures(seed: int, step: int, size: int) -> Picture:
    """Return a batch of the vision stage; a patch's labels are those of the object that covers most of it."""
    pixels = np.zeros((size, 112, 112, 3), np.float32)
    labels = {name: np.full((size, GRID, GRID), -100) for name in PATCH_CLASSES}
    labels["noun"][:] = len(NOUNS)
    for row in range(size):
        rng = generator(TRAIN, seed * 100, step * 1000 + row)
        scene = sample_scene(rng, "t", UNIFORM)
        picture = _normalize(scene)
        pixels[row] = _add_noise(rng, picture, 0.02)
        cover = np.full((GRID, GRID), 0.1 * PATCH * PATCH)
        for thing in scene.objects:
            box = thing.require_box()
            area = _cover(box.x0, box.x1)[None, :] * _cover(box.y0, box.y1)[:, None]
            won = area > cover
            cover = np.maximum(cover, area)
            x, y = box.center
            values = {
                "noun": NOUNS.index(thing.noun),
                "color": COLOR_NAMES.index(thing.attributes["color"]),
                "size": int(thing.attributes["size"] == "big"),
                "row": int(y // PATCH),
                "column": int(x // PATCH),
            }
            for name, value in values.items():
                labels[name][row][won] = value
    flat = {name: torch.from_numpy(value.reshape(size, -1)) for name, value in labels.items()}
    return Picture(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()), flat)


def _cover(low: float, high: float) -> NDArray[np.float64]:
    """Return how many pixels of each of the 7 patches along an axis lie in ``low .. high``."""
    edges = np.arange(GRID) * PATCH
    return np.clip(np.minimum(edges + PATCH, high) - np.maximum(edges, low), 0, None)


def token_texts(sequence: Sequence[int]) -> list[str]:
    """Return the words of token ids, to inspect a batch."""
    words = {i: w for w, i in _ids().items()}
    return [words[int(i)] for i in sequence]
