"""Results print in at most five lines, whatever they hold, and examples show their image in notebooks."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
from PIL import Image

import groundscope as gs
from groundscope.core.short_repr import MAX_LINES, WIDTH, short_repr, summarize


@dataclass(frozen=True)
class Many:
    first: np.ndarray
    names: tuple[str, ...]
    text: str
    nothing: None = None
    table: dict[str, int] | None = None
    a: tuple[str, ...] = ("a long name of a value" * 3,) * 30
    b: str = "b" * 200
    c: str = "c" * 200
    d: str = "d" * 200
    e: str = "e" * 200
    f: str = "f" * 200
    g: str = "g" * 200
    h: str = "h" * 200
    i: str = "i" * 200

    __repr__ = short_repr


def test_a_repr_is_short_whatever_the_fields_hold() -> None:
    text = repr(Many(np.zeros((300, 400)), tuple(map(str, range(5000))), "x" * 10_000, table={"k": 1}))
    lines = text.splitlines()
    assert len(lines) == MAX_LINES
    assert all(len(line) <= WIDTH + 10 for line in lines)
    assert text.startswith("Many(first=float64 [300, 400], names=5000 values,")
    assert "nothing" not in text
    assert lines[-1].strip() == "…)"


@pytest.mark.parametrize(
    ("value", "text"),
    [(3, "3"), (True, "True"), (0.5, "0.5"), ((), ""), ([1, 2], "[1, 2]"), ({1}, "1 value"), ("it's", '"it\'s"')],
)
def test_a_value_is_summarized(value: object, text: str) -> None:
    assert summarize(value) == text


@pytest.fixture(scope="module")
def results() -> dict[str, object]:
    model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(12)
    pairs = gs.counterfactuals.pairs(data, "color", limit=4)
    result = gs.answer(model, data[:8], progress=False)
    return {
        "dataset": data, "example": data[0], "pairs": pairs, "pair": pairs[0], "answers": result,
        "tokens": model.encode(data[0]).tokens, "scores": gs.patch_heads(model, pairs),
        "ablation": gs.ablate(model, data.where(kind="color")[:4], ["L4.H0"]), "model": model,
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", ["dataset", "example", "pairs", "pair", "answers", "tokens", "scores", "ablation", "model"]
)
def test_results_print_in_five_lines(results: dict[str, object], name: str) -> None:
    text = repr(results[name])
    assert len(text.splitlines()) <= 5
    assert len(text) < 700


def test_notebooks_show_the_image(results: dict[str, object]) -> None:
    data = results["dataset"]
    assert isinstance(data, gs.ConceptDataset)
    html = data[0]._repr_html_()
    encoded = re.search(r"base64,([^\"]+)", html)
    assert encoded is not None
    decoded = Image.open(io.BytesIO(base64.b64decode(encoded[1])))
    assert (np.asarray(decoded) == np.asarray(data[0].image.load())).all()
    assert data._repr_html_().count("<img") == 6
    hostile = replace(data[0], question="<script>alert(1)</script>")
    assert "<script>" not in hostile._repr_html_()
