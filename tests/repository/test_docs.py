"""The sessions in the documentation run and print what they show."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.toys.processes import run_code

ROOT = Path(__file__).resolve().parents[2]
EVERY = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").rglob("*.md") if "api" not in p.parts)]
PAGES = [
    p
    for p in EVERY
    if p.stem in {"transformer_lens", "pairs", "caption_words", "own_labels", "steering", "information"}
]
# What the page calls a result, and what must be true of it: a session that computes nothing would show here.
SHOWN = {
    "transformer_lens": """
import math
assert strengths.shape == (model.head_dim,) and float(strengths[0]) > float(strengths[-1]) > 0
assert float(torch.linalg.svdvals(ov)[model.head_dim]) < 1e-4 * float(strengths[0])
assert float(moved) > 0.01
assert torch.equal(model.logits(inputs)[0], own)
assert parts.shape == (1 + 2 * model.n_layers, len(data), 1, model.width)
assert len(ranking) == len(labels) and all(math.isfinite(x) for x, _ in ranking) and ranking[0][0] > ranking[-1][0]
assert heads.shape == (model.n_layers * model.n_heads, len(data))
import numpy as np
layer, head = strongest
z = store.read(f"decoder.L{layer}.z", "last", head=head)
result = z @ model.output_projection("decoder", layer).weight.detach().numpy().T.reshape(model.n_heads, model.head_dim, -1)[head]
scale = np.sqrt((whole[:, 0].double().numpy() ** 2).mean(-1) + bridge.cfg.eps)
np.testing.assert_allclose(heads[layer * model.n_heads + head].detach(), result @ toward_yes.numpy() / scale, atol=1e-3)
""",
    "own_labels": """
assert data[0].labels["crowd"] == len(questions[0].objects) and data[-1].images == ()
assert grid.numbers == ("crowd",) and grid.best("crowd").r2 > 0.3
assert set(softmax["chance"]) == {0.5}
assert own.concepts == ("hallucinated",) and own.n_train[0] + own.n_test[0] == 40
assert used.sum() == len(questions) and scores.mean() > 0.3
assert [v.image for v in views] == [0, 1] and all(len(v.positions) == 49 for v in views)
""",
    "information": """
assert len(result) == len(path[::4]) == len(result.frame()) and result.families == ("linear",)
assert 0.1 < result.nats.max() < result.entropy
""",
    "pairs": """
assert all(p.placebo and p.clean.answer == p.corrupt.answer for p in placebo)
assert scores.mean[4, 7] > 0.5 > 2 * abs(control.mean[4, 7])
assert outcomes.counts["right on both"] >= 6 and right.n_pairs == outcomes.counts["right on both"]
assert len(pairs(own, "color")) == 2 and pairs(own, "color")[0].clean.image.load() != pairs(own, "color")[0].corrupt.image.load()
""",
    "steering": """
import numpy as np
(change,) = vector.changes.values()
assert len(contrast.pairs) > 10 and abs(float(np.linalg.norm(change.direction)) - 1) < 1e-6
plain = gs.answer(model, data.filter(lambda e: e.group == question.group), progress=False)
assert len(steered) == len(plain) > 1
assert any(a.margin != b.margin for a, b in zip(steered.answers, plain.answers, strict=True))
assert [r["strength"] for r in sweep] == [0.0, 0.5, 1.0, 2.0] and limits["plain_text"] is None
assert name == "mine" and row in sweep and row.get("excess", 0) <= 1
assert any(r["harm"] != sweep[0]["harm"] for r in sweep)
""",
    "caption_words": """
by_word = sum(m.noun not in {o.noun for o in e.objects} for e in written for m in e.mentions)
assert len(wrong) == by_word == table["object:hallucinated"].sum() > 5
assert grid.frame()["balanced_accuracy"].max() > 0.6
share = (reference.clean - reference.corrupt > 0.5).mean()
assert 0 < len(raised) / len(pairs) < 0.6 < 0.8 < share
assert scores.top(1)[0].layer == 5 and scores.mean[5].max() > 0.2 and reference.top(1)[0].layer == 5
assert pair.clean.prefix and pair.clean.answer in {o.noun for o in pair.clean.objects}
""",
}


def test_every_page_is_linked_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in EVERY[1:]:
        assert f"({page.relative_to(ROOT)})" in text or page.stem == "index"


@pytest.mark.parametrize("page", EVERY, ids=lambda p: p.stem)
def test_links_within_the_project_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_a_page_runs_from_top_to_bottom(page: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    assert blocks
    done = run_code("\n".join([*blocks, SHOWN[page.stem]]), tmp_path)
    assert done.returncode == 0, done.stderr


def test_every_function_that_the_page_of_papers_names_is_there() -> None:
    text = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    names = re.findall(
        r"`((?:concepts|lvlm|probes|circuits|behavior|mitigation|diagnosis|groundscope|experiments)\.[\w.]+)`", text
    )
    assert len(names) > 40
    for name in names:
        parts = name.split(".")
        # The longest part that is a module: `behavior.pope` is a function too.
        depth = next(n for n in range(len(parts), 0, -1) if _is_module(".".join(parts[:n])))
        value: Any = importlib.import_module(".".join(parts[:depth]))
        for part in parts[depth:]:
            assert hasattr(value, part), name
            value = getattr(value, part)


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    mkdocs = Path(sys.executable).parent / "mkdocs"
    done = subprocess.run(
        [mkdocs, "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pages = sorted((tmp_path / "site").rglob("*.html"))
    front = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert "Why does a vision-language model say" in front
    assert len(pages) >= len(EVERY) + 7
    for page in (p for p in pages if p.name != "404.html"):
        text = page.read_text(encoding="utf-8")
        # Nothing is loaded from elsewhere, and links within the site lead somewhere.
        assert not re.search(r"<(?:script|link|img)[^>]+(?:src|href)=\"https?:", text)
        for target in re.findall(r"<a [^>]*href=\"((?!https?:|#|mailto:)[^\"#]+)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
