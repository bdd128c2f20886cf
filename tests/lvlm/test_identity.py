"""What identifies a model: files of its folder, revisions, weights, tokenizer."""

from __future__ import annotations

import copy
import gc
import hashlib
import weakref
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from torch import nn

from activation_store import trace
from behavior import answer
from concepts import ConceptDataset
from lvlm import answer_key, load_lvlm
from lvlm.model_files import deciding_files
from lvlm.processor_digest import pixel_settings, processor_digest
from lvlm.weights_hash import has_weights, weights_hash
from tests.toys.examples import example


def test_every_file_that_decides_on_prompts_tokens_pixels_or_code_is_listed(tmp_path: Path) -> None:
    """Templates, merges, sentencepiece models and code are part of a model, documents and pictures are not."""
    decide = [
        "additional_chat_templates/tool.jinja",
        "chat_template.jinja",
        "config.json",
        "merges.txt",
        "model.safetensors",
        "modeling_own.py",
        "preprocessor_config.json",
        "sub/inner/more.py",
        "tokenizer.model",
        "vocab.txt",
    ]
    for name in [*decide, "README.md", "sample.png", ".gitattributes", "sub/notes.txt", "__pycache__/own.py"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name, encoding="utf-8")
    (tmp_path / "linked.txt").symlink_to(tmp_path / "merges.txt")
    names = [path.relative_to(tmp_path).as_posix() for path in deciding_files(tmp_path)]
    assert names == sorted([*decide, "linked.txt"])
    assert "model.safetensors" not in [path.name for path in deciding_files(tmp_path, weights=False)]
    assert deciding_files(tmp_path / "absent") == ()


# -- weights ---------------------------------------------------------------------------------------------------------


def matrix() -> Any:
    """One matrix as wide as a language model of 7 billion parameters has them; its columns are 32 heads of width 128."""
    module: Any = nn.Module()
    module.o_proj = nn.Linear(4096, 256, bias=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        nn.init.normal_(module.o_proj.weight)
    return module


def by_hand(module: nn.Module) -> str:
    """The written definition, for tensors of less than one chunk: names, types, shapes and bytes, in order of names."""
    whole = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        whole.update(hashlib.sha256(tensor.numpy().tobytes()).digest())
    return f"sha256:{whole.hexdigest()}"


def test_the_hash_of_weights_covers_every_byte() -> None:
    module = matrix()
    hashes = {weights_hash(module)}
    assert hashes == {by_hand(module)}
    with torch.no_grad():
        before = module.o_proj.weight[7, 4001].item()
        module.o_proj.weight[7, 4001] += 1e-3
        hashes.add(weights_hash(module))
        module.o_proj.weight[7, 4001] = before
        assert weights_hash(module) in hashes
        module.o_proj.weight[:, 128:4096] = 0  # 31 of 32 heads
        hashes.add(weights_hash(module))
        module.o_proj.weight[:, 1:] = torch.randn(256, 4095)
        hashes.add(weights_hash(module))
        module.o_proj.weight.data.mul_(2)  # which torch does not count
        hashes.add(weights_hash(module))
    module.o_proj = nn.Linear(4096, 256, bias=False)
    hashes.add(weights_hash(module))
    module.register_buffer("scale", torch.ones(1))
    hashes.add(weights_hash(module))
    assert len(hashes) == 7


def test_a_hash_does_not_depend_on_chunks_threads_or_memory_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    module = matrix()
    before = weights_hash(module)
    module.o_proj.weight = nn.Parameter(module.o_proj.weight.detach().T.contiguous().T)
    assert not module.o_proj.weight.is_contiguous()
    assert weights_hash(module) == before
    layer = nn.Linear(3, 2).bfloat16()
    assert weights_hash(layer) == weights_hash(copy.deepcopy(layer)) != weights_hash(copy.deepcopy(layer).float())
    monkeypatch.setattr("lvlm.weights_hash._CHUNK", 1024)
    assert weights_hash(copy.deepcopy(module)) == weights_hash(copy.deepcopy(module))


def test_a_hash_does_not_keep_a_model(tmp_path: Path) -> None:
    """Neither does asking it, tracing it, or a cache of answers."""
    lvlm = load_lvlm("tiny")
    data = ConceptDataset("toy", (example(0),))
    ref = weakref.ref(lvlm.hf)
    assert lvlm.weights_hash
    answer_key(lvlm, example(0))
    answer(lvlm, data, progress=False)
    trace(lvlm, data, ["decoder.L5.z"], ["last"], tmp_path, progress=False)
    del lvlm
    gc.collect()
    assert ref() is None


def test_hashes_of_earlier_releases_are_compared_by_their_sample(caplog: pytest.LogCaptureFixture) -> None:
    module = matrix()
    flat = module.o_proj.weight.detach().numpy().ravel()
    old = hashlib.sha256(b"o_proj.weight(256, 4096)" + flat[:: flat.size // 4096].tobytes()).hexdigest()
    assert has_weights(module, weights_hash(module))
    assert not caplog.records
    assert has_weights(module, old)
    assert "equal hashes do not prove equal weights" in caplog.text
    assert not has_weights(module, "0" * 64)
    assert not has_weights(module, "sha256:" + "0" * 64)


# -- tokenizer and processor -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["normalizer", "pre-tokenizer", "special token", "chat template", "vocabulary"])
def test_every_part_of_a_tokenizer_is_in_the_digest(change: str) -> None:
    processor = load_lvlm("tiny", validate=False).processor
    before, pixels = processor_digest(processor), pixel_settings(processor)
    processor.tokenizer("some text", padding="max_length", max_length=9)  # how a call pads is no part of a tokenizer
    assert processor_digest(processor) == before
    backend: Any = processor.tokenizer.backend_tokenizer
    if change == "normalizer":
        backend.normalizer = tokenizers.normalizers.Lowercase()
    elif change == "pre-tokenizer":
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    elif change == "special token":
        processor.tokenizer.pad_token = "yes"
    elif change == "chat template":
        processor.chat_template = "{{ 'x' }}"
    else:
        processor.tokenizer.add_tokens(["zyzzyva"])
    assert processor_digest(processor) != before
    assert pixel_settings(processor) == pixels


# -- caches ----------------------------------------------------------------------------------------------------------


def test_a_cache_entry_is_not_used_if_its_inputs_changed() -> None:
    lvlm = load_lvlm("tiny", validate=False)
    question = example(0)
    first = lvlm.encode(question).inputs["pixel_values"]
    lvlm.processor.image_processor.do_normalize = False
    fresh = load_lvlm("tiny", validate=False)
    fresh.processor.image_processor.do_normalize = False
    assert torch.equal(lvlm.encode(question).inputs["pixel_values"], fresh.encode(question).inputs["pixel_values"])
    assert not torch.equal(lvlm.encode(question).inputs["pixel_values"], first)
    lvlm.processor.image_processor.do_normalize = True
    mean = list(lvlm.processor.image_processor.image_mean)
    lvlm.processor.image_processor.image_mean = mean
    assert torch.equal(lvlm.encode(question).inputs["pixel_values"], first)
    mean[0] += 0.5  # changed within the list
    assert not torch.equal(lvlm.encode(question).inputs["pixel_values"], first)
    forward, names = lvlm.hf.forward, lvlm.accepts
    lvlm.hf.forward = lambda input_ids, only_here=None: forward(input_ids)
    assert lvlm.accepts == {"input_ids", "only_here"}
    lvlm.hf.forward = forward
    assert lvlm.accepts == names
    key = answer_key(lvlm, question)
    lvlm.processor.tokenizer.add_tokens(["No!"])
    assert answer_key(lvlm, question) is not key
    layer, tower, place = lvlm.layers("decoder")[2], lvlm.tower, lvlm.locate("decoder.L2.z")
    assert lvlm.tower is tower
    lvlm.hf.model.language_model.layers[2] = copy.deepcopy(layer)
    assert lvlm.layers("decoder")[2] is not layer
    assert lvlm.locate("decoder.L2.z").module is lvlm.layers("decoder")[2].self_attn.o_proj is not place.module
    lvlm.hf.model.vision_tower = copy.deepcopy(lvlm.hf.model.vision_tower)
    assert lvlm.tower is not None
    assert lvlm.tower is not tower
    config = lvlm.config_hash
    lvlm.hf.config.text_config.rms_norm_eps *= 2
    assert lvlm.config_hash != config
