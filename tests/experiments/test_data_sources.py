"""A run's data from user files: every loader by name, with its own options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from rich.console import Console

from concepts import loaders
from experiments.config import DataConfig, RunConfig
from experiments.run.context import Context
from experiments.run.folder import RunFolder
from groundscope.core.errors import ConfigError


def context(folder: Path, **data: Any) -> Context:
    config = RunConfig(root=str(folder), data=DataConfig(questions=str(folder / "q.json"), images=str(folder), **data))
    return Context(config, RunFolder(folder), Console())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    document: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": f"n{i}"} for i in range(9)],
    }
    for i in range(12):
        Image.new("RGB", (2, 2)).save(tmp_path / f"{i}.png")
        document["images"].append({"id": i, "file_name": f"{i}.png"})
        document["annotations"].append({"id": i, "image_id": i, "category_id": i % 9, "bbox": [0, 0, 1, 1]})
    (tmp_path / "q.json").write_text(json.dumps(document))
    (tmp_path / "c.json").write_text(json.dumps({"annotations": [{"image_id": 3, "caption": "A thing."}]}))
    return tmp_path


def test_coco_with_captions_in_two_parts_that_share_no_image(folder: Path) -> None:
    run_context = context(folder, source="coco", loader={"captions": str(folder / "c.json"), "seed": 4})
    discovery, evaluation = run_context.parts
    assert len(discovery) + len(evaluation) == 25
    assert not {e.group for e in discovery} & {e.group for e in evaluation}
    assert sum(e.kind == "caption" for part in run_context.parts for e in part) == 1
    assert discovery.provenance["seed"] == 4


def test_mistakes_name_what_there_is(folder: Path) -> None:
    for data, words in (
        ({"source": "cocoa"}, "data.source=cocoa: choose from scenes, amber, aro, .*; did you mean coco"),
        (
            {"source": "coco", "loader": {"caption": "x"}},
            r"loader 'coco' has no option 'caption'; choose from captions, outlines, per_image, seed; did you mean captions",
        ),
        ({"source": "vsr", "loader": {"limit": 3}}, r"data\.loader\.limit: set data\.limit"),
        ({"source": "amber"}, "loader 'amber' needs the option 'annotations'; its options are annotations"),
    ):
        with pytest.raises(ConfigError, match=words):
            _ = context(folder, **data).parts
    with pytest.raises(ConfigError, match="data=vsr needs data"):
        _ = Context(RunConfig(data=DataConfig(source="vsr")), RunFolder(folder), Console()).parts


def test_every_loader_has_its_line_in_the_configuration() -> None:
    folder = Path(__file__).resolve().parents[2] / "experiments" / "conf" / "data"
    sources = {path.stem: yaml.safe_load(path.read_text())["source"] for path in folder.glob("*.yaml")}
    assert sources == {name: name for name in ("scenes", *loaders.LOADERS)}


def test_a_table_needs_no_folder_of_images(tmp_path: Path) -> None:
    rows = [f"{i}.png,Is there a dog in the image?,no,{'yes' if i % 3 else ''}" for i in range(12)]
    for i in range(12):
        Image.new("RGB", (2, 2)).save(tmp_path / f"{i}.png")
    (tmp_path / "q.csv").write_text("\n".join(["image,question,answer,mine", *rows]))
    config = RunConfig(root=str(tmp_path), data=DataConfig(source="table", questions=str(tmp_path / "q.csv")))
    parts = Context(config, RunFolder(tmp_path), Console()).parts
    assert sum("mine" in e.labels for part in parts for e in part) == 8
    assert not {e.group for e in parts[0]} & {e.group for e in parts[1]}
    with pytest.raises(ConfigError, match=r"data=table needs data.questions=FILE$"):
        _ = Context(RunConfig(data=DataConfig(source="table")), RunFolder(tmp_path), Console()).parts
