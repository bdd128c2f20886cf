"""Norm rules, projecting away, positions, decay and gates: in forwards, cached generation and beam search."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from activation_store import ConceptDirection
from circuits import Add, Gate, Intervention, Zero, intervened
from groundscope.core.errors import ConfigError, PatchError, SiteError
from lvlm import Head, Site
from lvlm.model import Batch
from lvlm.token_selection import LEGACY_STEERING_POSITIONS
from mitigation import ProbeGate, SteeringVector
from mitigation.steering.changes import AddChange, ProjectChange, VectorChange
from mitigation.steering.places import Key
from tests.toys.random_models import examples, hooks_of, layers_of, random_model, shared_model

KEYS: tuple[Key, ...] = (Head(2, 3), Head(2, 6), 1, Site("decoder", 3, "mlp_out"))


def unit(shape: Any, seed: int) -> np.ndarray:
    v = np.random.default_rng(seed).standard_normal(shape)
    return v / np.linalg.norm(v, axis=-1, keepdims=True)


def steering_vector(keys: tuple[Key, ...] = KEYS, **changes: Any) -> SteeringVector:
    model = shared_model()
    entries: dict[Key, VectorChange] = {
        key: AddChange(unit(model.head_dim if isinstance(key, Head) else model.width, k), 0.6 + 0.1 * k)
        for k, key in enumerate(keys)
    }
    if changes.pop("kind", "add") == "project":
        entries = {key: ProjectChange(c.direction) for key, c in entries.items() if isinstance(c, AddChange)}
    return replace(SteeringVector(entries, "last+generated", 1.5, model.name, model.config_hash), **changes)


@cache
def batch() -> Batch:
    return next(b for b in shared_model().batches(examples(), 2) if len(b.index) == 2)


def gate() -> ProbeGate:
    """A gate on the first layer that is open at the last token of one prompt, and closed at many others."""
    model, weights = shared_model(), unit(192, 50)
    with torch.no_grad():
        scores = model.read(batch().inputs, ["decoder.L0.resid_post"])["decoder.L0.resid_post"].numpy() @ weights
    bias = -float(scores[:, -1].mean())  # between the two prompts' last tokens
    assert 0.05 < (scores + bias > 0).mean() < 0.95
    return ProbeGate(0, weights, bias)


def change_by_hand(vector: SteeringVector, entry: Any, strength: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What becomes of ``[B, T, d]`` at a strength for each token ``[B, T, 1]``, from the formulas."""
    t = torch.tensor(entry.direction)
    if vector.kind == "project":
        return x - strength * ((x * t).sum(-1, keepdim=True).clamp_min(0) / (t * t).sum()) * t
    d = strength * entry.sigma * t
    if vector.norm == "free":
        return x + d
    length = x.norm(dim=-1, keepdim=True)
    y = x + d if vector.norm == "kept" else x / length + d
    return length * y / y.norm(dim=-1, keepdim=True)


@contextmanager
def by_hand(vector: SteeringVector, where: Callable[[int], torch.Tensor]) -> Iterator[None]:
    """Steer with plain hooks and no cache; `where` gives a factor for each position of a sequence of some length."""
    model, hooks = shared_model(), []
    dim, opened = model.head_dim, {}
    if vector.gate is not None:
        w, b = torch.tensor(vector.gate.weights), vector.gate.bias

        def judge(_m: Any, _a: Any, out: torch.Tensor) -> None:
            opened["open"] = (out @ w + b > 0).float()[..., None]

        hooks.append(layers_of(model)[0].register_forward_hook(judge))

    def strength(x: torch.Tensor) -> torch.Tensor:
        factor = vector.strength * where(x.shape[1])[None, :, None].expand(len(x), -1, 1)
        return factor * opened["open"] if opened else factor

    for key, entry in vector.changes.items():
        if isinstance(key, Head):

            def before(_m: Any, args: Any, key: Head = key, entry: Any = entry) -> Any:
                z, columns = args[0].clone(), slice(key.head * dim, (key.head + 1) * dim)
                z[..., columns] = change_by_hand(vector, entry, strength(z), z[..., columns])
                return (z,)

            hooks.append(layers_of(model)[key.layer].self_attn.o_proj.register_forward_pre_hook(before))
        else:

            def after(_m: Any, _a: Any, out: torch.Tensor, entry: Any = entry) -> torch.Tensor:
                return change_by_hand(vector, entry, strength(out), out)

            layer = layers_of(model)[key if isinstance(key, int) else key.layer]
            hooks.append((layer if isinstance(key, int) else layer.mlp).register_forward_hook(after))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def recomputed(ids: torch.Tensor) -> torch.Tensor:
    inputs = {**batch().inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return shared_model().hf(**inputs, use_cache=False).logits[:, -1]


def factors(vector: SteeringVector, length: int) -> torch.Tensor:
    """How strongly each position of prompt and answer is steered: a token keeps what it got when it was the last."""
    prompt, image = batch().encodings[0].tokens.length, batch().encodings[0].tokens.image
    at = torch.arange(length)
    step = (at - (prompt - 1)).clamp_min(0)
    chosen = {
        "last+generated": at >= prompt - 1,
        "all": at >= 0,
        "image:all": (at >= image[0]) & (at <= image[-1]),
        "suffix+generated": at > image[-1],
        "suffix:all": (at > image[-1]) & (at < prompt),
        "generated:all": at >= prompt,
    }[vector.positions]
    return chosen.float() * vector.decay**step


CASES: Mapping[str, Callable[[], SteeringVector]] = {
    "question": lambda: steering_vector(positions="suffix:all"),
    "generated": lambda: steering_vector(positions="generated:all"),
    "image": lambda: steering_vector(positions="image:all"),
    "kept": lambda: steering_vector(norm="kept", positions="all"),
    "relative": lambda: steering_vector(norm="relative", strength=0.5),
    "project": lambda: steering_vector(kind="project", positions="suffix+generated"),
    "decay": lambda: steering_vector().decaying(0.6),
    "decay of a norm rule": lambda: steering_vector(norm="relative", positions="suffix+generated").decaying(0.7),
    "gate": lambda: steering_vector(positions="all").gated(gate()),
    "gate and decay": lambda: steering_vector(positions="suffix+generated").gated(gate()).decaying(0.8),
    "gated projection": lambda: steering_vector(kind="project", strength=2.0).gated(gate()),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_cached_generation_is_recomputation_token_by_token(case: str) -> None:
    model, vector = shared_model(), CASES[case]()
    inputs = batch().inputs
    length = inputs["input_ids"].shape[1]
    with vector.applied(model):
        out = model.hf.generate(
            **inputs,
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    assert hooks_of(model) == 0
    moved = []
    for step, logits in enumerate(out.logits):
        ids = out.sequences[:, : length + step]
        with by_hand(vector, lambda n: factors(vector, n)):
            torch.testing.assert_close(logits, recomputed(ids), atol=3e-4, rtol=1e-4)
        moved.append(float((logits - recomputed(ids)).abs().max()))
    assert moved[-1] > 1e-3
    assert (moved[0] > 1e-3) == (vector.positions != "generated:all")


@pytest.mark.parametrize("case", ["all", "last", "decay"])
@torch.no_grad()
def test_beam_search_is_beam_search_without_a_cache(case: str) -> None:
    model = shared_model()
    vector = steering_vector(
        positions="all" if case == "all" else "last+generated", decay=0.5 if case == "decay" else 1.0
    )
    options = {"num_beams": 3, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "output_scores": True}
    with vector.applied(model):
        steered = model.hf.generate(**batch().inputs, **options, return_dict_in_generate=True)
    plain = model.hf.generate(**batch().inputs, **options, return_dict_in_generate=True)
    with by_hand(vector, lambda n: factors(vector, n)):
        naive = model.hf.generate(**batch().inputs, **options, use_cache=False, return_dict_in_generate=True)
    assert torch.equal(steered.sequences, naive.sequences)
    torch.testing.assert_close(steered.sequences_scores, naive.sequences_scores, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(steered.sequences_scores, plain.sequences_scores, atol=1e-3)
    assert hooks_of(model) == 0


def test_nested_twice_and_taken_away_twice() -> None:
    model = random_model()
    state = {name: p.clone() for name, p in model.hf.state_dict().items()}
    plain = model.logits(batch().inputs)
    vectors = [CASES[name]() for name in ("kept", "gate and decay", "project")]
    for _ in range(2):
        for vector in vectors:
            with vector.applied(model), vector.applied(model):
                assert not torch.equal(model.logits(batch().inputs), plain)
        assert hooks_of(model) == 0
        assert torch.equal(model.logits(batch().inputs), plain)
    assert all(torch.equal(p, state[name]) for name, p in model.hf.state_dict().items())


def test_a_closed_gate_does_nothing_and_an_open_one_everything() -> None:
    model, weights = shared_model(), np.eye(1, 192)[0]
    plain = model.logits(batch().inputs)
    with steering_vector().applied(model):
        steered = model.logits(batch().inputs)
    for bias, expected in ((-1e9, plain), (1e9, steered)):
        with steering_vector().gated(ProbeGate(0, weights, bias)).applied(model):
            torch.testing.assert_close(model.logits(batch().inputs), expected, atol=1e-5, rtol=1e-5)
    with steering_vector().gated(ProbeGate(0, weights, 1e9)).gated(None).applied(model):
        assert torch.equal(model.logits(batch().inputs), steered)


def test_a_gate_decides_like_its_probe() -> None:
    v = unit(24, 3).astype(np.float32)
    x = np.random.default_rng(0).standard_normal((50, 24))
    direction = ConceptDirection("decoder.L1.z", "last", "object:apple", v, head=2, scale=3.0, intercept=0.5)
    for when, threshold in ((True, 0.0), (True, 0.7), (False, 0.0)):
        made_gate = ProbeGate.from_direction(direction, when=when, threshold=threshold)
        opened = x @ made_gate.weights + made_gate.bias > 0
        decision = direction.decision(x) > threshold
        np.testing.assert_array_equal(opened, decision if when else ~decision)
        assert made_gate.place == Head(1, 2)
    with pytest.raises(SiteError, match="decoder 'z'"):
        ProbeGate.from_direction(replace(direction, site="decoder.L1.q"))


def test_a_direction_for_each_token() -> None:
    model, inputs = shared_model(), batch().inputs
    site = Site("decoder", 1, "mlp_out")
    length = inputs["input_ids"].shape[1]
    rows = unit((length, model.width), 4)
    rows[0] = 0
    vector = SteeringVector({site: AddChange(rows, 2.0)}, "all", 1.0, model.name, model.config_hash)
    plain = model.read(inputs, [str(site)])[str(site)]
    values: list[torch.Tensor] = []
    with vector.applied(model):
        hook = model.locate(site).watch(lambda x: values.append(x.clone()))
        model.logits(inputs)
        hook.remove()
    torch.testing.assert_close(values[0], plain + 2 * torch.tensor(rows, dtype=torch.float32), atol=1e-5, rtol=1e-5)
    short = replace(vector, changes={site: AddChange(rows[1:], 2.0)})
    with (
        short.applied(model),
        pytest.raises(PatchError, match=f"value has {length - 1} tokens, but the site has {length}"),
    ):
        model.logits(inputs)
    with pytest.raises(PatchError, match="for each token"):
        vector.at("last+generated")
    control = vector.randomized(3).changes[site].direction  # pyright: ignore[reportAttributeAccessIssue]
    np.testing.assert_allclose(np.linalg.norm(control, axis=1), np.r_[0, np.ones(length - 1)], atol=1e-6)


@pytest.mark.parametrize("case", ["kept", "relative", "project", "gate and decay", "by token"])
def test_native_file_holds_all_of_it(case: str, tmp_path: Path) -> None:
    if case == "by token":
        site = Site("vision", 2, "mlp_out")
        vector = SteeringVector({site: AddChange(unit((9, 16), 1), 0.1)}, "all", 0.9, "m", "c", norm="relative")
    else:
        vector = CASES[case]()
    path = vector.save(tmp_path / "v.safetensors")
    loaded = SteeringVector.load(path)
    for name in ("kind", "positions", "strength", "norm", "decay", "model", "config_hash"):
        assert getattr(loaded, name) == getattr(vector, name)
    assert list(loaded.changes) == list(vector.changes)
    for key, entry in vector.changes.items():
        same: Any = loaded.changes[key]
        np.testing.assert_array_equal(same.direction, entry.direction)  # pyright: ignore[reportAttributeAccessIssue]
        assert getattr(same, "sigma", 1) == getattr(entry, "sigma", 1)
    assert (loaded.gate is None) == (vector.gate is None)
    if loaded.gate is not None and vector.gate is not None:
        np.testing.assert_array_equal(loaded.gate.weights, vector.gate.weights)
        assert (loaded.gate.place, loaded.gate.bias) == (vector.gate.place, vector.gate.bias)
    # A file of version 1 knows none of it.
    tensors, card = load_file(path), json.loads(path.with_suffix(".json").read_text())
    old = {k: v for k, v in card.items() if k not in ("norm", "decay", "gate")}
    words = {new: word for word, new in LEGACY_STEERING_POSITIONS.items()}
    old |= {"version": 1, "positions": words[vector.positions]}
    save_file(tensors, tmp_path / "old", metadata={"steering_vector": json.dumps(old)})
    assert (SteeringVector.load(tmp_path / "old").norm, SteeringVector.load(tmp_path / "old").gate) == ("free", None)


def test_additions_at_one_site_are_summed() -> None:
    """Many heads of a layer, twice over, with something else between: the sum, in the order they were given."""
    model, site = shared_model(), Site("decoder", 2, "z")
    x = model.read(batch().inputs, [str(site)])[str(site)]
    push = torch.tensor(unit(24, 1), dtype=torch.float32)
    items = [Intervention(site, Add(push), "all", head) for head in (0, 3, 3)]
    expected = x.clone()
    for head in (0, 3, 3):
        expected[..., 24 * head : 24 * head + 24] += push
    for extra, after in (([], expected), ([Intervention(site, Zero(), "all", 3)], None)):
        values: list[torch.Tensor] = []
        with intervened(model, [*items, *extra, *items[:1]]):
            hook = model.locate(site).watch(lambda y, values=values: values.append(y.clone()))
            model.logits(batch().inputs)
            hook.remove()
        target = expected.clone()
        if after is None:
            target[..., 72:96] = 0
        target[..., :24] += push
        torch.testing.assert_close(values[0], target, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: steering_vector(norm="longer"), ConfigError, "unknown norm 'longer'"),
        (lambda: steering_vector(kind="project", norm="kept"), ConfigError, "norm .free. unless the kind is .add."),
        (lambda: steering_vector().decaying(0), ConfigError, "decay=0"),
        (lambda: steering_vector().decaying(float("nan")), ConfigError, "decay=nan"),
        (lambda: steering_vector().decaying(1.5), ConfigError, r"decay must be in \(0, 1\]"),
        (lambda: ProbeGate(0, np.zeros(4)), PatchError, "not all 0"),
        (lambda: ProbeGate(0, np.ones(4), float("nan")), PatchError, "bias nan"),
        (lambda: steering_vector().gated(ProbeGate(5, np.ones(192))).interventions(), SiteError, "no later"),
        (
            lambda: steering_vector().gated(ProbeGate(Site("vision", 0, "z"), np.ones(4))).interventions(),
            SiteError,
            "no later",
        ),
        (lambda: Intervention(Site("decoder", 0, "z"), Zero(), decay=0.5), PatchError, "without a strength"),
        (lambda: Intervention(Site("vision", 0, "z"), Zero(), "generated:all"), SiteError, "are for the decoder only"),
        (lambda: steering_vector(positions="answer"), SiteError, "unknown token selection 'answer'"),
    ],
)
def test_invalid_schedules_are_refused(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_gate_of_another_width_is_refused_before_anything_is_hooked() -> None:
    model = shared_model()
    with (
        pytest.raises(PatchError, match="must be 192"),
        steering_vector().gated(ProbeGate(0, np.ones(7))).applied(model),
    ):
        pass
    item = Intervention(
        Site("decoder", 1, "z"), Add(torch.ones(192)), gate=Gate(Site("decoder", 0, "z"), torch.ones(24), 0, 9)
    )
    with pytest.raises(SiteError, match="heads 0-7"), intervened(model, [item]):
        pass
    assert hooks_of(model) == 0
