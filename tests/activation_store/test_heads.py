"""Some heads of a model: the same values as of a store with all heads, under the model's numbers, wherever heads are named."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest

from activation_store import ActivationStore, ArrayInfo, trace, verify
from activation_store.format.schema import Schema
from concepts import ConceptDataset, scenes
from groundscope.core.errors import ModelError, SiteError, StoreError
from lvlm import Lvlm, load_lvlm
from mitigation import Contrast, derive
from mitigation.steering.export import iti_activations
from probes import ProbeGrid, fit_grid, multiclass, permutation_test, random_features, transfer

HEADS = (2, 5)
DIM = 24


@pytest.fixture(scope="module")
def model() -> Lvlm:
    return load_lvlm("tiny")


@pytest.fixture(scope="module")
def data() -> ConceptDataset:
    return scenes.dataset(n_images=48, splits=["neutral"])


@pytest.fixture(scope="module")
def whole(model: Lvlm, data: ConceptDataset, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    sites = ["decoder.L3.z", "decoder.L4.z", "resid_post", "decoder.L4.q", "decoder.L4.k"]
    return trace(model, data, sites, ["last"], tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def part(model: Lvlm, data: ConceptDataset, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    sites = ["decoder.L3.z", "decoder.L4.z", "resid_post", "decoder.L4.q", "decoder.L4.k", "vision.L1.z"]
    return trace(model, data, sites, ["last", "image:mean"], tmp_path_factory.mktemp("part"), heads=[5, 2])


def test_values_are_those_of_the_same_heads_of_all(whole: ActivationStore, part: ActivationStore, model: Lvlm) -> None:
    assert model.head_dim == DIM
    for site in ("decoder.L3.z", "decoder.L4.z"):
        every = whole.read(site, "last")
        assert (part.read(site, "last") == np.hstack([every[:, h * DIM : (h + 1) * DIM] for h in HEADS])).all()
        for head in HEADS:
            assert (part.read(site, "last", head=head) == every[:, head * DIM : (head + 1) * DIM]).all()
            assert (part.torch(site, "last", head=head)[3][0].numpy() == every[3, head * DIM : (head + 1) * DIM]).all()
    assert (part.read("decoder.L4.q", "last", head=5) == whole.read("decoder.L4.q", "last", head=5)).all()
    for site in ("decoder.L4.k", "decoder.L4.resid_post"):  # keys are shared by heads, the residual stream has none
        assert (part.read(site, "last") == whole.read(site, "last")).all()
    by_key = {a.key: a for a in part.arrays}
    assert by_key["decoder", "z", "last"].heads == HEADS
    assert by_key["vision", "z", "image:mean"].heads == by_key["decoder", "k", "last"].heads == ()
    assert (part.n_heads("decoder"), part.heads("decoder"), whole.heads("decoder")) == (2, HEADS, tuple(range(8)))


def test_files_hold_the_numbers_and_a_version_that_earlier_releases_refuse(
    whole: ActivationStore, part: ActivationStore
) -> None:
    for store, version, heads in ((whole, 3, None), (part, 4, [2, 5])):
        for name in ("shard-0-00000.h5", "index.h5"):
            with h5py.File(store.path / name) as file:
                z = file["arrays/decoder.z/last"]
                assert int(file.attrs["layout-version"]) == version
                assert z.attrs["n_heads"] == (8 if heads is None else 2)
                assert ("heads" in z.attrs) == (heads is not None)
                assert heads is None or z.attrs["heads"].tolist() == heads
        assert verify(store.path).ok
    assert Schema.from_record(part.schema.record()) == part.schema
    assert "'heads'" not in str(whole.schema.record())


def test_a_head_that_was_not_traced_is_one_clear_error(part: ActivationStore) -> None:
    words = r"head 3 of site 'decoder\.L4\.z' not in store: it has heads 2, 5; trace again with heads=\[3\]"
    with pytest.raises(SiteError, match=words):
        part.read("decoder.L4.z", "last", head=3)


@pytest.mark.parametrize(
    ("heads", "sites", "message"),
    [
        ([8], ["z"], r"heads=\[8\]: head 8 does not exist; decoder\.z of tiny has heads 0-7"),
        ([-1, 2], ["z"], r"head -1 does not exist"),
        ([], ["z"], "give at least one head, and each once"),
        ([2, 2], ["z"], "give at least one head, and each once"),
        (
            [2],
            ["resid_post", "vision.z"],
            r"applies to z, q, pattern of the decoder, but the sites are decoder\.resid_post",
        ),
    ],
)
def test_heads_that_cannot_be_stored_are_refused_before_work(
    model: Lvlm, data: ConceptDataset, tmp_path: Path, heads: list[int], sites: list[str], message: str
) -> None:
    with pytest.raises(SiteError, match=message):
        trace(model, data, sites, ["image:mean"], tmp_path / "store", heads=heads)
    assert not (tmp_path / "store").exists()


def test_a_store_of_other_heads_is_not_continued(model: Lvlm, data: ConceptDataset, tmp_path: Path) -> None:
    few = data[:4]
    trace(model, few, ["decoder.L3.z"], ["last"], tmp_path, heads=[1])
    with pytest.raises(StoreError, match="heads"):
        trace(model, few, ["decoder.L3.z"], ["last"], tmp_path, heads=[2])
    with pytest.raises(SiteError, match=r"heads=\(5, 2\) must be n_heads=2 different increasing numbers"):
        ArrayInfo("decoder", "z", "last", 1, 4, 2, heads=(5, 2))


def test_probes_name_the_heads_of_the_model(whole: ActivationStore, part: ActivationStore, tmp_path: Path) -> None:
    concepts = [c for c in whole.labels if c.startswith("object:named")]
    options = {"C": (0.1,), "folds": 3, "control": 0, "resamples": 20}
    full, some = (fit_grid(store, concepts, "z", tokens="last", **options) for store in (whole, part))
    columns = ["layer", "head", "balanced_accuracy", "validation"]
    reference, mine = full.frame()[columns], some.frame()[columns]
    pd.testing.assert_frame_equal(reference[reference["head"].isin(HEADS)].reset_index(drop=True), mine)
    some.save(tmp_path)
    loaded = ProbeGrid.load(tmp_path)
    assert loaded.heads == HEADS
    assert loaded.head_numbers == HEADS
    cell = loaded.best(concepts[0])
    assert cell.head in HEADS
    direction, other = (grid.direction(concepts[0], 4, 5) for grid in (loaded, full))
    assert direction.head == other.head == 5
    assert np.allclose(direction.vector, other.vector, atol=1e-6)
    with pytest.raises(Exception, match="head 3 not in this grid; choose from 2, 5"):
        loaded.direction(concepts[0], 4, 3)
    test = permutation_test(some, part, permutations=19).frame()
    assert test["head"].tolist() == [2, 5, 2, 5]
    assert random_features(some, part)["head"].tolist() == [2, 5]
    assert transfer(some, {"same": part})["head"].tolist() == [2, 5, 2, 5]
    with pytest.raises(SiteError, match=r"the grid has heads 2, 5 of decoder\.z, the store 0, 1, 2"):
        transfer(some, {"other": whole})
    labels = [c for c in whole.labels if c.startswith("object:")]
    assert labels
    full.save(tmp_path / "full")
    assert ProbeGrid.load(tmp_path / "full").head_numbers == tuple(range(8))


def test_classes_name_the_heads_of_the_model(whole: ActivationStore, part: ActivationStore) -> None:
    frame = part.frame()
    kinds = pd.DataFrame({"id": frame["id"], "side": np.where(np.arange(len(frame)) % 2, "odd", "even")})
    store = part.with_labels(kinds)
    grid = fit_grid(store, ["side"], "z", tokens="last", C=(0.1,), folds=3, control=0, resamples=20)
    assert multiclass(grid, "side")["head"].tolist() == [2, 5, 2, 5]


def test_steering_and_exports_name_the_heads_of_the_model(
    whole: ActivationStore, part: ActivationStore, model: Lvlm, tmp_path: Path
) -> None:
    contrast = Contrast.from_store(part, "object:named")
    vector = derive.iti(contrast, tokens="last", top=2)
    assert {head.head for head in vector.heads} <= set(HEADS)
    reference = derive.iti(Contrast.from_store(whole, "object:named"), tokens="last", heads=vector.heads)
    assert vector.heads
    assert set(vector.heads) == set(reference.heads)
    with pytest.raises((SiteError, ModelError), match=r"the store has heads 2, 5 of decoder\.z only"):
        iti_activations(contrast, tmp_path / "x", model)
