"""Checkpoints that lack weights, damaged files, devices that do not exist, wrapped models, templates by hub id."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from groundscope.core.errors import GroundscopeError, ModelError
from lvlm import FamilySpec, load_lvlm, wrap_lvlm
from lvlm.embedded_models import folder_of
from lvlm.encoding.processor import Parts
from lvlm.load_checks import check_device, check_loading
from tests.toys.examples import example
from tests.toys.families import model

LEFT = "language_model.model.layers.2.mlp.down_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder_of("tiny"), tmp_path / "m"))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def test_a_missing_weight_is_named(folder: Path) -> None:
    rewrite(folder, lambda t: {k: v for k, v in t.items() if k != LEFT})
    with pytest.raises(
        ModelError, match=r"lacks weights of Llava.*model\.language_model\.layers\.2\.mlp\.down_proj"
    ) as e:
        load_lvlm(folder)
    assert LEFT in str(e.value)


def test_a_checkpoint_none_of_whose_names_match_is_refused(folder: Path) -> None:
    rewrite(folder, lambda t: {f"module.{k}": v for k, v in t.items()})
    with pytest.raises(ModelError, match=r"no name of its checkpoint matches a weight .*the checkpoint has module\."):
        load_lvlm(folder)


def test_unused_tensors_are_a_warning_and_harmless_ones_are_not(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    buffer = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(folder, lambda t: {**t, buffer: torch.ones(4)})
    assert load_lvlm(folder, validate=False).unused_weights == ()
    assert not caplog.records
    rewrite(folder, lambda t: {**t, "extra.weight": torch.ones(2, 2)})
    with caplog.at_level(logging.WARNING):
        assert load_lvlm(folder, validate=False).unused_weights == ("extra.weight",)
    (text,) = [r.getMessage() for r in caplog.records if r.name == "lvlm.loading"]
    assert "1 tensors that the model does not use, for example extra.weight" in text


def test_tied_weights_are_not_missing() -> None:
    tied = torch.nn.ModuleDict({"embed": torch.nn.Embedding(4, 2), "head": torch.nn.Linear(2, 4, bias=False)})
    head: Any = tied["head"]
    head.weight = tied["embed"].weight
    assert check_loading(tied, {"missing_keys": {"head.weight"}, "unexpected_keys": set()}, "m") == ()
    with pytest.raises(ModelError, match="no name of its checkpoint matches"):
        check_loading(tied, {"missing_keys": {"head.weight", "embed.weight"}}, "m")


@pytest.mark.parametrize("damage", ["truncated", "empty", "no header", "a folder of no weights", "looping sizes"])
def test_damaged_checkpoints_are_one_sentence(folder: Path, damage: str) -> None:
    file = folder / "model.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "no header":
        file.write_bytes(b"\xff" * 64)
    elif damage == "a folder of no weights":
        file.unlink()
    else:
        config = json.loads((folder / "config.json").read_text())
        config["text_config"]["num_hidden_layers"] = 10**9
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"model '.*'"):
        load_lvlm(folder)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "mps:7", "", "cpu:3", "meta"])
def test_devices_that_do_not_exist_are_named(device: str) -> None:
    with pytest.raises(ModelError, match=rf"device '{device}' is not available; choose from cpu"):
        check_device(device)


def test_devices_that_exist_are_accepted() -> None:
    for device in ("cpu", "cpu:0", "auto"):
        check_device(device)
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="device 'cuda'"):
            load_lvlm("tiny", device="cuda")


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch.compile's own
def test_wrapped_models_are_unwrapped() -> None:
    lvlm = model("llava")
    inputs = lvlm.encode(example(0)).inputs
    for wrapped in (
        torch.nn.DataParallel(lvlm.hf),
        torch.compile(lvlm.hf),
        torch.compile(torch.nn.DataParallel(lvlm.hf)),
    ):
        unwrapped = wrap_lvlm(wrapped, lvlm.processor, validate=False)
        assert unwrapped.hf is lvlm.hf
        assert torch.equal(unwrapped.logits(inputs), lvlm.logits(inputs))
    for other in (torch.nn.Linear(2, 2), object()):
        with pytest.raises(ModelError, match="give a Hugging Face model"):
            wrap_lvlm(other, lvlm.processor)


def test_family_files_and_templates_must_be_regular_files(tmp_path: Path) -> None:
    """Reading a FIFO without a writer must not block."""
    os.mkfifo(tmp_path / "family.yaml")
    with pytest.raises(ModelError, match="not a regular file but a FIFO"):
        FamilySpec.from_yaml(tmp_path / "family.yaml")
    from lvlm.encoding.processor import _template

    (tmp_path / "chat_template.json").write_text('{"chat_template": 3}')
    with pytest.raises(ModelError, match="no chat template"):
        _template(str(tmp_path), {})
    (tmp_path / "chat_template.json").write_text("{")
    with pytest.raises(ModelError, match="invalid JSON"):
        _template(str(tmp_path), {})


def test_a_folder_has_no_revision(folder: Path) -> None:
    with pytest.raises(ModelError, match="only a Hugging Face id has revisions"):
        load_lvlm(folder, revision="main")


def test_parts_keep_their_template_when_saved(tmp_path: Path) -> None:
    from lvlm.encoding.processor import _template

    parts = model("llava").processor
    Parts(parts.tokenizer, parts.image_processor, "<image>", "{{ 'own' }}").save_pretrained(tmp_path)
    assert _template(str(tmp_path), {}) == "{{ 'own' }}"


BY_ID = """
import json, shutil, sys
from pathlib import Path
from tests.toys.tiled_families import llava_onevision
from lvlm import load_lvlm
from lvlm.model_files import resolved_revision
root = Path(sys.argv[1])
hf, processor = llava_onevision()
VISUAL = "{% for m in messages %}<sep> {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}"
VISUAL += "{% endif %}{% endfor %}{% endfor %}"
said = {}
for name, own in (("with", "{% for m in messages %}{{ m['content'] + '!' }}{% endfor %}"), ("without", None)):
    folder = root / name
    hf.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    if own:
        settings["chat_template"] = own
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": VISUAL}))
    snapshots = root / "hf" / "hub" / f"models--toy--{name}" / "snapshots"
    shutil.copytree(folder, snapshots / ("0" * 40))
    (snapshots.parent / "refs").mkdir()
    (snapshots.parent / "refs" / "main").write_text("0" * 40)
    by_id = load_lvlm(f"toy/{name}", validate=False)
    said[name] = [load_lvlm(folder, validate=False).prompt("Is it?"), by_id.prompt("Is it?"), by_id.revision]
    said[name].append(resolved_revision(f"toy/{name}"))
said["folder"] = resolved_revision(root / "with")
print(json.dumps(said))
"""


def test_a_template_is_the_same_by_hub_id_and_from_a_folder(tmp_path: Path) -> None:
    """A cache folder as the Hub's client makes it, offline; the tokenizer's own template is that of a text model."""
    path = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", BY_ID, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    prompts = json.loads(done.stdout)
    prompt = "<sep> <image>Is it?"
    assert prompts == {
        "with": [prompt, prompt, "0" * 40, "0" * 40],
        "without": [prompt, prompt, "0" * 40, "0" * 40],
        "folder": None,
    }


def test_unknown_models_are_one_sentence(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(GroundscopeError, match="cannot be loaded"):
        load_lvlm(folder)


def test_absurd_image_sizes_are_refused(folder: Path) -> None:
    (file,) = [p for p in folder.glob("*processor_config.json") if "size" in p.read_text()]
    settings = json.loads(file.read_text())
    inner = settings.get("image_processor", settings)
    inner["size"] = {"height": 10**6, "width": 10**6}
    file.write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"has size\.(height|width)=1000000"):
        load_lvlm(folder)
