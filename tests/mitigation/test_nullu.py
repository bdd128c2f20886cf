"""Nullu: directions and weights against numpy, exports read back by plain code; steering vectors as training-free methods."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import groundscope as gs
from groundscope.core.errors import ConfigError, DataError, ModelError, StoreError
from lvlm import wrap_lvlm
from mitigation.steering.derive import Demonstration
from mitigation.training_free import weight_export
from mitigation.training_free.hallucination_subspace import (
    HallucinationSubspace,
    derive_subspace,
    description_pairs,
    without_subspace,
)
from mitigation.training_free.methods.nullu import Nullu
from mitigation.training_free.methods.steering import Steering, derivations_for
from tests.toys.examples import example
from tests.toys.families import L, at, model

FAMILIES = ("llava", "qwen2_5_vl", "mistral3")
TEXTS = (("there is a cat", "there is a dog"), ("a cat", "a cat and a dog"), ("a dog", "a car"))


def demonstrations() -> list[Demonstration]:
    return [Demonstration(example(i), *texts) for i, texts in enumerate(TEXTS)]


def random_subspace(lvlm: Any, layers: tuple[int, ...], rank: int = 2) -> HallucinationSubspace:
    rng = np.random.default_rng(0)
    bases = {n: np.linalg.qr(rng.standard_normal((lvlm.width, rank)))[0].T for n in layers}
    return HallucinationSubspace(bases, lvlm.name, lvlm.config_hash)


def state(lvlm: Any) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in lvlm.hf.state_dict().items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", ["paper", "release"])
def test_directions_are_the_singular_vectors_of_the_differences(family: str, variant: Any) -> None:
    lvlm = model(family)
    layers = (1, 2)
    rows: dict[int, list[np.ndarray]] = {n: [] for n in layers}
    for pair in demonstrations():
        sides = []
        for text in (pair.correct, pair.hallucinated):
            inputs = lvlm.encode(replace(pair.example, prefix=text, answer="", candidates=())).inputs
            with torch.no_grad():
                hidden = lvlm.hf(**inputs, output_hidden_states=True, use_cache=False).hidden_states
                last: dict[int, torch.Tensor] = {}
                handle = at(lvlm.hf, L)[2].register_forward_hook(
                    lambda _m, _a, out, last=last: last.update({2: out[0] if isinstance(out, tuple) else out})
                )
                lvlm.hf(**inputs, use_cache=False)
                handle.remove()
            # Hugging Face's last hidden state is after the final norm
            by_layer = {
                1: hidden[2][0],
                2: hidden[3][0] if variant == "release" else last[2].reshape(hidden[2].shape)[0],
            }
            sides.append(
                {n: (x[-1] if variant == "paper" else x.mean(0)).double().numpy() for n, x in by_layer.items()}
            )
        for n in layers:
            rows[n].append(sides[0][n] - sides[1][n])
    subspace = derive_subspace(lvlm, demonstrations(), layers, 2, variant)
    for n in layers:
        x = np.stack(rows[n])
        _, vectors = np.linalg.eigh(x.T @ x)
        expected = vectors[:, ::-1][:, :2]
        projector = subspace.bases[n].T @ subspace.bases[n]
        np.testing.assert_allclose(projector, expected @ expected.T, atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_projected_in_the_context_and_restored_bit_for_bit(family: str) -> None:
    lvlm = model(family)
    before, own = state(lvlm), dict(lvlm.hf.named_parameters())
    subspace = random_subspace(lvlm, (1, 2))
    with Nullu(rank=2, subspace=subspace).applied(lvlm):
        inside = state(lvlm)
    changed = {name for name, x in before.items() if not torch.equal(x, inside[name])}
    assert changed == {f"{L}.{n}.mlp.down_proj.weight" for n in (1, 2)}
    for n in (1, 2):
        name = f"{L}.{n}.mlp.down_proj.weight"
        v, w = subspace.bases[n].astype(np.float64), before[name].double().numpy()
        np.testing.assert_allclose(inside[name].numpy(), (np.eye(len(w)) - v.T @ v) @ w, atol=1e-5)
    assert all(torch.equal(x, before[name]) for name, x in state(lvlm).items())
    assert all(x is own[name] for name, x in lvlm.hf.named_parameters())

    def fail() -> None:
        with Nullu(rank=2, subspace=subspace).applied(lvlm):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert all(x is own[name] for name, x in lvlm.hf.named_parameters())


def test_the_mlp_writes_nothing_along_the_directions() -> None:
    lvlm = model("llava")
    batch = next(lvlm.batches([example(0)], 1))
    subspace = random_subspace(lvlm, (1,))
    with Nullu(rank=2, subspace=subspace).applied(lvlm):
        written = lvlm.read(batch.inputs, ["decoder.L1.mlp_out"])["decoder.L1.mlp_out"]
    v = torch.tensor(subspace.bases[1].copy())
    assert float((written @ v.T).abs().max()) < 1e-5 * float(written.abs().max())


def test_pairs_come_from_captions_or_from_statements_about_annotated_objects() -> None:
    data = gs.scenes.dataset(60)
    captions = description_pairs(data)
    assert {p.example.kind for p in captions} == {"caption"}
    assert all(p.correct != p.hallucinated for p in captions)
    statements = description_pairs(data.filter(lambda e: e.kind != "caption"))
    assert len(statements) > len(captions)
    for pair in statements[:20]:
        nouns = {o.noun for o in pair.example.objects}
        assert pair.correct.split()[-1] in nouns
        assert pair.hallucinated.split()[-1] not in nouns
        assert pair.example.question == "Describe the image."
    with pytest.raises(DataError, match="Nullu needs images with annotated objects"):
        description_pairs(gs.ConceptDataset("x", tuple(replace(e, objects=()) for e in data[:5])))


def test_derived_directions_change_answers_and_rank_zero_does_not() -> None:
    lvlm, data = gs.load_lvlm("tiny"), gs.scenes.dataset(60)
    material = gs.DerivationData(lvlm, None, data)
    method = Nullu.derive(material, layers=(4, 5))
    batch = next(lvlm.batches(data.examples[:8], 8))
    plain = lvlm.logits(batch.inputs)
    with method.applied(lvlm):
        assert not torch.allclose(lvlm.logits(batch.inputs), plain, atol=1e-3)
    with Nullu(rank=0, subspace=method.subspace).applied(lvlm):
        assert torch.equal(lvlm.logits(batch.inputs), plain)
    assert torch.equal(lvlm.logits(batch.inputs), plain)
    control = method.randomized(1)
    assert control.name == "Nullu (layers=(4, 5), random subspaces, seed 1)"
    assert not np.allclose(control.required_subspace().bases[4], method.required_subspace().bases[4])
    assert method.parameters["subspace"]["pairs"] == len(description_pairs(data))
    unreadable = Demonstration(data[0], "a dog", "a bicycle")  # the embedded model has no word "bicycle"
    pairs = [*description_pairs(data), unreadable]
    assert derive_subspace(lvlm, pairs, (5,), 2, "paper").provenance["left_out"] == 1


def test_files_have_the_edited_weights(tmp_path: Path) -> None:
    lvlm = model("llava")
    method = Nullu(rank=2, subspace=random_subspace(lvlm, (1, 2)))
    before = state(lvlm)
    with method.applied(lvlm):
        expected = state(lvlm)
    names = [f"{L}.{n}.mlp.down_proj.weight" for n in (1, 2)]

    weights = load_file(weight_export.edited_weights(method, tmp_path / "weights.safetensors", lvlm))
    assert sorted(weights) == names
    assert all(torch.equal(weights[name], expected[name]) for name in names)

    folder = weight_export.lora_adapter(method, tmp_path / "lora", lvlm)
    config = json.loads((folder / "adapter_config.json").read_text())
    adapter = load_file(folder / "adapter_model.safetensors")
    assert config["r"] == config["lora_alpha"] == 2
    assert [f"{name}.weight" for name in config["target_modules"]] == names
    for name in config["target_modules"]:
        a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        scale = config["lora_alpha"] / config["r"]
        torch.testing.assert_close(
            before[f"{name}.weight"] + scale * b @ a, expected[f"{name}.weight"], atol=1e-5, rtol=0
        )

    path = weight_export.subspace(method, tmp_path / "subspace.safetensors")
    from_file = Nullu(rank=2, subspace=HallucinationSubspace.load(path))
    with from_file.applied(lvlm):
        assert all(torch.equal(x, expected[name]) for name, x in state(lvlm).items())


def test_a_checkpoint_is_the_edited_model(tmp_path: Path) -> None:
    lvlm = model("llava")
    method = Nullu(rank=2, subspace=random_subspace(lvlm, (1, 2)))
    with method.applied(lvlm):
        expected = state(lvlm)
    folder = weight_export.checkpoint(method, tmp_path / "model", lvlm)
    loaded = wrap_lvlm(type(lvlm.hf).from_pretrained(folder), lvlm.processor, name="edited", validate=False)
    assert all(torch.equal(x, expected[name]) for name, x in state(loaded).items())


@pytest.mark.parametrize("name", ["baked", "gguf", "steering_vectors", "vllm", "vti"])
def test_formats_of_additions_refuse_changed_weights_by_name(name: str, tmp_path: Path) -> None:
    lvlm = model("llava")
    method: Any = Nullu(rank=2, subspace=random_subspace(lvlm, (1,)))
    with pytest.raises(ConfigError, match=f"Nullu cannot be written as '{name}'.*no steering vector.*weight_export"):
        gs.exports[name].write(method, tmp_path / "x", lvlm)


def test_refusals(tmp_path: Path) -> None:
    lvlm = model("llava")
    with pytest.raises(ModelError, match="has no directions yet; make it with Nullu"):
        Nullu().check(lvlm)
    with pytest.raises(ModelError, match=r"the MLPs of gemma3 .* do not end in one"):
        Nullu(subspace=random_subspace(model("gemma3"), (1,))).check(model("gemma3"))
    with pytest.raises(ModelError, match="derived for 'llava', not for 'gemma3'"):
        Nullu(subspace=random_subspace(lvlm, (1,))).check(model("gemma3"))
    with pytest.raises(DataError, match="3 pairs of descriptions for 4 directions"):
        derive_subspace(lvlm, demonstrations(), (1,), 4, "paper")
    with pytest.raises(DataError, match="must have orthonormal rows"):
        HallucinationSubspace({1: np.ones((2, 4))}, "m", "c")
    with pytest.raises(ConfigError, match="rank=-1"):
        Nullu(rank=-1)
    with pytest.raises(StoreError, match="no hallucination_subspace at"):
        HallucinationSubspace.load(tmp_path / "absent.safetensors")
    with pytest.raises(ConfigError, match="rank=0: there is no change"):
        weight_export.lora_adapter(Nullu(rank=0, subspace=random_subspace(lvlm, (1,))), tmp_path, lvlm)


def test_bfloat16_weights_are_edited_in_float32() -> None:
    w, v = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)).bfloat16(), np.eye(16)[:2]
    edited = without_subspace(w, v)
    assert edited.dtype == torch.bfloat16
    assert torch.equal(edited[2:], w[2:])
    assert not edited[:2].any()


# ---- steering vectors


def test_a_steering_vector_is_a_row_like_any_other_method() -> None:
    lvlm, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10)
    material = gs.DerivationData(lvlm, None, data, heads=["L3.H1", "L4.H2"])
    entry = gs.mitigations["prior_removal"]
    vector = entry.make(material)
    assert isinstance(vector, gs.SteeringVector)
    batch = next(lvlm.batches(data.examples[:4], 4))
    plain = lvlm.logits(batch.inputs)
    with vector.applied(lvlm, 2 * entry.unit):
        expected = lvlm.logits(batch.inputs)
    method = Steering.derive(material, derivation="prior_removal", strength=2.0)
    with method.applied(lvlm):
        assert torch.equal(lvlm.answer_logits(batch), expected)
    assert not torch.equal(expected, plain)
    assert torch.equal(lvlm.logits(batch.inputs), plain)
    assert method.parameters["vector"]["strength"] == vector.strength
    with Steering(derivation="mine", mitigation=vector).applied(lvlm), pytest.raises(ConfigError, match="strength"):
        Steering(strength=1.0, mitigation=_Other()).check(lvlm)


class _Other:
    name = "other"
    parameters: Any = {}  # noqa: RUF012
    forward_cost = gs.ForwardCost(2)

    def check(self, model: Any) -> None: ...

    def applied(self, model: Any) -> Any: ...


def test_derivations_that_data_do_not_allow_are_named() -> None:
    lvlm, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10)
    material = gs.DerivationData(lvlm, None, data, heads=["L3.H1"])
    allowed = derivations_for(material)
    assert "amplify" in allowed
    assert not {"discriminant", "vsv", "project_away"} & set(allowed)
    with pytest.raises(DataError, match="discriminant reads a store"):
        Steering.derive(material)
    with pytest.raises(DataError, match="vsv needs the option example"):
        Steering.derive(material, derivation="vsv")
    with pytest.raises(ConfigError, match="did you mean amplify"):
        Steering.derive(material, derivation="amplfy")
    with pytest.raises(ModelError, match="has no vector yet"):
        Steering().check(lvlm)
