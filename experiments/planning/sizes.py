"""Bytes of a store before it is written: its arrays, its tables and the tensors of the model."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from concepts.schema import ConceptDataset

if TYPE_CHECKING:
    from activation_store.tracing.plan import Plan
    from lvlm.model import Encoding, Lvlm

_SHARD = 512
"""Examples per file of a store, the default of `activation_store.trace`."""
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def array_bytes(plan: Plan, encodings: Sequence[Encoding], examples: int) -> dict[str, float]:
    """Return the bytes of each array for `examples` examples that are like the encoded ones."""
    from lvlm.token_selection import TokenSelection

    sizes = {}
    for array in plan.schema.arrays:
        tokens = 1.0
        if array.ragged:
            selection, stack = TokenSelection.parse(array.tokens), array.stack
            tokens = float(np.mean([len(e.tokens.positions(selection, stack)) for e in encodings]))  # type: ignore[arg-type]
        sizes[array.name] = examples * tokens * array.n_layers * array.width * _BYTES[plan.schema.storage(array)]
    return sizes


def stored_rows(examples: int) -> int:
    """Return the rows on disk of an array with one vector per example: whole chunks, in a shard of several chunks."""
    from activation_store.format.schema import CHUNK_ROWS

    last = examples % _SHARD
    return examples - last + (last if last <= CHUNK_ROWS else -(-last // CHUNK_ROWS) * CHUNK_ROWS)


def unembedding_bytes(model: Lvlm, plan: Plan) -> float:
    """Return the bytes of final norm and unembedding, which are stored once."""
    from activation_store.tracing.provenance import read_unembedding

    arrays = read_unembedding(model, plan) or {}
    return float(sum(rows.nbytes for rows in arrays.values()))


def table_bytes(model: Lvlm, data: ConceptDataset, plan: Plan, encodings: Sequence[Encoding], examples: int) -> float:
    """Estimate the bytes of tables, indexes and digests from two small stores, whose arrays have one layer and one column."""
    concepts = tuple(sorted({concept for example in data for concept in example.labels}))
    few = max(1, len(encodings) // 4)
    with tempfile.TemporaryDirectory() as folder:
        small, large = (
            _narrow_store(model, plan, encodings[:n], concepts, Path(folder) / str(n)) for n in (few, len(encodings))
        )
    if len(encodings) == few:
        return large * examples / few
    each = (large - small) / (len(encodings) - few)
    shards = math.ceil(examples / _SHARD)
    return examples * each + shards * max(0.0, large - len(encodings) * each)


def _narrow_store(
    model: Lvlm, plan: Plan, encodings: Sequence[Encoding], concepts: tuple[str, ...], folder: Path
) -> float:
    """Write a store with arrays of one layer and one column; return its bytes without these columns."""
    import torch

    from activation_store.format.ragged import Ragged
    from activation_store.format.schema import Schema
    from activation_store.tracing.example_table import build_row, build_spans
    from activation_store.writing.writer import StoreWriter
    from lvlm.family.specification import resolve

    narrow = {"n_layers": 1, "width": 1, "n_heads": None, "layers": (0,), "heads": ()}
    arrays = tuple(replace(a, **narrow, values=a.values[:1]) for a in plan.schema.arrays)
    count = len(encodings)
    nothing = np.zeros((count, 1, 1), np.float32)
    values: dict[Any, Any] = {a.key: Ragged(nothing, np.arange(count + 1)) if a.ragged else nothing for a in arrays}
    unembedding: Any = resolve(model.hf, model.spec.unembedding or "", model.spec)
    logits = torch.zeros(int(unembedding.weight.shape[0]))
    roles = [role for role in plan.roles if role not in {"generated", "answer"}]
    rows = [
        {**build_row(model, e, logits, concepts), **build_spans(e.tokens, roles), "image": "0" * 64} for e in encodings
    ]
    with StoreWriter(folder, Schema(arrays, plan.schema.dtype), {}) as writer:
        writer.append(values, {name: [row[name] for row in rows] for name in rows[0]})
    written = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    return float(written - count * sum(_BYTES[plan.schema.storage(a)] for a in arrays))
