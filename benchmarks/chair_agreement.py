"""How often CHAIR finds the same objects in a caption as the released scorer does.

    python benchmarks/chair_agreement.py --release DIR --pattern DIR [--captions FILE …] [--quick]

The released scorer is not part of this project: clone LisaAnne/Hallucination (``--release``) and clips/pattern
(``--pattern``), install nltk and its data ``punkt_tab``. The functions of both are run from their source, the first with its
two Python 2 print statements replaced. Captions are JSON lines with a field ``caption``, as scorers of captions read them;
without any, and next to them, captions are made from templates with every word of the released list, its plurals and phrases.
Without ``--release`` there is nothing to compare with, and no figure.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from behavior.chair import COCO_PHRASES, chair, read_synonyms

TEMPLATES = (
    "A {}.",
    "The image shows two {} near a {}.",
    "A {}, a {} and {}; the {}!",
    '({}) is "{}" - {} -- {}.',
    '{}.{} {}. "{}" {}',
    "It's {}'s {} (the {}.), and '{}'.",
    "{}... {}.. {} . {}",
    "1. {}\n2. {}\n\n**{}**: {}",
    "Is that {}? {}?! {}: {}",
    "the {}\u2019s \u201c{}\u201d \u2014 {}\u2013{}",
    "a toilet with {} and its seats; {} & {}",
    "e.g. {} vs. {} at 5 p.m. {} St. {}",
    "don't {} i'll {} {},{} ,{} :{}",
)
Reader = Callable[[str], list[str]]


def released(release: Path, pattern: Path) -> tuple[Reader, Callable[[str], str]]:
    """Return the released scorer's reading of a caption, and its plural of a word, from source."""
    text = (pattern / "pattern/text/en/inflect.py").read_text(encoding="utf-8")
    words: dict[str, Any] = {"re": re, "NOUN": "NN", "ADJECTIVE": "JJ"}
    exec(text[text.index("plural_prepositions =") : text.index("#### VERB CONJUGATION")], words)  # noqa: S102 - source that the user names
    text = (release / "utils/chair.py").read_text(encoding="utf-8")
    text = text[text.index("class CHAIR") : text.index("def load_generated_captions")].replace('print "\\n"', "pass")
    text = text.replace("'data/synonyms.txt'", repr(str(release / "data/synonyms.txt")))
    import nltk  # pyright: ignore[reportMissingImports]

    scorer: dict[str, Any] = {"nltk": nltk, "singularize": words["singularize"]}
    exec(text, scorer)  # noqa: S102
    evaluator = scorer["CHAIR"]([], "")
    return lambda caption: evaluator.caption_to_words(caption)[1], words["pluralize"]


def build_captions(entries: list[str], plural: Callable[[str], str], count: int) -> Iterator[str]:
    """Yield captions from templates."""
    chance = random.Random(0)
    forms = [
        form
        for entry in map(str.strip, entries)
        for form in (entry, f"{entry}s", f"{entry}es", plural(entry), f"{entry}'s", f"{entry}s'", entry.upper(),
                     entry.replace(" ", "-"), f"baby {entry}", f"{entry}-like", f"{entry} seat", f"{entry}/cat")
    ]  # fmt: skip
    for _ in range(count):
        template = chance.choice(TEMPLATES)
        yield template.format(*chance.choices(forms, k=template.count("{}")))


def main() -> None:
    """Run, print a table and one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--release", type=Path, help="clone of LisaAnne/Hallucination")
    parser.add_argument("--pattern", type=Path, help="clone of clips/pattern")
    parser.add_argument("--captions", type=Path, nargs="*", default=[], help="JSON lines with a field caption")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    figures: dict[str, dict[str, object]] = {}
    if options.release is None or options.pattern is None:
        print("nothing to compare with: give --release and --pattern")
    else:
        theirs, plural = released(options.release, options.pattern)
        synonyms = read_synonyms(options.release / "data/synonyms.txt")
        entries = [*synonyms, *COCO_PHRASES]
        groups = {path.stem: [json.loads(line)["caption"] for line in path.open()] for path in options.captions}
        groups["templates"] = list(build_captions(entries, plural, 2_000 if options.quick else 40_000))
        table = Table("captions", "n", "equal objects, %", "mentions", "theirs")
        everything = {"equal": 0, "captions": 0}
        for name, captions in groups.items():
            keys = {str(i): caption for i, caption in enumerate(captions)}
            ours = [
                list(c.mentioned) for c in chair(keys, dict.fromkeys(keys, ()), synonyms, phrases=COCO_PHRASES).captions
            ]
            right = [theirs(caption) for caption in captions]
            equal = sum(a == b for a, b in zip(ours, right, strict=True))
            table.add_row(name, str(len(captions)), f"{100 * equal / len(captions):.2f}",
                          str(sum(map(len, ours))), str(sum(map(len, right))))  # fmt: skip
            if name != "templates":
                everything["equal"] += equal
                everything["captions"] += len(captions)
            else:
                share = equal / len(captions)
                figures["equal_templates"] = {
                    "value": share,
                    "goal": ">= .99",
                    "holds": share >= 0.99,
                    "n": len(captions),
                }
        if everything["captions"]:
            share = everything["equal"] / everything["captions"]
            figures["equal_captions"] = {
                "value": share, "goal": ">= .99", "holds": share >= 0.99, "n": everything["captions"],
            }  # fmt: skip
        Console().print(table)
    versions = {"device": platform.machine(), "python": platform.python_version()}
    print(json.dumps({"benchmark": "chair_agreement", **versions, "figures": figures}))


if __name__ == "__main__":
    main()
