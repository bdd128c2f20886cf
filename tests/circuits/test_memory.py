"""What causal steps hold at real width: nothing by heads x tokens x width, nothing by vocabulary x runs."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from activation_store.format.model_tensors import LazyTensor, damaged_tensors, read_tensor, write_tensors
from circuits import HeadSet, ablate, faithfulness, input_attribution, logits_under
from circuits.ablation import _means, _outputs
from circuits.attribution.residual_stream import forms_of, run
from circuits.execution.memory import batch_rows, kept_bytes
from circuits.faithfulness.circuit_run import HeadContributions, ends_of, run_circuit
from circuits.head_screening.direct_logit import direct_attribution, image_difference
from circuits.interventions.intervention import Add, Intervention
from circuits.results.graph import Shape
from concepts import scenes
from concepts.schema import Example
from lvlm import Head, Lvlm, Site
from lvlm.answer_keys import AnswerKey, answer_key
from lvlm.token_selection import TokenSelection
from tests.toys.edge_oracle import graph_of
from tests.toys.families import model as toy
from tests.toys.patching_oracle import pair_of
from tests.toys.random_models import examples, shared_model
from tests.toys.wide_model import HEADS, WIDTH, Live, peak_of, wide


@pytest.fixture(scope="module")
def question() -> Example:
    base = next(e for e in scenes.dataset(10, 0) if e.kind == "existence")
    return replace(base, question=f"Please answer yes or no : {base.question}")


@pytest.fixture(scope="module")
def models() -> dict[int, Lvlm]:
    return {layers: wide(layers) for layers in (2, 4)}


# -- growth at width 1024, 595 tokens --------------------------------------------------------------------------------


def test_attribution_and_means_take_no_tokens_of_other_layers(models: dict[int, Lvlm], question: Example) -> None:
    peak_bytes: dict[str, dict[int, int]] = {"attribution": {}, "means": {}, "difference": {}}
    for layers, model in models.items():
        batch = next(model.batches([question], 1))
        assert batch.encodings[0].tokens.length == 595
        keys = [answer_key(model, question)]

        def attribution(model: Lvlm = model, batch: object = batch, keys: list[AnswerKey] = keys) -> None:
            with torch.no_grad():
                direct_attribution(model, batch, keys, [question.answer])  # type: ignore[arg-type]

        def means(model: Lvlm = model, layers: int = layers) -> None:
            with torch.no_grad():
                _means(model, [question], range(layers), TokenSelection.parse("all"), 1)

        peak_bytes["attribution"][layers] = peak_of(attribution)
        peak_bytes["means"][layers] = peak_of(means)
        peak_bytes["difference"][layers] = peak_of(lambda m=model, b=batch: image_difference(m, b))
    stream = 595 * WIDTH * 4
    for name, peaks in peak_bytes.items():
        # A layer more holds rows of width D (in float64 at most); z of all tokens would be 595 of them.
        assert (peaks[4] - peaks[2]) / 2 <= 16 * WIDTH * 8, name
        assert peaks[2] <= 16 * stream, name


def test_a_circuit_of_edges_holds_a_few_streams_a_layer(models: dict[int, Lvlm], question: Example) -> None:
    peaks, largest = {}, 0
    stream = 595 * WIDTH * 4
    for layers, model in models.items():
        inputs = model.encode(question).inputs

        def metric(logits: torch.Tensor) -> torch.Tensor:
            return logits[:, 0] - logits[:, 1]

        with torch.no_grad():
            written = run(model, inputs, metric).written
            forms, _ = forms_of(model, lambda m=model, x=inputs: run(m, x, metric))
            shape = Shape(layers, HEADS, tuple(f.parallel for f in forms))
            mask = np.zeros((shape.n_sources, shape.n_targets), bool)
            mask[0] = mask[2] = True
            with Live() as live:
                ends = ends_of(model, inputs, written, written)
                circuit_run = run_circuit(model, forms, shape, ends, mask & shape.there, metric)
        peaks[layers], largest = live.peak, max(largest, live.largest)
        torch.testing.assert_close(circuit_run, written.metric, rtol=1e-4, atol=1e-4)
    # Of a layer: how z, its mean and the MLP move. Every head's share would be 2 x (heads + 1) = 18 streams.
    assert (peaks[4] - peaks[2]) / 2 <= 5 * stream
    assert largest <= 4 * stream  # hidden states of the attention's eager and fused kernels among them


# -- equal results -----------------------------------------------------------------------------------------------------


def test_any_heads_shares_add_up_to_what_the_projection_gives() -> None:
    lvlm = toy("paligemma2")  # a norm after attention
    projection = lvlm.output_projection("decoder", 1)
    torch.manual_seed(0)
    z = torch.randn(2, 5, projection.in_features, dtype=torch.float64)
    matrix = projection.weight.detach().double()
    attention = (z @ matrix.T).float()
    with torch.no_grad():
        heads = HeadContributions.of_run(lvlm, 1, z.float(), attention)
        norm = lvlm.layers("decoder")[1].get_submodule(lvlm.spec.decoder.attention_out)
        scale = norm(attention) / attention
        for some in ([0], [1, 3], [0, 1, 2, 3]):
            by_head = z.unflatten(-1, (4, -1))[..., some, :]
            expected = torch.einsum("pthd,whd->ptw", by_head, matrix.unflatten(1, (4, -1))[:, some])
            torch.testing.assert_close(heads.sum_of(np.array(some)), (expected * scale).float(), rtol=1e-3, atol=1e-4)


def test_donors_within_a_budget_are_the_same_donors() -> None:
    lvlm = shared_model()
    length = lvlm.encode(examples()[0]).tokens.length
    some = [e for e in examples() if lvlm.encode(e).tokens.length == length][:4]
    sets = [Head(1, 3), HeadSet([Head(0, 0), Head(4, 7)])]
    free = ablate(lvlm, some, sets, method="resample", tokens="all", progress=False)
    tight = ablate(lvlm, some, sets, method="resample", tokens="all", memory=1, progress=False)
    np.testing.assert_allclose(tight.ablated, free.ablated, atol=1e-4)
    np.testing.assert_allclose(tight.margins, free.margins, atol=1e-4)
    donors = _outputs(lvlm, some, [1], TokenSelection.parse("all"), 4)[1]
    for row, example in enumerate(some):
        z = lvlm.read(lvlm.encode(example).inputs, ["decoder.L1.z"])["decoder.L1.z"][0]
        torch.testing.assert_close(donors[row], z, rtol=1e-4, atol=1e-5)


def test_attribution_is_the_formula_with_the_whole_unembedding(monkeypatch: pytest.MonkeyPatch) -> None:
    lvlm, some = shared_model(), examples()[:3]
    batch = next(lvlm.batches(some, 3))
    ordered = [some[i] for i in batch.index]
    keys, answers = [answer_key(lvlm, e) for e in ordered], [e.answer for e in ordered]
    with torch.no_grad():
        whole = direct_attribution(lvlm, batch, keys, answers)
        monkeypatch.setattr("circuits.head_screening.direct_logit._BLOCK", 7)
        torch.testing.assert_close(direct_attribution(lvlm, batch, keys, answers), whole, rtol=1e-4, atol=1e-5)


def test_scores_of_a_split_do_not_hold_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    lvlm, some = shared_model(), examples()[:4]
    sizes: list[int] = []
    scores = AnswerKey.scores

    def counted(self: AnswerKey, logits: torch.Tensor) -> torch.Tensor:
        sizes.append(logits.dim())
        return scores(self, logits)

    monkeypatch.setattr(AnswerKey, "scores", counted)
    input_attribution.split(lvlm, some, matched_texts={e.id: [e.question] for e in some}, progress=False)
    assert set(sizes) == {1}  # one run's logits at a time


def test_corrections_are_recorded_within_the_budget() -> None:
    lvlm, some = shared_model(), examples()[:6]
    batch = next(lvlm.batches(some, 6))
    change = [Intervention(Site("decoder", 2, "z"), Add(torch.ones(lvlm.head_dim)), "last+generated", 1)]
    each = kept_bytes(lvlm, 1, batch.encodings[0].tokens.length)
    whole = logits_under(lvlm, [[], change])(batch)
    # Room for two recordings at a time is room for the resumed rows too.
    parts = logits_under(lvlm, [[], change], memory=max(2 * each + 1, 40 << 20))(batch)
    for first, second in zip(whole, parts, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def test_batches_that_no_user_chooses_fit_a_budget() -> None:
    lvlm, some = shared_model(), examples()[:3]
    assert batch_rows(lvlm, some, 32) == 32
    assert batch_rows(lvlm, some, 32, memory=1) == 1
    assert batch_rows(lvlm, some, 32, 3 * kept_bytes(lvlm, 1, lvlm.encode(some[0]).tokens.length), recorded=True) == 3
    assert batch_rows(lvlm, [], 32) == 32


def test_faithful_circuits_still_begin_and_end_at_both_runs() -> None:
    lvlm = toy("llava")
    curve = faithfulness.edges(lvlm, [pair_of(0)], graph_of(lvlm), shares=(0, 0.1, 0.9, 1), progress=False)
    assert curve.margins[0, [0, 3]] == pytest.approx([curve.empty[0], curve.full[0]], abs=2e-5)


# -- the model's own arrays ------------------------------------------------------------------------------------------


def test_rows_are_written_block_by_block_with_the_same_digest(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(5000, 1000)).astype("<f4")
    read: list[int] = []

    def part(rows: slice) -> np.ndarray:
        read.append(rows.stop - rows.start)
        return values[rows]

    rows = LazyTensor(values.shape, values.dtype, part)
    header = f"{values.dtype.str} {values.shape}\n".encode()
    assert rows.digest() == hashlib.sha256(header + values.tobytes()).hexdigest()
    assert max(read) * 4000 <= 8 << 20
    assert sum(read) == 5000
    assert rows.nbytes == values.nbytes
    (tmp_path / "rows").mkdir()
    (tmp_path / "whole").mkdir()
    write_tensors(tmp_path / "rows", {"w": rows})
    write_tensors(tmp_path / "whole", {"w": values})
    for folder in (tmp_path / "rows", tmp_path / "whole"):
        np.testing.assert_array_equal(read_tensor(folder, "w"), values)
        write_tensors(folder, {"w": rows})  # the same: nothing to say
        assert damaged_tensors(folder) == []
