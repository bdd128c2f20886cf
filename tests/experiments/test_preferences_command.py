"""`groundscope preferences` and `tune` on a run folder made by hand, and the page of `groundscope compare`."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf

from concepts.schema import Example
from diagnosis import Diagnoses, Diagnosis, ModelComparison
from experiments.cli import compare, preferences
from experiments.config import RunConfig
from experiments.data import load_parts
from experiments.report.changes import changes_page
from experiments.run.folder import LAYOUT, MARKER, write_json
from groundscope.core.errors import ConfigError, DataError, GroundscopeError, StoreError
from lvlm import load_lvlm
from tests.toys import preferences as toys


def diagnosed(example: Example, answer: str, verdict: str | None) -> Diagnosis:
    about = {name: getattr(example, name) for name in ("id", "group", "level", "split", "kind", "question")}
    return Diagnosis({**about, "truth": example.answer}, answer, "", verdict, 0.9)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Example]]:
    """A run whose six color questions about conflict scenes were overridden, one not seen, and one right."""
    root = tmp_path_factory.mktemp("work") / "runs" / "mine"
    config = RunConfig(name="mine")
    config.model.path, config.data.n_images, config.data.test_images = "tiny", 60, 10
    root.mkdir(parents=True)
    (root / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")
    examples = list(load_parts(config.data)[0].where(split="conflict", kind="what_color"))[:8]
    rows = [diagnosed(e, str(e.prior_answer), "overridden by the prior") for e in examples[:6]]
    rows += [
        diagnosed(examples[6], str(examples[6].prior_answer), "not seen"),
        diagnosed(examples[7], examples[7].answer, None),
    ]
    write_json(root / MARKER, {"layout": LAYOUT})
    (root / "diagnosis").mkdir()
    Diagnoses(tuple(rows), (), "tiny", "c", "w").save(root / "diagnosis" / "diagnoses.json")
    return root, examples


def test_the_overridden_answers_of_a_run_become_a_file(
    run: tuple[Path, list[Example]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, examples = run
    assert preferences.write([str(root), f"out={tmp_path}", "anchors=0"]) == 0
    assert "6 pairs" in capsys.readouterr().out
    rows = toys.naive_trl(tmp_path / "preferences.jsonl")
    assert [r[:3] for r in rows] == [(e.question, e.answer, e.prior_answer) for e in examples[:6]]
    for row, example in zip(rows, examples, strict=False):
        np.testing.assert_array_equal(row[3][0], np.asarray(example.image.load()))
    preferences.write([str(root), f"out={tmp_path / 'all'}", "verdicts=wrong", "format=csr"])
    rows = toys.naive_csr(tmp_path / "all" / "preferences.json")
    assert len(rows) == 8  # seven wrong answers, and the right one as an anchor
    assert rows[-1][1] == examples[7].answer != rows[-1][2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "takes one run with diagnoses"),
        (["formt=trl"], r"no option 'formt'.*did you mean format"),
        (["format=trll"], r"unknown preference format 'trll'.*did you mean trl"),
        (["verdicts=all"], "choose overridden"),
        (["anchors=x"], "anchors=x; give a number"),
        (["anchors=-1"], "anchors=-1.0"),
        (["data.n_images=20"], "is not among the data|is another question"),
        (["format=csr", "variant=llava"], "format 'csr' has no option 'variant'"),
    ],
)
def test_wrong_requests(run: tuple[Path, list[Example]], tmp_path: Path, words: list[str], message: str) -> None:
    arguments = [*([str(run[0])] if words else []), f"out={tmp_path}", *words]
    with pytest.raises((ConfigError, DataError), match=message) as error:
        preferences.write(arguments)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_diagnoses_is_named_with_the_command(run: tuple[Path, list[Example]], tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.yaml").write_text((run[0] / "config.yaml").read_text())
    with pytest.raises(ConfigError, match=r"has no diagnoses: groundscope resume=.*stages=\[examples,trace,diagnose\]"):
        preferences.write([str(tmp_path / "bare")])


def test_a_tuned_model_is_written_and_loads(
    run: tuple[Path, list[Example]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tuned"
    words = [str(run[0]), f"out={out}", "epochs=1", "learning_rate=2e-3", "batch_size=4", "targets=o_proj,down_proj"]
    assert preferences.tune(words) == 0
    assert "epoch 1: validation loss" in capsys.readouterr().out
    tuned, before = load_lvlm(str(out / "model"), dtype="float32"), load_lvlm("tiny")
    record = json.loads((out / "groundscope.json").read_text())
    assert record["weights_hash"] == before.weights_hash
    assert record["provenance"]["options"]["targets"] == ["o_proj", "down_proj"]
    changed = {
        name
        for (name, a), (_, b) in zip(before.hf.named_parameters(), tuned.hf.named_parameters(), strict=True)
        if not np.array_equal(a.detach().numpy(), b.detach().numpy())
    }
    assert changed
    assert all(name.endswith(("o_proj.weight", "down_proj.weight")) for name in changed)
    with pytest.raises(ConfigError, match="exists; choose another folder"):
        preferences.tune(words)


# ---- what changed inside


def comparison(concept: str = "object:apple") -> ModelComparison:
    change = {
        "first": [0.5, 0.9],
        "second": [0.75, 0.88],
        "difference": [0.25, -0.02],
        "low": [0.1, -0.1],
        "high": [0.4, 0.06],
    }
    probes = pd.DataFrame({"grid": "decoder.z@last", "concept": concept, "layer": [0, 1], "head": [3, 4], **change})
    probes = probes.assign(n=40, paired=True).astype({"head": "Int64"})
    heads = pd.DataFrame({"kind": "color", "name": ["L0.H3", "L1.H4"], **change})
    ranking = {"kind": "color", "rank_correlation": 0.5, "rank_correlation_low": 0.1, "rank_correlation_high": 0.8}
    ranking |= {"overlap_5": 0.6, "overlap_10": 0.7, "shared_groups": 12}
    verdicts = [
        {"first": "overridden by the prior", "second": "right", "n": 7},
        {"first": "right", "second": "right", "n": 30},
    ]
    answers = pd.DataFrame({"measure": ["all: right", "conflict: wrong by prior"], "n": 100, **change})
    notes = ("heads for object: only one of the two has them",)
    tables = (
        answers.assign(gained=30, lost=5, p=0.001),
        probes,
        heads,
        pd.DataFrame([ranking]),
        pd.DataFrame(verdicts),
    )
    origin = {"first": {"weights_hash": "sha256:1"}, "second": {}}
    return ModelComparison("before <b>", "after", *tables, notes, origin)


def cells(page: str, section: str) -> list[list[str]]:
    part = page[page.index(f'<section id="{section}"') :].split("</section>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", part)
    return [[html.unescape(c) for c in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)] for row in rows]


def test_the_page_shows_every_part_and_escapes_names() -> None:
    page = changes_page(comparison("object:<script>"))
    assert "<script>" not in page
    assert "before &lt;b&gt;" in page
    assert ["all: right", "100", "50.0 %", "75.0 %", "+25.0 [+10.0, +40.0]", "30", "5", "0.001"] in cells(
        page, "answers"
    )
    assert ["overridden by the prior", "7", ""] in cells(page, "verdicts")
    assert ["decoder.z@last", "0", "1", "50.0 %", "75.0 %", "+25.0", "1"] in cells(page, "probes")
    assert ["decoder.z@last", "0", "3", "object:<script>", "50.0 %", "75.0 %", "+25.0 [+10.0, +40.0]"] in cells(
        page, "probes"
    )
    assert ["L0.H3", "+0.500", "+0.750", "+0.250 [+0.100, +0.400]"] in cells(page, "heads")
    assert "only one of the two has them" in page
    assert "sha256:1" in page
    whole = comparison()
    empty = replace(whole, probes=whole.probes[:0], heads=whole.heads[:0], verdicts=whole.verdicts[:0])
    assert '<section id="probes"' not in changes_page(empty)


def test_a_saved_comparison_is_read_back_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = comparison().save(tmp_path / "c.json")
    loaded = ModelComparison.load(file)
    for part in ("answers", "probes", "heads", "ranking", "verdicts"):
        pd.testing.assert_frame_equal(loaded.frame(part), comparison().frame(part))
    assert (loaded.first, loaded.notes) == ("before <b>", comparison().notes)
    page = tmp_path / "page.html"
    assert compare.show([str(file), f"page={page}"]) == 0
    assert "7 answers: overridden by the prior -> right" in capsys.readouterr().out
    assert page.read_text(encoding="utf-8") == changes_page(loaded)
    file.write_text(file.read_text().replace("0.25", "0.35"))
    with pytest.raises(StoreError, match="does not match its digest"):
        compare.show([str(file)])
    with pytest.raises(GroundscopeError, match="page= takes one file"):
        compare.show(["a", "b", "page="])
