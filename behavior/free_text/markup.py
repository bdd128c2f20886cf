"""A description as HTML: objects red, attributes yellow, relations blue, as in figures 4 to 6 of Shu et al. (arXiv 2501.01346).

Color is not the only sign: objects have a solid line below them, attributes a dashed one, relations a double one; wrong spans
are filled and end with a cross, unknown ones with a question mark, and each span has its level, phrase, verdict and reason
as a title.
"""

from __future__ import annotations

from html import escape

from behavior.free_text.spans import Description, Span

STYLE = """
.description { --object: #c0322b; --attribute: #8a6100; --relation: #1f5fae;
  --object-fill: #fbd9d6; --attribute-fill: #fdecb2; --relation-fill: #d3e4fa;
  line-height: 1.9; max-width: 46rem; overflow-wrap: anywhere; }
.description mark { color: inherit; background: none; text-underline-offset: 3px;
  text-decoration: underline 2px; }
.description .object { text-decoration-style: solid; text-decoration-color: var(--object); --fill: var(--object-fill); }
.description .attribute { text-decoration-style: dashed; text-decoration-color: var(--attribute);
  --fill: var(--attribute-fill); }
.description .relation { text-decoration-style: double; text-decoration-color: var(--relation);
  --fill: var(--relation-fill); }
.description .wrong { background: var(--fill); border-radius: 3px; padding: 0.1em 0.15em; font-weight: 600; }
.description .wrong::after { content: "\\2717"; font-size: 0.75em; vertical-align: super; }
.description .unknown { text-decoration-thickness: 1px; }
.description .unknown::after { content: "?"; font-size: 0.7em; vertical-align: super; }
@media (prefers-color-scheme: dark) {
  .description { --object: #ff8a80; --attribute: #f2c94c; --relation: #8ab8f5;
    --object-fill: #6a1f1b; --attribute-fill: #57430a; --relation-fill: #1d4069; }
}
"""
"""Style of the marked spans, in light and dark."""


def description_html(description: Description) -> str:
    """Return a paragraph with the spans of a description as ``mark`` elements; needs `STYLE`.

    Of overlapping spans the shorter is marked.

    Examples
    --------
    >>> from behavior.free_text import Description, Span
    >>> from behavior.free_text.markup import description_html
    >>> description_html(Description("1", "A <dog>", (Span(3, 6, "object", (), "wrong", "annotated as absent"),)))
    '<p class="description">A &lt;<mark class="object wrong" title="object: dog, wrong (annotated as absent)">dog</mark>&gt;</p>'
    """
    text, at, parts = description.text, 0, []
    for span in _without_overlaps(description.spans):
        parts += [escape(text[at : span.start]), _mark(span, description)]
        at = span.end
    return f'<p class="description">{"".join(parts)}{escape(text[at:])}</p>'


def legend_html() -> str:
    """Return a line that explains the marks, with the words it describes marked in that way.

    Examples
    --------
    >>> from behavior.free_text.markup import legend_html
    >>> legend_html().count("<mark")
    5
    """
    levels = ", ".join(f'<mark class="{level}">{level}</mark>' for level in ("object", "attribute", "relation"))
    return (
        f'<p class="description">Underlined: {levels}. Filled, with a cross: <mark class="object wrong">wrong</mark>. '
        'With a question mark: <mark class="object unknown">not decided by the annotation</mark>.</p>'
    )


def _mark(span: Span, description: Description) -> str:
    classes = span.level if span.verdict in (None, "right") else f"{span.level} {span.verdict}"
    verdict = f", {span.verdict}" if span.verdict is not None else ""
    reason = f" ({span.reason})" if span.reason else ""
    title = escape(f"{span.level}: {description.phrase(span)}{verdict}{reason}", quote=True)
    return f'<mark class="{classes}" title="{title}">{escape(span.words(description.text))}</mark>'


def _without_overlaps(spans: tuple[Span, ...]) -> list[Span]:
    """Return spans that do not overlap, in order; of several with the same place, one that is wrong."""
    severity = {"wrong": 0, "unknown": 1, "right": 2, None: 3}
    chosen: list[Span] = []
    for span in sorted(spans, key=lambda s: (s.end - s.start, severity[s.verdict])):
        if all(span.end <= other.start or other.end <= span.start for other in chosen):
            chosen.append(span)
    return sorted(chosen, key=lambda s: s.start)
