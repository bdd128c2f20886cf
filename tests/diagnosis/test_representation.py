"""Representation and behavior in one study: the choice of a concept, parts that are left out, and files."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import groundscope as gs
from activation_store import MemorySource
from concepts import caption_images
from diagnosis import RepresentationStudy, ceilings_of_readings, regress_correctness
from diagnosis.path_concept import choose_concept, choose_object
from groundscope.core.errors import DataError, StoreError
from probes import InformationPath, measure_information
from probes.alignment import measure_layers


def make_store(*, objects: bool = True) -> MemorySource:
    """Questions about colors (three classes, one true), sizes (not exclusive) and presence."""
    n = 120
    rng = np.random.default_rng(0)
    kind = np.arange(n) % 3
    color, size, dog = np.arange(n) // 3 % 3, rng.integers(0, 2, n), rng.integers(0, 2, n)
    table: dict[str, Any] = {
        "id": range(n),
        "group": np.arange(n) // 3,
        "level": np.where(kind < 2, "attribute", "object"),
        "object:dog": np.where(np.arange(n) < 100, dog, 0),
        "object:cat": (np.arange(n) // 3 == 0).astype(float),
        "attribute:named": 1.0,
    }
    for i, name in enumerate(("red", "green", "blue")):
        table[f"attribute:{name}"] = np.where(kind == 0, color == i, np.nan)
    table["attribute:big"] = np.where(kind < 2, size, np.nan)  # an object is big or not, whatever its color
    x = rng.normal(size=(n, 2, 6))
    arrays: dict[str | tuple[str, str], np.ndarray] = {("vision.resid_post", "image:mean"): x}
    if objects:
        at_object = x.copy()
        at_object[0] = np.nan  # the first object has no box
        arrays["vision.resid_post", "object:mean"] = at_object
    return MemorySource(arrays, table)


def test_the_concept_is_the_largest_set_of_exclusive_classes_at_objects() -> None:
    store: Any = make_store()
    concept = choose_concept(store, 1000)
    assert set(concept.names) == {"attribute:red", "attribute:green", "attribute:blue"}
    assert concept.tokens == "object:mean"
    assert np.flatnonzero(concept.rows).tolist() == [i for i in range(0, 120, 3) if i > 0]
    limited = choose_concept(store, 13)
    assert limited.rows.sum() == 13
    assert not (limited.rows & ~concept.rows).any()


def test_without_boxes_the_concept_is_the_most_balanced_object() -> None:
    store: Any = make_store(objects=False)
    concept = choose_concept(store, 1000)
    assert (concept.names, concept.tokens) == (("object:dog",), "image:mean")
    with pytest.raises(DataError, match="no object is present in 12 images"):
        choose_object(store.frame()[["group", "object:cat"]])


def test_captions_are_one_for_each_image_and_true() -> None:
    data = gs.scenes.dataset(20, seed=3)
    captions = caption_images(data)
    assert [e.image.identity for e in captions] == list(dict.fromkeys(e.image.identity for e in data))
    for example in captions:
        for item in example.objects:
            assert f"{item.attributes['color']} {item.noun}" in example.answer
        assert {k for k, v in example.labels.items() if v} == {f"object:{o.noun}" for o in example.objects}
    assert len({e.id for e in captions}) == len(captions)


def test_no_more_images_than_requested_are_compared_with_captions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = gs.load_lvlm("tiny", validate=False)
    data = gs.scenes.dataset(150, splits=("neutral",)).where(kind="color")
    store = gs.trace(model, data, sites=["resid_post"], tokens=["last"], out=tmp_path / "store", progress=False)
    compared: list[int] = []

    def count(*stores: Any, rows: np.ndarray | None = None, **options: Any) -> Any:
        result = measure_layers(*stores, rows=rows, **options)
        if rows is not None:
            compared.append(len(result.ids))
        return result

    monkeypatch.setattr("diagnosis.representation.measure_layers", count)
    study = gs.study_representation(model, data, store, images=15, permutations=0, resamples=20, progress=False)
    assert study.provenance["texts"] == "captions"
    assert compared == [15]


def make_study() -> RepresentationStudy:
    rng = np.random.default_rng(0)
    z = np.arange(120) % 2
    x = rng.normal(size=(120, 4)) + 2.0 * z[:, None] * [1, 0, 0, 0]
    path = measure_information({"a": x, "b": x[:, 1:]}, z, np.arange(120), families=("linear",), progress=False)
    read, said = rng.normal(size=(2, 120)) + 1, rng.random(120) < 0.6
    images = [f"image {i // 2}" for i in range(120)]
    ceilings = ceilings_of_readings(read, said, images, ["color"] * 120, ["neutral"] * 120, resamples=100)
    regression = regress_correctness(
        said, {"margin": read}, images, margins=read[0], folds=3, resamples=20, progress=False
    )
    table = {"id": range(30), "group": range(30)}
    layers = rng.normal(size=(30, 2, 5))
    images_alone = MemorySource({("resid_post", "image:mean"): layers}, table, provenance={"input": "image"})
    texts_alone = MemorySource({("resid_post", "question:mean"): layers}, table, provenance={"input": "text"})
    scores = measure_layers(images_alone, texts_alone, measures=["cka", "modality_gap"], resamples=20)
    return RepresentationStudy(
        scores.table(), scores.best(), {"image": path}, ceilings, regression, {"caption path": "no captions"},
        {"texts": "questions"},
    )  # fmt: skip


def test_a_study_is_read_as_it_was_written(tmp_path: Path) -> None:
    study = make_study()
    file = study.save(tmp_path / "study")
    again = RepresentationStudy.load(file.parent)
    for name in ("alignment", "best"):
        pd.testing.assert_frame_equal(getattr(again, name), getattr(study, name), check_dtype=False, rtol=1e-12)
    old, new = study.paths["image"], again.paths["image"]
    for name in ("nats", "low", "high", "pvi", "kept_variance", "null_entropy", "ids", "groups"):
        np.testing.assert_array_equal(getattr(new, name), getattr(old, name))
    assert (new.sites, new.families, new.classes, new.choices) == (old.sites, old.families, old.classes, old.choices)
    assert str(new) == str(old)
    pd.testing.assert_frame_equal(new.frame(), old.frame())
    assert again.ceilings is not None
    assert study.ceilings is not None
    assert again.ceilings.cells == study.ceilings.cells
    np.testing.assert_array_equal(again.ceilings.margins, study.ceilings.margins)
    assert again.regression is not None
    assert study.regression is not None
    assert asdict(again.regression) == asdict(study.regression)
    assert again.text() == study.text()
    assert dict(again.left_out) == {"caption path": "no captions"}


@pytest.mark.parametrize("change", ["digest", "missing path", "another file"])
def test_damaged_studies_are_refused(change: str, tmp_path: Path) -> None:
    file = make_study().save(tmp_path)
    if change == "digest":
        document = json.loads(file.read_text())
        document["left_out"] = {}
        file.write_text(json.dumps(document))
    elif change == "missing path":
        (tmp_path / "information-image.safetensors").unlink()
    else:
        (tmp_path / "information-image.safetensors").write_bytes((tmp_path / "ceilings.safetensors").read_bytes())
    with pytest.raises(StoreError, match=r"representation\.json|information-image"):
        RepresentationStudy.load(tmp_path)


def test_rows_of_low_rank_have_equal_widths_in_all_folds() -> None:
    # Two copies of each of 40 rows that span few directions: folds differ in rank, and the nonlinear family trains them together.
    rng = np.random.default_rng(0)
    base = rng.normal(size=(9, 30))
    x = np.repeat(base, [40, 40, 40, 40, 40, 40, 40, 1, 1], axis=0)
    z = np.arange(len(x)) % 2
    path = measure_information({"x": x}, z, np.arange(len(x)), control=False, progress=False)
    assert isinstance(path, InformationPath)
    assert abs(path.nats).max() < 0.05
