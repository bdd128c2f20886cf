"""Encode examples in chunks of bounded memory, and group them into batches of equal shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from concepts.schema import Example
from lvlm.encoding.encode import Batch, Encoding, Inputs

CHUNK_BYTES = 256 << 20
"""Number of bytes of encodings after which batches are yielded before more examples are encoded."""


def batches(
    examples: Sequence[Example],
    size: int,
    encode: Callable[[Example], Encoding],
    collate: Callable[[Sequence[Encoding]], Inputs],
    *,
    in_order: bool = True,
) -> Iterator[Batch]:
    """Yield encoded examples in batches of equal shape; see `lvlm.model.Lvlm.batches`.

    Parameters
    ----------
    examples
        Examples to encode.
    size
        Largest number of rows of a batch.
    encode
        Encodes one example.
    collate
        Stacks the inputs of encodings of equal shape.
    in_order
        True: encode a chunk, then yield its batches by shape, shortest first. False: yield each batch when it is full.
    """

    def batch(items: Sequence[tuple[int, Encoding]]) -> Batch:
        index, encodings = zip(*items, strict=True)
        return Batch(index, encodings, collate(encodings))

    start = 0
    while start < len(examples):
        by_shape: dict[tuple[Any, ...], list[tuple[int, Encoding]]] = {}
        tensors: dict[int, int] = {}  # bytes by identity: questions about one image share its pixels
        i = start
        while i < min(len(examples), start + 64 * size):
            encoding = encode(examples[i])
            by_shape.setdefault(encoding.shape, []).append((i, encoding))
            tensors |= {id(x): x.nbytes for x in encoding.inputs.values()}
            i += 1
            if not in_order and len(by_shape[encoding.shape]) == size:
                yield batch(by_shape.pop(encoding.shape))
            # A chunk ends after whole batches only, to avoid short batches.
            if (i - start) % size == 0 and sum(tensors.values()) > CHUNK_BYTES:
                break
        start = i
        for _, items in sorted(by_shape.items()):
            for k in range(0, len(items), size):
                yield batch(items[k : k + size])
