"""One error by prior followed through the model: image, answers, probe readings, attention, the effect of steering."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from concepts.nouns import article
from concepts.scenes.distributions import TYPICAL
from experiments.report import figures
from experiments.report.derived import ColorMargins, color_margins, color_readings, errors_by_prior
from experiments.report.html import example_block, figure, missing_illustrations, paragraph, percent, section, table
from experiments.results.illustrations import Illustration
from experiments.results.run_files import RunFiles
from experiments.results.selection import typical_error
from groundscope.core.text import format_count


def example_section(run: RunFiles) -> str:
    """Return the section; empty if no wrong answer is the one that the prior predicts."""
    errors = errors_by_prior(run)
    example = typical_error([e for _, e in errors])
    thing = example.named_object() if example is not None else None
    if run.frame is None or example is None or thing is None:
        return ""
    row = next(row for row, e in errors if e.id == example.id)
    true, prior = thing.attributes["color"], TYPICAL[thing.noun][0]
    illustrations = run.illustrations("behavior")
    illustration = (illustrations or {}).get(example.id)
    answers = illustration.answers if illustration is not None else {}
    facts = [
        ("question", example.question),
        ("the image shows", f"{article(true)} {true} {thing.noun}"),
        ("answer of the model", run.frame["model_answer"].tolist()[row]),
        ("true answer", example.answer),
    ]
    if illustration is not None:
        facts.append(("answer when steered", answers.get("after", "not steered")))
    if "twin" in answers:
        facts.append(("answer of the twin without the prior", answers["twin"]))
    readings = color_margins(run, np.array([row]))
    title = f"{article(true).capitalize()} {true} {thing.noun}, called {prior}"
    parts = [
        missing_illustrations(illustrations, run, "evaluate"),
        example_block(facts, illustration, f"Scene with {article(true)} {true} {thing.noun}"),
        paragraph(summarize_margins(readings, true, prior)),
    ]
    if readings:
        places = [_place(r) for r in readings]
        lines = {color: [_margin(r, color) for r in readings] for color in (true, prior)}
        parts.append(
            figure(
                figures.margins(lines, places, f"Probe margins: {true} (in the image) and {prior} (typical)"),
                f"Margins of the probes for {true} and {prior} on this image, at the object's tokens and at the last token. "
                "Above 0 the probe reads the color.",
            )
        )
    if illustration is not None and illustration.attention:
        box = (thing.box.x0, thing.box.y0, thing.box.x1, thing.box.y1) if thing.box else None
        parts.append(_attention(illustration, box))
    parts.append(_all_errors(run))
    return section("example", title, *parts)


def _margin(reading: ColorMargins, color: str) -> float:
    return float(reading.margins[0, reading.colors.index(color)])


def _place(reading: ColorMargins) -> str:
    return f"{reading.place} (last token)" if reading.tokens == "last" else reading.place


def summarize_margins(readings: Sequence[ColorMargins], true: str, prior: str) -> str:
    """Return a sentence about the places at which probes read the true color, with the names of the figure's axis."""
    if not readings:
        return "Not every color has a probe, so the color cannot be followed through the model."
    other = [_place(r) for r in readings if _margin(r, true) <= _margin(r, prior)]
    count = f"Probes read {true} rather than {prior} at {len(readings) - len(other)} of {format_count(len(readings), 'place')}"
    if not other:
        return f"{count}: the color is decodable everywhere, yet the answer is {prior}."
    return f"{count}; they read {prior} at {', '.join(other)}."


def _attention(illustration: Illustration, box: tuple[float, float, float, float] | None) -> str:
    maps = [(head, m.weights, m.image_mass) for head, m in illustration.attention.items()]
    return figure(
        figures.overlay(illustration.image, illustration.size, maps, box),
        "Attention of the top heads from the last token. The frame marks the object in question. Each map is scaled to its "
        "maximum. A head can use the image without attention to it here, through tokens that attended to it in earlier layers.",
    )


def _all_errors(run: RunFiles) -> str:
    readings = color_readings(run)
    if not readings:
        return ""
    rows = [
        (
            f"{r.place} ({'object tokens' if r.tokens == 'object:mean' else 'last token'})",
            percent(r.true, digits=0),
            percent(r.prior, digits=0),
        )
        for r in readings
    ]
    lead = paragraph(f"The same for all answers by the prior against the image ({readings[0].n}):")
    return lead + table(["place", "probes read the true color", "probes read the prior's color"], rows)
