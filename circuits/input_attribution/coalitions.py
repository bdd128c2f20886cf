"""One question as a game: which parts of image and question are given, and what the model is then shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from circuits.input_attribution import shapley
from concepts.regions import Revealed
from concepts.schema import Box, Example, ImageSource
from groundscope.core.errors import ConfigError, ModelError, PatchError
from lvlm.model import Encoding, Lvlm


@dataclass(frozen=True)
class Players:
    """The parts of one example that can be given or withheld."""

    names: tuple[str, ...]
    boxes: tuple[Box, ...]
    """Regions of the image that are players, before the rest of it."""
    words: tuple[tuple[int, ...], ...]
    """For each player of the prompt the positions it holds in the decoder."""

    @property
    def of_image(self) -> int:
        """How many players the image has; they come first."""
        return len(self.names) - len(self.words)


@dataclass(frozen=True, eq=False)
class Game:
    """What has to be run to know the value of every coalition asked for."""

    players: Players
    coalitions: np.ndarray
    """bool ``[m, n_players]``; the first gives nothing, the last everything."""
    orders: np.ndarray | None
    """Orders of arrival ``[orders, n_players]`` where there are too many players for all coalitions."""
    runs: tuple[Encoding, ...]
    """Different inputs; each is run once."""
    members: np.ndarray
    """Run of each coalition under each pair of neutral image and neutral question, int ``[m, n_neutral]``."""


def players_of(model: Lvlm, example: Example, encoding: Encoding, image: str, prompt: str) -> Players:
    """Return an example's players: the image ``whole`` or by ``objects``, the prompt ``whole`` or by ``words``."""
    places = [(o.noun, o.box) for o in example.objects if o.box is not None] if image == "objects" else []
    boxes = tuple(box for _, box in places)
    seen = (*(f"image: {noun}" for noun, _ in places), "image: rest") if image == "objects" else ("image",)
    question = encoding.tokens.question
    if prompt == "whole":
        return Players((*seen, "prompt"), boxes, (question,))
    if "qformer_input_ids" in encoding.inputs:
        msg = f"prompt='words': {model.name} reads the question twice, once beside the image; use prompt='whole'"
        raise ConfigError(msg)
    owner = _word_of_token(model, example.question, len(question))
    words = example.question.split()
    held = tuple(tuple(p for p, w in zip(question, owner, strict=True) if w == i) for i in range(len(words)))
    named = tuple(f"prompt: {word}" for word, positions in zip(words, held, strict=True) if positions)
    return Players((*seen, *named), boxes, tuple(positions for positions in held if positions))


def make_game(
    model: Lvlm,
    example: Example,
    players: Players,
    neutral_images: Sequence[ImageSource],
    neutral_questions: Sequence[str],
    orders: int,
    seed: int,
) -> Game:
    """Return what to run so that each player's share can be known.

    Raises
    ------
    PatchError
        Where a neutral image or question changes the number of tokens, or the place of the image's.
    """
    n = len(players.names)
    drawn = None if n <= shapley.MOST else shapley.sample_orders(n, orders, seed)
    wanted = shapley.coalitions(n) if drawn is None else _asked(drawn, players.of_image)
    encoded: dict[tuple[str, str], Encoding] = {}
    given = model.encode(example)

    def encode(image: ImageSource, question: str) -> Encoding:
        key = (image.identity, question)
        if key not in encoded:
            encoded[key] = _alike(model.encode(replace(example, image=image, question=question)), given, question)
        return encoded[key]

    number: dict[tuple[str, bytes, str], int] = {}
    runs: list[Encoding] = []
    neutrals = list(product(neutral_images, neutral_questions))
    members = np.empty((len(wanted), len(neutrals)), np.int64)
    for c, coalition in enumerate(wanted):
        shown, words = coalition[: players.of_image], coalition[players.of_image :]
        for k, (picture, text) in enumerate(neutrals):
            boxes = players.boxes
            image = Revealed(example.image, picture, boxes, tuple(bool(s) for s in shown))
            key = (image.identity, words.tobytes(), "" if words.all() else text)
            if key not in number:
                number[key] = len(runs)
                asked = encode(image, example.question if words.any() else text)
                partly = words.any() and not words.all()
                runs.append(_mixed(asked, encode(image, text), players.words, words) if partly else asked)
            members[c, k] = number[key]
    return Game(players, wanted, drawn, tuple(runs), members)


def _asked(drawn: np.ndarray, of_image: int) -> np.ndarray:
    """Return the different coalitions along some orders, and those of image and prompt as wholes."""
    n = drawn.shape[1]
    image = np.arange(n) < of_image
    corners = np.stack([np.zeros(n, bool), image, ~image, np.ones(n, bool)])
    along = shapley.arrivals(drawn).reshape(-1, n)
    return np.unique(np.concatenate([corners, along]), axis=0)


def _mixed(given: Encoding, neutral: Encoding, words: Sequence[Sequence[int]], kept: np.ndarray) -> Encoding:
    """Return the given question with the words that are not kept replaced by the neutral question's tokens."""
    ids = given.inputs["input_ids"].clone()
    for positions, keep in zip(words, kept, strict=True):
        if not keep:
            ids[:, list(positions)] = neutral.inputs["input_ids"][:, list(positions)]
    return replace(given, inputs={**given.inputs, "input_ids": ids})


def _alike(encoding: Encoding, given: Encoding, question: str) -> Encoding:
    if encoding.shape != given.shape or encoding.tokens.image != given.tokens.image:
        msg = (
            f"example '{given.example.id}': with the neutral image or question '{question}' it has {encoding.tokens.length} "
            f"tokens, as it is {given.tokens.length}; neutral images must be of its size and questions of its length"
        )
        raise PatchError(msg)
    return encoding


def _word_of_token(model: Lvlm, question: str, tokens: int) -> list[int]:
    """Return for each token of the question the number of the word it begins in."""
    text = model.prompt(question)
    start = text.rindex(question)
    offsets = model.processor.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    inside = [(a - start, b - start) for a, b in offsets if b > start and a < start + len(question) and b > a]
    if len(inside) != tokens:
        msg = f"prompt='words': the tokenizer of {model.name} does not tell where the words of '{question}' are"
        raise ModelError(msg)
    ends = list(_word_ends(question))
    return [next(i for i, end in enumerate(ends) if max(a, 0) < end) for a, _ in inside]


def _word_ends(question: str) -> Iterator[int]:
    at = 0
    for word in question.split():
        at = question.index(word, at) + len(word)
        yield at
