"""Steering vectors: what they do in forwards and generation, controls, files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from groundscope.core.errors import ConfigError, ModelError, PatchError, SiteError, StoreError
from lvlm import Head
from lvlm.model import Batch, Lvlm
from lvlm.token_selection import LEGACY_STEERING_POSITIONS
from mitigation import SteeringVector
from mitigation.steering.changes import AddChange, AmplifyChange, VectorChange
from tests.toys.random_models import examples, hooks_of, layers_of, random_model, shared_model

HEADS = (Head(1, 3), Head(1, 6), Head(4, 0))


def unit(rng: np.random.Generator, d: int) -> np.ndarray:
    v = rng.standard_normal(d)
    return v / np.linalg.norm(v)


def vector(model: Lvlm, kind: str = "add", layers: tuple[int, ...] = (), **changes: Any) -> SteeringVector:
    rng = np.random.default_rng(0)
    entries: dict[Head | int, VectorChange] = {}
    for key in (*HEADS, *layers):
        d = model.head_dim if isinstance(key, Head) else model.width
        if kind == "add":
            entries[key] = AddChange(unit(rng, d), sigma=0.5 + rng.random())
        else:
            reads = np.linalg.qr(rng.standard_normal((d, 3)))[0].T if key == HEADS[0] else None
            entries[key] = AmplifyChange(rng.standard_normal(d), reads=reads)
    steering = SteeringVector(entries, "last+generated", 2.0, model.name, model.config_hash, {"method": "by hand"})  # pyright: ignore[reportArgumentType]  # one of the two
    return replace(steering, **changes)


def rows(model: Lvlm) -> Batch:
    return next(b for b in model.batches(examples(), 2) if len(b.index) == 2)


def change_by_hand(entry: Any, kind: str, strength: float, x: torch.Tensor) -> torch.Tensor:
    """What a vector does to ``[..., d]``, from the formulas."""
    if kind == "add":
        return x + strength * entry.sigma * torch.tensor(entry.direction)
    v = torch.tensor(entry.mean)
    reads = torch.eye(len(v)) if entry.reads is None else torch.tensor(entry.reads)
    writes = reads if entry.writes is None else torch.tensor(entry.writes)
    return x + strength * (x - v) @ reads.T @ writes


@torch.no_grad()
def logits_by_hand(
    model: Lvlm, inputs: Mapping[str, torch.Tensor], steering: SteeringVector, strength: float, first: int
) -> torch.Tensor:
    """Logits of one forward without a cache, plain torch hooks changing every position from `first` on."""
    hooks = []
    dim = model.head_dim
    for key, entry in steering.changes.items():
        if isinstance(key, Head):

            def before(
                _m: object, args: tuple[torch.Tensor], key: Head = key, entry: AddChange = entry
            ) -> tuple[torch.Tensor]:
                z = args[0].clone()
                part = z[:, first:, key.head * dim : (key.head + 1) * dim]
                z[:, first:, key.head * dim : (key.head + 1) * dim] = change_by_hand(
                    entry, steering.kind, strength, part
                )
                return (z,)

            hooks.append(layers_of(model)[key.layer].self_attn.o_proj.register_forward_pre_hook(before))
        else:

            def after(_m: object, _a: object, out: torch.Tensor, entry: AddChange = entry) -> torch.Tensor:
                out = out.clone()
                out[:, first:] = change_by_hand(entry, steering.kind, strength, out[:, first:])
                return out

            hooks.append(layers_of(model)[key].register_forward_hook(after))
    try:
        return model.hf(**inputs, use_cache=False).logits[:, -1]
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("kind", ["add", "amplify"])
@pytest.mark.parametrize("layers", [(), (2,)])
def test_steered_logits_equal_the_formula(kind: str, layers: tuple[int, ...]) -> None:
    model = shared_model()
    steering, inputs = vector(model, kind, layers), rows(model).inputs
    length = inputs["input_ids"].shape[1]
    after = rows(model).encodings[0].tokens.image[-1] + 1
    for rule, first in (("last+generated", length - 1), ("suffix+generated", after), ("all", 0)):
        with steering.at(rule).applied(model, 1.5):  # pyright: ignore[reportArgumentType]  # from the list
            steered = model.logits(inputs)
        torch.testing.assert_close(steered, logits_by_hand(model, inputs, steering, 1.5, first), atol=1e-4, rtol=1e-4)
        assert not torch.allclose(steered, model.logits(inputs), atol=1e-3)


@pytest.mark.parametrize("kind", ["add", "amplify"])
@pytest.mark.parametrize("rule", ["last+generated", "suffix+generated", "all"])
@torch.no_grad()
def test_cached_generation_is_recomputation_token_by_token(kind: str, rule: str) -> None:
    model = shared_model()
    steering, batch = vector(model, kind, (2,), positions=rule, strength=0.8), rows(shared_model())
    length = batch.inputs["input_ids"].shape[1]
    with steering.applied(model):
        out = model.hf.generate(
            **batch.inputs,
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    # Each token was the last one once, and its keys and values stay as they were made then.
    first = {"last+generated": length - 1, "suffix+generated": batch.encodings[0].tokens.image[-1] + 1, "all": 0}[rule]
    for step, logits in enumerate(out.logits):
        ids = out.sequences[:, : length + step]
        prefix = {**batch.inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        torch.testing.assert_close(logits, logits_by_hand(model, prefix, steering, 0.8, first), atol=2e-4, rtol=1e-4)
    # A random model says the same words either way; what it would have said next is not the same.
    assert not torch.allclose(out.logits[0], model.logits(batch.inputs), atol=1e-4)


def test_image_positions_act_on_the_prompt_only() -> None:
    model = shared_model()
    steering, inputs = vector(model, positions="image:all"), rows(shared_model()).inputs
    lengths: list[int] = []
    hook = model.locate("decoder.L1.z").watch(lambda x: lengths.append(x.shape[1]))
    base: list[torch.Tensor] = []
    late = model.locate("decoder.L4.z").watch(lambda x: base.append(x.clone()))
    model.logits(inputs)
    with steering.applied(model):
        model.generate_batch(rows(model), max_new_tokens=3)
    hook.remove()
    late.remove()
    assert not torch.equal(base[0], base[1])
    assert lengths[-1] == 1


def test_steering_is_repeatable_and_removes_its_hooks() -> None:
    model = random_model()
    state = {name: p.clone() for name, p in model.hf.state_dict().items()}
    inputs = rows(model).inputs
    plain = model.logits(inputs)
    steering = vector(model)
    steered = []
    for _ in range(2):
        with steering.applied(model):
            steered.append(model.logits(inputs))
        assert hooks_of(model) == 0
        assert torch.equal(model.logits(inputs), plain)
    assert torch.equal(*steered)
    with pytest.raises(KeyError), steering.applied(model):
        raise KeyError
    assert hooks_of(model) == 0
    assert all(torch.equal(p, state[name]) for name, p in model.hf.state_dict().items())
    with steering.applied(model, 0):
        assert hooks_of(model) == 0
        assert torch.equal(model.logits(inputs), plain)


def test_vectors_stack() -> None:
    model = shared_model()
    inputs = rows(model).inputs
    steering = vector(model)
    with steering.applied(model, 1.0), steering.applied(model, 2.0):
        double = model.logits(inputs)
    with steering.applied(model, 3.0):
        single = model.logits(inputs)
    torch.testing.assert_close(double, single, atol=1e-4, rtol=1e-4)


def test_strengths() -> None:
    model = shared_model()
    inputs = rows(model).inputs
    steering = vector(model)
    with steering.applied(model):
        own = model.logits(inputs)
    with steering.scaled(7).applied(model, 2.0):
        assert torch.equal(model.logits(inputs), own)
    assert steering.scaled(7).strength == 7
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="finite"):
            steering.scaled(wrong)
        with pytest.raises(ConfigError, match="finite"), steering.applied(model, wrong):
            pass


def test_a_vector_for_another_model_is_refused_unless_forced() -> None:
    model = shared_model()
    foreign = replace(vector(model), config_hash="0" * 64, model="other")
    with pytest.raises(ModelError, match="derived for 'other'"), foreign.applied(model):
        pass
    with foreign.applied(model, force=True):
        assert hooks_of(model) > 0
    deep = replace(foreign, changes={Head(40, 0): foreign.changes[HEADS[0]]})
    with pytest.raises(SiteError, match="layers 0-5"), deep.applied(model, force=True):
        pass
    wide = replace(foreign, changes={Head(0, 0): AddChange(np.eye(1, 128)[0])})
    with pytest.raises(PatchError, match="must be 24"), wide.applied(model, force=True):
        pass


# ---- controls ----------------------------------------------------------------------------------------------------------


def test_random_control_of_separate_reading_and_writing_directions_has_the_same_size() -> None:
    rng = np.random.default_rng(3)
    reads, writes = np.eye(1, 24), 3.5 * np.eye(1, 24, 4)
    steering = SteeringVector(
        {HEADS[0]: AmplifyChange(np.zeros(24), reads=reads, writes=writes)}, "last+generated", 1.0, "m", "c", {}
    )
    entry: Any = steering.randomized(2).changes[HEADS[0]]
    assert entry.reads is not None
    assert entry.writes is not None
    x = rng.standard_normal((10, 24))
    moved = x @ entry.reads.T @ entry.writes
    np.testing.assert_allclose(np.linalg.norm(moved, axis=1), 3.5 * np.abs(x[:, 0]), rtol=1e-5)
    assert abs(float(entry.writes[0] @ writes[0])) < 3.5**2 * 0.7


@pytest.mark.parametrize("kind", ["add", "amplify"])
def test_random_control_has_the_same_size_for_every_input(kind: str) -> None:
    model = shared_model()
    steering = vector(model, kind, (2,))
    control = steering.randomized(5)
    rng = np.random.default_rng(1)
    for key, entry in steering.changes.items():
        other = control.changes[key]
        x = torch.tensor(
            rng.standard_normal((20, model.head_dim if isinstance(key, Head) else model.width)), dtype=torch.float32
        )
        a, b = (change_by_hand(e, kind, 1.5, x) - x for e in (entry, other))
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=1), rtol=1e-4, atol=1e-5)
        cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
        assert abs(float(cosine.mean())) < 0.7
    assert control.provenance["control"] == "random directions, seed 5"
    repeated = steering.randomized(5)
    for key in steering.changes:
        name = "direction" if kind == "add" else "writes"
        np.testing.assert_array_equal(getattr(control.changes[key], name), getattr(repeated.changes[key], name))
    with control.applied(model):
        steered = model.logits(rows(model).inputs)
    by_hand = logits_by_hand(model, rows(model).inputs, control, 2.0, rows(model).inputs["input_ids"].shape[1] - 1)
    torch.testing.assert_close(steered, by_hand, atol=1e-4, rtol=1e-4)


def test_same_directions_at_other_heads() -> None:
    model = shared_model()
    steering = vector(model)
    others = (Head(5, 5), Head(0, 1), Head(2, 2))
    moved = steering.on_heads(others)
    assert set(moved.heads) == set(others)
    for old, new in zip(steering.heads, others, strict=True):
        assert moved.changes[new] is steering.changes[old]
    for wrong in (others[:2], (others[0],) * 3, ()):
        with pytest.raises(PatchError, match="3 different heads"):
            steering.on_heads(wrong)
    for unfit in (vector(model, "amplify"), vector(model, "add", (2,))):
        with pytest.raises(PatchError, match="derive"):
            unfit.on_heads(others)


# ---- construction ------------------------------------------------------------------------------------------------------


def test_invalid_vectors_are_refused() -> None:
    steering = vector(shared_model())
    with pytest.raises(PatchError, match="at least one"):
        replace(steering, changes={})
    with pytest.raises(PatchError, match="add, amplify"):
        replace(steering, changes={HEADS[0]: steering.changes[HEADS[0]], 1: AmplifyChange(np.zeros(192))})
    with pytest.raises(SiteError, match="token selection"):
        steering.at("first")
    with pytest.raises(PatchError, match="length 2"):
        replace(steering, changes={HEADS[0]: AddChange(2 * np.eye(24)[0])})
    for sigma in (0.0, -1.0, float("nan")):
        with pytest.raises(PatchError, match="sigma"):
            AddChange(np.eye(3)[0], sigma)
    with pytest.raises(PatchError, match="finite"):
        AddChange(np.array([1.0, np.nan]))
    with pytest.raises(PatchError, match="the same number of rows"):
        AmplifyChange(np.ones(3), reads=np.eye(2, 3), writes=np.eye(3))


def test_frozen_and_ordered() -> None:
    steering = vector(shared_model(), layers=(1,))
    assert list(steering.changes) == [Head(1, 3), Head(1, 6), 1, Head(4, 0)]
    assert steering.heads == HEADS
    assert steering.layers == (1,)
    with pytest.raises(TypeError):
        steering.changes[0] = steering.changes[1]  # pyright: ignore[reportIndexIssue]  # it is read-only
    with pytest.raises(ValueError, match="read-only"):
        steering.changes[1].direction[0] = 0  # pyright: ignore[reportAttributeAccessIssue]
    assert "L1.H3" in repr(steering)


# ---- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["add", "amplify"])
def test_native_file(kind: str, tmp_path: Path) -> None:
    model = shared_model()
    steering = vector(model, kind, (2,)).randomized(1)
    path = steering.save(tmp_path / "new" / "vector.safetensors")
    tensors = load_file(path)
    names = {"layers.1.head.3", "layers.1.head.6", "layers.4.head.0", "layers.2.residual"}
    assert {n for n in tensors if not n.endswith(("reads", "writes"))} == names
    assert tensors["layers.1.head.3"].shape == (model.head_dim,)
    assert tensors["layers.2.residual"].shape == (model.width,)
    card = json.loads(path.with_suffix(".json").read_text())
    assert card["config_hash"] == model.config_hash
    assert card["entries"]["layers.1.head.3"]["site"] == "decoder.L1.z"
    loaded = SteeringVector.load(path)
    assert (loaded.kind, loaded.positions, loaded.strength) == (steering.kind, steering.positions, steering.strength)
    assert loaded.provenance == steering.provenance
    inputs = rows(model).inputs
    both = []
    for v in (steering, loaded):
        with v.applied(model):
            both.append(model.logits(inputs))
    assert torch.equal(*both)


def test_files_that_are_not_vectors_are_refused(tmp_path: Path) -> None:
    path = vector(shared_model()).save(tmp_path / "vector.safetensors")
    with pytest.raises(StoreError, match="no such file"):
        SteeringVector.load(tmp_path / "none")
    save_file({"x": np.ones(2, np.float32)}, tmp_path / "other")
    with pytest.raises(StoreError, match="is not a steering_vector file"):
        SteeringVector.load(tmp_path / "other")
    tensors, card = load_file(path), json.loads(path.with_suffix(".json").read_text())
    for name, change, message in (
        ("newer", {"version": 5}, "version 5"),
        ("kind", {"kind": "multiply"}, "damaged"),
        ("name", {"entries": {"layers.1.mlp": {"sigma": 1.0}}}, "damaged"),
        ("gap", {"entries": {"layers.5.head.0": {"sigma": 1.0}}}, "damaged"),
    ):
        save_file(tensors, tmp_path / name, metadata={"steering_vector": json.dumps({**card, **change})})
        with pytest.raises(StoreError, match=message):
            SteeringVector.load(tmp_path / name)


@pytest.mark.parametrize("value", ["ab", [1, "x"], [1j, 0.0], [[1.0], [2.0, 3.0]]])
def test_a_direction_is_made_of_real_numbers(value: Any) -> None:
    with pytest.raises(PatchError, match="direction: it must be an array of real numbers"):
        AddChange(value)


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize(("old", "new"), LEGACY_STEERING_POSITIONS.items())
def test_files_of_earlier_versions_have_their_own_words_for_positions(
    version: int, old: str, new: str, tmp_path: Path
) -> None:
    path = vector(shared_model()).save(tmp_path / "vector.safetensors")
    tensors, card = load_file(path), json.loads(path.with_suffix(".json").read_text())
    assert (card["version"], card["positions"]) == (4, "last+generated")
    header = {"steering_vector": json.dumps({**card, "version": version, "positions": old})}
    save_file(tensors, tmp_path / "old", metadata=header)
    assert SteeringVector.load(tmp_path / "old").positions == new
