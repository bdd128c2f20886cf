"""Interventions on a model are part of the provenance of its activations and answers."""

from __future__ import annotations

import copy
import functools
import logging
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from activation_store import ActivationStore, trace
from activation_store.format.provenance_versions import convert_provenance
from behavior.answering import answer, answer_each
from circuits.attention_knockout import blocked
from circuits.interventions.intervention import Gate, Intervention, intervened
from circuits.interventions.transforms import Add, Zero
from concepts import ConceptDataset
from groundscope.core.errors import StoreError
from lvlm import Head, Lvlm, load_lvlm
from lvlm.active_interventions import ActiveIntervention, mark_observer
from lvlm.intervention_digest import digest_of
from lvlm.sites import Site
from mitigation.steering.changes import AddChange
from mitigation.steering.vector import SteeringVector
from tests.toys.examples import example

STORES = Path(__file__).parents[1] / "stores"
DATA = ConceptDataset("toy", tuple(example(n) for n in range(4)))
SITE = "decoder.L5.z"


@pytest.fixture(scope="module")
def model() -> Lvlm:
    return load_lvlm("tiny", validate=False)


@pytest.fixture(scope="module")
def plain(model: Lvlm, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    return traced(model, tmp_path_factory.mktemp("plain") / "store")


def traced(model: Lvlm, out: Path, **more: Any) -> ActivationStore:
    return trace(model, DATA, [SITE], ["last"], out, progress=False, **{"batch_size": 1, "shard_size": 2, **more})


def vectors(model: Lvlm) -> dict[str, SteeringVector]:
    u, v = np.eye(1, model.width, dtype=np.float32)[0], np.eye(1, model.head_dim, dtype=np.float32)[0]
    places: dict[str, Any] = {"L2": 2, "L2.H1": Head(2, 1), "decoder.L2.mlp_out": Site("decoder", 2, "mlp_out")}
    return {
        name: SteeringVector(
            {key: AddChange(v if isinstance(key, Head) else u)}, "last+generated", 9.0, "tiny", model.config_hash
        )
        for name, key in places.items()
    }


@pytest.mark.parametrize("place", ["L2", "L2.H1", "decoder.L2.mlp_out"])
def test_a_trace_names_the_vector_that_was_applied(
    model: Lvlm, plain: ActivationStore, place: str, tmp_path: Path
) -> None:
    vector = vectors(model)[place]
    assert "interventions" not in plain.provenance
    with vector.applied(model):
        steered = traced(model, tmp_path / "steered")
        (intervention,) = steered.provenance["interventions"]
        assert (intervention["kind"], intervention["name"]) == (
            "steering vector",
            f"add at {place}; last+generated, strength 9",
        )
        with pytest.raises(StoreError, match=rf"field 'provenance.interventions' differs.*{place}"):
            traced(model, plain.path)
        repeated = traced(model, tmp_path / "steered")  # under the same vector it is the same store
    assert repeated.digest == steered.digest
    for other in (
        nullcontext(),
        vector.applied(model, 8.0),
        vectors(model)["L2" if place != "L2" else "L2.H1"].applied(model),
    ):
        with other, pytest.raises(StoreError, match="interventions"):
            traced(model, tmp_path / "steered")
    assert model.interventions == ()
    assert not np.allclose(steered.read(SITE, "last"), plain.read(SITE, "last"))
    traced(model, plain.path)


def test_a_trace_that_was_cut_off_is_not_continued_under_a_vector(
    model: Lvlm, plain: ActivationStore, tmp_path: Path
) -> None:
    cut = Path(shutil.copytree(plain.path, tmp_path / "cut"))
    for name in ("manifest.json", "index.h5", "shard-0-00001.h5"):
        (cut / name).unlink()
    with (
        vectors(model)["L2"].applied(model),
        pytest.raises(StoreError, match=r"add at L2; last\+generated, strength 9"),
    ):
        traced(model, cut)
    assert len(ActivationStore(cut)) == 2
    np.testing.assert_array_equal(traced(model, cut).read(SITE, "last"), plain.read(SITE, "last"))


def test_weights_that_changed_in_memory_are_noticed(plain: ActivationStore) -> None:
    other = load_lvlm("tiny", validate=False)
    traced(other, plain.path)
    with torch.no_grad():
        other.hf.model.language_model.layers[0].mlp.down_proj.weight[3, 5] += 1e-4
    with pytest.raises(StoreError, match=r"field 'provenance.model.weights' differs"):
        traced(other, plain.path)


def test_attention_and_tokenizer_are_compared(plain: ActivationStore, model: Lvlm) -> None:
    with model.eager(), pytest.raises(StoreError, match=r"field 'provenance.model.attention' differs.*'sdpa'.*'eager'"):
        traced(model, plain.path)
    other = load_lvlm("tiny", validate=False)
    other.processor.tokenizer.backend_tokenizer.normalizer = None
    other.processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})
    with pytest.raises(StoreError, match=r"field 'provenance.processor.digest' differs"):
        traced(other, plain.path)


@pytest.mark.parametrize("kind", ["forward hook", "forward pre-hook", "replaced forward"])
def test_an_unknown_hook_is_recorded_and_refuses_to_join_other_rows(
    model: Lvlm, plain: ActivationStore, kind: str, tmp_path: Path
) -> None:
    if kind == "replaced forward":  # which nnsight must find when it first wraps a model
        model = load_lvlm("tiny", validate=False)
    inner = model.layers("decoder")[1].mlp.down_proj

    def touch(*_: Any) -> None:
        return None

    def forward(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.Linear.forward(inner, x)

    if kind == "replaced forward":
        inner.forward = forward
        undo: Callable[[], Any] = lambda: delattr(inner, "forward")  # noqa: E731
    else:
        undo = (inner.register_forward_hook if kind == "forward hook" else inner.register_forward_pre_hook)(
            touch
        ).remove
    try:
        (description,) = model.unregistered_hooks
        assert description.startswith("model.language_model.layers.1.mlp.down_proj: ")
        assert "test_tracer_applied.test_an_unknown_hook" in description
        assert description.endswith(f"({kind})")
        store = traced(model, tmp_path / "new")
        assert store.provenance["hooks"] == [description]
        for out, more in ((plain.path, {}), (tmp_path / "new", {}), (tmp_path / "other", {"workers": 2})):
            with pytest.raises(
                StoreError, match=r"while hooks act on tiny whose effect is not known: model\.language"
            ) as e:
                traced(model, out, **more)
            assert "\n" not in str(e.value)
        assert answer(model, DATA, progress=False).provenance["hooks"] == [description]
    finally:
        undo()
    assert model.unregistered_hooks == ()
    if kind != "replaced forward":
        with pytest.raises(StoreError, match=r"provenance\.hooks"):
            traced(model, tmp_path / "new")


def test_a_forward_that_was_replaced_on_the_class_is_found(model: Lvlm, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the code of several published corrections does, also under the name of what it replaces."""
    kind = type(model.layers("decoder")[1])
    real = kind.forward

    def doubled(self: Any, *args: Any, **options: Any) -> Any:
        return real(self, *args, **options)

    for patch in (doubled, functools.wraps(real)(doubled)):
        with monkeypatch.context() as patched:
            patched.setattr(kind, "forward", patch)
            (description,) = model.unregistered_hooks
            assert description.startswith("model.language_model.layers.0: ")
            assert description.endswith("(replaced forward of the class)")
        assert model.unregistered_hooks == ()


def test_a_model_in_training_mode_is_no_plain_model(model: Lvlm) -> None:
    model.hf.train()
    try:
        assert "training mode" in model.unregistered_hooks[0]
    finally:
        model.hf.eval()
    assert model.unregistered_hooks == ()


def test_observers_and_hooks_of_libraries_are_no_changes(model: Lvlm, plain: ActivationStore) -> None:
    """transformers collects outputs by hooks, nnsight and accelerate replace ``forward`` of every module."""
    import accelerate

    handle = model.hf.register_forward_pre_hook(mark_observer(lambda *_: None))
    watched = model.locate("decoder.L2.z").watch(lambda _: None)
    assert model.unregistered_hooks == ()
    assert traced(model, plain.path).digest == plain.digest
    handle.remove()
    edited = model.locate("decoder.L2.z").edit(lambda x: x)
    assert len(model.unregistered_hooks) == 1
    edited.remove()
    watched.remove()
    away = copy.deepcopy(model.hf)
    accelerate.cpu_offload(away, execution_device=torch.device("cpu"))
    assert Lvlm(away, model.processor, model.spec, "away").unregistered_hooks == ()


def test_global_hooks_and_copied_hooks_are_found(model: Lvlm) -> None:
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert [h for h in model.unregistered_hooks if h.startswith("all modules: ")]
    finally:
        handle.remove()
    with vectors(model)["L2"].applied(model):
        assert model.unregistered_hooks == ()
        copied = Lvlm(copy.deepcopy(model.hf), model.processor, model.spec, "copy")
    # The copy keeps the hook, which is not registered there.
    assert copied.interventions == ()
    assert len(copied.unregistered_hooks) == 1


def test_every_intervention_registers_itself_and_ends(model: Lvlm) -> None:
    layer = Intervention(Site("decoder", 1, "z"), Zero(), "last+generated", head=2)
    block = torch.zeros(1, 3, 3, dtype=torch.bool)
    with intervened(model, [layer]), blocked(model, [0, 1], block), vectors(model)["L2"].applied(model):
        kinds = [(intervention.kind, intervention.name) for intervention in model.interventions]
        assert kinds[:2] == [
            ("intervention", "decoder.L1.z of head 2"),
            ("attention knockout", "layers 0, 1"),
        ]
        assert kinds[2][0] == "steering vector"
        assert all(intervention.digest for intervention in model.interventions)
    with intervened(model, []):
        assert model.interventions == ()
    registration = model.register(ActiveIntervention("mine", "by hand", lambda: "d"))
    assert [intervention.record() for intervention in model.interventions] == [
        {"kind": "mine", "name": "by hand", "digest": "d"}
    ]
    registration.remove()
    registration.remove()
    assert model.interventions == ()
    with pytest.raises(ZeroDivisionError), intervened(model, [layer]):
        raise ZeroDivisionError
    assert model.interventions == ()


def test_a_digest_names_all_that_a_change_does() -> None:
    base = Intervention(Site("decoder", 1, "z"), Add(torch.ones(4)), "last+generated", head=2)
    gate = Gate(Site("decoder", 0, "z"), torch.ones(4), 0.5)
    same = Intervention(Site("decoder", 1, "z"), Add(torch.ones(4)), "last+generated", head=2)
    others = [
        replace(base, change=Add(torch.ones(4) * 2)),
        replace(base, change=Add(torch.ones(4), "kept")),
        replace(base, change=Zero()),
        replace(base, positions="all"),
        replace(base, positions=(1, 2)),
        replace(base, head=1),
        replace(base, rows=(0,)),
        replace(base, gate=gate),
        replace(base, gate=replace(gate, bias=0.25)),
        replace(base, decay=0.5),
        replace(base, site=Site("decoder", 2, "z")),
    ]
    digests = [digest_of([item]) for item in (base, *others)]
    assert len(set(digests)) == len(digests)
    assert None not in digests
    assert digest_of([same]) == digests[0]
    assert digest_of([replace(base, change=lambda x: x)]) is None


def test_a_change_without_a_digest_refuses_to_join_other_rows(model: Lvlm, tmp_path: Path) -> None:
    own = Intervention(Site("decoder", 1, "z"), lambda x: 2 * x, "last+generated")
    with intervened(model, [own]):
        store = traced(model, tmp_path / "new")
        assert store.provenance["interventions"] == [{"kind": "intervention", "name": "decoder.L1.z", "digest": None}]
        with pytest.raises(StoreError, match=r"whose effect is not known: intervention decoder\.L1\.z"):
            traced(model, tmp_path / "new")


def test_answers_name_what_was_applied(model: Lvlm) -> None:
    vector = vectors(model)["L2"]
    with vector.applied(model):
        provenance = answer(model, DATA, progress=False).provenance
    assert provenance["interventions"][0]["name"] == "add at L2; last+generated, strength 9"
    each = answer_each(model, DATA, {"plain": nullcontext, "steered": lambda: vector.applied(model)}, progress=False)
    assert "interventions" not in each["plain"].provenance
    assert each["steered"].provenance["interventions"] == provenance["interventions"]
    assert "interventions" not in answer(model, DATA, progress=False).provenance


# -- stores of the first release -------------------------------------------------------------------------------------


def test_a_store_of_the_first_release_is_continued_in_its_form(
    model: Lvlm, plain: ActivationStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its two rows were traced by the first release, with the old hash of weights and the old digest of the processor."""
    old = Path(shutil.copytree(STORES / "traced-1", tmp_path / "old"))
    before = (old / "shard-0-00000.h5").read_bytes()
    with caplog.at_level(logging.WARNING, logger="activation_store"):
        store = traced(model, old)
    assert store.complete
    assert (old / "shard-0-00000.h5").read_bytes() == before
    assert "version" not in store.provenance
    assert ":" not in store.provenance["model"]["weights"]
    np.testing.assert_allclose(store.read(SITE, "last"), plain.read(SITE, "last"), atol=1e-4)
    assert "equal samples do not prove equal models" in caplog.text
    with vectors(model)["L2"].applied(model), pytest.raises(StoreError, match="add at L2"):
        traced(model, old)
    changed = load_lvlm("tiny", validate=False)
    with torch.no_grad():
        changed.hf.model.language_model.layers[0].mlp.down_proj.weight.mul_(3.0)
    with pytest.raises(StoreError, match=r"provenance\.model\.weights"):
        traced(changed, old)
    more = ConceptDataset("toy", tuple(replace(e, id=f"more-{e.id}") for e in DATA))
    new = trace(model, more, [SITE], ["last"], tmp_path / "new", progress=False)
    assert len(store.merge(new)) == len(new.merge(store)) == 8


def test_forms_are_converted_to_the_older_one_only() -> None:
    new = {
        "version": 2,
        "model": {
            "weights": "sha256:1",
            "weights-sample": "s",
            "attention": "sdpa",
            "family": {"a": 1, "b": {"c": 2, "d": 3}},
        },
        "processor": {"class": "P", "digest": "n", "settings": "o"},
        "generate": {"most_tokens": 3, "decoding": "greedy", "ends": [1], "left-out": []},
    }
    old = {"model": {"weights": "s", "family": {"a": 1, "b": {"c": 2}}}}
    assert convert_provenance(new, old) == {
        "model": {"weights": "s", "family": {"a": 1, "b": {"c": 2}}},
        "processor": {"class": "P", "digest": "o"},
        "generate": {"most_tokens": 3, "decoding": "greedy"},
    }
    assert convert_provenance(new, new) == new
    assert convert_provenance(old, new) == old
    followed = {**new, "generate": {**new["generate"], "left-out": ["num_beams"]}}
    assert convert_provenance(followed, old)["generate"]["decoding"] == "greedy without num_beams"
    assert convert_provenance({"model": "m"}, {"model": "m"}) == {"model": "m"}
