"""Heads are localized on a user's files: every source of pairs, from annotation files to the files of the patch stage."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from circuits import HeadScores
from concepts import scenes
from concepts.schema import ConceptDataset
from experiments.config import DataConfig, ModelConfig, PatchConfig, RunConfig
from experiments.report.sections.patching import patching_section
from experiments.results.run_files import RunFiles
from experiments.run.context import Context
from experiments.run.folder import RunFolder
from experiments.stages import patch
from experiments.validation import check
from groundscope.core.errors import ConfigError
from groundscope.testing.annotation_files import FORMATS, AnnotationFiles, save_annotations
from lvlm import load_lvlm
from lvlm.model import Lvlm
from tests.toys.command_line import run_command

KINDS = {
    "coco": {"object"},
    "gqa": {"object", "color", "attribute", "relation"},
    "visual_genome": {"object", "color", "attribute", "relation"},
    "vaw": {"color", "attribute"},
    "pope": {"object"},
    "whatsup": {"relation"},
    "pairs": {"object", "color", "relation"},
}
"""Kinds of pairs that the annotations of each source allow."""


@pytest.fixture(scope="module")
def data() -> ConceptDataset:
    return scenes.dataset(32, seed=3)


@pytest.fixture(autouse=True)
def _without_illustrations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch, "illustrate_heads", lambda *_: None)


@pytest.fixture(scope="module")
def model() -> Lvlm:
    return load_lvlm("tiny")


def context_of(files: AnnotationFiles, root: Path, model: Lvlm, **options: object) -> Context:
    config = RunConfig(
        root=str(root), name=files.source,
        data=DataConfig(
            source=files.source, questions=str(files.file), images=str(files.images), loader=dict(files.options),
            test_share=0.2,
        ),
        patch=replace(PatchConfig(pairs=4), **options),
    )  # fmt: skip
    context = Context(config, RunFolder(root / files.source), Console(quiet=True))
    context.__dict__["model"] = model
    return context


@pytest.mark.parametrize("source", FORMATS)
def test_heads_are_localized_by_every_kind_of_pair_that_the_annotations_allow(
    source: str, data: ConceptDataset, model: Lvlm, tmp_path: Path
) -> None:
    root = tmp_path / source / "circuits"
    root.mkdir(parents=True)
    context = context_of(save_annotations(data, tmp_path / "files", source), tmp_path, model)
    patch.check(context)
    summary = patch.make_head_scores(context, root)
    run = RunFiles(tmp_path / source)
    assert set(run.head_scores) == KINDS[source], summary
    assert "blank" not in run.head_scores
    for kind, card in run.pairs.items():
        assert sum(card["outcomes"].values()) == card["made"] == 4
        assert card["method"] in {"swap", "mirror", "given"}
        assert run.head_scores[kind].n_pairs == card["used"]
        placebo = run.control_scores("placebo").get(kind)
        assert (placebo.n_pairs if placebo else 0) == card["placebo"]["used"]
        assert (card["placebo"]["used"] > 0) is (card["placebo"].get("reason") is None)
    # The head that carries objects in every scene carries them on the user's files too.
    if "object" in run.head_scores and source != "pairs":
        assert str(run.head_scores["object"].top(1)[0]) == "L4.H7"
        assert run.control_scores("placebo")["object"].mean[4, 7] < 0.5 * run.head_scores["object"].mean[4, 7]
    text = patching_section(run)
    assert ("Placebo pairs: photographs" in text) is bool(run.control_scores("placebo"))
    assert '<th scope="col">right on both</th>' in text


def test_the_command_puts_images_on_a_canvas(
    data: ConceptDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = save_annotations(data[:100], tmp_path / "files", "vaw")
    status, output, errors = run_command(
        ("data=vaw", f"data.questions={files.file}", f"data.images={files.images}", "data.canvas=140x112", "patch.pairs=4",
         "patch.kinds=[color]", "patch.methods=[recolor]", "stages=[examples,patch]", "threads=1", "root=runs"),
        tmp_path, monkeypatch, capsys,
    )  # fmt: skip
    assert status == 0, errors
    assert "color by recolor; every head patched exactly" in output
    run = RunFiles(tmp_path / "runs" / "default")
    assert run.pairs["color"]["method"] == "recolor"
    example = next(iter(run.examples.values()))
    assert json.loads(example.image.identity)[:2] == ["canvas", [140, 112]]
    assert all(14 <= o.box.x0 <= 126 for o in example.objects if o.box)


def test_methods_that_make_none_of_a_kind_leave_it_out(data: ConceptDataset, model: Lvlm, tmp_path: Path) -> None:
    files = save_annotations(data[:100], tmp_path / "files", "gqa")
    context = context_of(files, tmp_path, model, methods=["mirror"], placebo=False)
    root = tmp_path / "gqa" / "circuits"
    root.mkdir(parents=True)
    patch.make_head_scores(context, root)
    top = json.loads((root / "top.json").read_text())
    assert top["kinds"] == ["relation"]
    reason = top["left_out"]["object"]
    assert reason == "none of the methods mirror makes pairs of kind 'object'; choose from given, swap, inpaint"
    assert not (root / "controls" / "relation-placebo.safetensors").exists()
    assert HeadScores.load(root / "relation.safetensors").n_pairs == top["pairs"]["relation"]["used"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": {"source": "coco", "canvas": "224"}}, "data.canvas=224: write width and height in pixels, such as"),
        ({"data": {"canvas": "224x224"}}, "data.canvas has no effect with data=scenes"),
        (
            {"patch": {"methods": ["recolour"]}},
            "patch.methods: unknown method of pairs 'recolour'.*did you mean recolor",
        ),
        ({"patch": {"methods": []}}, r"patch.methods=\[\]: choose from given, swap"),
        ({"patch": {"kinds": []}}, r"patch.kinds=\[\]: choose from"),
    ],
)
def test_wrong_options_are_one_sentence(options: dict[str, dict[str, object]], message: str, tmp_path: Path) -> None:
    data, patching = options.get("data", {}), options.get("patch", {})
    config = RunConfig(
        model=ModelConfig(path="tiny"), data=replace(DataConfig(), **data), patch=replace(PatchConfig(), **patching)
    )
    context = Context(config, RunFolder(tmp_path), Console(quiet=True))

    def check_all() -> None:
        check(config)
        patch.check(context)

    with pytest.raises(ConfigError, match=message):
        check_all()
