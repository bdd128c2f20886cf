"""Examples and pairs in notebooks: a thumbnail of the image next to the question and its answer."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from groundscope.core.errors import GroundscopeError

if TYPE_CHECKING:
    from concepts.counterfactual_pair import CounterfactualPair
    from concepts.image_source import ImageSource
    from concepts.schema import Example

SIDE = 160
"""Longest side of a thumbnail in pixels."""
MAX_SHOWN = 6
"""Examples of a dataset that are shown."""


def thumbnail(image: ImageSource) -> str:
    """Return an ``img`` element with a PNG of at most `SIDE` pixels a side; a text if the image cannot be read."""
    try:
        picture = image.load()
    except GroundscopeError as error:
        return f"<em>{html.escape(str(error))}</em>"
    picture.thumbnail((SIDE, SIDE))
    data = io.BytesIO()
    picture.save(data, format="PNG")
    return f'<img src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}" alt="">'


def examples_html(examples: Sequence[Example], title: str = "") -> str:
    """Return a table with a row of images and a row of questions and true answers."""
    first = examples[:MAX_SHOWN]
    images = "".join(f"<td>{thumbnail(e.image)}</td>" for e in first)
    texts = "".join(
        f"<td>{html.escape(e.question)}<br>{_prefix(e)}<strong>{html.escape(_short(e.answer))}</strong></td>"
        for e in first
    )
    head = f"<p>{html.escape(title)}</p>" if title else ""
    return f"{head}<table><tr>{images}</tr><tr>{texts}</tr></table>"


def pair_html(pair: CounterfactualPair) -> str:
    """Return both images of a pair with the question, both true answers and the change."""
    return examples_html((pair.clean, pair.corrupt), f"{pair.kind}: {pair.change}")


def _prefix(example: Example) -> str:
    return f"{html.escape(example.prefix.strip())} " if example.prefix else ""


def _short(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
