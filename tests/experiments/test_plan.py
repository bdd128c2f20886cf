"""``groundscope plan``: sizes against a real run, without weights, in bounded time; selections that a run does not trace."""

from __future__ import annotations

import io
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from activation_store import ActivationStore
from concepts import scenes
from experiments.cli.overrides import compose
from experiments.cli.plan import show
from experiments.planning import times
from experiments.planning.estimate import MOST_SECONDS, estimate
from experiments.run.context import Context
from experiments.run.folder import RunFolder
from experiments.stages.trace import trace_into, traced_examples, traced_tokens
from groundscope.core.errors import ConfigError
from lvlm import Lvlm, load_lvlm
from lvlm.embedded_models import folder_of
from lvlm.thin_model import count_flops, thin_model
from tests.toys.pope_files import pope_folder


@pytest.fixture(scope="module")
def pope(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pope")
    pope_folder(folder, 12)
    return folder


@pytest.fixture(scope="module")
def loaded() -> Lvlm:
    return load_lvlm("tiny")


def context(folder: Path, *options: str, model: Lvlm | None = None) -> Context:
    data = ("data=pope", f"data.questions={folder}/pope_random.json", f"data.images={folder}/images")
    config, _ = compose([*data, f"root={folder}/runs", "threads=1", *options])
    run_context = Context(config, RunFolder(folder / "runs" / "x"), Console(file=io.StringIO()))
    if model is not None:
        run_context.__dict__["model"] = model
    return run_context


def real_bytes(root: Path) -> int:
    return sum(p.stat().st_size for p in root.rglob("*") if p.is_file())


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("trace=heads", "trace.dtype=bfloat16", "trace.layers=[1,4]", "trace.unembedding=true"),
        ("trace.sites=[z,resid_post]", "trace.tokens=[last]", "trace.heads=[2,7]"),
        (
            "trace.sites=[resid_post]",
            "trace.dtype=float16",
            "+trace.reduce.rank={tokens: 'image:all', words: [dog, cat]}",
        ),
        ("trace.sites=[resid_post]", "trace.tokens=[last,image:all]", "trace.dtype=float16"),
    ],
    ids=["default", "heads", "some-heads", "reduced", "every-token"],
)
def test_planned_bytes_are_those_of_a_real_trace(
    options: tuple[str, ...], pope: Path, loaded: Lvlm, tmp_path: Path
) -> None:
    run_context = context(pope, *options, model=loaded)
    store = trace_into(run_context, tmp_path / "store")
    plan = estimate(run_context, seconds=0.01)
    assert plan.examples == len(store)
    assert set(plan.sites) == {info.name for info in (*store.arrays, *store.reductions)}
    if layers := run_context.config.trace.layers:
        assert all(info.layers == tuple(layers) for info in store.arrays)
    assert bool(store.tensors) == run_context.config.trace.unembedding
    assert plan.on_disk == pytest.approx(real_bytes(tmp_path / "store"), rel=0.3)
    width = {"float32": 4, "float16": 2, "bfloat16": 2}[run_context.config.trace.dtype]
    for info in store.reductions:
        assert plan.sites[info.name] == len(store) * 49 * info.n_layers * 2 * 4  # two words, in float32
    for info in store.arrays:
        tokens = 49 if info.ragged else 1
        assert plan.sites[info.name] == pytest.approx(len(store) * tokens * info.n_layers * info.width * width)


def test_the_unembedding_counts_once(pope: Path, loaded: Lvlm) -> None:
    run_context = context(pope, "trace=heads", "trace.unembedding=true", model=loaded)
    few, many = (estimate(run_context, examples=n, seconds=0.01) for n in (512, 1024))
    own = sum(p.numel() * 4 for p in (loaded.hf.lm_head.weight, loaded.hf.model.language_model.norm.weight))
    # What is left of the smaller store when the larger one's growth is taken off is there once.
    constant = few.on_disk - (many.on_disk - few.on_disk)
    assert constant == pytest.approx(own, rel=0.01)


def test_sizes_need_no_weights(
    pope: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder_of("tiny"), tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
    options = ("model=hf", f"model.path={tmp_path / 'model'}", "trace=heads")
    monkeypatch.setattr(times, "THIN_BYTES", 0)
    plan = estimate(context(pope, *options))
    assert (plan.measured, plan.seconds, plan.loading, plan.hours(1)) == (0, None, None, None)
    whole = estimate(context(pope, "trace=heads", model=load_lvlm("tiny")), seconds=0.01)
    assert (plan.sites, plan.forwards) == (whole.sites, whole.forwards)
    assert plan.on_disk == pytest.approx(whole.on_disk, rel=0.01)
    data = ("data=pope", f"data.questions={pope}/pope_random.json", f"data.images={pope}/images")
    assert show([*data, *options, "threads=1"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "hours are not estimated, because the weights of" in output
    assert "sizes from the configuration" in output


def test_a_thin_model_stands_in_for_weights(
    pope: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 10 s, two decoder layers take 4 s and two vision layers 2 s: the model has 6 and 4, and 12 questions on 12 images."""
    shutil.copytree(folder_of("tiny"), tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
    monkeypatch.setattr(times, "time_layers", lambda *_: (10.0, {"decoder": 4.0, "vision": 2.0}))
    options = ("model=hf", f"model.path={tmp_path / 'model'}", "trace=heads")
    run_context = context(pope, *options)
    plan = estimate(run_context, examples=10)
    images = len({e.image.identity for e in traced_examples(run_context)}) / len(traced_examples(run_context))
    assert plan.method == "thin"
    assert plan.seconds == pytest.approx(11 * (4 + 4 * 6 / 2 + images * 2 * 4 / 2))
    assert (
        plan.weights == sum(p.numel() * 4 for p in load_lvlm("tiny", dtype="float32").hf.parameters()) // 2
    )  # bfloat16
    data = ("data=pope", f"data.questions={pope}/pope_random.json", f"data.images={pope}/images")
    assert show([*data, *options, "threads=1"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "with two layers of random weights" in output
    assert "without the time to load the model and to write" in output


def test_times_within_layers_are_those_of_their_hooks(loaded: Lvlm) -> None:
    """The first hook of a layer runs before the timer starts, the second while it runs."""
    encoding = loaded.encode(scenes.dataset(10, 0).examples[0])
    thin = thin_model(loaded)
    hooks = [m.register_forward_hook(lambda *_: time.sleep(0.1)) for m in thin.layers("decoder")]
    try:
        spent, parts = times.time_layers(thin, encoding)
    finally:
        for hook in hooks:
            hook.remove()
    assert 0.2 <= parts["decoder"] < spent
    assert 0 < parts["vision"] < spent - 0.2
    assert (thin.n_layers, thin.n_vision_layers) == (2, 2)


def test_operations_are_those_that_torch_counts(loaded: Lvlm) -> None:
    """Without patch embedding and norms."""
    encoding = loaded.encode(scenes.dataset(10, 0).examples[0])
    inputs = loaded.collate([encoding])
    with loaded.eager(), FlopCounterMode(display=False) as counter:
        loaded.logits(inputs)
    assert sum(count_flops(loaded, encoding)) == pytest.approx(counter.get_total_flops(), rel=0.04)


def test_a_device_that_is_not_there_is_counted_and_marked(pope: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    plan = estimate(context(pope, "model.device=cuda"), tflops=2.0)
    assert (plan.method, plan.measured) == ("operations", 0)
    assert plan.seconds == pytest.approx(plan.tera_operations / 2)
    data = ("data=pope", f"data.questions={pope}/pope_random.json", f"data.images={pope}/images")
    assert show([*data, "model.device=cuda", "tflops=50", "threads=1"]) == 0
    assert "not checked: this machine has no device 'cuda'" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ConfigError, match="tflops must be above 0"):
        show([*data, "tflops=0"])


def test_a_long_forward_is_stopped_between_two_layers(loaded: Lvlm) -> None:
    hooks = [
        layer.register_forward_hook(lambda *_: time.sleep(0.2)) for layer in loaded.layers("decoder")
    ]  # 1.2 s in all
    try:
        start = time.perf_counter()
        took = times.time_one_forward(loaded, loaded.encode(scenes.dataset(10, 0).examples[0]), 0.3)
        spent = time.perf_counter() - start
    finally:
        for hook in hooks:
            hook.remove()
    assert took >= 1.2
    assert spent < took - 0.4  # at least two layers did not run


def test_measuring_time_has_an_upper_bound(pope: Path, loaded: Lvlm, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []

    def measure(_options: object, _model: object, _data: object, _tokens: object, seconds: float) -> tuple[int, float]:
        limits.append(seconds)
        return 1, 2.0

    monkeypatch.setattr("experiments.planning.estimate.measure_trace", measure)
    plan = estimate(context(pope, "trace=heads", model=loaded), examples=10, seconds=1e9)
    assert limits == [MOST_SECONDS]
    assert MOST_SECONDS <= 60
    assert plan.seconds == 20.0


def test_selections_that_no_example_has_are_not_traced(pope: Path, loaded: Lvlm, tmp_path: Path) -> None:
    run_context = context(pope, model=loaded)
    assert traced_tokens(run_context) == ["last", "image:mean"]
    store = trace_into(run_context, tmp_path / "store")
    assert {info.tokens for info in store.arrays} == {"last", "image:mean"}
    assert len(store.arrays) == 8
    for info in store.arrays:
        site = "projector.out" if info.stack == "projector" else f"{info.stack}.L{info.layers[0]}.{info.component}"
        assert np.isfinite(ActivationStore(store.path).read(site, info.tokens)).any(), info.name
    with pytest.raises(ConfigError, match="no question of these data has a box"):
        traced_tokens(context(pope, "trace.tokens=[object:mean]"))
    config, _ = compose(["data.n_images=10", "data.test_images=10", f"root={tmp_path}"])
    icon_context = Context(config, RunFolder(tmp_path / "y"), Console(file=io.StringIO()))
    assert traced_tokens(icon_context) == ["last", "image:mean", "object:mean"]
    assert len(traced_examples(icon_context))


def test_validation_can_be_left_out_and_changes_no_key(pope: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags: list[bool] = []
    monkeypatch.setattr("lvlm.load_lvlm", lambda *_args, validate, **_more: flags.append(validate), raising=False)
    contexts = [context(pope, option) for option in ("model.validate=true", "model.validate=false")]
    for run_context in contexts:
        run_context._load("tiny")
    assert flags == [True, False]
    assert contexts[0].model_key() == contexts[1].model_key()
