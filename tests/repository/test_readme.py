"""The first lines of the README, on the embedded model and a question file in POPE's layout."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from concepts import scenes

ROOT = Path(__file__).resolve().parents[2]


def test_the_first_lines_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert len([line for line in code.splitlines() if line and not line.startswith("import")]) == 6
    folder = tmp_path / "val2014"
    folder.mkdir()
    rows, count = [], {"yes": 0, "no": 0}
    by_image = {example.group: example for example in scenes.dataset(n_images=200, seed=3)}
    for number, example in enumerate(by_image.values()):
        answer = "yes" if "dog" in {o.noun for o in example.objects} else "no"
        if count[answer] < 14:
            count[answer] += 1
            example.image.load().save(folder / f"{number}.png")
            rows.append({"image": f"{number}.png", "text": "Is there a dog in the image?", "label": answer})
    assert min(count.values()) == 14
    lines = (json.dumps({"question_id": i, **row}) for i, row in enumerate(rows, 1))
    (tmp_path / "coco_pope_adversarial.json").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("llava-hf/llava-1.5-7b-hf", "tiny"), "README.md", "exec"), {})  # noqa: S102
    printed = capsys.readouterr().out
    assert "object:dog" in printed
    assert "Head(layer=" in printed
    assert "yes_ratio" in printed or "accuracy" in printed
