"""Group rows of a batch by their common prefix: the image, and the text before the first different token.

Keys and values of a prompt's first tokens do not depend on the tokens after them, so the prefix of several questions about one
image runs once, and each question continues its cache (`lvlm.decoding.prefix_run`). `lvlm.prefix_sharing` decides for which
models that is exact, and `PrefixGroups` for which rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lvlm.family.module_detection import text_config

if TYPE_CHECKING:
    from concepts.schema import Example
    from lvlm.encoding.encode import Encoding
    from lvlm.model import Lvlm

PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
"""Inputs with one value for each token."""


def attention_window(model: Lvlm) -> int | None:
    """Return the number of tokens that a token attends to in the layers with a sliding window; None without one.

    Rows of a batch are padded between prefix and question, which is exact only for sequences within the window.
    """
    config = text_config(model.hf.config)
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    uses = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
    return int(window) if window and uses else None


@dataclass(frozen=True)
class PrefixGroup:
    """Rows that begin with the same tokens and images."""

    key: tuple[Any, ...]
    """Images and tokens up to the last image token."""
    encodings: tuple[Encoding, ...]
    index: tuple[int, ...]
    """Index of each row in the sequence of examples."""
    length: int
    """Number of tokens that all rows begin with."""

    @property
    def signature(self) -> tuple[Any, ...]:
        """Key that is equal for groups whose prefixes can share a batch: the last image token, and the shapes of the images."""
        first = self.encodings[0]
        shapes = ((name, tuple(x.shape)) for name, x in sorted(first.inputs.items()) if name not in PER_TOKEN)
        return (image_end(first), *shapes)


class PrefixGroups:
    """Examples in groups with the same prefix, in batches of whole groups.

    Parameters
    ----------
    model
        The model.
    examples
        The examples.
    size
        Largest number of rows of a batch; a larger group is divided.
    extra
        Largest number of tokens that will follow a prompt.

    Examples
    --------
    >>> import groundscope as gs
    >>> from lvlm.prefix_groups import PrefixGroups
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10)
    >>> groups = PrefixGroups(model, data.examples, 32)
    >>> rows = [row for batch in groups.batches() for group in batch for row in group.index]
    >>> sorted(rows + groups.others()) == list(range(len(data)))
    True
    """

    def __init__(self, model: Lvlm, examples: Sequence[Example], size: int, extra: int = 0) -> None:
        self._model, self._examples, self._size, self._extra = model, examples, size, extra
        self._window = attention_window(model)
        self._left: list[int] = []
        by_images: dict[tuple[str, ...], list[int]] = {}
        for number, example in enumerate(examples):
            by_images.setdefault(tuple(image.identity for image in example.images), []).append(number)
        self._several = [rows for images, rows in by_images.items() if images and len(rows) > 1]
        self._single = [row for images, rows in by_images.items() if not images or len(rows) == 1 for row in rows]

    def batches(self) -> Iterator[list[PrefixGroup]]:
        """Yield the groups of each batch, in the order of their first examples."""
        batch: list[PrefixGroup] = []
        for group in self._groups():
            if self._window is not None and self._columns([*batch, group]) > self._window:
                if self._columns([group]) > self._window:
                    self._left.extend(group.index)
                    continue
                yield batch
                batch = []
            count = sum(len(part.index) for part in batch)
            if batch and count + len(group.index) > self._size:
                yield batch
                batch = []
            start = 0
            while len(group.index) - start > self._size:
                yield [_part(group, slice(start, start + self._size))]
                start += self._size
            batch.append(_part(group, slice(start, None)))
        if batch:
            yield batch

    def others(self) -> list[int]:
        """Return the indices of examples without a group, once `batches` is exhausted: alone with their image, or without one."""
        return sorted((*self._single, *self._left))

    def _columns(self, groups: Sequence[PrefixGroup]) -> int:
        """Return the number of key columns of a batch, with the tokens that follow the prompts."""
        tails = max(e.tokens.length - group.length for group in groups for e in group.encodings)
        return max(group.length for group in groups) + tails + self._extra

    def _groups(self) -> Iterator[PrefixGroup]:
        for rows in self._several:
            by_prefix: list[tuple[list[int], list[Encoding]]] = []
            for row in rows:
                encoding = self._model.encode(self._examples[row])
                place = next((i for i, (_, others) in enumerate(by_prefix) if _same_prefix(others[0], encoding)), None)
                if place is None:
                    by_prefix.append(([row], [encoding]))
                else:
                    by_prefix[place][0].append(row)
                    by_prefix[place][1].append(encoding)
            for index, encodings in by_prefix:
                length = common_length(encodings)
                if len(index) == 1 or not length:
                    self._left.extend(index)
                    continue
                ids = tuple(encodings[0].inputs["input_ids"][0, : image_end(encodings[0]) + 1].tolist())
                yield PrefixGroup((encodings[0].image_key, ids), tuple(encodings), tuple(index), length)


def image_end(encoding: Encoding) -> int:
    """Return the position of the last image token; -1 without an image."""
    return max(encoding.tokens.image, default=-1)


def common_length(encodings: Sequence[Encoding]) -> int:
    """Return how many tokens all rows begin with, at least one less than the shortest; 0 if their images are not among them."""
    rows = [e.inputs["input_ids"][0].tolist() for e in encodings]
    shortest = min(len(row) for row in rows) - 1
    length = next((i for i in range(shortest) if len({row[i] for row in rows}) > 1), shortest)
    # Positions with several axes continue from a text token.
    first = image_end(encodings[0]) + 1 + ("mm_token_type_ids" in encodings[0].inputs)
    return length if length >= first else 0


def _same_prefix(a: Encoding, b: Encoding) -> bool:
    """Whether two examples about the same images have equal inputs up to the last image token."""
    end = image_end(a) + 1
    if image_end(b) + 1 != end or a.inputs.keys() != b.inputs.keys():
        return False
    for name, x in a.inputs.items():
        y = b.inputs[name]
        if name in PER_TOKEN:
            x, y = x[:, :end], y[:, :end]
        # A Q-Former reads the question, so its image tokens are not those of other questions.
        if x is not y and not torch.equal(x, y):
            return False
    return True


def _part(group: PrefixGroup, rows: slice) -> PrefixGroup:
    return PrefixGroup(group.key, group.encodings[rows], group.index[rows], group.length)
