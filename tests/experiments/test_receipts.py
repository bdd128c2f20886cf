"""Receipts of stages whose content was changed, and a trace that leaves out images which cannot be read."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from activation_store import ActivationStore
from experiments.cli.overrides import compose
from experiments.data import load_files
from experiments.run.context import Context
from experiments.run.folder import Receipt, RunFolder, read_receipt, write_receipt
from experiments.stages.trace import make_activations, trace_into
from experiments.validation import check
from groundscope.core.errors import ConfigError, DataError

RECEIPT = Receipt(
    "evaluate", "k" * 64, {"rates.json": "0" * 64}, 12.5, "right 81.2 %", basis="b" * 64, inputs={"trace": "t"}
)


CHANGES = [
    ("81.2", "91.2"),
    ("12.5", "13.5"),
    ('"t"', '"u"'),
    ('"bb', '"cb'),
    ('"stamps": {}', '"stamps": {"rates.json": [1, 2]}'),
]


@pytest.mark.parametrize(("old", "new"), CHANGES)
def test_a_changed_value_of_a_receipt_is_an_error(tmp_path: Path, old: str, new: str) -> None:
    write_receipt(tmp_path, RECEIPT)
    assert read_receipt(tmp_path) == RECEIPT
    path = tmp_path / "stage.json"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"stage\.json is damaged.*delete that file"):
        read_receipt(tmp_path)


def test_a_receipt_without_its_digest_is_damaged_and_one_of_an_earlier_release_is_read(tmp_path: Path) -> None:
    write_receipt(tmp_path, RECEIPT)
    path = tmp_path / "stage.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    del record["digest"]
    path.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ConfigError, match="damaged"):
        read_receipt(tmp_path)
    earlier = {k: record[k] for k in ("stage", "key", "files", "seconds", "summary", "stamps", "origin")}
    path.write_text(json.dumps(earlier), encoding="utf-8")
    receipt = read_receipt(tmp_path)
    assert receipt is not None
    assert receipt.summary == "right 81.2 %"


def pope_files(folder: Path) -> None:
    rng = random.Random(0)
    lines = []
    for i in range(12):
        image = Image.new("RGB", (40, 40), tuple(rng.randrange(256) for _ in range(3)))
        image.save(folder / f"{i}.png")
        for n, noun in enumerate(("dog", "cat")):
            text = {"question_id": 2 * i + n, "image": f"{i}.png", "text": f"Is there a {noun} in the image?"}
            lines.append(json.dumps({**text, "label": "yes" if n else "no"}))
    (folder / "q.json").write_text("\n".join(lines), encoding="utf-8")


def test_a_trace_of_a_run_skips_images_that_cannot_be_read(tmp_path: Path) -> None:
    from lvlm import load_lvlm

    pope_files(tmp_path)
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:60])
    files = (f"data.questions={tmp_path}/q.json", f"data.images={tmp_path}")
    options = ("data=pope", *files, "data.test_share=.01", "trace=heads", "name=x", "threads=1")
    model = load_lvlm("tiny", validate=False)
    contexts = {}
    for name, words in {"raise": (), "skip": ("trace.on_error=skip",)}.items():
        (tmp_path / name).mkdir()
        context = Context(compose([*options, *words])[0], RunFolder(tmp_path / "x"), Console(file=io.StringIO()))
        context.__dict__.update(model=model, parts=(load_files(context.config.data), None))
        contexts[name] = context
    with pytest.raises(DataError, match="cannot be read"):
        make_activations(contexts["raise"], tmp_path / "raise")
    context = contexts["skip"]
    assert make_activations(context, tmp_path / "skip").startswith(
        "22 examples (2 skipped, because their images cannot be read), "
    )
    assert len(ActivationStore(tmp_path / "skip").provenance["skipped"]) == 2
    context.config.trace.shards = 2
    parts = tmp_path / "parts"
    for part in (1, 0):  # one chunk of batches: the first part is empty
        trace_into(context, parts, part)
    assert make_activations(context, parts).startswith("22 examples (2 skipped")


def test_unreadable_images_are_skipped_or_an_error_by_option() -> None:
    with pytest.raises(ConfigError, match=r"trace\.on_error=leave: choose from raise, skip"):
        check(compose(["trace.on_error=leave", "name=x"])[0])
