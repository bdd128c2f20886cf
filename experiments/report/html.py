"""Small pieces of HTML; every text that comes from data goes through `text`."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from importlib.resources import files

from PIL import Image


def text(value: object) -> str:
    """Escape anything for use inside an element or an attribute."""
    return html.escape(str(value), quote=True)


def percent(value: float) -> str:
    """Return a rate as people write it."""
    return "not measured" if math.isnan(value) else f"{100 * value:.1f} %"


def section(name: str, title: str, *parts: str, made: Sequence[str] = ()) -> str:
    """Return a section that the navigation can link to; at its end, links to the stages that its numbers come from."""
    heading = f'<h2 id="{text(name)}-t">{text(title)}</h2>'
    links = ", ".join(f'<a href="#made-{text(stage)}">{text(stage)}</a>' for stage in made)
    source = f'<p class="soft">Files and commands behind these numbers: {links}.</p>' if made else ""
    return f'<section id="{text(name)}" aria-labelledby="{text(name)}-t">{heading}{"".join(parts)}{source}</section>'


def paragraph(content: str, *, soft: bool = False) -> str:
    """Return a paragraph of text (escaped here)."""
    return f"<p{' class=soft' if soft else ''}>{text(content)}</p>"


def figure(svg: str, caption: str) -> str:
    """Return a figure; its caption is also what a screen reader says."""
    labelled = svg.replace("<svg ", f'<svg role="img" aria-label="{text(caption)}" ', 1)
    return f'<figure tabindex="0">{labelled}<figcaption>{text(caption)}</figcaption></figure>'


def table(head: Sequence[str], rows: Sequence[Sequence[object]], ids: Sequence[str] = ()) -> str:
    """Return a table with a header row, and rows to link to where `ids` names them; wide ones scroll inside themselves."""
    top = "".join(f'<th scope="col">{text(h)}</th>' for h in head)
    names = [f' id="{text(name)}"' for name in ids] or [""] * len(rows)
    lines = ("".join(f"<td>{text(cell)}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr{name}>{line}</tr>" for name, line in zip(names, lines, strict=True))
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def closed(name: str, title: str, *parts: str) -> str:
    """Return a part that opens when it is chosen; a link to `name` opens it too, because the anchor is inside."""
    return f'<details><summary>{text(title)}</summary><div id="{text(name)}">{"".join(parts)}</div></details>'


def picture(image: Image.Image, description: str) -> str:
    """Return an image inside the page."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{text(description)}" src="data:image/png;base64,{data}">'


def page(title: str, lead: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """Return the whole document from ``(name, link, section)`` parts; one file, no script, nothing loaded from outside."""
    style = files("experiments.report").joinpath("style.css").read_text(encoding="utf-8")
    links = "".join(f'<li><a href="#{text(name)}">{text(link)}</a></li>' for name, link, _ in sections)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{style}</style></head><body><main><header><h1>{text(title)}</h1>"
        f'<p class="soft">{text(lead)}</p><nav aria-label="Sections"><ul>{links}</ul></nav></header>'
        f"{''.join(s for _, _, s in sections)}</main></body></html>\n"
    )
