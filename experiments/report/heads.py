"""The heads one by one: a grid to choose from, and for each of the best where it looks and where it matters most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from concepts.schema import Example
from experiments.report import figures
from experiments.report.data import Facts
from experiments.report.html import closed, figure, paragraph, section, table, text
from lvlm import Head

if TYPE_CHECKING:
    from circuits import HeadScores

SHOWN = 8
"""Heads told in detail at most."""
IMAGES = 3
"""Images shown for each."""


@dataclass(frozen=True)
class Told:
    """A head with the kind of pair it matters most for, and the examples where it does."""

    head: Head
    kind: str
    examples: tuple[Example, ...]
    effects: tuple[float, ...]
    """Of the head in those examples' pairs."""


def heads_section(facts: Facts) -> str:
    """Return the section; nothing where no head was scored."""
    if not facts.heads:
        return ""
    told = told_heads(facts)
    parts = [
        paragraph(
            "The largest effect of each head among the kinds of pairs, in percent of the answer brought back. "
            "Choose a framed one to see where it looks and the images it matters most for."
        ),
        _grid(facts, {t.head for t in told}),
    ]
    maps = _attention(facts, told)
    for entry in told:
        rows = []
        for kind, scores in facts.heads.items():
            low, high = scores.interval()
            at = (entry.head.layer, entry.head.head)
            rows.append((kind, f"{scores.mean[at]:+.3f} [{low[at]:+.3f}, {high[at]:+.3f}]", f"{scores.sign[at]:.0%}"))
        name = str(entry.head)
        best = facts.heads[entry.kind].mean[entry.head.layer, entry.head.head]
        parts.append(
            closed(
                f"head-{name}",
                f"{name}: brings back {100 * best:.0f} % of {entry.kind} answers",
                table(["kind of pair", "effect", "scenes where it is above 0"], rows),
                figure(
                    figures.overlays(
                        [
                            (
                                e.image.load(),
                                maps[e.id, entry.head][0],
                                f"{e.question}\n{e.answer}; effect {effect:+.2f}",
                            )
                            for e, effect in zip(entry.examples, entry.effects, strict=True)
                        ]
                    ),
                    f"Attention of {name} from the last token, over the images it matters most for; of all its attention "
                    f"{', '.join(f'{maps[e.id, entry.head][1]:.0%}' for e in entry.examples)} falls on the image. A head may "
                    "carry the image without looking at it here, through tokens that looked before.",
                )
                if entry.examples
                else "",
            )
        )
    return section("heads", "Head by head", *parts, made=("patch",))


def told_heads(facts: Facts) -> list[Told]:
    """Choose the heads to tell: those carried on with, then the best of each kind; and their examples."""
    wanted = [Head.parse(h) for h in facts.top]
    for scores in facts.heads.values():
        wanted += [h for h in scores.top(2) if h not in wanted]
    by_id = {e.id: e for e in facts.context.discovery}
    found = []
    for head in wanted[:SHOWN]:
        kind, scores = max(facts.heads.items(), key=lambda item: item[1].mean[head.layer, head.head])
        chosen = _strongest(scores, head, by_id)
        found.append(Told(head, kind, tuple(e for e, _ in chosen), tuple(v for _, v in chosen)))
    return found


def _strongest(scores: HeadScores, head: Head, by_id: dict[str, Example]) -> list[tuple[Example, float]]:
    """Return the examples a head matters most for, one an image."""
    effects = scores.effects[:, head.layer, head.head]
    seen: set[str] = set()
    chosen: list[tuple[Example, float]] = []
    for row in np.argsort(-effects, kind="stable"):
        example = by_id.get(scores.ids[row])
        if example is None or scores.groups[row] in seen:
            continue
        seen.add(scores.groups[row])
        chosen.append((example, float(effects[row])))
        if len(chosen) == IMAGES:
            break
    return chosen


def _attention(facts: Facts, told: list[Told]) -> dict[tuple[str, Head], tuple[np.ndarray, float]]:
    """Return map and share on the image by example and head."""
    from circuits import attention_to_image

    examples = list({e.id: e for t in told for e in t.examples}.values())
    if not examples:
        return {}
    heads = [t.head for t in told]
    seen = attention_to_image(facts.context.model, examples, heads)
    return {
        (example.id, head): (seen.maps[i, k].reshape(seen.grid), float(seen.image_mass[i, k]))
        for i, example in enumerate(examples)
        for k, head in enumerate(heads)
    }


def _grid(facts: Facts, told: set[Head]) -> str:
    """Return the heads as a table of links, the last layer on top."""
    stacked = np.stack([s.mean for s in facts.heads.values()])
    largest = np.take_along_axis(stacked, np.abs(stacked).argmax(0)[None], 0)[0]
    n_layers, n_heads = largest.shape
    limit = max(0.05, float(np.abs(largest).max()))
    lines = ["<tr><th></th>" + "".join(f'<th scope="col">H{h}</th>' for h in range(n_heads)) + "</tr>"]
    for layer in reversed(range(n_layers)):
        cells = []
        for number in range(n_heads):
            value, head = float(largest[layer, number]), Head(layer, number)
            # The tint says how much, the sign which of two colors; mixed with the page, so that it works in the dark too.
            tint = f"--effect:{round(100 * abs(value) / limit)}%;--tint:var(--{'for' if value >= 0 else 'against'})"
            shown = f"{round(100 * value) or 0}"
            label = f"{head}: {shown} percent"
            inner = f'<a href="#head-{head}" aria-label="{text(label)}">{shown}</a>' if head in told else shown
            cells.append(f'<td style="{tint}">{inner}</td>')
        lines.append(f'<tr><th scope="row">L{layer}</th>{"".join(cells)}</tr>')
    return f'<div class="scroll" tabindex="0"><table class="heads">{"".join(lines)}</table></div>'
