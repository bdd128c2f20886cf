"""Agreement of `behavior.chair` with the released CHAIR scorer on the objects mentioned in captions.

    python benchmarks/chair_agreement.py --release DIR --pattern DIR [--captions FILE …] [--quick]

The baseline is the released scorer, which is not part of this project: clone LisaAnne/Hallucination (``--release``) and
clips/pattern (``--pattern``), and install nltk with its data ``punkt_tab``. Functions of both are executed from their source
files, the first with its two Python 2 print statements replaced. Without both options nothing is compared and there are no
figures. Figures:

equal_templates
    share of captions with equal lists of objects, among captions generated from templates with every word of the released
    list, its plurals and its phrases;
equal_captions
    the same among captions of the files of ``--captions`` (JSON lines with a field ``caption``).
"""

from __future__ import annotations

import json
import platform
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from behavior.chair import COCO_PHRASES, chair, read_synonyms
from benchmarks._harness import (
    Figure,
    describe_device,
    figure,
    finish,
    option_parser,
    progress,
    wide_console,
)

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


def load_release(release: Path, pattern: Path) -> tuple[Reader, Callable[[str], str]]:
    """Return the released scorer's functions that list the objects of a caption and form the plural of a word."""
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
    """Yield captions from templates, filled with words in many forms."""
    rng = random.Random(0)
    forms = [
        form
        for entry in map(str.strip, entries)
        for form in (entry, f"{entry}s", f"{entry}es", plural(entry), f"{entry}'s", f"{entry}s'", entry.upper(),
                     entry.replace(" ", "-"), f"baby {entry}", f"{entry}-like", f"{entry} seat", f"{entry}/cat")
    ]  # fmt: skip
    for _ in range(count):
        template = rng.choice(TEMPLATES)
        yield template.format(*rng.choices(forms, k=template.count("{}")))


def main() -> None:
    """Run, print a table, and as the last line one JSON object."""
    parser = option_parser(__doc__, quick="2,000 instead of 40,000 captions from templates")
    parser.add_argument("--release", type=Path, help="clone of LisaAnne/Hallucination")
    parser.add_argument("--pattern", type=Path, help="clone of clips/pattern")
    parser.add_argument("--captions", type=Path, nargs="*", default=[], help="JSON lines with a field caption")
    options = parser.parse_args()
    figures: dict[str, Figure] = {}
    if options.release is None or options.pattern is None:
        print("Nothing was compared: --release and --pattern are required.")
    else:
        find_objects, pluralize = load_release(options.release, options.pattern)
        synonyms = read_synonyms(options.release / "data/synonyms.txt")
        groups = {path.stem: [json.loads(line)["caption"] for line in path.open()] for path in options.captions}
        count = 2_000 if options.quick else 40_000
        groups["templates"] = list(build_captions([*synonyms, *COCO_PHRASES], pluralize, count))
        table = Table("captions", "n", "equal objects, %", "objects", "objects of the release")
        equal, total = 0, 0
        for name, captions in groups.items():
            with progress(name, len(captions)) as advance:
                by_id = {str(i): caption for i, caption in enumerate(captions)}
                results = chair(by_id, dict.fromkeys(by_id, ()), synonyms, phrases=COCO_PHRASES).captions
                objects = [list(result.mentioned) for result in results]
                expected = []
                for caption in captions:
                    expected.append(find_objects(caption))
                    advance()
            equal_in_group = sum(a == b for a, b in zip(objects, expected, strict=True))
            percent = f"{100 * equal_in_group / len(captions):.2f}"
            counts = [str(sum(map(len, lists))) for lists in (objects, expected)]
            table.add_row(name, str(len(captions)), percent, *counts)
            if name == "templates":
                figures["equal_templates"] = figure(equal_in_group / len(captions), ">= .99", len(captions))
            else:
                equal += equal_in_group
                total += len(captions)
        if total:
            figures["equal_captions"] = figure(equal / total, ">= .99", total)
        wide_console().print(table)
    finish("chair_agreement", f"{describe_device()}, Python {platform.python_version()}", figures)


if __name__ == "__main__":
    main()
