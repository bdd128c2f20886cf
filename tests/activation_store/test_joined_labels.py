"""Labels joined to a store by id: equal to a trace with these labels, and refused where they cannot be matched."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from activation_store import ActivationStore, MemorySource, trace
from concepts import ConceptDataset, scenes
from groundscope.core.errors import DataError, StoreError
from lvlm import load_lvlm

ROWS = 12


@pytest.fixture(scope="module")
def data() -> ConceptDataset:
    return scenes.dataset(n_images=20, splits=["neutral"])[:ROWS]


@pytest.fixture(scope="module")
def labels(data: ConceptDataset) -> pd.DataFrame:
    """Every kind of label, in another order than the examples, with empty cells, an unknown id and fields of an example."""
    rows = [
        {"id": e.id, "question": "another", "blurred": "yes" if i % 2 else "no", "size": i / 2 if i % 3 else None,
         "place": ("room", "street", None)[i % 3], "object:cup": i % 2 == 0, "all": True}
        for i, e in enumerate(data)
    ]  # fmt: skip
    return pd.DataFrame([*reversed(rows), {"id": "unknown", "blurred": "yes"}])


@pytest.fixture(scope="module")
def stores(
    data: ConceptDataset, labels: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ActivationStore, ActivationStore]:
    """Return the store with joined labels, and the store of a trace with these labels on the examples."""
    folder, model = tmp_path_factory.mktemp("stores"), load_lvlm("tiny", validate=False)
    options: dict[str, Any] = {"sites": ["decoder.L1.resid_post"], "tokens": ["last"], "batch_size": 4}
    plain = trace(model, data, out=folder / "plain", **options)
    by_id = labels.set_index("id")

    def own(name: str) -> dict[str, bool | float]:
        row = by_id.loc[name]
        values: dict[str, bool | float] = {
            "blurred": row["blurred"] == "yes",
            "all": True,
            "object:cup": bool(row["object:cup"]),
        }
        if not pd.isna(row["size"]):
            values["size"] = float(row["size"])
        if isinstance(row["place"], str):
            values |= {f"place:{name}": row["place"] == name for name in ("room", "street")}
        return values

    labeled = ConceptDataset(data.name, tuple(replace(e, labels={**e.labels, **own(e.id)}) for e in data))
    retraced = trace(model, labeled, out=folder / "retraced", shard_size=5, **options)
    return plain.with_labels(labels), retraced


def test_the_join_equals_a_trace_with_the_labels(stores: tuple[ActivationStore, ActivationStore]) -> None:
    joined, retraced = stores
    assert (
        set(joined.labels)
        == set(retraced.labels)
        > {"blurred", "size", "all", "place:room", "place:street", "object:cup"}
    )
    assert set(joined.columns) == set(retraced.columns)
    for name in retraced.columns:
        expected = retraced.columns[name]
        if expected.dtype != object:
            np.testing.assert_array_equal(joined.columns[name], expected, err_msg=name)
            assert joined.columns[name].dtype == expected.dtype, name
    assert (
        joined.frame()["question"].tolist() == retraced.frame()["question"].tolist()
    )  # fields of the frame are ignored
    site = ("decoder.L1.resid_post", "last")
    np.testing.assert_array_equal(joined.read(*site), retraced.read(*site))
    assert joined.select(blurred=True).tolist() == list(range(1, ROWS, 2))


def test_a_joined_store_is_a_store(stores: tuple[ActivationStore, ActivationStore], data: ConceptDataset) -> None:
    joined, _ = stores
    plain = ActivationStore(joined.path)
    assert joined.digest != plain.digest  # grids of other labels are grids of another store
    assert "blurred" not in plain.labels
    assert copy.copy(joined).digest == joined.digest  # by the same parts as in the workers of a data loader
    relabeled = joined.with_labels(pd.DataFrame({"id": [e.id for e in data], "blurred": 1.5}))
    assert set(relabeled.frame()["blurred"]) == {1.5}
    assert relabeled.frame()["size"].equals(joined.frame()["size"])
    labeled = ConceptDataset("mine", (replace(data[2], labels={"blurred": True}),))
    assert np.flatnonzero(plain.with_labels(labeled).frame()["blurred"] == 1).tolist() == [2]
    with pytest.raises(StoreError, match="stores with joined labels cannot be merged; merge the stores first"):
        joined.merge(plain)


def test_arrays_in_memory_are_joined_alike() -> None:
    store = MemorySource({"z": np.arange(8.0).reshape(2, 1, 4)}, {"id": ["a", "b"], "group": ["g", "h"]}, n_heads=2)
    joined = store.with_labels(pd.DataFrame({"id": ["b"], "size": [2.5]}))
    np.testing.assert_array_equal(joined.frame()["size"], [np.nan, 2.5])
    np.testing.assert_array_equal(
        joined.read("decoder.L0.z", "last", head=1), store.read("decoder.L0.z", "last", head=1)
    )


def test_labels_that_cannot_be_matched_are_refused(
    stores: tuple[ActivationStore, ActivationStore], data: ConceptDataset
) -> None:
    _, store = stores
    first = data[0].id
    for frame, error, message in (
        ({"name": [first], "x": [1]}, StoreError, r"the table of labels has no column 'id'; add one with the ids"),
        ({"id": [first, first], "x": [1, 0]}, StoreError, f"the table of labels has the id '{first}' twice"),
        (
            {"id": ["q1"], "x": [1]},
            StoreError,
            f"no id of the table of labels is in the store: its ids are like 'q1', the store's like '{first}'",
        ),
        (
            {"id": [first], "answer": ["yes"]},
            StoreError,
            "the table has no label column: every column is a field of an example",
        ),
        (
            {"id": [first, data[1].id], "x": ["yes", 2.5]},
            DataError,
            f"labels: example '{data[1].id}': column 'x' holds 2.5",
        ),
    ):
        with pytest.raises(error, match=re.escape(message)):
            store.with_labels(pd.DataFrame(frame))
