"""Every family: values read are those that the model computes, and image tokens are at the positions of their pixels."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from activation_store import trace
from activation_store.tracing.plan import make_plan
from activation_store.tracing.tracer import Tracer
from concepts import ConceptDataset
from concepts.annotated_object import Box
from groundscope.core.errors import ModelError, SiteError
from lvlm import FamilySpec, Lvlm, TokenSelection, families, load_lvlm, wrap_lvlm
from lvlm.identity_checks import validate
from tests.toys.examples import example
from tests.toys.families import BUILDERS, FAMILY, LENS, PLACED, WHERE, at, build, model, raw
from tests.toys.remote_code_families import STAND_INS, build_stand_in

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "guides" / "families.md"


# -- the proof -----------------------------------------------------------------------------------------------------------


@FAMILY
def test_every_identity_holds_to_float_precision(family: str) -> None:
    lvlm = model(family)
    errors = validate(lvlm, lvlm.encode(example()))
    assert max(errors.values()) <= 1e-5
    parts = (
        "sum of heads",
        "pre + attn_out + mlp_out = post",
        "resid_pre = previous",
        "unembedding",
        "no logit",
        "rows sum",
    )
    for part in parts:
        assert any(part in name for name in errors), part
    if WHERE[family][2]:
        assert any(name.startswith("vision.L0: sum of heads") for name in errors)
    assert any("cross" in name for name in errors) == (family in {"mllama", "instructblip_t5", "florence2"})
    assert any("except at the image" in name for name in errors) == (family == "qwen3_vl")


@FAMILY
def test_traced_values_equal_raw_hooks(family: str, tmp_path: Path) -> None:
    lvlm = model(family)
    data = ConceptDataset("d", (example(0), example(1), example(2, (100, 140))))
    decoder, _, vision, _ = WHERE[family]
    sites = ["resid_post", "z"] + (["vision.resid_post", "vision.z"] if vision else [])
    tokens = ["last"] + (["image:mean"] if vision else [])
    store = trace(lvlm, data, sites, tokens, tmp_path, batch_size=1, answers=False, progress=False)
    for row, question in enumerate(data):
        encoding = lvlm.encode(question)
        record = raw(family, lvlm.collate([encoding]))
        for n in range(len(at(lvlm.hf, decoder))):
            for component in ("resid_post", "z"):
                name = f"decoder.L{n}.{component}"
                if name not in record:
                    continue
                np.testing.assert_array_equal(store.read(name, "last")[row], record[name][0, -1].numpy(), err_msg=name)
        if vision:
            count = sum(len(lattice.positions) for lattice in encoding.tokens.views["vision"])
            flat = record["vision.L0.z"].reshape(-1, record["vision.L0.z"].shape[-1]).double()
            assert encoding.tokens.sequence["vision"] == len(flat)
            at_image = list(encoding.tokens.positions(TokenSelection("image", "mean"), "vision"))
            assert len(set(at_image)) == count
            expected = flat[at_image].mean(0).numpy()
            np.testing.assert_allclose(store.read("vision.L0.z", "image:mean")[row], expected, rtol=1e-5, atol=1e-6)


@FAMILY
def test_an_example_in_a_batch_equals_the_example_alone(family: str) -> None:
    lvlm = model(family)
    data = ConceptDataset("d", (example(0), example(3, (60, 60)), example(1), example(2, (60, 60))))
    vision = WHERE[family][2]
    sites = ["resid_post", "mlp_out", "attn_out"] + (["vision.resid_post", "vision.mlp_out"] if vision else [])
    sites = [s for s in sites if family not in {"mllama"} or s != "attn_out"]
    tokens = ["last"] + (["image:mean"] if vision else [])
    plan = make_plan(lvlm, lvlm.encode(data[0]), sites, tokens, "float32")
    batched, _ = Tracer.begin(lvlm, data, plan, 8, answers=False).chunk(data.examples, lambda _: None)
    alone, _ = Tracer.begin(lvlm, data, plan, 1, answers=False).chunk(data.examples, lambda _: None)
    sizes = {len(batch.index) for batch in lvlm.batches(data.examples, 8)}
    assert max(sizes) > 1
    for key, values in batched.items():
        scale = max(1.0, float(np.abs(alone[key]).max()))
        np.testing.assert_allclose(values, alone[key], rtol=0, atol=1e-5 * scale, err_msg=str(key))


# -- where tokens are ----------------------------------------------------------------------------------------------------


def embedded(lvlm: Lvlm, picture: Image.Image) -> tuple[torch.Tensor, Any]:
    """What the first decoder layer is given for an image, and the map of its tokens."""
    inputs, tokens = lvlm.encode_prompt(
        lvlm.prompt("Is there a cat?"), [picture], question="Is there a cat?", boxes={"o": (0, Box(0, 0, 1, 1))}
    )
    record: list[torch.Tensor] = []
    hook = lvlm.locate("decoder.L0.resid_pre").watch(lambda x: record.append(x[0].clone()))
    try:
        lvlm.logits(inputs)
    finally:
        hook.remove()
    return record[0], tokens


@pytest.mark.parametrize("family", PLACED)
@pytest.mark.parametrize("size", [(168, 112), (90, 150)])
def test_an_image_token_changes_where_its_pixels_do(family: str, size: tuple[int, int]) -> None:
    """With attention between patches cut, a token depends on its own pixels alone: change some, and see which it is."""
    lvlm = model(family)
    projections = [lvlm.output_projection("vision", n) for n in range(lvlm.n_vision_layers)]
    parameters = [(p.weight.clone(), None if p.bias is None else p.bias.clone()) for p in projections]
    noise = np.random.default_rng(0)
    pixels = noise.integers(96, 160, (size[1], size[0], 3), dtype=np.uint8)
    try:
        with torch.no_grad():
            for projection in projections:
                projection.weight.zero_()
        before, tokens = embedded(lvlm, Image.fromarray(pixels))
        for lattice in tokens.views["decoder"]:
            assert lattice.grid is not None
            for cell in noise.choice(lattice.grid.count, 2, replace=False):
                box = lattice.grid.box(int(cell))
                x0, x1 = (
                    round(b0 + share * (b1 - b0)) for b0, b1, share in ((box.x0, box.x1, 0.4), (box.x0, box.x1, 0.6))
                )
                y0, y1 = (
                    round(b0 + share * (b1 - b0)) for b0, b1, share in ((box.y0, box.y1, 0.4), (box.y0, box.y1, 0.6))
                )
                if min(x0, y0) < 0 or x1 > size[0] or y1 > size[1]:
                    continue  # padding has no pixels
                changed = pixels.copy()
                changed[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)] = 255
                after, _ = embedded(lvlm, Image.fromarray(changed))
                moved = (after - before).abs().amax(-1)
                here = lattice.positions
                assert int(moved[list(here)].argmax()) == int(cell), (lattice.kind, cell)
                text = [i for i in range(len(moved)) if i not in set(tokens.image)]
                if family != "gemma3":
                    assert float(moved[text].max()) == 0
    finally:
        with torch.no_grad():
            for projection, (weight, _) in zip(projections, parameters, strict=True):
                projection.weight.copy_(weight)


# -- the table -----------------------------------------------------------------------------------------------------------

NAMES = {
    "llava": "LLaVA-1.5",
    "llava_next": "LLaVA-NeXT",
    "llava_onevision": "LLaVA-OneVision",
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "glm4v": "GLM-4V",
    "idefics3": "Idefics3",
    "smolvlm": "SmolVLM",
    "internvl": "InternVL",
    "paligemma": "PaliGemma",
    "paligemma2": "PaliGemma-2",
    "gemma3": "Gemma3",
    "mllama": "Llama-3.2-Vision",
    "blip2_opt": "BLIP-2 (OPT)",
    "blip2_llama": "BLIP-2 (Llama)",
    "instructblip_llama": "InstructBLIP (Llama)",
    "instructblip_t5": "InstructBLIP (T5)",
    "deepseek_vl": "DeepSeek-VL",
    "janus": "Janus",
    "kosmos2": "Kosmos-2",
    "florence2": "Florence-2",
    "chameleon": "Chameleon",
    "llama4": "Llama 4",
    "mistral3": "Mistral3",
    "minigpt4": "MiniGPT-4 *",
    "deepseek_vl_v2": "DeepSeek-VL2 *",
    "qwen": "Qwen-VL *",
}


def table() -> str:
    """The table of families, from the models that the tests above prove."""
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    lines = [
        "| family | model type | sites | image tokens have a place | TransformerLens | what differs |",
        "|---|---|---|---|---|---|",
    ]
    for family, name in NAMES.items():
        lvlm = model(family) if family in BUILDERS else wrap_lvlm(*build_stand_in(family), name=family, validate=False)
        tokens = lvlm.encode(example()).tokens
        sites = ["decoder"]
        sites += ["cross"] if any(lvlm.attends("decoder", n, cross=True) for n in range(lvlm.n_layers)) else []
        sites += ["vision"] if lvlm.n_vision_layers else []
        sites += ["projector"] if lvlm.spec.projector else []
        views = tokens.views.get("decoder", ())
        place = "not in the decoder" if not views else ("yes" if all(v.grid for v in views) else "no (queries)")
        lens = "yes" if family in LENS and type(lvlm.hf).__name__ in SUPPORTED_ARCHITECTURES else ""
        row = (name, f"`{lvlm.spec.model_type}`", ", ".join(sites), place, lens, lvlm.spec.notes)
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def test_the_guide_lists_the_validated_families() -> None:
    assert set(NAMES) == set(BUILDERS) | set(STAND_INS)
    assert {families[m].model_type for m in families} == {
        (model(f) if f in BUILDERS else wrap_lvlm(*build_stand_in(f), validate=False)).spec.model_type for f in NAMES
    }
    text = PAGE.read_text(encoding="utf-8")
    start, end = "<!-- families: begin -->\n", "\n<!-- families: end -->"
    if os.environ.get("WRITE_FAMILIES"):
        head, _, tail = text.partition(start)
        PAGE.write_text(head + start + table() + end + tail.partition(end)[2], encoding="utf-8")
        text = PAGE.read_text(encoding="utf-8")
    assert table() == text.partition(start)[2].partition(end)[0], (
        "run this test with WRITE_FAMILIES=1 to renew the table"
    )


# -- what a user brings --------------------------------------------------------------------------------------------------


def test_a_family_spec_is_read_from_yaml(tmp_path: Path) -> None:
    network, processor = build_stand_in("minigpt4")
    network.config.model_type = "mine"
    with pytest.raises(ModelError, match=r"unknown family 'mine'.*spec=FamilySpec\('mine'") as error:
        wrap_lvlm(network, processor)
    assert "llama_model: CausalLM" in str(error.value)
    assert "blocks: ModuleList of 2" in str(error.value)
    path = tmp_path / "mine.yaml"
    path.write_text(
        "model_type: mine\nview: resampled\ntemplate: '{image} {question}'\ndecoder:\n  layers: llama_model.model.layers\n"
    )
    lvlm = wrap_lvlm(network, processor, spec=path)
    assert lvlm.spec.vision.layers == "visual_encoder.blocks"
    path.write_text("model_type: mine\nview: resampled\nmlp_path: x\n")
    with pytest.raises(ModelError, match="unknown field 'mlp_path'; choose from"):
        wrap_lvlm(network, processor, spec=path)
    path.write_text("model_type: mine\nview: resampled\ndecoder:\n  layers: llama_model.model.blocks\n")
    with pytest.raises(
        ModelError, match=r"no module 'llama_model.model.blocks' \('llama_model.model' has embed_tokens, layers, norm\)"
    ):
        wrap_lvlm(network, processor, spec=path)
    path.write_text("model_type: mine\nview: sideways\n")
    with pytest.raises(ModelError, match="unknown image encoding 'sideways'; choose from whole"):
        wrap_lvlm(network, processor, spec=path)
    with pytest.raises(ModelError, match="cannot be read"):
        FamilySpec.from_yaml(tmp_path / "none.yaml")
    path.write_text("- a list\n")
    with pytest.raises(ModelError, match="is not a mapping"):
        FamilySpec.from_yaml(path)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("gemma3", {"attention_out": ""}, r"decoder.L0: pre \+ attn_out = mid fails"),
        ("glm4v", {"mlp_out": ""}, r"decoder.L0: pre \+ attn_out \+ mlp_out = post fails .* FamilySpec.decoder.mlp"),
        ("mllama", {"cross_gate": ""}, r"decoder.L1: pre \+ attn_out = mid fails"),
        ("florence2", {"attention_post_norm": "", "mlp_post_norm": ""}, r"decoder.L0: pre \+ attn_out = mid fails"),
        ("llama4", {"mlp": "self_attn.o_proj"}, r"decoder.L0: pre \+ attn_out \+ mlp_out = post fails"),
        ("qwen2_vl", {"output_projection": "self_attn.q_proj"}, r"decoder.L0: sum of heads = attn_out fails"),
    ],
)
def test_an_incomplete_family_spec_fails_validation(family: str, change: dict[str, str], message: str) -> None:
    lvlm = model(family)
    wrong = replace(lvlm.spec, decoder=replace(lvlm.spec.decoder, **change))
    with pytest.raises(ModelError, match=message):
        wrap_lvlm(*build(family), spec=wrong)


def test_undeclared_deepstack_fails_validation() -> None:
    with pytest.raises(ModelError, match=r"qwen3_vl.*decoder.L1: resid_pre = previous resid_post fails"):
        wrap_lvlm(*build("qwen3_vl"), spec=replace(families["qwen3_vl"], added_after=""))


@pytest.mark.parametrize(
    "family", ["qwen2_vl", "smolvlm", "llama4", "mistral3", "kosmos2", "instructblip_t5", "florence2"]
)
def test_a_saved_model_loads_with_pillow_alone(family: str, tmp_path: Path) -> None:
    lvlm = model(family)
    lvlm.hf.save_pretrained(tmp_path)
    lvlm.processor.save_pretrained(tmp_path)
    loaded = load_lvlm(tmp_path)
    inputs = lvlm.encode(example()).inputs
    reloaded = loaded.encode(example()).inputs
    assert inputs.keys() == reloaded.keys()
    assert all(torch.equal(inputs[name], reloaded[name]) for name in inputs)
    torch.testing.assert_close(loaded.logits(reloaded), lvlm.logits(inputs), rtol=0, atol=1e-6)


def test_missing_sites_of_a_family_are_named() -> None:
    for family, site, message in (
        ("chameleon", "projector.out", r"has no projector: its VQ encoder \(model.vqmodel\) is convolutions"),
        (
            "chameleon",
            "vision.L0.z",
            r"no vision layers that can be read: its VQ .* is 'decoder.L0.resid_pre' at 'image:all'",
        ),
        ("mllama", "decoder.L1.z", r"no self-attention in this layer; layers that have it: 0, 2"),
        ("mllama", "decoder.L0.cross.z", r"no cross-attention in this layer; layers that have it: 1, 3"),
    ):
        with pytest.raises(SiteError, match=message):
            model(family).locate(site)


PROCESSORS = [
    "llava",
    "llava_next",
    "idefics3",
    "paligemma",
    "paligemma2",
    "gemma3",
    "mllama",
    "blip2_opt",
    "janus",
    "deepseek_vl",
]


# PaliGemma's processor makes an array of tensors as numpy no longer likes it.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("family", PROCESSORS)
def test_inputs_are_those_of_the_familys_own_processor(family: str) -> None:
    """Where transformers builds the processor without torchvision, it is the oracle for placeholders and pixels."""
    lvlm, question = model(family), example()
    text, image = lvlm.prompt(question.question), question.image.load()
    if family.startswith("paligemma"):
        text = f"<image>{question.question}"  # it adds the rest itself
    direct = lvlm.processor(
        images=[[image]] if family in {"mllama", "idefics3"} else [image], text=[text], return_tensors="pt"
    )
    ours = lvlm.encode(question).inputs
    named = [
        "input_ids",
        "pixel_values",
        *(n for n in ("token_type_ids", "cross_attention_mask", "aspect_ratio_ids") if n in ours),
    ]
    for name in named:
        if name in direct:
            theirs = direct[name]
            if family.startswith("paligemma"):  # the toy's tokenizer adds a first token, which the real one does not
                theirs = theirs[:, -ours[name].shape[1] :] if name != "pixel_values" else theirs
            assert torch.equal(ours[name], theirs), name


def test_the_library_is_imported_without_transformers(tmp_path: Path) -> None:
    """So that it works under whatever release a model's own code needs."""
    code = (
        "import sys, pkgutil, importlib; sys.modules['transformers'] = None\nimport lvlm\n"
        "for m in pkgutil.walk_packages(lvlm.__path__, 'lvlm.'):\n"
        "    if '.tiny' not in m.name: importlib.import_module(m.name)\nprint('done')"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "done\n", done.stderr
