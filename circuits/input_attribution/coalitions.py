"""One question as a cooperative game: coalitions of parts of image and text, and the model inputs for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from circuits.input_attribution import shapley
from concepts.annotated_object import Box
from concepts.image_source import ImageSource
from concepts.region_masking import RegionMaskedImage
from concepts.schema import Example
from groundscope.core.errors import ConfigError, ModelError, PatchError
from lvlm.model import Encoding, Lvlm


@dataclass(frozen=True)
class Players:
    """The parts of one example that can be present or neutral."""

    names: tuple[str, ...]
    boxes: tuple[Box, ...]
    """Regions of the image that are players; the rest of the image is one more."""
    words: tuple[tuple[int, ...], ...]
    """Decoder positions of each player of the text."""
    of_prefix: bool = False
    """Whether the text player is the prefix; the question is then in every run."""

    @property
    def of_image(self) -> int:
        """Number of image players; they come first."""
        return len(self.names) - len(self.words)


@dataclass(frozen=True, eq=False)
class Game:
    """Model inputs needed for the value of every coalition."""

    players: Players
    coalitions: np.ndarray
    """bool ``[m, n_players]``; the first coalition is empty, the last complete."""
    orders: np.ndarray | None
    """Orders of arrival ``[orders, n_players]``; None if all coalitions are enumerated."""
    runs: tuple[Encoding, ...]
    """Distinct inputs; each is run once."""
    members: np.ndarray
    """Index of the run of each coalition and each pair of neutral image and question, int ``[m, n_neutral]``."""


def players_of(model: Lvlm, example: Example, encoding: Encoding, image: str, prompt: str) -> Players:
    """Return the players: the image ``whole`` or by ``objects``; the prompt ``whole`` or by ``words``, or the ``prefix``."""
    places = [(o.noun, o.box) for o in example.objects if o.box is not None] if image == "objects" else []
    boxes = tuple(box for _, box in places)
    image_players = (*(f"image: {noun}" for noun, _ in places), "image: rest") if image == "objects" else ("image",)
    question = encoding.tokens.question
    if prompt == "prefix":
        if not encoding.tokens.prefix:
            msg = f"example '{example.id}' has no prefix; use prompt='whole', or leave it out"
            raise PatchError(msg)
        return Players((*image_players, "prefix"), boxes, (encoding.tokens.prefix,), of_prefix=True)
    if prompt == "whole":
        return Players((*image_players, "prompt"), boxes, (question,))
    if "qformer_input_ids" in encoding.inputs:
        msg = f"prompt='words': {model.name} also reads the question in its Q-Former; use prompt='whole'"
        raise ConfigError(msg)
    owner = _word_of_token(model, example, len(question))
    words = example.question.split()
    positions_of_word = tuple(
        tuple(p for p, w in zip(question, owner, strict=True) if w == i) for i in range(len(words))
    )
    named = tuple(f"prompt: {word}" for word, positions in zip(words, positions_of_word, strict=True) if positions)
    return Players((*image_players, *named), boxes, tuple(positions for positions in positions_of_word if positions))


def make_game(
    model: Lvlm,
    example: Example,
    players: Players,
    neutral_images: Sequence[ImageSource],
    neutral_texts: Sequence[str],
    orders: int,
    seed: int,
) -> Game:
    """Return the runs that determine each player's share; neutral texts are questions, or prefixes if the prefix is a player.

    Raises
    ------
    PatchError
        If a neutral image or text changes the number of tokens or the positions of the image.
    """
    n = len(players.names)
    sampled_orders = None if n <= shapley.MOST else shapley.sample_orders(n, orders, seed)
    coalitions = (
        shapley.coalitions(n) if sampled_orders is None else _coalitions_along(sampled_orders, players.of_image)
    )
    encoded: dict[tuple[str, str], Encoding] = {}
    original = model.encode(example)
    field = "prefix" if players.of_prefix else "question"
    own_text = example.prefix if players.of_prefix else example.question

    def encode(image: ImageSource, text: str) -> Encoding:
        key = (image.identity, text)
        if key not in encoded:
            changed = replace(example, image=image, **{field: text}, mentions=())
            encoded[key] = _check_alike(model.encode(changed), original, field, text)
        return encoded[key]

    number: dict[tuple[str, bytes, str], int] = {}
    runs: list[Encoding] = []
    neutrals = list(product(neutral_images, neutral_texts))
    members = np.empty((len(coalitions), len(neutrals)), np.int64)
    for c, coalition in enumerate(coalitions):
        revealed, words = coalition[: players.of_image], coalition[players.of_image :]
        for k, (picture, text) in enumerate(neutrals):
            boxes = players.boxes
            image = RegionMaskedImage(example.image, picture, boxes, tuple(bool(s) for s in revealed))
            key = (image.identity, words.tobytes(), "" if words.all() else text)
            if key not in number:
                number[key] = len(runs)
                full_text = encode(image, own_text if words.any() else text)
                partly = words.any() and not words.all()
                runs.append(
                    _replace_words(full_text, encode(image, text), players.words, words) if partly else full_text
                )
            members[c, k] = number[key]
    return Game(players, coalitions, sampled_orders, tuple(runs), members)


def _coalitions_along(orders: np.ndarray, of_image: int) -> np.ndarray:
    """Return the distinct coalitions along orders of arrival, and those of the full image and the full prompt."""
    n = orders.shape[1]
    image = np.arange(n) < of_image
    corners = np.stack([np.zeros(n, bool), image, ~image, np.ones(n, bool)])
    along = shapley.arrivals(orders).reshape(-1, n)
    return np.unique(np.concatenate([corners, along]), axis=0)


def _replace_words(
    encoding: Encoding, neutral: Encoding, words: Sequence[Sequence[int]], present: np.ndarray
) -> Encoding:
    """Return the question with its absent words replaced by the neutral question's tokens."""
    ids = encoding.inputs["input_ids"].clone()
    for positions, is_present in zip(words, present, strict=True):
        if not is_present:
            ids[:, list(positions)] = neutral.inputs["input_ids"][:, list(positions)]
    return replace(encoding, inputs={**encoding.inputs, "input_ids": ids})


def _check_alike(encoding: Encoding, original: Encoding, field: str, text: str) -> Encoding:
    if encoding.shape != original.shape or encoding.tokens.image != original.tokens.image:
        msg = (
            f"example '{original.example.id}': with the neutral image or {field} '{text}' it has {encoding.tokens.length} "
            f"tokens instead of {original.tokens.length}; use neutral images of its size and a {field} of its length"
        )
        raise PatchError(msg)
    return encoding


def _word_of_token(model: Lvlm, example: Example, tokens: int) -> list[int]:
    """Return for each token of the question the index of the word in which it begins."""
    question, text = example.question, model.prompt(example.request, system=example.system)
    start = text.rindex(question)
    offsets = model.processor.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    inside = [(a - start, b - start) for a, b in offsets if b > start and a < start + len(question) and b > a]
    if len(inside) != tokens:
        msg = f"prompt='words': the tokenizer of {model.name} returns no offsets for '{question}'; use prompt='whole'"
        raise ModelError(msg)
    ends = list(_word_ends(question))
    return [next(i for i, end in enumerate(ends) if max(a, 0) < end) for a, _ in inside]


def _word_ends(question: str) -> Iterator[int]:
    at = 0
    for word in question.split():
        at = question.index(word, at) + len(word)
        yield at
