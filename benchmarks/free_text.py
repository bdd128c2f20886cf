"""F1 of the parser of descriptions on annotated sentences of released captions.

    python benchmarks/free_text.py [--quick] [--save]

The 300 sentences are those of tests/toys/free_text: captions of five models from the POPE repository, annotated by one
annotator before the parser was written (GUIDELINE.md there); 150 are held out: neither read nor parsed until the parser was
finished. Figures, for the held-out half, each with a 95 % interval over sentences:

object, attribute, relation
    F1. Objects are equal if their last words are at the same place; attributes and relations if they overlap and the last
    words of their objects are at the same places;
object_exact, attribute_exact, relation_exact
    F1 where all places must be equal;
development_object, …
    F1 on the half that the parser was written with;
keyword_object
    baseline: every word of the parser's list of things is an object, without rules.

The annotator also wrote the parser, so both share conventions: on other people's annotations F1 is lower by an unknown amount.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from behavior.free_text import Description, Span, SpanAgreement, compare_spans, parse_description, read_descriptions
from behavior.free_text.word_lists import OBJECT_NOUNS
from benchmarks._harness import Figure, describe_device, figure, finish, option_parser, print_figures
from concepts.object_mentions import find_mentions

SENTENCES = Path(__file__).resolve().parent.parent / "tests" / "toys" / "free_text" / "sentences.jsonl"
GOALS = {"object": 0.9, "attribute": 0.8, "relation": 0.7}


def main() -> None:
    """Parse, compare, print."""
    parser = option_parser(__doc__, quick="no effect: the benchmark takes seconds", save=True)
    options = parser.parse_args()
    halves = {line["id"]: line["half"] for line in map(json.loads, SENTENCES.read_text(encoding="utf-8").splitlines())}
    rows = read_descriptions(SENTENCES)
    figures: dict[str, Figure] = {}
    for half in ("held_out", "development"):
        reference = [row for row in rows if halves[row.id] == half]
        parsed = [parse_description(row.text, id=row.id) for row in reference]
        prefix = "" if half == "held_out" else "development_"
        figures |= _figures(compare_spans(reference, parsed), prefix, "", goals=half == "held_out")
        if half == "held_out":
            figures |= _figures(compare_spans(reference, parsed, exact=True), prefix, "_exact", goals=False)
            lexicon = {noun: noun for noun in OBJECT_NOUNS}
            words = [_keywords(row, lexicon) for row in reference]
            figures["keyword_object"] = _figures(compare_spans(reference, words), "", "", goals=False)["object"]
    print_figures(figures, "F1 on annotated sentences")
    finish("free_text", describe_device(), figures, save=options.save)


def _keywords(row: Description, lexicon: dict[str, str]) -> Description:
    return row.with_spans(Span(start, end, "object") for _, start, end in find_mentions(row.text, lexicon))


def _figures(agreement: SpanAgreement, prefix: str, suffix: str, *, goals: bool) -> dict[str, Figure]:
    return {
        f"{prefix}{row.level}{suffix}": figure(
            round(row.f1.value, 3),
            f">= {GOALS[row.level]}" if goals else "",
            n=row.both + row.only_first,
            low=round(row.f1.low, 3),
            high=round(row.f1.high, 3),
            precision=round(row.precision.value, 3),
            recall=round(row.recall.value, 3),
        )
        for row in agreement.levels
    }


if __name__ == "__main__":
    main()
