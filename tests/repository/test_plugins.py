"""Installed packages extend the open tables: one with an entry in each group, and one whose entries cannot be loaded."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from tests.toys.processes import Finished, run_code

ROOT = Path(__file__).resolve().parents[2]

GOOD = '''
"""A plug-in of groundscope: a loader, kinds of pairs and of metrics, an estimator, a mitigation, an export and a family."""

import json
from dataclasses import replace

from sklearn.svm import LinearSVC

from behavior.benchmarks import BENCHMARKS, Reading
from behavior.card import SURVEY_ROWS
from behavior.metrics import BehaviorMetric
from concepts import ConceptDataset, CounterfactualPair, Example
from concepts.image_files import FileImage
from experiments.report import Section, html
from lvlm import FamilySpec
from mitigation import Capability, Export, MitigationMethod, derive
from mitigation.methods import blank_contrast
from probes import PredictiveFamily
from probes.information.linear import fit_linear


SPEC = FamilySpec("my_llava", template="Human: {image}{question} Assistant:")


def load_tags(file, images, *, noun="pear"):
    about = {"question": f"Is there a {noun} in the image?", "candidates": ("yes", "no"), "level": "object"}
    return ConceptDataset("tags", tuple(
        Example(id=name, image=FileImage(images / name, name), answer=tag, kind="existence", split="neutral", group=name,
                **about)
        for name, tag in json.loads(file.read_text()).items()
    ))


def swap_images(data):
    for first, second in zip(data, data[1:]):
        if first.answer != second.answer:
            yield CounterfactualPair(first, replace(second, group=first.group), "swap", f"image of {second.id}")



def write_text(vector, path, model):
    path.write_text(str(vector))
    return path


text_file = Export(write_text, Capability("people", "nowhere", ("heads",), kinds=("amplify",), positions=("last+generated",)))
amplify_more = MitigationMethod(lambda data: derive.amplification(blank_contrast(data), heads=data.heads, strength=2))
tags_section = Section("Tags", lambda run: html.section("tags", "Tags", html.paragraph(f"{len(run.examples)} tags")))
yes_ratio = BehaviorMetric(lambda a: set(a.candidates) == {"yes", "no"}, lambda a: a.given == "yes")
svm = LinearSVC(C=0.01)
strict_family = PredictiveFamily(fit_linear, (1.0,))
tags_row = SURVEY_ROWS["POPE"]
tags_benchmark = replace(BENCHMARKS["r_bench"], title="Tags")


def read_tagged(record, layout):
    return Reading(str(record.values["tag"]), record.values["said"]) if "tag" in record.values else None


def spread(logits, pair):
    return logits.amax(-1) - logits.mean(-1)
'''
ENTRIES = {
    "groundscope.loaders": ("tags", "load_tags"),
    "groundscope.pairs": ("swap", "swap_images"),
    "groundscope.behavior_metrics": ("says yes", "yes_ratio"),
    "groundscope.benchmarks": ("tags", "tags_benchmark"),
    "groundscope.answer_formats": ("tagged", "read_tagged"),
    "groundscope.survey_rows": ("Tags", "tags_row"),
    "groundscope.metrics": ("spread", "spread"),
    "groundscope.estimators": ("svm", "svm"),
    "groundscope.predictive_families": ("strict", "strict_family"),
    "groundscope.mitigations": ("amplify_more", "amplify_more"),
    "groundscope.exports": ("text_file", "text_file"),
    "groundscope.families": ("my_llava", "SPEC"),
    "groundscope.report_sections": ("tags", "tags_section"),
}
"""Entry-point group to the name of the entry and its function in the plug-in."""
USE = """
from pathlib import Path

import groundscope as gs

data = gs.loaders.load("tags", "tags.json", "images", limit=3)
assert (len(data), data[0].question) == (3, "Is there a pear in the image?")
assert data.provenance["loader_package"] == "good-plugin 1.2"
assert gs.loaders.load("tags", "tags.json", "images", noun="dog")[0].question == "Is there a dog in the image?"

pairs = gs.counterfactuals.pairs(data, "swap")
assert [p.change for p in pairs] == ["image of b.png", "image of c.png"]

model = gs.load_lvlm("tiny")
answers = gs.answer(model, data, progress=False)
rates = gs.compute_metrics(answers, data)
assert rates["says yes"].n == 3 and rates["all: right"].n == 3
assert gs.patch_heads(model, pairs, min_effect=0.0, progress=False).n_pairs == 2
own = gs.load_lvlm("tiny")
own.hf.config.model_type = "my_llava"
assert gs.wrap_lvlm(own.hf, own.processor).prompt("Red?") == "Human: <image>Red? Assistant:"
assert gs.families.origins == {"my_llava": "good-plugin 1.2"}
scores = gs.patch_heads(model, pairs, metric="spread", progress=False)
assert (scores.metric, scores.provenance["metric_package"]) == ("spread", "good-plugin 1.2")

benchmarks = gs.behavior.benchmarks
Path("q.json").write_text('[{"question_id": 1, "image": "a.png", "text": "Is it?", "label": "no"}]')
Path("a.jsonl").write_text('{"tag": 1, "said": "No."}')
score = benchmarks.score_files("tags", "a.jsonl", files={"questions": "q.json"})
assert score.figures["accuracy"].value == 1 and benchmarks.BENCHMARKS.origins == {"tags": "good-plugin 1.2"}

from experiments.report import SECTIONS

assert (SECTIONS["tags"].link, SECTIONS.origins) == ("Tags", {"tags": "good-plugin 1.2"})

import numpy as np
import pandas as pd


class Memory:
    arrays = (gs.ArrayInfo("decoder", "resid_post", "last", n_layers=1, width=2),)
    digest, provenance = "0" * 64, {}

    def frame(self):
        names = [str(i) for i in range(60)]
        return pd.DataFrame({"id": names, "group": names, "object:pear": [i % 2 for i in range(60)]})

    def read(self, site, tokens, head=None, examples=None):
        return np.array([[i % 2, i] for i in range(60)], np.float32)[examples]


grid = gs.fit_grid(Memory(), site="resid_post", estimator="svm", folds=2, control=0, progress=False)
assert grid.balanced_accuracy.item() == 1
assert grid.provenance["estimator_package"] == "good-plugin 1.2"
vector = gs.mitigations["amplify_more"].make(gs.DerivationData(model, None, data, heads=["L3.H1"]))
assert (vector.strength, gs.mitigations.origins) == (2, {"amplify_more": "good-plugin 1.2"})
assert "text_file" in gs.export.formats_for(vector)
assert gs.exports["text_file"].write(vector, Path("vector.txt"), model).read_text() == str(vector)
"""
BROKEN = """
import groundscope as gs
from experiments.report import SECTIONS
from groundscope.core.errors import GroundscopeError

TABLES = {
    "groundscope.loaders": gs.loaders.LOADERS,
    "groundscope.pairs": gs.counterfactuals.KINDS,
    "groundscope.behavior_metrics": gs.behavior.metrics.METRICS,
    "groundscope.benchmarks": gs.behavior.benchmarks.BENCHMARKS,
    "groundscope.answer_formats": gs.behavior.benchmarks.ANSWER_FORMATS,
    "groundscope.survey_rows": gs.behavior.card.SURVEY_ROWS,
    "groundscope.metrics": gs.circuits.metrics,
    "groundscope.estimators": gs.probes.estimators,
    "groundscope.predictive_families": gs.probes.predictive_families,
    "groundscope.mitigations": gs.mitigations,
    "groundscope.exports": gs.exports,
    "groundscope.families": gs.families,
    "groundscope.report_sections": SECTIONS,
}
assert TABLES.keys() == GROUPS
for group, table in TABLES.items():
    try:
        table["broken"]
    except GroundscopeError as error:
        assert "broken-plugin 0.1" in str(error) and "No module named 'missing_dependency'" in str(error), error
    else:
        raise AssertionError(group)
    assert list(table.failures) == ["broken"]
    assert len(table.usable()) == len(table) > 1
"""


def install(
    name: str, version: str, source: str, entries: dict[str, tuple[str, str]], folder: Path, work: Path
) -> None:
    """Build the wheel of a package of one module and unpack it into a folder."""
    module = name.replace("-", "_")
    project = work / name
    project.mkdir()
    (project / f"{module}.py").write_text(source)
    lines = [
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n',
        f'[project]\nname = "{name}"\nversion = "{version}"\n',
        f'[tool.hatch.build.targets.wheel]\ninclude = ["{module}.py"]\n',
    ]
    lines += [f'[project.entry-points."{g}"]\n"{entry}" = "{module}:{attr}"\n' for g, (entry, attr) in entries.items()]
    (project / "pyproject.toml").write_text("\n".join(lines))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(work), str(project)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=work)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = work.glob(f"{module}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install both plug-ins into ``packages``, and write the data that the good one loads."""
    folder = tmp_path_factory.mktemp("plugins")
    work = tmp_path_factory.mktemp("projects")
    install("good-plugin", "1.2", GOOD, ENTRIES, folder / "packages", work)
    broken = dict.fromkeys(ENTRIES, ("broken", "entry"))
    install("broken-plugin", "0.1", "import missing_dependency\n", broken, folder / "packages", work)
    (folder / "images").mkdir()
    tags = {f"{name}.png": ("yes", "no")[i % 2] for i, name in enumerate("abcdefghijkl")}
    for i, name in enumerate(tags):
        Image.new("RGB", (112, 112), (20 * i, 90, 60)).save(folder / "images" / name)
    (folder / "tags.json").write_text(json.dumps(tags))
    return folder


def run(code: str, desk: Path) -> Finished:
    return run_code(code, desk, path=[ROOT, desk / "packages"], environment={"COLUMNS": "200"})


def command(desk: Path, *options: str) -> Finished:
    words = ["groundscope", *options]
    return run(f"import sys; sys.argv = {words!r}\nfrom experiments.cli.main import main\nmain()", desk)


def test_entries_of_an_installed_package_are_used(desk: Path) -> None:
    done = run(USE, desk)
    assert done.returncode == 0, done.stderr
    assert "the behavior metric 'broken' was not loaded: broken-plugin 0.1" in done.stderr


def test_a_package_that_cannot_be_loaded_is_named_and_stops_nothing_else(desk: Path) -> None:
    done = run(f"GROUPS = {set(ENTRIES)!r}\n{BROKEN}", desk)
    assert done.returncode == 0, done.stderr


def test_the_command_reads_data_with_the_loader_of_an_installed_package(desk: Path) -> None:
    files = ["data.questions=tags.json", "data.images=images"]
    done = command(desk, "data.source=tags", *files, "+data.loader.noun=dog", "stages=[examples]")
    assert done.returncode == 0, done.stderr
    (examples,) = desk.glob("runs/*/examples/discovery.jsonl")
    records = [json.loads(line) for line in examples.read_text().splitlines()]
    assert {r["question"] for r in records} == {"Is there a dog in the image?"}
    about = json.loads((examples.parent / "discovery.json").read_text())
    assert about["provenance"]["loader_package"] == "good-plugin 1.2"
    for options, message in (
        (["data.source=broken"], "the loader 'broken' cannot be used: broken-plugin 0.1"),
        (["data.source=tag"], "did you mean tags"),
        (["data.source=tags", "patch.kinds=[broken]"], "the kind of pair 'broken' cannot be used: broken-plugin 0.1"),
    ):
        done = command(desk, *options, *files, "stages=[examples,patch]", "name=refused")
        assert done.returncode != 0
        assert message in done.stderr + done.stdout
