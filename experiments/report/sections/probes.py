"""Where concepts can be decoded: accuracy of probes by head, and along the forward pass."""

from __future__ import annotations

from concepts.schema import LEVELS
from experiments.report import figures
from experiments.report.derived import accuracy_by_place, level_accuracy
from experiments.report.html import figure, paragraph, section
from experiments.results.run_files import RunFiles


def probes_section(run: RunFiles) -> str:
    """Return the section; empty if no probe was fitted."""
    parts = [
        paragraph(
            "Logistic probes, fitted on one part of the images and evaluated once on the other; questions about one image are "
            "never in both. The control repeats the procedure with shuffled labels."
        )
    ]
    rows = []
    for level in LEVELS:
        accuracy = level_accuracy(run, "decoder", "z", "last", level)
        if accuracy is not None:
            values, controls, names = accuracy
            rows.append((f"{level} ({len(names)} concept{'s' if len(names) > 1 else ''})", values, controls))
    if rows:
        parts.append(
            figure(
                figures.grids(rows),
                "Balanced accuracy of probes on the output of each head at the last token, averaged over the concepts of a "
                "level. Right: the same with shuffled labels.",
            )
        )
    for tokens, name in (("object:mean", "the object's image tokens"), ("last", "the last token")):
        lines, control = {}, {}
        for level in LEVELS:
            places = accuracy_by_place(run, level, tokens)
            if places:
                lines[level] = [(p.place, p.value, p.low, p.high) for p in places]
                control |= {p.place: p.control for p in places}
        if lines:
            parts.append(
                figure(
                    figures.path(lines, control, f"Probes at {name}"),
                    f"Balanced accuracy of probes at {name}, from the vision tower through the projector to the decoder.",
                )
            )
    return section("known", "Where it is known", *parts, stages=("trace", "probe")) if len(parts) > 1 else ""
