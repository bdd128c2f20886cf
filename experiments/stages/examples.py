"""Stage `examples`: the questions of both parts of the data, as JSON."""

from __future__ import annotations

import json
from pathlib import Path

from experiments.run.context import Context
from experiments.run.folder import write_json, write_text


def make_examples(context: Context, root: Path) -> str:
    """Write the examples of both parts, one record per line."""
    for name, part in (("discovery", context.discovery), ("held_out", context.held_out)):
        write_text(root / f"{name}.jsonl", "".join(json.dumps(example.record()) + "\n" for example in part))
        write_json(
            root / f"{name}.json", {"name": part.name, "digest": part.digest, "provenance": dict(part.provenance)}
        )
    images = [len({e.group for e in part}) for part in context.parts]
    return (
        f"{len(context.discovery)} discovery questions on {images[0]} images, "
        f"{len(context.held_out)} test questions on {images[1]} images"
    )
