"""What the page about adding to the house says is done as it says, in a copy of the house, and works."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from transformers import VipLlavaConfig, VipLlavaForConditionalGeneration

from activation_store import trace
from concepts import scenes
from lvlm import load_lvlm
from lvlm.tiny.architecture import build_model, build_processor
from tests.toys.processes import run_code

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.M | re.S))
BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```", flags=re.M | re.S)
# What must be true at the end of each section's session.
TRUE = {
    "A loader": """
assert [e.question for e in data] == ["Is there a pear in the image?", "Is there a bell in the image?"]
assert [e.answer for e in data] == ["yes", "no"]
assert data.provenance["loader"] == "presence"
""",
    "A kind of counterfactual pair": """
assert all(p.clean.question == p.corrupt.question and p.clean.answer != p.corrupt.answer for p in pairs)
assert len(pairs) > 5
""",
    "A metric of patching": """
import numpy as np
assert (scores.metric, same.metric) == ("certainty", "certainty.certainty")
assert scores.n_pairs == 4
np.testing.assert_array_equal(scores.effects, same.effects)
""",
    "A method that derives a vector": """
import numpy as np
labels = store.frame()["object:named"].to_numpy(float)
x = store.read("decoder.L2.resid_post", "last").astype(np.float64)
expected = np.median(x[labels == 1], axis=0) - np.median(x[labels == 0], axis=0)
np.testing.assert_allclose(vector.changes[2].direction, expected / np.linalg.norm(expected), atol=1e-6)
assert vector.provenance["method"] == "median difference"
data = gs.DerivationData(gs.load_lvlm("tiny"), store, gs.scenes.dataset(10))
assert gs.mitigations["median"].make(data).layers == (3,)
""",
    "An export": """
import numpy as np, pytest
assert "rows" in gs.export.formats_for(vector)
rows = np.load(path)
assert np.flatnonzero(np.abs(rows).sum(1)).tolist() == [2]
np.testing.assert_allclose(rows[2], vector.changes[2].sigma * vector.changes[2].direction, rtol=1e-5)
from groundscope.core.errors import ConfigError
from lvlm import Head
at_heads = gs.derive.mean_difference(contrast, heads=[Head(2, 1)], positions="all")
with pytest.raises(ConfigError, match="export it as .*formats_for"):
    gs.exports["rows"].write(at_heads, "rows.npy", model)
""",
    "A benchmark": """
assert (score.figures["accuracy"].value, score.missing, score.tasks) == (1.0, 1, {"2": "yes/no"})
assert score.answers.answers[0].level == "attribute"
""",
    "A family": """
assert model.spec.notes == "features of several vision layers" and (model.n_layers, model.n_heads) == (6, 8)
""",
}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the packages, with all that the page adds."""
    folder = tmp_path_factory.mktemp("house")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for _, title, body in BLOCK.findall(PAGE):
        if not title:
            continue
        file = folder / title
        if body.startswith((" ", "+")):
            lines = file.read_text(encoding="utf-8").splitlines()
            place = -1
            for line in body.splitlines():
                if line.startswith("+"):
                    place += 1
                    lines.insert(place, line[1:])
                else:
                    assert lines.count(line[1:]) == 1, f"{title}: {line}"
                    place = lines.index(line[1:])
            file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        else:
            assert not file.exists()
            file.write_text(body, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lay out what the sessions open: a file with its images, a store, a model of another type."""
    folder = tmp_path_factory.mktemp("desk")
    data = scenes.dataset(n_images=12, seed=1).filter(lambda e: e.kind == "existence")
    (folder / "images").mkdir()
    data[0].image.load().save(folder / "images" / "a.png")
    rows = [{"image": "a.png", "noun": "pear", "present": True}, {"image": "a.png", "noun": "bell", "present": False}]
    (folder / "presence.jsonl").write_text("\n".join(map(json.dumps, rows)))
    trace(load_lvlm("tiny"), data, sites=["resid_post", "z"], tokens=["last"], out=folder / "activations")
    small = build_model().config
    torch.manual_seed(0)
    about = {"image_token_index": small.image_token_id, "vision_feature_layers": [-2, -1]}
    config = VipLlavaConfig(vision_config=small.vision_config, text_config=small.text_config, **about)
    other = VipLlavaForConditionalGeneration(config)
    other.save_pretrained(folder / "vip-llava")
    build_processor().save_pretrained(folder / "vip-llava")
    return folder


def test_the_page_describes_every_tested_extension() -> None:
    assert set(SECTIONS) == set(TRUE)


@pytest.mark.parametrize("section", TRUE)
def test_extensions_of_the_page_work(section: str, house: Path, desk: Path) -> None:
    session = "".join(body for kind, title, body in BLOCK.findall(SECTIONS[section]) if kind == "python" and not title)
    assert session
    done = run_code(session + TRUE[section], desk, path=[house], reload=True)
    assert done.returncode == 0, done.stderr


def test_extensions_of_the_page_pass_lint_and_types(house: Path) -> None:
    added = [str(house / title) for _, title, _ in BLOCK.findall(PAGE) if title.endswith(".py")]
    done = subprocess.run(
        [Path(sys.executable).parent / "ruff", "check", "--no-cache", "--config", ROOT / "pyproject.toml", *added],
        cwd=house, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
