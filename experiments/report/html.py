"""HTML of the report. Text from data is escaped by `text`."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Protocol

from PIL import Image

if TYPE_CHECKING:
    from experiments.results.illustrations import Illustration, Illustrations
    from experiments.results.run_files import RunFiles

_ENLARGED = 200
"""Images narrower than this many pixels are enlarged."""


class _Estimate(Protocol):
    """A value with an interval."""

    @property
    def value(self) -> float: ...

    @property
    def low(self) -> float: ...

    @property
    def high(self) -> float: ...


def text(value: object) -> str:
    """Escape anything for use inside an element or an attribute."""
    return html.escape(str(value), quote=True)


def percent(value: float, digits: int = 1) -> str:
    """Return a rate in percent."""
    return "not measured" if math.isnan(value) else f"{100 * value:.{digits}f} %"


def interval(estimate: _Estimate) -> str:
    """Return a rate in percent with its interval; says if the interval rests on few images."""
    few = " (few images)" if getattr(estimate, "few_groups", False) else ""
    return f"{percent(estimate.value)} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]{few}"


def section(name: str, title: str, *parts: str, stages: Sequence[str] = ()) -> str:
    """Return a section; `stages` adds links to the provenance of the stages that computed its numbers."""
    heading = f'<h2 id="{text(name)}-t">{text(title)}</h2>'
    links = ", ".join(f'<a href="#made-{text(stage)}">{text(stage)}</a>' for stage in stages)
    source = f'<p class="soft">Files and commands behind these numbers: {links}.</p>' if stages else ""
    return f'<section id="{text(name)}" aria-labelledby="{text(name)}-t">{heading}{"".join(parts)}{source}</section>'


def paragraph(content: str, *, soft: bool = False) -> str:
    """Return a paragraph of text, escaped here; `soft` is smaller and paler."""
    return f"<p{' class=soft' if soft else ''}>{text(content)}</p>"


def figure(svg: str, caption: str) -> str:
    """Return a figure; screen readers read its caption."""
    labelled = svg.replace("<svg ", f'<svg role="img" aria-label="{text(caption)}" ', 1)
    return f'<figure tabindex="0">{labelled}<figcaption>{text(caption)}</figcaption></figure>'


def table(head: Sequence[str], rows: Sequence[Sequence[object]], ids: Sequence[str] = ()) -> str:
    """Return a table with a header row; `ids` are anchors of the rows. Wide tables scroll horizontally."""
    top = "".join(f'<th scope="col">{text(h)}</th>' for h in head)
    names = [f' id="{text(name)}"' for name in ids] or [""] * len(rows)
    lines = ("".join(f"<td>{text(cell)}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr{name}>{line}</tr>" for name, line in zip(names, lines, strict=True))
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def closed(name: str, title: str, *parts: str) -> str:
    """Return a part that is closed until it is selected; a link to `name`, an anchor inside it, opens it too."""
    return f'<details><summary>{text(title)}</summary><div id="{text(name)}">{"".join(parts)}</div></details>'


def term_list(terms: Mapping[str, str]) -> str:
    """Return terms with their meanings; empty for no terms."""
    pairs = "".join(f"<dt>{text(term)}</dt><dd>{text(meaning)}</dd>" for term, meaning in terms.items())
    return f'<dl class="meaning">{pairs}</dl>' if terms else ""


def picture(image: Image.Image, description: str) -> str:
    """Return an image as a data URL."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{text(description)}" src="data:image/png;base64,{data}">'


def example_block(facts: Sequence[tuple[str, object]], illustration: Illustration | None, description: str) -> str:
    """Return facts about an example, with its image if the run has a copy."""
    pairs = "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in facts)
    image_html = ""
    if illustration is not None:
        image = illustration.image
        if image.width < _ENLARGED:
            image = image.resize((image.width * 3, image.height * 3), resample=Image.Resampling.NEAREST)
        image_html = picture(image, description)
    return f'<div class="example">{image_html}<dl>{pairs}</dl></div>'


def missing_illustrations(illustrations: Illustrations | None, run: RunFiles, stage: str) -> str:
    """Return why a stage has no illustrations, and the command that makes them; empty if it has them."""
    if illustrations is None:
        return paragraph(
            f"Images and attention maps are not shown: stage {stage} was run by an earlier version, which did not store them. "
            f"To add them: groundscope resume={run.root} stages=[{stage},report] force=true",
            soft=True,
        )
    if illustrations.reason:
        return paragraph(f"Images and attention maps are not shown: {illustrations.reason}", soft=True)
    return ""


def page(title: str, lead: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """Return the document from ``(id, link, section)`` parts: one file without scripts or external resources."""
    style = files("experiments.report").joinpath("style.css").read_text(encoding="utf-8")
    links = "".join(f'<li><a href="#{text(name)}">{text(link)}</a></li>' for name, link, _ in sections)
    navigation = f'<nav aria-label="Sections"><ul>{links}</ul></nav>' if len(sections) > 1 else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{style}</style></head><body><main><header><h1>{text(title)}</h1>"
        f'<p class="soft">{text(lead)}</p>{navigation}</header>'
        f"{''.join(s for _, _, s in sections)}</main></body></html>\n"
    )
