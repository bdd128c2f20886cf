"""The sessions that the documentation shows run as they are written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
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
"""
}


def test_every_page_is_linked_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    every = sorted((ROOT / "docs").rglob("*.md"))
    assert len(every) > len(PAGES)
    for page in every:
        assert f"({page.relative_to(ROOT)})" in text


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda p: p.stem)
def test_links_within_the_project_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_a_page_runs_from_top_to_bottom(page: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    assert blocks
    script = tmp_path / "page.py"
    script.write_text("\n".join([*blocks, SHOWN[page.stem]]), encoding="utf-8")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); exec(compile(open({str(script)!r}).read(), 'page', 'exec'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
