"""The layout of an activation store on disk, versions 3 and 4. Versions 1 and 2 can also be read.

A store is a folder::

    manifest.json            written last; present only in a finished store
    manifest-<worker>.json   only with several workers: the finished shards of one of them
    shard-<worker>-<n>.h5    sealed shards, never changed afterwards
    index.h5                 the whole store as one HDF5 file of virtual datasets over the shards; for other readers
    tensors.h5               arrays that belong to the model, not to an example (optional)
    .sealed-<worker>.jsonl   digests of the shards that an unfinished run sealed, one per line
    *.part, .*.lock          files of a running or killed run; never read

A shard is plain HDF5 that any HDF5 library can open, with default library version bounds::

    /                              type ``activation-shard``; attributes ``layout-version``, ``rows``
    /schema, /provenance           type ``json``: scalar UTF-8 strings
    /arrays/<stack>.<component>/   type ``site-group``, e.g. ``decoder.z``, ``projector.out``, ``decoder.cross.z``
        <token selection>          type ``activation-array``: [N, L, D], chunks [32, 1, D] clipped to the sizes,
                                   e.g. ``last``, ``image:mean``; z as [N, L, H*head_dim], heads concatenated
        <role>:all, mention:<…>    type ``ragged-array``, a group: ``values`` as above but [T, L, D], the concatenated
                                   tokens of all examples, and ``offsets`` int64 [N+1], the start of each
    /digests/<stack>.<component>/
        <token selection>          type ``chunk-digests``: uint32 [blocks, L], the CRC-32 of the stored bytes of each chunk
    /examples/                     type ``example-table``: one row per example
        <column>                   type ``string-column`` (UTF-8), ``label-column`` (float32, NaN = undefined),
                                   ``number-column`` (float64, int64 or bool), or ``list-column``, a group: ``values``
                                   [M] or [M, k] of int64, float64 or text, and ``offsets`` int64 [N+1]

Every element carries the attributes ``encoding-type`` and ``encoding-version``. An array also carries ``dtype``
(``bfloat16`` is stored losslessly as uint16), ``layers`` (the layer numbers along the second axis), ``n_heads`` (0 if its
width is not divided into heads), ``order`` (below), ``overflow`` and ``nonfinite`` (the number of values too large for
the dtype, and of values that were NaN or infinite) and ``sha256``; a column carries ``position``, its index in the table,
and ``sha256``. The digest of an array covers its table of chunk digests (uint32, little-endian, row by row) and, if it is
ragged, its offsets (int64, little-endian); that of a string column its values, each followed by a zero byte; that of
other columns their little-endian values; that of a list column its offsets, then its values.

``order`` is ``NLD``, as above, or ``LND``: the array is contiguous [L, N, D] ([L, T, D]), as ``repack`` writes it for the
fastest reads of whole layers; a row of its table of digests still covers 32 rows of a layer, fewer at the end. With
compression (``schema``: ``bitshuffle-lz4`` or ``blosc2-zstd``) chunks pass through that HDF5 filter.

Column names are link names in which ``%``, ``/`` and a leading ``.`` are percent-encoded, because ``/`` separates paths.
A missing string is the empty string. An empty token selection (no such object in the image) is a row of NaN; in a ragged
array it is a row without tokens. Columns with a fixed meaning, if present: those of `STANDARD_COLUMNS`,
``model_answer``, ``image`` (SHA-256 of the picture: over its width, ``x`` and height in ASCII digits, a zero byte, and its
RGB values row by row, uint8), ``span:<role>`` (a list of [start, stop) pairs: the runs of decoder positions of a role,
`runs`; a role that the decoder does not have has no column), ``boxes`` (a list of x0, y0, x1, y1 in pixels, half open),
and ``box_ids`` and ``box_nouns``, lists of the same lengths as ``boxes``. If tokens of mentions were traced, each of these
lists has an item for each object that the prefix mentions, in the order of the rows of ``mention:<…>``: ``mention:noun``,
``mention:present`` (1, 0 or NaN), ``mention:characters`` ([start, stop) in the column ``prefix``), ``mention:tokens``
([start, stop) of decoder positions), ``mention:log_p`` and ``mention:first_log_p`` (the log-probability of the mention's
tokens, and of the first of them, in nats).

``manifest.json`` is canonical JSON (sorted keys, indent 1, ASCII) with ``layout-version``, ``schema``, ``provenance``,
``tensors``, ``index``, ``shards`` (file, its layout version, bytes, rows, SHA-256, digests of its arrays, example ids)
and ``sha256``, the digest of the same JSON without it, which detects any changed byte; this rule holds for all future
versions, so that a newer manifest can be distinguished from a damaged one. Shards and ``tensors.h5`` end with a seal
(`activation_store.format.seal`): digests of all their bytes that need no HDF5, and a digest of those digests, which is the
SHA-256 of a shard in the manifest. Soft and external links, external storage and virtual datasets are errors in shards and
``tensors.h5``. The rows of a store are the rows of its shards, ordered by worker and number.

Version 2 files have no seal; the SHA-256 of a shard covers all its bytes except its chunks (for contiguous arrays: except
the arrays), whose digests are in the tables among those bytes.

Version 1 has no ragged arrays, list columns, compression, LND order, index or chunk digests: an array's digest covers its
little-endian values in the order row block (of the chunk's rows), layer, row, width, and the SHA-256 of a shard covers the
whole file. A store can hold shards of all versions.

Version 4 is version 3 with two more kinds of arrays. Arrays of some heads only: the attribute ``heads`` and the field of the same
name in the schema hold the numbers of the heads along the width. Arrays of reduced tokens, always float32, named
``arrays/<site>|<reduction>/<tokens>``: the fields ``reduction`` and ``values`` in the schema name the reduction and the values
along the width. A store is of version 4 only if it has such an array, so that earlier releases read all others.

A reader raises an error for a higher ``layout-version``, and ignores unknown elements and fields.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

from groundscope.core.errors import SiteError, StoreError
from groundscope.core.short_repr import short_repr
from groundscope.core.text import nearest
from lvlm.sites import LAYER_COMPONENTS
from lvlm.token_selection import TokenSelection

LAYOUT_VERSION = 4
"""The highest version that is read."""
PLAIN_VERSION = 3
"""The version that is written for a store without elements that only version 4 has."""
ENCODING_VERSION = "1"
CHUNK_ROWS = 32
MANIFEST = "manifest.json"
TENSORS = "tensors.h5"
INDEX = "index.h5"

REQUIRED_COLUMNS = ("id", "group")
"""Columns that every example must have: its id, and the image or scene that splits must not divide."""
STANDARD_COLUMNS = ("id", "group", "question", "answer", "split", "kind", "level")
"""String columns that every table has, in this order; the empty string if the caller did not set them."""
LABEL_LEVELS = ("object", "attribute", "relation")
"""A column named ``<level>:<name>`` is a label: float32, 1 true, 0 false, NaN undefined."""
NOT_COMPARED = ("environment",)
"""Provenance keys that are recorded but can differ when a run is resumed."""

Dtype = Literal["float32", "float16", "bfloat16"]
DTYPES: tuple[Dtype, ...] = ("float32", "float16", "bfloat16")
Compression = Literal["bitshuffle-lz4", "blosc2-zstd"]
COMPRESSIONS: tuple[Compression, ...] = ("bitshuffle-lz4", "blosc2-zstd")
"""The first is faster, the second smaller. Both need the package hdf5plugin to read and to write."""
Key = tuple[str, str, str]
"""Key of an array: (stack, component, token selection), e.g. ``("decoder", "z", "last")``."""

_LATER_FIELDS = ("heads", "reduction", "values")
"""Fields of arrays that version 4 added."""
_REDUCTION = re.compile(r"[a-z0-9_-]+")
_PER_HEAD = frozenset({"z", "q", "k", "v"})
_SHARD = re.compile(r"^shard-(\d+)-(\d+)\.h5$")


@dataclass(frozen=True)
class ArrayInfo:
    """One array of a store: a component of a stack at a token selection, with its sizes per example.

    Examples
    --------
    >>> from activation_store import ArrayInfo
    >>> info = ArrayInfo("decoder", "z", "last", n_layers=24, width=896, n_heads=14)
    >>> info.name, info.head_dim
    ('decoder.z/last', 64)
    """

    stack: str
    """``vision``, ``projector`` or ``decoder``."""
    component: str
    """As in a site: ``resid_post``, ``z``, …; ``cross.z`` for cross-attention layers; ``out`` for the projector."""
    tokens: str
    """Token selection, e.g. ``last`` or ``image:mean``."""
    n_layers: int
    width: int
    """Values per example and layer: D, or H*head_dim for z."""
    n_heads: int | None = None
    """Number of equal slices (heads, concatenated) of the width; None if the width is not divided."""
    layers: tuple[int, ...] = ()
    """Layer numbers along the second axis, increasing; by default 0 to n_layers-1."""
    heads: tuple[int, ...] = ()
    """Numbers of the heads along the width, increasing, if only some of the model's heads are stored; else 0 to n_heads-1."""
    reduction: str = ""
    """Name of the reduction (`activation_store.reductions`) whose values are stored instead of activations; empty for none."""
    values: tuple[str, ...] = ()
    """Names of the values along the width, of a reduction only."""
    ragged: bool = False
    """Every token of the selection is stored, [T, L, D] with offsets: for ``:all`` and ``mention:…`` selections, and only for
    them. A table with one row per mention (`activation_store.MentionRows`) has ``mention:…`` arrays that are not ragged."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(int(layer) for layer in self.layers) or tuple(range(self.n_layers)))
        object.__setattr__(self, "heads", tuple(int(head) for head in self.heads))
        object.__setattr__(self, "values", tuple(str(value) for value in self.values))
        components = ("out",) if self.stack == "projector" else LAYER_COMPONENTS
        problem = ""
        if self.stack not in ("vision", "projector", "decoder"):
            problem = "the stack must be vision, projector or decoder"
        elif self.component.removeprefix("cross.") not in components:
            problem = f"the component must be one of {', '.join(components)}"
        elif TokenSelection.parse(self.tokens).reduction == "all" and not self.ragged:
            problem = "':all' selects several vectors per example; use ':mean' for one vector, or set ragged=True"
        elif self.ragged and not TokenSelection.parse(self.tokens).ragged:
            problem = "ragged=True stores every token of a selection; use ':all'"
        elif self.n_layers < 1 or self.width < 1:
            problem = f"n_layers={self.n_layers} and width={self.width} must be at least 1"
        elif len(self.layers) != self.n_layers or list(self.layers) != sorted(set(self.layers)):
            problem = f"layers={self.layers} must be {self.n_layers} different increasing numbers"
        elif self.n_heads is not None and (self.n_heads < 1 or self.width % self.n_heads):
            problem = f"its width {self.width} does not divide into n_heads={self.n_heads}"
        elif self.heads and (
            len(self.heads) != self.n_heads or list(self.heads) != sorted(set(self.heads)) or self.heads[0] < 0
        ):
            problem = f"heads={self.heads} must be n_heads={self.n_heads} different increasing numbers"
        elif (self.reduction and not _REDUCTION.fullmatch(self.reduction)) or (self.values and not self.reduction):
            problem = f"reduction='{self.reduction}' must be of lower-case letters, digits, '_' and '-'"
        elif self.reduction and (
            len(set(self.values)) < len(self.values) or len(self.values) != self.width or self.n_heads
        ):
            problem = f"a reduction needs {self.width} different names of values and no heads, not values={self.values}"
        if problem:
            msg = f"array {self.stack}.{self.component} [{self.tokens}] cannot be stored: {problem}"
            raise SiteError(msg)

    @property
    def key(self) -> Key:
        """Key of the array: ``(stack, component, tokens)``; the component of a reduction is followed by ``|`` and its name."""
        component = f"{self.component}|{self.reduction}" if self.reduction else self.component
        return (self.stack, component, self.tokens)

    @property
    def name(self) -> str:
        """Path of the array under ``/arrays`` in a shard: ``decoder.z/last``."""
        return array_name(self.key)

    @property
    def head_numbers(self) -> tuple[int, ...]:
        """Numbers of the stored heads, in the order of their slices; empty for a component without heads."""
        return self.heads or tuple(range(self.n_heads or 0))

    def record(self) -> dict[str, Any]:
        """Return the fields as JSON-serializable values; without those of version 4 where they are empty."""
        lists = {"layers": list(self.layers), "heads": list(self.heads), "values": list(self.values)}
        fields = {**asdict(self), **lists}
        return {name: value for name, value in fields.items() if value or name not in _LATER_FIELDS}

    @property
    def head_dim(self) -> int | None:
        """Width of one head; None for a component without heads."""
        if self.n_heads is None or self.component.removeprefix("cross.") not in _PER_HEAD:
            return None
        return self.width // self.n_heads


@dataclass(frozen=True)
class Schema:
    """The contents of a store per example: its arrays, their storage dtype and their compression.

    Raises
    ------
    StoreError
        If there is no array, two have the same name, or the dtype or compression is unknown.

    Examples
    --------
    >>> from activation_store import ArrayInfo, Schema
    >>> schema = Schema((ArrayInfo("decoder", "resid_post", "last", n_layers=24, width=896),), "bfloat16")
    >>> schema.dtype, len(schema.arrays)
    ('bfloat16', 1)
    """

    arrays: tuple[ArrayInfo, ...]
    dtype: Dtype = "float32"
    compression: Compression | None = None
    """None for the speed of the disk; compression helps most with values of a bfloat16 model."""

    __repr__ = short_repr

    def __post_init__(self) -> None:
        arrays = tuple(sorted(self.arrays, key=lambda a: a.key))
        object.__setattr__(self, "arrays", arrays)
        if self.dtype not in DTYPES:
            msg = f"unknown dtype '{self.dtype}'; choose from {', '.join(DTYPES)}{nearest(str(self.dtype), DTYPES)}"
            raise StoreError(msg)
        if self.compression not in (None, *COMPRESSIONS):
            similar = nearest(str(self.compression), COMPRESSIONS)
            msg = f"unknown compression '{self.compression}'; choose from None, {', '.join(COMPRESSIONS)}{similar}"
            raise StoreError(msg)
        names = [a.name for a in arrays]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if not arrays or repeated:
            msg = (
                f"the schema has repeated arrays: {', '.join(repeated)}; give each once"
                if repeated
                else "the schema has no array; give at least one"
            )
            raise StoreError(msg)

    def storage(self, info: ArrayInfo) -> Dtype:
        """Return the dtype in which an array is stored: float32 for reductions, whose ranks 16 bits cannot hold."""
        return "float32" if info.reduction else self.dtype

    @property
    def layout_version(self) -> int:
        """The layout version of its files: the lowest that can hold its arrays."""
        return LAYOUT_VERSION if any(a.heads or a.reduction for a in self.arrays) else PLAIN_VERSION

    def record(self) -> dict[str, Any]:
        """Return the schema as JSON-serializable values."""
        arrays = [a.record() for a in self.arrays]
        return {"dtype": self.dtype, "compression": self.compression, "arrays": arrays}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Schema:
        """Create the schema from the result of `record`; raise `StoreError` if it is not valid."""
        fields = {"stack": str, "component": str, "tokens": str, "n_layers": int, "width": int, "layers": list}
        try:
            for a in record["arrays"]:
                wrong = [f for f, kind in fields.items() if type(a[f]) is not kind]
                wrong += ["n_heads"] * (type(a["n_heads"]) not in (int, type(None)))
                wrong += ["layers"] * any(type(layer) is not int for layer in a["layers"])
                heads = a.get("heads", [])
                wrong += ["heads"] * (type(heads) is not list or any(type(head) is not int for head in heads))
                names = a.get("values", [])
                wrong += ["values"] * (type(names) is not list or any(type(name) is not str for name in names))
                wrong += ["reduction"] * (type(a.get("reduction", "")) is not str)
                if wrong or type(a.get("ragged", False)) is not bool:
                    msg = f"field '{(wrong or ['ragged'])[0]}' of an array has the wrong type"
                    raise TypeError(msg)
            # Fields that version 1 lacks get their defaults.
            arrays = tuple(
                ArrayInfo(
                    **{f: a[f] for f in (*fields, "n_heads")},
                    **{f: a[f] for f in ("ragged", *_LATER_FIELDS) if f in a},
                )
                for a in record["arrays"]
            )
            return cls(arrays, cast("Dtype", record["dtype"]), record.get("compression"))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            msg = f"the schema of the store cannot be read ({error!r}): it is damaged or of another version"
            raise StoreError(msg) from error


def array_name(key: Key) -> str:
    """Return the path of an array under ``/arrays`` in a shard, e.g. ``decoder.z/last``."""
    return f"{key[0]}.{key[1]}/{key[2]}"


def shard_name(worker: int, number: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{worker}-{number:05d}.h5"


def shard_numbers(name: str) -> tuple[int, int] | None:
    """Return (worker, number) of a shard's file name, None for other files."""
    match = _SHARD.match(name)
    return (int(match[1]), int(match[2])) if match else None


def manifest_name(worker: int | None = None) -> str:
    """Return the file name of the manifest, or of one worker's part of it."""
    return MANIFEST if worker is None else f"manifest-{worker}.json"


def sealed_name(worker: int) -> str:
    """Return the name of the file in which an unfinished run records the digests of its sealed shards."""
    return f".sealed-{worker}.jsonl"


def link_name(column: str) -> str:
    """Return the HDF5 link name of a column."""
    name = column.replace("%", "%25").replace("/", "%2F")
    return "%2E" + name[1:] if name.startswith(".") else name


def column_name(link: str) -> str:
    """Return the column of an HDF5 link name."""
    return link.replace("%2E", ".").replace("%2F", "/").replace("%25", "%")


def is_label(column: str) -> bool:
    """Whether a column holds labels of a concept, judged by its name."""
    return column.partition(":")[0] in LABEL_LEVELS and ":" in column


def runs(positions: Iterable[int]) -> list[list[int]]:
    """Return token positions as sorted [start, stop) runs of consecutive positions, as in a column ``span:<role>``."""
    out: list[list[int]] = []
    for position in sorted(positions):
        if out and out[-1][1] == position:
            out[-1][1] += 1
        else:
            out.append([position, position + 1])
    return out


def check_version(version: object, where: str) -> None:
    """Raise `StoreError` unless this version can read the given layout version."""
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
    """Return the first field, in dotted form, in which two records differ, with both values; None if they are equal."""
    a, b = _flat(old), _flat(new)
    for field in sorted(a.keys() | b.keys()):
        old_value, new_value = a.get(field, "nothing"), b.get(field, "nothing")
        if old_value != new_value or type(old_value) is not type(new_value):
            return field, old_value, new_value
    return None


def comparable(schema: Schema, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that must be equal for two runs to write into one store."""
    arrays = {a.name: a.record() for a in schema.arrays}
    compared = {key: value for key, value in provenance.items() if key not in NOT_COMPARED}
    return {"dtype": schema.dtype, "compression": schema.compression, "arrays": arrays, "provenance": compared}


def _flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    out: dict[str, object] = {}
    for key, value in record.items():
        if isinstance(value, Mapping) and value:
            out.update(_flat(value, f"{prefix}{key}."))
        else:
            out[f"{prefix}{key}"] = value
    return out
