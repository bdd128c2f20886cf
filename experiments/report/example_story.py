"""One image told in full: what it shows, what the model says, where the truth is known, where heads look, the correction."""

from __future__ import annotations

import numpy as np

from concepts.nouns import article
from concepts.scenes.distributions import TYPICAL
from concepts.schema import ConceptDataset, Example
from experiments.report import figures
from experiments.report.data import Facts
from experiments.report.html import figure, paragraph, picture, section, table, text
from lvlm import Head


def apple_section(facts: Facts) -> str:
    """Return the section of the example `Facts.apple` chose; nothing where there is none."""
    row = facts.apple()
    if row is None:
        return ""
    example = facts.examples[row]
    thing = example.named_object()
    if thing is None:
        return ""
    true, prior = thing.attributes["color"], TYPICAL[thing.noun][0]
    steered, twin = _steered_answer(facts, example), _twin_answer(facts, example)
    image = example.image.load()
    enlarged = image.resize((image.width * 3, image.height * 3), resample=0) if image.width < 200 else image
    facts_list = [
        ("question", example.question),
        ("the image shows", f"{article(true)} {true} {thing.noun}"),
        ("the model says", facts.frame["model_answer"][row]),
        ("the truth", example.answer),
        ("steered, it says", steered),
    ]
    if twin is not None:
        facts_list.append(("its twin without the prior says", twin))
    pairs = "".join(f"<dt>{text(k)}</dt><dd>{text(v)}</dd>" for k, v in facts_list)
    parts = [
        f'<div class="apple">{picture(enlarged, f"Scene with {article(true)} {true} {thing.noun}")}<dl>{pairs}</dl></div>',
        paragraph(_story(facts, row, true, prior, thing.noun)),
    ]
    places, lines = _margins(facts, row, true, prior)
    if places:
        parts.append(
            figure(
                figures.margins(lines, places, f"What probes read: {true} (seen) against {prior} (typical)"),
                f"Margins of the probes for {true} and {prior} on this image, at the object's tokens and at the last token; "
                "above 0 the probe says yes.",
            )
        )
    parts.append(_looks(facts, example))
    parts.append(_rates_known(facts))
    return section("apple", f"{article(true).capitalize()} {true} {thing.noun}, called {prior}", *parts)


def _margins(facts: Facts, row: int, true: str, prior: str) -> tuple[list[str], dict[str, list[float]]]:
    places: list[str] = []
    lines: dict[str, list[float]] = {true: [], prior: []}
    for place, tokens, margins, colors in facts.color_margins(np.array([row])):
        places.append(f"{place}{' (last token)' if tokens == 'last' else ''}")
        for color in lines:
            lines[color].append(float(margins[0, colors.index(color)]))
    return places, lines


def _story(facts: Facts, row: int, true: str, prior: str, noun: str) -> str:
    """Say in plain words where the truth is and where it goes."""
    places, lines = _margins(facts, row, true, prior)
    if not places:
        return "No probe for every color could be fitted, so the way of the color cannot be followed."
    reads = [p for p, t, other in zip(places, lines[true], lines[prior], strict=True) if t > other]
    lost = [p for p, t, other in zip(places, lines[true], lines[prior], strict=True) if t <= other]
    first = f"Probes read {true} rather than {prior} at {len(reads)} of {len(places)} places"
    if not lost:
        return f"{first}: the {noun}'s color is known everywhere, and the answer is {prior} all the same."
    return f"{first}; {prior} is ahead at {', '.join(lost)}."


def _steered_answer(facts: Facts, example: Example) -> str:
    from behavior import answer
    from mitigation import SteeringVector

    context = facts.context
    file = facts.root / "steering" / "vector.safetensors"
    if not file.exists():
        return "not steered"
    vector = SteeringVector.load(file)
    one = ConceptDataset("one", (example,))
    with vector.applied(context.model):
        return str(answer(context.model, one, progress=False).answers[0].given)


def _twin_answer(facts: Facts, example: Example) -> str | None:
    from behavior import answer

    twin = facts.context.twin
    if twin is None:
        return None
    return str(answer(twin, ConceptDataset("one", (example,)), progress=False).answers[0].given)


def _looks(facts: Facts, example: Example) -> str:
    """Draw where the top heads look."""
    if not facts.top:
        return ""
    from circuits import attention_to_image

    heads = [Head.parse(h) for h in facts.top][:4]
    seen = attention_to_image(facts.context.model, [example], heads)
    thing = example.named_object()
    box = (thing.box.x0, thing.box.y0, thing.box.x1, thing.box.y1) if thing and thing.box else None
    maps = [
        (str(head), seen.maps[0, i].reshape(seen.grid), float(seen.image_mass[0, i])) for i, head in enumerate(heads)
    ]
    return figure(
        figures.overlay(example.image.load(), maps, box),
        "Where the top heads look from the last token; framed: the object asked about. Each map is scaled to its own "
        "largest value; a head may carry the image without looking at it here, through tokens that looked before.",
    )


def _rates_known(facts: Facts) -> str:
    rows = facts.known()
    if not rows:
        return ""
    return paragraph(f"The same over all {rows[0][3]} answers that follow the prior against the image:") + table(
        ["probes at", "read the true color", "read the prior's color"],
        [(place, f"{100 * true:.0f} %", f"{100 * prior:.0f} %") for place, true, prior, _ in rows],
    )
