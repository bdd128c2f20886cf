"""Write one array of a shard, block by block, with a digest per chunk."""

from __future__ import annotations

import zlib

import h5py
import numpy as np

from activation_store.format.buffered_file import BufferedFile
from activation_store.format.compression import filter_options
from activation_store.format.digests import blocks
from activation_store.format.encoding import STORAGE, Encoded
from activation_store.format.schema import CHUNK_ROWS, ArrayInfo, Schema
from activation_store.writing.queue import Background, Pool
from activation_store.writing.shard_parts import create_array, describe_array


class ArrayBuilder:
    """Collects the rows of one array into blocks of 32, and submits each to the background thread as one chunk per layer."""

    def __init__(
        self, file: h5py.File, raw_file: BufferedFile, info: ArrayInfo, schema: Schema, disk: Background, pool: Pool
    ) -> None:
        self.info = info
        self._raw_file = raw_file
        self._file, self._dtype, self._disk = file, schema.dtype, disk
        self._compressed = filter_options(schema.compression)
        self._pool = pool
        self._block = self._new_block()
        self._filled = 0
        self._chunk_rows = 0  # set by the first block
        self._digests: list[list[int]] = []
        self._lengths: list[int] = []
        self._overflow = 0
        self._nonfinite = 0
        # Used only by the background thread:
        self._element: tuple[h5py.Group | h5py.Dataset, h5py.Dataset] | None = None

    def add(self, encoded: Encoded, rows: slice) -> None:
        """Append a slice of the examples of an encoded batch."""
        self._overflow += int(encoded.overflow[rows].sum())
        self._nonfinite += int(encoded.nonfinite[rows].sum())
        at, stop = rows.start, rows.stop
        if encoded.offsets is not None:
            offsets = encoded.offsets[at : stop + 1]
            self._lengths.extend(np.diff(offsets).tolist())
            at, stop = int(offsets[0]), int(offsets[-1])
        while at < stop:
            n = min(stop - at, CHUNK_ROWS - self._filled)
            if n == CHUNK_ROWS and not self._compressed:
                self._add_block(encoded.stored[at : at + n])
            else:
                self._block[:, self._filled : self._filled + n] = encoded.stored[at : at + n].swapaxes(0, 1)
                self._filled += n
            at += n
            if self._filled == CHUNK_ROWS:
                self.flush()

    def _add_block(self, rows: np.ndarray) -> None:
        # Rows that fill a whole block are digested layer by layer while they are in the processor's cache.
        block, digests = self._block, []
        for layer, chunk in enumerate(block):
            chunk[:] = rows[:, layer]
            digests.append(zlib.crc32(chunk.data))
        self._chunk_rows = CHUNK_ROWS
        self._submit(block, CHUNK_ROWS, digests)

    def flush(self) -> None:
        """Submit the last block, even if it is not full."""
        n, block = self._filled, self._block
        if n == 0:
            return
        # A first block that is not full is the only block: chunks are then clipped to it.
        self._chunk_rows = self._chunk_rows or n
        block[:, n:] = 0  # the padding of the last chunk must not depend on the block's earlier contents
        digests = [] if self._compressed else [zlib.crc32(chunk[: self._chunk_rows].data) for chunk in block]
        self._submit(block, n, digests)

    def _submit(self, block: np.ndarray, n: int, digests: list[int]) -> None:
        self._digests.append(digests)
        self._disk.submit(lambda: self._write(block, n), block.nbytes)
        self._block, self._filled = self._new_block(), 0

    def finish(self) -> str:
        """Write the array's attributes after all its values are on disk; return its digest."""
        element, values = self._element if self._element else self._create(1)
        if self._compressed:
            digests = self._stored_digests(values)
        else:
            digests = np.array(self._digests, np.uint32).reshape(-1, self.info.n_layers)
        return describe_array(
            element,
            values,
            self.info,
            self._dtype,
            digests,
            offsets=np.cumsum([0, *self._lengths], dtype=np.int64) if self.info.ragged else None,
            overflow=self._overflow,
            nonfinite=self._nonfinite,
        )

    def _new_block(self) -> np.ndarray:
        return self._pool.take((self.info.n_layers, CHUNK_ROWS, self.info.width), STORAGE[self._dtype])  # [L, 32, D]

    def _create(self, chunk_rows: int) -> tuple[h5py.Group | h5py.Dataset, h5py.Dataset]:
        n_layers, width = self.info.n_layers, self.info.width
        self._element = create_array(
            self._file,
            self.info,
            self._dtype,
            (0, n_layers, width),
            maxshape=(None, n_layers, width),
            chunks=(chunk_rows, 1, width),
            **self._compressed,
        )
        return self._element

    def _write(self, block: np.ndarray, n: int) -> None:
        values = (self._element if self._element else self._create(self._chunk_rows))[1]
        start = len(values)
        values.resize(start + n, axis=0)
        for layer, chunk in enumerate(block):
            if self._compressed:
                values[start : start + n, layer : layer + 1] = chunk[:n, None]
            else:
                # Writing the finished chunk directly avoids a copy in HDF5 and runs at the speed of the disk.
                values.id.write_direct_chunk((start, layer, 0), chunk[: self._chunk_rows])
        self._raw_file.check()
        self._pool.release(block)

    def _stored_digests(self, values: h5py.Dataset) -> np.ndarray:
        # The compressed bytes of a chunk are available only from HDF5, after a flush.
        values.file.flush()
        where = blocks(values)
        stored = (
            values.id.read_direct_chunk((block * where.rows, layer, 0))[1]
            for block, layer in np.ndindex(where.offsets.shape)
        )
        return np.array([zlib.crc32(chunk) for chunk in stored], np.uint32).reshape(where.offsets.shape)
