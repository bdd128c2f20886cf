"""The layout of an activation store on disk: version 3. Versions 1 and 2 are read as well.

A store is a folder::

    manifest.json            written last; present only in a finished store
    manifest-<worker>.json   only with several workers: what one of them finished
    shard-<worker>-<n>.h5    sealed shards, never changed again
    index.h5                 the whole store as one HDF5 file, by virtual datasets over the shards; for other readers
    tensors.h5               arrays that belong to the model, not to an example (optional)
    .sealed-<worker>.jsonl   digests of the shards that an unfinished run sealed, a line for each
    *.part, .*.lock          files of a run that is at work, or was killed; never read

A shard is plain HDF5 that any HDF5 library opens; with default library version bounds::

    /                              type ``activation-shard``; attributes ``layout-version``, ``rows``
    /schema, /provenance           type ``json``: scalar UTF-8 strings
    /arrays/<stack>.<component>/   type ``site-group``, e.g. ``decoder.z``, ``projector.out``, ``decoder.cross.z``
        <token selection>          type ``activation-array``: [N, L, D], chunks [32, 1, D] clipped to the sizes,
                                   e.g. ``last``, ``image:mean``; z as [N, L, H*head_dim], heads side by side
        <role>:all                 type ``ragged-array``, a group: ``values`` as above but [T, L, D], the tokens of all
                                   examples one after the other, and ``offsets`` int64 [N+1], where each begins
    /digests/<stack>.<component>/
        <token selection>          type ``chunk-digests``: uint32 [blocks, L], the CRC-32 of each chunk as it is stored
    /examples/                     type ``example-table``: one row an example
        <column>                   type ``string-column`` (UTF-8), ``label-column`` (float32, NaN = undefined),
                                   ``number-column`` (float64, int64 or bool), or ``list-column``, a group: ``values``
                                   [M] or [M, k] of int64, float64 or text, and ``offsets`` int64 [N+1]

Every element carries the attributes ``encoding-type`` and ``encoding-version``. An array also carries ``dtype``
(``bfloat16`` is held losslessly as uint16), ``layers`` (the layer numbers along the second axis), ``n_heads`` (0 where
its width is not divided into heads), ``order`` (below), ``overflow`` and ``nonfinite`` (how many values were too large
for the dtype, and how many came as NaN or infinity) and ``sha256``; a column carries ``position``, its place in the
table, and ``sha256``. The digest of an array is over its table of chunk digests (uint32, little-endian, row by row) and,
of a ragged one, its offsets (int64, little-endian) after it; that of a string column over its values, each followed by a
zero byte; that of other columns over their little-endian values; that of a list column over its offsets, then its values.

``order`` is ``NLD``, as above, or ``LND``: the array is contiguous [L, N, D] ([L, T, D]), what ``repack`` makes for the
fastest reading of whole layers; a row of its table of digests is over 32 rows of a layer all the same, fewer at the end.
With compression (``schema``: ``bitshuffle-lz4`` or ``blosc2-zstd``) chunks go through that HDF5 filter.

Column names are link names in which ``%``, ``/`` and a leading ``.`` are percent-encoded, as ``/`` divides paths.
A missing string is the empty string. An empty token selection (no such object in the image) is a row of NaN; in a ragged
array it is a row without tokens. Columns with a fixed meaning, where they are there: those of `STANDARD_COLUMNS`,
``model_answer``, ``image`` (SHA-256 of the picture: over its width, ``x`` and height in ASCII digits, a zero byte, and its
RGB values row by row, uint8), ``span:<role>`` (a list of [start, stop) pairs: the runs of decoder positions of a role,
`runs`; a role that the decoder does not have has no column), ``boxes`` (a list of x0, y0, x1, y1 in pixels, half open) and
beside it, of equal lengths, ``box_ids`` and ``box_nouns``.

``manifest.json`` is canonical JSON (sorted keys, indent 1, ASCII) with ``layout-version``, ``schema``, ``provenance``,
``tensors``, ``index``, ``shards`` (file, its layout version, bytes, rows, SHA-256, digests of its arrays, example ids)
and ``sha256``, the digest of the same JSON without it, so that a flipped byte anywhere is found; this much holds for
every version to come, so that a newer manifest can be told from a damaged one. Shards and ``tensors.h5`` end with a seal
(`activation_store.format.seal`): digests of all their bytes that need no HDF5, and a digest of these, which is the SHA-256 that
the manifest has of a shard. Links to other places or files, external storage and virtual datasets are refused in shards and
``tensors.h5``. Rows of a store are its shards' rows, ordered by worker and number.

In version 2 files had no seal, and the SHA-256 of a shard was over all of its bytes but those of its chunks (of contiguous
arrays: those of the arrays), whose digests are in the tables among those bytes.

Version 1 had neither ragged arrays, list columns, compression, the order LND, an index nor digests of chunks: there an
array's digest is over its little-endian values in the order row block (of the chunk's rows), layer, row, width, and the
SHA-256 of a shard is over the whole file. A store may hold shards of all versions.

A reader of version 3 refuses a higher ``layout-version``, and ignores elements and fields it does not know.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

from groundscope.core.errors import SiteError, StoreError
from lvlm.sites import LAYER_COMPONENTS, TokenSelection

LAYOUT_VERSION = 3
ENCODING_VERSION = "1"
CHUNK_ROWS = 32
MANIFEST = "manifest.json"
TENSORS = "tensors.h5"
INDEX = "index.h5"

REQUIRED_COLUMNS = ("id", "group")
"""Columns that every example must bring: its name, and the image or scene that splits must not divide."""
STANDARD_COLUMNS = ("id", "group", "question", "answer", "split", "kind", "level")
"""String columns that every table has, in this order; the empty string where they were not given."""
LABEL_LEVELS = ("object", "attribute", "relation")
"""A column named ``<level>:<name>`` is a label: float32, 1 true, 0 false, NaN undefined."""
NOT_COMPARED = ("environment",)
"""Keys of the provenance that are recorded but may differ when a run is resumed."""

Dtype = Literal["float32", "float16", "bfloat16"]
DTYPES: tuple[Dtype, ...] = ("float32", "float16", "bfloat16")
Compression = Literal["bitshuffle-lz4", "blosc2-zstd"]
COMPRESSIONS: tuple[Compression, ...] = ("bitshuffle-lz4", "blosc2-zstd")
"""For speed, and for size. Reading and writing either needs the package hdf5plugin."""
Key = tuple[str, str, str]
"""What an array is called: (stack, component, token selection), e.g. ``("decoder", "z", "last")``."""

_PER_HEAD = frozenset({"z", "q", "k", "v"})
_SHARD = re.compile(r"^shard-(\d+)-(\d+)\.h5$")


@dataclass(frozen=True)
class ArrayInfo:
    """One array of a store: a site family and a token selection, with the sizes of what is kept for an example."""

    stack: str
    """``vision``, ``projector`` or ``decoder``."""
    component: str
    """As in a site: ``resid_post``, ``z``, …; ``cross.z`` for cross-attention layers; ``out`` for the projector."""
    tokens: str
    """Token selection as printed, e.g. ``last`` or ``image:mean``."""
    n_layers: int
    width: int
    """Values for each example and layer: D, or H*head_dim for z."""
    n_heads: int | None = None
    """Into how many equal slices, heads side by side, the width divides; None where it does not."""
    layers: tuple[int, ...] = ()
    """Layer numbers along the second axis, increasing; by default 0 to n_layers-1."""
    ragged: bool = False
    """Every token of the selection is kept, [T, L, D] with offsets: for ``image:all`` and its like, and only for them."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(int(layer) for layer in self.layers) or tuple(range(self.n_layers)))
        known = ("out",) if self.stack == "projector" else LAYER_COMPONENTS
        problem = ""
        if self.stack not in ("vision", "projector", "decoder"):
            problem = "the stack must be vision, projector or decoder"
        elif self.component.removeprefix("cross.") not in known:
            problem = f"the component must be one of {', '.join(known)}"
        elif TokenSelection.parse(self.tokens).reduction == "all" and not self.ragged:
            problem = "one vector is kept for an example; take ':mean' instead of ':all', or bring all with ragged=True"
        elif TokenSelection.parse(self.tokens).reduction != "all" and self.ragged:
            problem = "ragged=True keeps every token of a selection: take ':all'"
        elif self.n_layers < 1 or self.width < 1:
            problem = f"n_layers={self.n_layers} and width={self.width} must be at least 1"
        elif len(self.layers) != self.n_layers or list(self.layers) != sorted(set(self.layers)):
            problem = f"layers={self.layers} must be {self.n_layers} different increasing numbers"
        elif self.n_heads is not None and (self.n_heads < 1 or self.width % self.n_heads):
            problem = f"its width {self.width} does not divide into n_heads={self.n_heads}"
        if problem:
            msg = f"array {self.stack}.{self.component} [{self.tokens}] cannot be stored: {problem}"
            raise SiteError(msg)

    @property
    def key(self) -> Key:
        """What the array is called: ``(stack, component, tokens)``."""
        return (self.stack, self.component, self.tokens)

    @property
    def name(self) -> str:
        """Where the array is, under ``/arrays`` in a shard: ``decoder.z/last``."""
        return array_name(self.key)

    @property
    def head_dim(self) -> int | None:
        """Width of one head; None for a component that has no heads."""
        if self.n_heads is None or self.component.removeprefix("cross.") not in _PER_HEAD:
            return None
        return self.width // self.n_heads


@dataclass(frozen=True)
class Schema:
    """What a store keeps for each example: its arrays, the dtype they are kept in, and how they are compressed.

    Raises
    ------
    StoreError
        Where there is no array, two have the same name, or dtype or compression is none that there is.
    """

    arrays: tuple[ArrayInfo, ...]
    dtype: Dtype = "float32"
    compression: Compression | None = None
    """None for the speed of the disk; it pays on values that came as bfloat16."""

    def __post_init__(self) -> None:
        arrays = tuple(sorted(self.arrays, key=lambda a: a.key))
        object.__setattr__(self, "arrays", arrays)
        if self.dtype not in DTYPES:
            msg = f"dtype '{self.dtype}' cannot be stored: choose one of {', '.join(DTYPES)}"
            raise StoreError(msg)
        if self.compression not in (None, *COMPRESSIONS):
            msg = f"compression '{self.compression}' is none: choose None or one of {', '.join(COMPRESSIONS)}"
            raise StoreError(msg)
        names = [a.name for a in arrays]
        twice = sorted({name for name in names if names.count(name) > 1})
        if not arrays or twice:
            msg = f"a schema names arrays twice: {', '.join(twice)}" if twice else "a schema needs at least one array"
            raise StoreError(msg)

    def record(self) -> dict[str, Any]:
        """Return the schema as plain values that JSON can hold."""
        arrays = [{**asdict(a), "layers": list(a.layers)} for a in self.arrays]
        return {"dtype": self.dtype, "compression": self.compression, "arrays": arrays}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Schema:
        """Read what `record` returned; raises `StoreError` for anything else."""
        fields = {"stack": str, "component": str, "tokens": str, "n_layers": int, "width": int, "layers": list}
        try:
            for a in record["arrays"]:
                wrong = [f for f, kind in fields.items() if type(a[f]) is not kind]
                wrong += ["n_heads"] * (type(a["n_heads"]) not in (int, type(None)))
                wrong += ["layers"] * any(type(layer) is not int for layer in a["layers"])
                if wrong or type(a.get("ragged", False)) is not bool:
                    msg = f"'{(wrong or ['ragged'])[0]}' of an array has a wrong type"
                    raise TypeError(msg)
            # A field that version 1 did not have has its default.
            arrays = tuple(
                ArrayInfo(**{f: a[f] for f in (*fields, "n_heads")}, ragged=a.get("ragged", False))
                for a in record["arrays"]
            )
            return cls(arrays, cast("Dtype", record["dtype"]), record.get("compression"))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            msg = f"the schema of the store cannot be read ({error!r}): it is damaged or of another version"
            raise StoreError(msg) from error


def array_name(key: Key) -> str:
    """Return where an array is under ``/arrays`` in a shard, e.g. ``decoder.z/last``."""
    return f"{key[0]}.{key[1]}/{key[2]}"


def shard_name(worker: int, number: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{worker}-{number:05d}.h5"


def shard_numbers(name: str) -> tuple[int, int] | None:
    """Return (worker, number) of a shard's file name, None for other files."""
    match = _SHARD.match(name)
    return (int(match[1]), int(match[2])) if match else None


def manifest_name(worker: int | None = None) -> str:
    """Return the file name of the manifest, or of the part that one of several workers writes."""
    return MANIFEST if worker is None else f"manifest-{worker}.json"


def sealed_name(worker: int) -> str:
    """Return the file name under which an unfinished run keeps the digests of the shards that it sealed."""
    return f".sealed-{worker}.jsonl"


def link_name(column: str) -> str:
    """Return the HDF5 link name of a column."""
    name = column.replace("%", "%25").replace("/", "%2F")
    return "%2E" + name[1:] if name.startswith(".") else name


def column_name(link: str) -> str:
    """Return the column of an HDF5 link name."""
    return link.replace("%2E", ".").replace("%2F", "/").replace("%25", "%")


def is_label(column: str) -> bool:
    """Whether a column holds a concept's labels, by its name."""
    return column.partition(":")[0] in LABEL_LEVELS and ":" in column


def runs(positions: Iterable[int]) -> list[list[int]]:
    """Return token positions as [start, stop) pairs of neighbours, in order: what a column ``span:<role>`` holds."""
    out: list[list[int]] = []
    for position in sorted(positions):
        if out and out[-1][1] == position:
            out[-1][1] += 1
        else:
            out.append([position, position + 1])
    return out


def check_version(version: object, where: str) -> None:
    """Raise `StoreError` unless this code can read a layout version."""
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        msg = f"{where}: layout version {version!r} does not exist; the file is damaged"
        raise StoreError(msg)
    if version > LAYOUT_VERSION:
        msg = (
            f"{where}: layout version {version} is newer than {LAYOUT_VERSION}, the highest that this version of "
            f"groundscope reads; update groundscope, or trace again with this one"
        )
        raise StoreError(msg)


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, object, object] | None:
    """Return the first field, in dotted form, in which two records differ, with its old and new value; None if none."""
    a, b = _flat(old), _flat(new)
    for field in sorted(a.keys() | b.keys()):
        left, right = a.get(field, "nothing"), b.get(field, "nothing")
        if left != right or type(left) is not type(right):
            return field, left, right
    return None


def comparable(schema: Schema, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return what two runs must have in common to write into one store."""
    arrays = {a.name: {**asdict(a), "layers": list(a.layers)} for a in schema.arrays}
    kept = {key: value for key, value in provenance.items() if key not in NOT_COMPARED}
    return {"dtype": schema.dtype, "compression": schema.compression, "arrays": arrays, "provenance": kept}


def _flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    out: dict[str, object] = {}
    for key, value in record.items():
        if isinstance(value, Mapping) and value:
            out.update(_flat(value, f"{prefix}{key}."))
        else:
            out[f"{prefix}{key}"] = value
    return out
