"""Question files in POPE's layout, with images."""

from __future__ import annotations

import json
from pathlib import Path

from concepts.scenes.scene import TEST, generator, sample_scene


def pope_folder(folder: Path, count: int = 40) -> None:
    """Write a question file in POPE's layout and its images."""
    (folder / "images").mkdir()
    lines = []
    for i in range(count):
        scene = sample_scene(generator(TEST, 31, i), f"p{i}", count=3)
        scene.load().save(folder / "images" / f"p{i}.png")
        absent = next(n for n in ("car", "dog", "apple", "key") if scene.get(n) is None)
        for noun, label in ((scene.objects[0].noun, "yes"), (absent, "no")):
            article = "an" if noun[0] in "aeiou" else "a"
            question = f"Is there {article} {noun} in the image?"
            record = {"question_id": len(lines), "image": f"p{i}.png", "text": question, "label": label}
            lines.append(json.dumps(record))
    (folder / "pope_random.json").write_text("\n".join(lines) + "\n")
