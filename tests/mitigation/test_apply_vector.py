"""The loader without groundscope: equal logits and equal generated tokens, in this process and in one without the packages."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from groundscope.core.packages import PACKAGES
from lvlm import Head, Site
from mitigation import AddChange, AmplifyChange, ProbeGate, ProjectChange, SteeringVector, export
from mitigation.steering.changes import VectorChange
from mitigation.steering.export import apply_vector
from mitigation.steering.places import Key
from tests.toys.random_models import examples, hooks_of, layers_of, shared_model

RNG = np.random.default_rng(0)


def unit(d: int) -> np.ndarray:
    v = RNG.standard_normal(d)
    return v / np.linalg.norm(v)


def make_vector(*keys: Key, kind: str = "add", width: int = 192, **more: Any) -> SteeringVector:
    model = shared_model()
    changes: dict[Key, VectorChange] = {}
    for key in keys:
        d = model.head_dim if isinstance(key, Head) else width
        if kind == "add":
            changes[key] = AddChange(unit(d), 1.5)
        elif kind == "project":
            changes[key] = ProjectChange(unit(d))
        else:
            changes[key] = AmplifyChange(unit(d), reads=unit(d)[None], writes=2 * unit(d)[None])
    positions = more.pop("positions", "last+generated")
    whole = SteeringVector(changes, positions, 2.0, model.name, model.config_hash)
    return replace(whole, **more)


HEADS = (Head(1, 3), Head(1, 6), Head(4, 0))
VECTORS = {
    "heads": make_vector(*HEADS),
    "heads amplify, decay": make_vector(*HEADS, kind="amplify", decay=0.5),
    "project image": make_vector(1, 2, kind="project", positions="image:all"),
    "everywhere": make_vector(2, Site("decoder", 3, "mlp_out"), Head(3, 1), positions="all"),
    "question": make_vector(1, positions="suffix:all"),
    "question and answer, decay": make_vector(1, positions="suffix+generated", decay=0.7),
    "answer": make_vector(3, positions="generated:all"),
    "last, kept": make_vector(2, positions="last", norm="kept"),
    "relative, decay": make_vector(2, norm="relative", decay=0.5),
    "away": make_vector(2, 4, positions="all", norm="away"),
    "vision": make_vector(Site("vision", 1, "resid_post"), positions="all", width=128),
    "attention output, gate at a head": make_vector(
        Site("decoder", 1, "attn_out"), kind="amplify", positions="all", gate=ProbeGate("L1.H2", unit(24), 0.1)
    ),
    "gate": make_vector(*HEADS[2:], gate=ProbeGate(2, unit(192), -0.2), positions="all"),
}


@torch.no_grad()
def outputs(inputs: dict[str, torch.Tensor], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of the prompt, and of three generated steps."""
    hf: Any = shared_model().hf
    generated = hf.generate(
        **inputs,
        max_new_tokens=3,
        min_new_tokens=3,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return hf(**inputs).logits, torch.stack(generated.logits)


@pytest.mark.parametrize("case", VECTORS)
def test_logits_are_those_of_the_vector(case: str, tmp_path: Path) -> None:
    model, vector = shared_model(), VECTORS[case]
    inputs = dict(next(b for b in model.batches(examples(), 2) if len(b.index) == 2).inputs)
    path = export.safetensors(vector, tmp_path / "v.safetensors", model)
    assert SteeringVector.load(path).parameters == vector.parameters
    plain, hooks, result = outputs(inputs), hooks_of(model), ()
    without_cache = {"use_cache": False}
    for options in ({}, without_cache) if "decay" in case or "question" in case else ({},):
        with vector.applied(model):
            expected = outputs(inputs, **options)
        with apply_vector.steer(model.hf, path):
            result = outputs(inputs, **options)
        for a, b in zip(result, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert not all(torch.allclose(a, b, atol=1e-3) for a, b in zip(result, plain, strict=True))
    # Afterwards the model is unchanged, and strength 0 changes nothing.
    assert hooks_of(model) == hooks
    assert "generate" not in vars(model.hf)
    with apply_vector.steer(model.hf, path, 0.0), torch.no_grad():
        assert torch.equal(model.hf(**inputs).logits, plain[0])


def test_the_loader_needs_only_torch_and_safetensors(tmp_path: Path) -> None:
    """Plain transformers code in a process where every package of groundscope is blocked."""
    model, case = shared_model(), "heads amplify, decay"
    shutil.copy(apply_vector.__file__, tmp_path / "apply_vector.py")
    model.hf.save_pretrained(tmp_path / "model")
    inputs = dict(next(model.batches(examples()[:1], 1)).inputs)
    files = {
        name: export.safetensors(VECTORS[name], tmp_path / f"{i}.safetensors", model)
        for i, name in enumerate((case, "gate"))
    }
    expected = {}
    for name in files:
        with VECTORS[name].applied(model):
            expected[name] = outputs(inputs)
    torch.save((inputs, {str(path): expected[name] for name, path in files.items()}), tmp_path / "expected.pt")  # noqa: TID251
    code = f"""
import sys
for room in {sorted({"groundscope", *PACKAGES})!r}:
    sys.modules[room] = None
sys.path.insert(0, {str(tmp_path)!r})
import torch
from apply_vector import steer
from transformers import LlavaForConditionalGeneration
model = LlavaForConditionalGeneration.from_pretrained({str(tmp_path / "model")!r}).eval()
inputs, expected = torch.load({str(tmp_path / "expected.pt")!r}, weights_only=True)
worst = 0.0
for path, (logits, steps) in expected.items():
    with torch.no_grad(), steer(model, path):
        made = model.generate(
            **inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        worst = max(worst, float((model(**inputs).logits - logits).abs().max()))
        worst = max(worst, float((torch.stack(made.logits) - steps).abs().max()))
print(worst)
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-5


def test_files_that_cannot_be_applied_are_refused_before_anything_changes(tmp_path: Path) -> None:
    model, vector = shared_model(), VECTORS["heads"]
    hooks = hooks_of(model)
    alone = export.safetensors(vector, tmp_path / "alone.safetensors")
    named = export.safetensors(vector, tmp_path / "named.safetensors", model)
    (tmp_path / "text.safetensors").write_text("no tensors")
    for path, hf, message in (
        (alone, model.hf, "does not name the model's modules; write it with the model"),
        (named, layers_of(model)[0], "has no module 'model.language_model.layers"),
        (tmp_path / "text.safetensors", model.hf, "is not a steering vector"),
        (tmp_path / "none.safetensors", model.hf, "not a regular file"),
    ):
        with pytest.raises(ValueError, match=message):
            apply_vector.apply(hf, path)
    assert hooks_of(model) == hooks


def test_a_place_that_is_no_plain_tensor_is_refused_by_name(tmp_path: Path) -> None:
    vector = make_vector(Site("decoder", 2, "resid_mid"))
    path = export.safetensors(vector, tmp_path / "v.safetensors", shared_model())
    with pytest.raises(ValueError, match=r"'layers\.2\.resid_mid' is not the plain input or output of a module"):
        apply_vector.read(path)
