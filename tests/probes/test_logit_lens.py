"""Reading residuals through a store's unembedding: against the formula row by row, and on the embedded model's own logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from groundscope.core.errors import ProbeError, SiteError
from probes.analysis import logit_lens
from probes.analysis.logit_lens import Unembedding
from tests.toys.memory_store import MemoryStore, make_store


class WithTensors(MemoryStore):
    """A store that keeps model-level arrays."""

    model_tensors: dict[str, np.ndarray]

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(sorted(self.model_tensors))

    def tensor(self, name: str) -> np.ndarray:
        return self.model_tensors[name]


VOCABULARY = {"apple": 3, "cat": 0, "the": 8}


@pytest.fixture
def store() -> WithTensors:
    base = make_store(n_groups=60)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(240, 2, 16))
    unembedding = rng.normal(size=(9, 16)).astype(np.float32)
    apple = base.table["object:apple"].to_numpy()
    x[:, 1] += 0.8 * apple[:, None] * unembedding[3]  # written where the unembedding reads it, in layer 1 only
    x[5] = np.nan
    tensors_store = WithTensors(base.table, {("decoder", "resid_post", "image:mean"): x})
    tensors_store.model_tensors = {
        "final_norm.weight": rng.uniform(0.5, 2, 16).astype(np.float32),
        "unembedding.weight": unembedding,
    }
    return tensors_store


def test_the_logit_lens_equals_its_formula(store: WithTensors) -> None:
    log_probabilities = logit_lens.logit_lens(store, ["cat", "apple"], VOCABULARY)
    assert sorted(log_probabilities) == [0, 1]
    weight, matrix = (store.model_tensors[k].astype(float) for k in ("final_norm.weight", "unembedding.weight"))
    for layer, rows in log_probabilities.items():
        assert np.isnan(rows[5]).all()
        for row in (0, 17, 200):
            h = store.values["decoder", "resid_post", "image:mean"][row, layer].astype(np.float32).astype(float)
            logits = matrix @ (h / np.sqrt(np.mean(h * h) + 1e-6) * weight)
            p = np.exp(logits) / np.exp(logits).sum()
            np.testing.assert_allclose(np.exp(rows[row]), p[[0, 3]], rtol=1e-4)


def test_a_layer_norm_and_biases_are_used_where_there_are(store: WithTensors) -> None:
    rng = np.random.default_rng(1)
    extra = {"final_norm.bias": rng.normal(size=16), "unembedding.bias": rng.normal(size=9)}
    store.model_tensors |= {k: v.astype(np.float32) for k, v in extra.items()}
    head = Unembedding.of(store, epsilon=1e-5)
    assert head.norm == "layer"
    h = rng.normal(size=16)
    normed = (h - h.mean()) / np.sqrt(h.var() + 1e-5) * store.model_tensors["final_norm.weight"] + extra[
        "final_norm.bias"
    ]
    want = store.model_tensors["unembedding.weight"] @ normed + extra["unembedding.bias"]
    np.testing.assert_allclose(head.logits(h[None])[0], want, rtol=1e-4, atol=1e-4)
    gemma = Unembedding.of(store, norm="rms", offset=1.0)
    np.testing.assert_allclose(gemma.scale, store.model_tensors["final_norm.weight"] + 1)


def test_an_object_is_read_out_at_the_layer_that_writes_it(store: WithTensors) -> None:
    scores = logit_lens.object_readout(store, ["object:apple"], VOCABULARY, resamples=200).set_index("layer")
    assert scores.loc[1, "auc"] > 0.8
    assert scores.loc[1, "auc_low"] > 0.7
    assert scores.loc[1, "present"] > scores.loc[1, "absent"] + 0.5
    assert scores.loc[0, "auc_low"] < 0.5 < scores.loc[0, "auc_high"]
    assert (scores["n"] == 239).all()
    log_p = logit_lens.logit_lens(store, ["apple"], VOCABULARY)[1][:, 0]
    truth = store.table["object:apple"].to_numpy() == 1
    ok = ~np.isnan(log_p)
    up, down = log_p[ok & truth], log_p[ok & ~truth]
    assert scores.loc[1, "auc"] == pytest.approx(np.mean(up[:, None] > down[None]), abs=1e-9)


def test_a_vocabulary_is_kept_next_to_the_store(tmp_path: Path) -> None:
    path = logit_lens.keep_vocabulary(tmp_path / "activations", VOCABULARY)
    assert path == tmp_path / "activations.vocabulary.json"
    assert logit_lens.read_vocabulary(tmp_path / "activations") == VOCABULARY
    with pytest.raises(ProbeError, match=r"no vocabulary at .*keep_vocabulary"):
        logit_lens.read_vocabulary(tmp_path / "other")
    path.write_text("[1]")
    with pytest.raises(ProbeError, match="is not a vocabulary"):
        logit_lens.read_vocabulary(tmp_path / "activations")
    path.write_text("{")
    with pytest.raises(ProbeError, match="invalid JSON"):
        logit_lens.read_vocabulary(tmp_path / "activations")


def test_bad_input_is_refused(store: WithTensors) -> None:
    with pytest.raises(ProbeError, match="'pear' not in the vocabulary of 3 words"):
        logit_lens.logit_lens(store, ["pear"], VOCABULARY)
    with pytest.raises(ProbeError, match="is number 99 of an unembedding of 9 rows"):
        logit_lens.logit_lens(store, ["pear"], {"pear": 99})
    with pytest.raises(SiteError, match=r"decoder.resid_post at last not in store"):
        logit_lens.logit_lens(store, ["cat"], VOCABULARY, tokens="last")
    with pytest.raises(ProbeError, match="'object:pear' not in store"):
        logit_lens.object_readout(store, ["object:pear"], VOCABULARY)
    store.model_tensors["unembedding.weight"] = np.ones((9, 4), np.float32)
    with pytest.raises(ProbeError, match="width 16, the unembedding needs 4"):
        logit_lens.logit_lens(store, ["cat"], VOCABULARY)
    del store.model_tensors["unembedding.weight"]
    with pytest.raises(ProbeError, match=r"has no unembedding.weight \(it has final_norm.weight\)"):
        logit_lens.logit_lens(store, ["cat"], VOCABULARY)
