"""Preference pairs about small images, and readers of their files that share no code with the package."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from concepts import BytesImage
from mitigation import PreferenceData, PreferencePair


def pixels(seed: int, size: tuple[int, int] = (9, 7)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)


def image(seed: int) -> BytesImage:
    file = io.BytesIO()
    Image.fromarray(pixels(seed)).save(file, format="PNG")
    return BytesImage(file.getvalue(), f"image {seed}")


def pair(number: int, **changes: Any) -> PreferencePair:
    fields: dict[str, Any] = {
        "id": f"p{number}",
        "images": (image(number // 2),),
        "prompt": f"What is at place {number}?",
        "chosen": f"a cup, number {number}",
        "rejected": "ein Hund \u201ebunt\u201c\nzwei",
        "source": "labels",
        "group": f"g{number // 2}",
    }
    return PreferencePair(**fields | changes)


def preferences(n: int = 6) -> PreferenceData:
    return PreferenceData("by hand", tuple(pair(i) for i in range(n)))


Row = tuple[str, str, str, list[np.ndarray]]
"""Prompt, chosen and rejected answer, and the pixels of the images."""


def open_pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def naive_trl(file: Path) -> list[Row]:
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        parts = row["prompt"][-1]["content"]
        assert [p["type"] for p in parts] == ["image"] * len(row["images"]) + ["text"]
        answers = [row[k][0]["content"][0]["text"] for k in ("chosen", "rejected")]
        rows.append((parts[-1]["text"], *answers, [open_pixels(file.parent / i) for i in row["images"]]))
    return rows


def naive_csr(file: Path) -> list[Row]:
    rows = []
    for row in json.loads(file.read_text(encoding="utf-8")):
        chosen, rejected = row["conversations"], row["rejected_conversations"]
        assert [t["from"] for t in chosen + rejected] == ["human", "gpt", "human", "gpt"]
        assert chosen[0]["value"] == rejected[0]["value"]
        prompt = chosen[0]["value"].removeprefix("<image>\n")
        rows.append((prompt, chosen[1]["value"], rejected[1]["value"], [open_pixels(file.parent / row["image"])]))
    return rows


def naive_rlaif_v(file: Path) -> list[Row]:
    import pandas as pd

    frame: Any = pd.read_parquet(file)
    rows: list[Row] = []
    for _, r in frame.iterrows():
        picture = Image.open(io.BytesIO(r["image"]["bytes"])).convert("RGB")
        rows.append((r["question"], r["chosen"], r["rejected"], [np.asarray(picture)]))
    return rows


def _vg_paths(folder: Path) -> dict[int, Path]:
    """Visual Genome's index as HA-DPO's code reads it: the last two parts of each URL, below the folder."""
    rows = json.loads((folder / "image_data.json").read_text())
    return {r["image_id"]: folder / r["url"].split("/")[-2] / r["url"].split("/")[-1] for r in rows}


def naive_pope(file: Path, key: str) -> list[Row]:
    paths = _vg_paths(file.parent)
    rows = json.loads(file.read_text(encoding="utf-8"))
    return [
        (r["question"], r["chosen"], r[key], [open_pixels(paths[int(r["image_id"])])]) for r in rows if not r["correct"]
    ]


def naive_descriptions(file: Path) -> list[tuple[np.ndarray, list[str], list[str]]]:
    paths = _vg_paths(file.parent)
    document = json.loads(file.read_text(encoding="utf-8"))
    rows = document.items() if isinstance(document, dict) else [(r["image_id"], r) for r in document]
    return [(open_pixels(paths[int(i)]), r["chosen"], r["rejected"]) for i, r in rows]
