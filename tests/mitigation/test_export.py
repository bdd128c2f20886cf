"""Exports: read back the way their consumers do, and doing to the logits what the vector does."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from safetensors.numpy import load_file
from torch.nn.functional import normalize

from activation_store import trace
from concepts.schema import Example
from groundscope.core.errors import ConfigError, ModelError, PatchError, StoreError
from lvlm import Head, Site, wrap_lvlm
from lvlm.model import Lvlm
from mitigation import Contrast, SteeringVector, derive, export
from mitigation.steering.changes import AddChange, AmplifyChange, ProbeGate, ProjectChange, VectorChange
from mitigation.steering.export import apply_bias
from mitigation.steering.export.baked import apply
from mitigation.steering.export.gguf import card_in, check
from mitigation.steering.export.residual_conversion import to_residual
from mitigation.steering.places import Key
from tests.toys.random_models import data, examples, layers_of, pairs, random_model, shared_model

HEADS = (Head(1, 3), Head(1, 6), Head(4, 0))
MLP = Site("decoder", 3, "mlp_out")


def steering_vector(*keys: Key, strength: float = 1.5, **changes: Any) -> SteeringVector:
    model, rng = shared_model(), np.random.default_rng(0)
    entries: dict[Key, VectorChange] = {}
    for key in keys:
        v = rng.standard_normal(model.head_dim if isinstance(key, Head) else model.width)
        entries[key] = AddChange(v / np.linalg.norm(v), 0.5 + rng.random())
    kind = changes.pop("kind", "add")
    if kind != "add":
        make = ProjectChange if kind == "project" else AmplifyChange
        entries = {key: make(c.direction) for key, c in entries.items() if isinstance(c, AddChange)}
    whole = SteeringVector(entries, "all", strength, model.name, model.config_hash, {"method": "by hand"})
    return replace(whole, **changes)


def inputs() -> dict[str, torch.Tensor]:
    return next(b for b in shared_model().batches(examples(), 2) if len(b.index) == 2).inputs


def steered(vector: SteeringVector, strength: float | None = None) -> torch.Tensor:
    with vector.applied(shared_model(), strength):
        return shared_model().logits(inputs())


@contextmanager
def hooked(hooks: dict[torch.nn.Module, Callable[[torch.Tensor], torch.Tensor]]) -> Iterator[None]:
    """Change modules' outputs with plain torch hooks, as consumers do."""
    handles = [
        module.register_forward_hook(
            lambda _m, _a, out, change=change: (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)
        )
        for module, change in hooks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def consumed(hooks: dict[torch.nn.Module, Callable[[torch.Tensor], torch.Tensor]]) -> torch.Tensor:
    with hooked(hooks):
        return shared_model().logits(inputs())


def adding(rows: dict[int, torch.Tensor]) -> dict[torch.nn.Module, Callable[[torch.Tensor], torch.Tensor]]:
    return {layers_of(shared_model())[i]: lambda x, row=row: x + row for i, row in rows.items()}


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(a, shared_model().logits(inputs()), atol=1e-3)


# ---- GGUF --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [None, 0.7])
def test_gguf_is_what_llama_cpp_adds(strength: float | None, tmp_path: Path) -> None:
    vector = steering_vector(2, 4)
    path = export.gguf(vector, tmp_path / "new" / "vector.gguf", shared_model(), strength=strength)
    reader = GGUFReader(path)
    assert {t.name for t in reader.tensors} == {"direction.2", "direction.4"}
    for tensor in reader.tensors:
        assert tensor.tensor_type == GGMLQuantizationType.F32
        assert list(tensor.shape) == [shared_model().width]
    rows = {int(t.name.removeprefix("direction.")): torch.tensor(np.array(t.data)) for t in reader.tensors}
    same(consumed(adding(rows)), steered(vector, strength))
    fields = {name: reader.get_field(name) for name in reader.fields}
    metadata = {name: field.contents() for name, field in fields.items() if field is not None}
    assert metadata["general.architecture"] == "controlvector"
    assert metadata["controlvector.model_hint"] == "llava"
    assert metadata["controlvector.layer_count"] == 2
    assert card_in(path)["strength"] == (strength or 1.5)
    assert set(check(path)) == {2, 4}
    assert not list(path.parent.glob("*.part"))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"direction.0": np.ones(4, np.float32)}, "a layer >= 1"),
        ({"direction.x": np.ones(4, np.float32)}, "a layer >= 1"),
        ({"weight": np.ones(4, np.float32)}, "a layer >= 1"),
        ({"direction.1": np.ones(4, np.float16)}, "F16"),
        ({"direction.1": np.ones((2, 4), np.float32)}, "one axis"),
        ({"direction.1": np.ones(4, np.float32), "direction.2": np.ones(8, np.float32)}, r"lengths \[4, 8\]"),
    ],
)
def test_vectors_that_llama_cpp_cannot_read_are_refused(
    tensors: dict[str, np.ndarray], message: str, tmp_path: Path
) -> None:
    writer = GGUFWriter(tmp_path / "bad.gguf", "controlvector")
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match=message):
        check(tmp_path / "bad.gguf")


def test_a_conversion_is_the_projection_and_is_recorded_in_the_card(tmp_path: Path) -> None:
    model, vector = shared_model(), steering_vector(*HEADS, 2, MLP)
    path = export.gguf(vector, tmp_path / "v.gguf", model, convert=True)
    rows = check(path)
    expected = {i: np.zeros(model.width) for i in (1, 2, 3, 4)}
    for key, entry in vector.changes.items():
        move = 1.5 * entry.sigma * entry.direction.astype(np.float64)
        if isinstance(key, Head):
            weight = layers_of(model)[key.layer].self_attn.o_proj.weight.detach().double().numpy()
            move = weight[:, key.head * model.head_dim : (key.head + 1) * model.head_dim] @ move
        expected[key if isinstance(key, int) else key.layer] += move
    assert set(rows) == set(expected)
    for layer, row in expected.items():
        np.testing.assert_allclose(rows[layer], row, atol=1e-5)
    card = json.dumps(card_in(path))
    assert "approximate" in card
    assert "W_O d" in card
    same(consumed(adding({i: torch.tensor(row) for i, row in rows.items()})), steered(to_residual(vector, model)))
    # The output of an MLP is added to the block's output unchanged: that conversion is exact.
    alone = steering_vector(MLP)
    moved = export.gguf(alone, tmp_path / "mlp.gguf", model, convert=True)
    assert "exact" in json.dumps(card_in(moved))
    same(consumed(adding({i: torch.tensor(row) for i, row in check(moved).items()})), steered(alone))


# ---- torch files -------------------------------------------------------------------------------------------------------


def opened(path: Path) -> Any:
    return torch.load(path, weights_only=True)  # noqa: TID251  # as the consumer does


@pytest.mark.parametrize("positions", ["all", "generated:all"])
def test_vllm_matrix(positions: str, tmp_path: Path) -> None:
    vector = steering_vector(0, 3, positions=positions)
    path = export.vllm(vector, tmp_path / "look.pt", shared_model())
    matrix = opened(path)
    assert (matrix.shape, matrix.dtype) == ((6, shared_model().width), torch.float32)
    assert [bool(row.any()) for row in matrix] == [True, False, False, True, False, False]
    request = json.loads((tmp_path / "look.pt.json").read_text())["hotwire"]
    only = {"decode_only": True} if positions == "generated:all" else {}
    assert request == [{"id": "look", "layer": layer, "scale": 1.0, **only} for layer in (0, 3)]
    rows = {item["layer"]: item["scale"] * matrix[item["layer"]] for item in request}
    same(consumed(adding(rows)), steered(vector.at("all")))


@pytest.mark.parametrize("keys", [(0, 3), HEADS, (*HEADS, 2)])
def test_steering_vectors(keys: tuple[Key, ...], tmp_path: Path) -> None:
    model, vector = shared_model(), steering_vector(*keys)
    at_heads = any(isinstance(key, Head) for key in keys)
    path = export.steering_vectors(vector, tmp_path / "v.pt", model, convert=at_heads)
    document = opened(path)
    names = dict(model.hf.named_modules())
    # What the package does: the names that fit the pattern, numbered from 0, are the layers; their outputs are added to.
    pattern = re.compile(re.escape(document["layer_config"][document["layer_type"]]).replace(r"\{num\}", r"(\d+)"))
    layers = {int(m[1]): module for name, module in names.items() if (m := pattern.fullmatch(name))}
    assert sorted(layers) == list(range(6))
    hooks = {
        layers[i]: lambda x, row=row: x + row.reshape(1, 1, -1) for i, row in document["layer_activations"].items()
    }
    mixed = at_heads and any(isinstance(key, int) for key in keys)
    assert document["layer_type"] == ("self_attn" if at_heads and not mixed else "decoder_block")
    # Heads alone convert exactly; combined with other sites they act later, and the card states it.
    same(consumed(hooks), steered(to_residual(vector, model) if mixed else vector))
    card = json.loads((tmp_path / "v.pt.json").read_text())
    conversion = card.get("conversion", card["provenance"].get("conversion", ""))
    assert conversion.startswith("approximate" if mixed else "exact" if at_heads else "")


def vti_layer(directions: torch.Tensor, alpha: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """What VTI puts after an MLP: directions ``[1, D]`` or ``[1, tokens, D]``."""

    def change(x: torch.Tensor) -> torch.Tensor:
        length = x.norm(dim=-1, keepdim=True)
        return normalize(normalize(x, dim=-1) + 0.1 * alpha * normalize(directions[0], dim=-1), dim=-1) * length

    return change


@pytest.mark.parametrize("stack", ["decoder", "vision"])
def test_vti_directions(stack: str, tmp_path: Path) -> None:
    model, rng = shared_model(), np.random.default_rng(1)
    tower = model.hf.model.vision_tower
    modules = (
        layers_of(model) if stack == "decoder" else next(m for n, m in tower.named_modules() if n.endswith("layers"))
    )
    outputs: list[torch.Tensor] = []
    hook = modules[0].mlp.register_forward_hook(lambda _m, _a, out: outputs.append(out))
    model.logits(inputs())
    hook.remove()
    width, tokens = outputs[0].shape[-1], outputs[0].shape[1]
    shape = (width,) if stack == "decoder" else (tokens, width)
    entries: dict[Key, VectorChange] = {}
    for layer in (0, 2):
        v = rng.standard_normal(shape)
        entries[Site(stack, layer, "mlp_out")] = AddChange(v / np.linalg.norm(v, axis=-1, keepdims=True), 0.1)  # pyright: ignore[reportArgumentType]  # one of the two
    vector = SteeringVector(entries, "all", 6.0, model.name, model.config_hash, norm="relative")
    path = export.vti(vector, tmp_path / "vti.pt", model)
    directions = opened(path)
    assert directions.shape == (len(modules), 1, *shape)
    alpha = json.loads((tmp_path / "vti.pt.json").read_text())["alpha"]
    assert alpha == pytest.approx(6)
    hooks = {layer.mlp: vti_layer(directions[i], alpha) for i, layer in enumerate(modules)}
    same(consumed(hooks), steered(vector))
    uneven = replace(vector, changes={**entries, Site("decoder", 1, "mlp_out"): AddChange(np.eye(1, model.width)[0])})
    with pytest.raises(ConfigError):
        export.vti(uneven, tmp_path / "no.pt", model)


# ---- baked -------------------------------------------------------------------------------------------------------------


def test_baked_biases_do_what_the_vector_does(tmp_path: Path) -> None:
    vector = steering_vector(*HEADS, 1, 2, MLP)
    path = export.baked(vector, tmp_path / "bias.safetensors", shared_model())
    stem = "model.language_model.layers"
    ends = {f"{stem}.{i}.self_attn.o_proj.bias" for i in (1, 4)} | {f"{stem}.{i}.mlp.down_proj.bias" for i in (1, 2, 3)}
    assert set(load_file(path)) == ends
    other, twice = random_model(), random_model()
    plain = other.logits(inputs())
    undo = apply(other.hf, path)
    same(other.logits(inputs()), steered(vector))
    undo()
    assert torch.equal(other.logits(inputs()), plain)
    half = export.baked(vector, tmp_path / "half.safetensors", shared_model(), strength=0.75)
    for _ in range(2):  # a bias that is there is added to
        apply(twice.hf, half)
    same(twice.logits(inputs()), steered(vector))


def test_an_offloaded_model_is_baked_and_converted_like_one_in_memory(tmp_path: Path) -> None:
    model, vector = shared_model(), steering_vector(*HEADS, 2, MLP)
    network = copy.deepcopy(model.hf)
    accelerate.cpu_offload(network, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in network.parameters())
    away = wrap_lvlm(network, model.processor, name=model.name, validate=False)
    here, there = (export.baked(vector, tmp_path / f"{i}.safetensors", m) for i, m in enumerate((model, away)))
    assert here.read_bytes() == there.read_bytes()
    for first, second in zip(
        *(to_residual(steering_vector(*HEADS), m).changes.values() for m in (model, away)), strict=True
    ):
        np.testing.assert_array_equal(first.direction, second.direction)


def test_the_loader_stands_alone(tmp_path: Path) -> None:
    source = Path(apply_bias.__file__)
    assert len(source.read_text().splitlines()) <= 75
    shutil.copy(source, tmp_path / "apply_bias.py")
    export.baked(steering_vector(*HEADS, 2), tmp_path / "bias.safetensors", shared_model())
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import torch
from apply_bias import apply, read
changes, card = read({str(tmp_path / "bias.safetensors")!r})
model = torch.nn.Module()
for name, change in changes.items():
    at = model
    *parents, last, _ = name.split(".")
    for part in parents:
        at.add_module(part, getattr(at, part, torch.nn.Module()))
        at = getattr(at, part)
    at.add_module(last, torch.nn.Linear(4, len(change), bias=False))
undo = apply(model, {str(tmp_path / "bias.safetensors")!r})
assert all(torch.equal(model.get_parameter(n), c) for n, c in changes.items())
undo()
assert all(p.dim() == 2 for p in model.parameters())
print(len(changes), card["strength"], sorted(set(m.split(".")[0] for m in sys.modules) & {{"circuits", "transformers", "lvlm"}}))
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout == "3 1.5 []\n", done.stderr
    with pytest.raises(ValueError, match="not a bias patch"):
        apply_bias.apply(torch.nn.Linear(2, 2), source)


def test_files_that_do_not_fit_change_nothing(tmp_path: Path) -> None:
    path = export.baked(steering_vector(*HEADS), tmp_path / "bias.safetensors", shared_model())
    with pytest.raises(ModelError, match="no linear layer"):
        apply(torch.nn.Linear(2, 2), path)
    with pytest.raises(StoreError):
        apply(shared_model().hf, steering_vector(*HEADS).save(tmp_path / "vector.safetensors"))
    with pytest.raises(StoreError, match="no such file"):
        apply(shared_model().hf, tmp_path / "none")


def test_an_mlp_that_ends_in_no_linear_layer_is_not_baked(tmp_path: Path) -> None:
    model = random_model()
    last = layers_of(model)[2].mlp
    last.down_proj = torch.nn.Sequential(last.down_proj, torch.nn.Tanh())
    with pytest.raises(ConfigError, match="does not end in one linear layer"):
        export.baked(steering_vector(2), tmp_path / "no.safetensors", model)


# ---- what a format cannot hold -----------------------------------------------------------------------------------------

GATE = ProbeGate(0, np.ones(192))
UNFIT = {
    "heads": (lambda: steering_vector(*HEADS), {"safetensors", "baked"}),
    "residual": (lambda: steering_vector(2), {"safetensors", "baked", "gguf", "steering_vectors", "vllm"}),
    "first layer": (lambda: steering_vector(0, 2), {"safetensors", "baked", "steering_vectors", "vllm"}),
    "MLP": (lambda: steering_vector(MLP), {"safetensors", "baked"}),
    "attention output": (lambda: steering_vector(Site("decoder", 1, "attn_out")), {"safetensors"}),
    "last": (lambda: steering_vector(2, positions="last+generated"), {"safetensors"}),
    "question": (lambda: steering_vector(2, positions="suffix:all"), {"safetensors"}),
    "generated": (lambda: steering_vector(2, positions="generated:all"), {"safetensors", "vllm"}),
    "kept": (lambda: steering_vector(2, norm="kept"), {"safetensors"}),
    "relative": (lambda: steering_vector(MLP, norm="relative"), {"safetensors", "vti"}),
    "relative elsewhere": (lambda: steering_vector(2, MLP, norm="relative"), {"safetensors"}),
    "decay": (lambda: steering_vector(2, decay=0.5), {"safetensors"}),
    "gate": (lambda: steering_vector(2, gate=GATE), {"safetensors"}),
    "project": (lambda: steering_vector(2, kind="project"), {"safetensors"}),
    "amplify": (lambda: steering_vector(2, kind="amplify"), {"safetensors"}),
}


@pytest.mark.parametrize("case", UNFIT)
def test_every_format_writes_what_it_can_hold_and_refuses_the_rest(case: str, tmp_path: Path) -> None:
    make, able = UNFIT[case]
    vector = make()
    assert set(export.formats_for(vector)) == able
    for name, form in export.exports.items():
        path, write = tmp_path / f"{name}.file", form.write
        if name in able:
            assert write(vector, path, shared_model()).is_file()
            continue
        with pytest.raises(ConfigError, match=f"cannot be written as '{name}'") as refused:
            write(vector, path, shared_model())
        assert "'safetensors'" in str(refused.value)
        assert "formats_for(vector)" in str(refused.value)
        assert not path.exists()


def test_refusals_name_the_fix(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="convert=True"):
        export.gguf(steering_vector(*HEADS), tmp_path / "v")
    with pytest.raises(ConfigError, match=r"vector\.at\('all'\)"):
        export.gguf(steering_vector(2, positions="last+generated"), tmp_path / "v")
    with pytest.raises(ConfigError, match="pass model="):
        export.gguf(steering_vector(*HEADS), tmp_path / "v", convert=True)
    with pytest.raises(ConfigError, match="cannot be converted"):
        export.vllm(steering_vector(*HEADS, kind="amplify"), tmp_path / "v", shared_model(), convert=True)
    with pytest.raises(ConfigError, match="layer 0 comes before layer 1"):
        export.gguf(steering_vector(Head(0, 1)), tmp_path / "v", shared_model(), convert=True)
    for strength in (float("nan"), float("inf")):
        for name in ("baked", "gguf", "steering_vectors", "vllm"):
            with pytest.raises(ConfigError, match="finite"):
                export.exports[name].write(steering_vector(2), tmp_path / "v", shared_model(), strength=strength)


@pytest.mark.parametrize("name", list(export.exports))
def test_a_vector_for_another_model_is_not_written(name: str, tmp_path: Path) -> None:
    vector = steering_vector(MLP, norm="relative") if name == "vti" else steering_vector(2)
    with pytest.raises(ModelError, match="derived for"):
        export.exports[name].write(replace(vector, config_hash="x"), tmp_path / "v", shared_model())
    assert not list(tmp_path.iterdir())


# ---- activations -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def by_hand(model: Lvlm, example: Example, side: str) -> tuple[Any, np.ndarray]:
    """One plain forward: what it gives, and what goes into or comes out of every output projection, at the last token."""
    values: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.o_proj.register_forward_hook(lambda _m, a, o: values.append(a[0] if side == "input" else o))
        for layer in layers_of(model)
    ]
    out = model.hf(**model.encode(example).inputs, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    return out, np.stack([x[0, -1].numpy() for x in values])


def test_iti_activations(tmp_path: Path) -> None:
    model = shared_model()
    dataset = data(8)
    sites = ["z", "resid_post", "decoder.L0.resid_pre"]
    store = trace(model, dataset, sites=sites, tokens=["last"], out=tmp_path / "store")
    positive = np.array([e.answer == "yes" for e in dataset])
    positive[0] = True
    paths = export.iti_activations(Contrast.from_store(store, positive=positive), tmp_path / "features" / "toy", model)
    assert [p.name for p in paths] == ["toy_head_wise.npy", "toy_layer_wise.npy", "toy_labels.npy"]
    heads, layers, labels = (np.load(p, allow_pickle=False) for p in paths)
    np.testing.assert_array_equal(labels, positive.astype(int))
    for row, example in enumerate(dataset):
        out, zs = by_hand(model, example, "input")
        hidden = torch.stack([h[0, -1] for h in out.hidden_states])
        np.testing.assert_allclose(layers[row], hidden.numpy(), atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(heads[row], zs, atol=1e-4, rtol=1e-4)
    # What honest_llama's scripts make of the files is the vector of the release.
    split = heads.reshape(len(heads), 6, 8, model.head_dim).astype(np.float64)
    accuracies = {Head(i, k): float(i * 8 + k) for i in range(6) for k in range(8)}
    vector = derive.iti(
        Contrast.from_store(store, positive=positive), accuracy=accuracies, top=3, folds=2, variant="release"
    )
    assert vector.heads == (Head(5, 5), Head(5, 6), Head(5, 7))
    for head in vector.heads:
        own = split[:, head.layer, head.head]
        com = own[labels == 1].mean(0) - own[labels == 0].mean(0)
        com /= np.linalg.norm(com)
        np.testing.assert_allclose(vector.changes[head].direction, com, atol=1e-5)
        assert vector.changes[head].sigma == pytest.approx(np.std(own @ com), rel=1e-5)
    foreign = random_model()
    foreign.hf.config.text_config.rope_theta = 1.0  # another configuration, another hash
    with pytest.raises(ModelError, match="not traced from"):
        export.iti_activations(Contrast.from_store(store, positive=positive), tmp_path / "x", foreign)
    none = np.zeros(len(dataset), bool)
    with pytest.raises(PatchError, match="nothing to write"):
        export.iti_activations(Contrast.from_store(store, positive=none, negative=none), tmp_path / "x", model)


def test_ict_activations(tmp_path: Path) -> None:
    model = shared_model()
    blurred = [p for p in pairs("blur") if p.clean.named_object() is not None][:3]
    masked = [next(m for m in pairs("mask") if m.clean.id == p.clean.id) for p in blurred]
    paths = export.ict_activations(
        Contrast.from_pairs(model, blurred), Contrast.from_pairs(model, masked), tmp_path / "vectors"
    )
    assert [p.name for p in paths] == ["base.npy", "hallucinated.npy", "object.npy"]
    sides = ([p.clean for p in blurred], [p.corrupt for p in blurred], [p.corrupt for p in masked])
    for path, side in zip(paths, sides, strict=True):
        array = np.load(path, allow_pickle=False)
        assert array.shape == (3, 6, model.width)
        for row, example in enumerate(side):
            np.testing.assert_allclose(array[row], by_hand(model, example, "output")[1], atol=1e-4, rtol=1e-4)
    with pytest.raises(PatchError, match="same clean examples"):
        export.ict_activations(
            Contrast.from_pairs(model, blurred), Contrast.from_pairs(model, masked[::-1]), tmp_path / "no"
        )
