"""Stage `examples`: the questions of both parts of the data, as JSON."""

from __future__ import annotations

import json
from pathlib import Path

from experiments.run.context import Context
from experiments.run.folder import write_json, write_text
from groundscope.core.text import format_count


def make_examples(context: Context, root: Path) -> str:
    """Write the examples of both parts, one record per line."""
    for name, part in (("discovery", context.discovery), ("held_out", context.held_out)):
        write_text(root / f"{name}.jsonl", "".join(json.dumps(example.record()) + "\n" for example in part))
        write_json(
            root / f"{name}.json", {"name": part.name, "digest": part.digest, "provenance": dict(part.provenance)}
        )
    named = zip(("discovery", "test"), context.parts, strict=True)
    return ", ".join(
        f"{len(part)} {name} questions on {format_count(len({e.group for e in part}), 'image')}"
        for name, part in named
        if len(part)
    )
