"""A model that computes NaN gives no answers, and an image that cannot be read stops a trace or is left out and named."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from activation_store import ActivationStore, trace
from circuits import patch_heads
from circuits.ablation import ablate
from concepts.image_files import FileImage
from concepts.schema import ConceptDataset
from diagnosis.pipeline import _without_image
from groundscope.core.errors import ConfigError, DataError, ModelError, StoreError
from lvlm import Lvlm
from lvlm.finite_logits import check_finite
from tests.toys import random_models


@pytest.fixture
def broken() -> Lvlm:
    """A model whose logits are NaN: as where float16 overflows."""
    model = random_models.random_model()
    with torch.no_grad():
        list(model.hf.parameters())[-1].fill_(float("nan"))
    return model


def patch(model: Lvlm) -> object:
    return patch_heads(model, random_models.pairs("color")[:2], tokens="last")


WAYS: dict[str, Callable[[Lvlm], object]] = {
    "ablate": lambda model: ablate(model, random_models.examples(2), "layers", method="zero"),
    "patch_heads": patch,
    "without image": lambda model: _without_image(model, random_models.examples(2)),
}


@pytest.mark.parametrize("way", WAYS)
def test_nan_logits_are_an_error(broken: Lvlm, way: str) -> None:
    with pytest.raises(ModelError, match=r"(example|pair) '.*the logits of random are not finite"):
        WAYS[way](broken)


def test_nan_logits_are_no_answers_in_a_trace(broken: Lvlm, tmp_path: Path) -> None:
    data = random_models.data(4)
    with pytest.raises(ModelError, match=r"example '.*the logits of random are not finite"):
        trace(broken, data, ["resid_post"], ["last"], tmp_path / "s", progress=False)
    store = trace(broken, data, ["resid_pre"], ["last"], tmp_path / "t", answers=False, progress=False)
    assert len(store) == 4  # without answers nothing is chosen


def test_an_ablation_that_makes_nan_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_models.random_model()
    real, calls = type(model).logits, []

    def logits(self: Lvlm, *args: object, **options: object) -> torch.Tensor:
        out = real(self, *args, **options)  # type: ignore[arg-type]
        calls.append(1)
        return out if len(calls) == 1 else out * float("nan")

    monkeypatch.setattr(type(model), "logits", logits)
    with pytest.raises(ModelError, match="not finite"):
        ablate(model, random_models.examples(1), "layers", method="zero")


def test_minus_infinity_at_some_tokens_is_finite() -> None:
    logits = torch.tensor([[0.0, float("-inf")], [1.0, 2.0]])
    check_finite(logits.logsumexp(-1), ["a", "b"], "toy")
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ModelError, match=r"^b: the logits of toy"):
            check_finite(torch.tensor([0.0, bad]), ["a", "b"], "toy")
        with pytest.raises(ModelError, match=r"^a: "):
            check_finite(np.array([[0.0, bad], [1, 1]]), ["a", "b"], "toy")


@pytest.fixture
def some_unreadable(tmp_path: Path) -> ConceptDataset:
    """The images of the first and the fifth example, of eight, are no pictures."""
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing more")
    bad = FileImage(tmp_path / "broken.png", "broken")
    data = random_models.data(8)
    examples = [replace(e, image=bad) if i in (0, 4) else e for i, e in enumerate(data.examples)]
    return replace(data, examples=tuple(examples))


def test_an_unreadable_image_is_skipped_by_name(
    some_unreadable: ConceptDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, data = random_models.shared_model(), some_unreadable
    options = {"sites": ["resid_post"], "tokens": ["last"], "progress": False, "batch_size": 2}
    with pytest.raises(DataError, match=r"its image cannot be read"):
        trace(model, data, out=tmp_path / "s", **options)
    with caplog.at_level(logging.WARNING):
        store = trace(model, data, out=tmp_path / "s", on_error="skip", **options)
    names = [e.id for e in data.examples]
    assert store.columns["id"].tolist() == [name for i, name in enumerate(names) if i not in (0, 4)]
    assert list(store.provenance["skipped"]) == [names[0], names[4]]
    assert all(store.provenance["skipped"].values())
    assert "2 of 8 examples are skipped" in caplog.text
    assert names[0] in caplog.text
    whole = trace(model, random_models.data(8), out=tmp_path / "whole", on_error="skip", **options)
    assert "skipped" not in whole.provenance
    rows = [i for i in range(8) if i not in (0, 4)]
    site = "decoder.L1.resid_post"
    np.testing.assert_allclose(store.read(site, "last"), whole.read(site, "last")[rows], rtol=1e-4, atol=1e-5)
    repeated = trace(model, data, out=tmp_path / "s", on_error="skip", **options)
    assert repeated.digest == store.digest
    Image.new("RGB", (16, 16)).save(tmp_path / "broken.png")  # repaired: it is another set of rows
    with pytest.raises(StoreError, match="differs"):
        trace(model, data, out=tmp_path / "s", on_error="skip", **options)


def test_workers_skip_the_same(some_unreadable: ConceptDataset, tmp_path: Path) -> None:
    model, data = random_models.shared_model(), some_unreadable
    for worker in (1, 0):
        trace(
            model, data, ["resid_pre"], ["last"], tmp_path, answers=False, progress=False, batch_size=1,
            on_error="skip", worker=worker, workers=2,
        )  # fmt: skip
    store = ActivationStore(tmp_path)
    assert (store.complete, len(store)) == (True, 6)


def test_where_no_image_can_be_read_nothing_is_written(some_unreadable: ConceptDataset, tmp_path: Path) -> None:
    data = replace(some_unreadable, examples=some_unreadable.examples[:1])
    with pytest.raises(DataError, match="no image can be read"):
        trace(random_models.shared_model(), data, ["resid_post"], ["last"], tmp_path / "s", on_error="skip")
    assert not (tmp_path / "s").exists()
    with pytest.raises(ConfigError, match="unknown on_error 'leave'; choose from raise, skip"):
        trace(random_models.shared_model(), data, ["z"], ["last"], tmp_path / "s", on_error="leave")  # type: ignore[arg-type]
