"""The model under study: sites, token maps, answer keys, and the identities that validate them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from concepts import scenes
from concepts.annotated_object import Box
from concepts.scenes.questions import as_example, existence, what_color
from concepts.scenes.scene import TEST, generator, sample_scene
from concepts.schema import Example
from groundscope.core.errors import DataError, ModelError, SiteError
from lvlm import Head, Lvlm, PatchGrid, Site, TokenSelection, answer_key, families, load_lvlm, wrap_lvlm
from lvlm.family.specification import StackSpec
from lvlm.identity_checks import validate
from lvlm.sites import LAYER_COMPONENTS
from lvlm.tiny.architecture import build_model, build_processor
from lvlm.token_selection import PATCHABLE, READABLE, REDUCTIONS, SINGLE, STEERABLE, STORED_ROLES


@pytest.fixture(scope="module")
def model() -> Lvlm:
    return wrap_lvlm(build_model(), build_processor(), name="random")


@pytest.fixture(scope="module")
def example() -> Example:
    scene = sample_scene(generator(TEST, 2, 0), "s", count=3)
    return as_example(scene, what_color(scene, scene.objects[1]), "neutral")


# -- names ---------------------------------------------------------------------------------------------------------


@given(st.sampled_from(["vision", "decoder"]), st.integers(0, 200), st.sampled_from(LAYER_COMPONENTS), st.booleans())
def test_sites_print_and_parse(stack: Any, layer: int, component: Any, cross: bool) -> None:
    site = Site(stack, layer, component, cross=cross)
    assert Site.parse(str(site)) == site


@given(st.integers(0, 99), st.integers(0, 99))
def test_heads_print_and_parse(layer: int, head: int) -> None:
    assert Head.parse(str(Head(layer, head))) == Head(layer, head)


SELECTIONS = [
    *("last", "bos", "all", "all:mean", "all:each", "last+generated", "suffix+generated", "generated:3", "answer:0"),
    *("positions:7", "positions:2,13", "positions:2,13:each", "positions:2,13:mean", "object:apple:mean"),
    *(f"{role}:{how}" for role in STORED_ROLES if role not in SINGLE for how in REDUCTIONS),
    *(f"suffix:{how}" for how in REDUCTIONS),
]


@pytest.mark.parametrize("text", SELECTIONS)
def test_selections_print_and_parse(text: str) -> None:
    selection = TokenSelection.parse(text)
    assert str(selection) == text
    assert TokenSelection.parse(text, allowed=[selection.form]) == selection


def test_each_list_of_forms_is_a_list_of_selections() -> None:
    for form in (*READABLE, *PATCHABLE, *STEERABLE):
        text = form.replace("<i>,<j>", "1,2").replace("<k>", "3").replace("<id>", "x")
        assert TokenSelection.parse(text).form == form


@pytest.mark.parametrize("text", ["decoder.12.z", "decoder.L1.zz", "text.L0.z", "projector", "decoder.L-1.z", ""])
def test_invalid_sites_are_refused(text: str) -> None:
    with pytest.raises(SiteError, match="is not a site"):
        Site.parse(text)


@pytest.mark.parametrize(
    "text", ["last:mean", "picture:mean", "image:sum", "all:all", "image+generated", "generated:03"]
)
def test_an_unknown_selection_is_refused(text: str) -> None:
    with pytest.raises(SiteError, match=f"unknown token selection '{re.escape(text)}'; choose from last"):
        TokenSelection.parse(text)


@pytest.mark.parametrize(
    ("text", "allowed", "message"),
    [
        ("image", (), "several readings: 'image:mean' .their mean., 'image:all' .every one of them., 'image:each'"),
        (
            "suffix",
            PATCHABLE,
            "several readings: 'suffix:all' .every one of them., 'suffix:each' .one at a time.; choose",
        ),
        ("question", ("question:all",), "unknown token selection 'question'; write 'question:all'"),
        ("12, 13", PATCHABLE, "write 'positions:12,13' for positions counted from 0"),
        ("image:mean", PATCHABLE, "'image:mean' is not supported here; choose from last, .*; did you mean image"),
        ("imgae:all", STEERABLE, "choose from last, last.generated, all, .*; did you mean image:all"),
        (7, (), "unknown token selection 7; choose from last, bos, "),
    ],
)
def test_refusals_of_selections_name_what_is_allowed(text: Any, allowed: Any, message: str) -> None:
    with pytest.raises(SiteError, match=message):
        TokenSelection.parse(text, allowed=allowed)


# -- patches and boxes ---------------------------------------------------------------------------------------------


@given(
    st.integers(1, 24),
    st.integers(1, 24),
    st.floats(4, 40),
    st.tuples(st.floats(0, 0.9), st.floats(0, 0.9), st.floats(0.05, 1), st.floats(0.05, 1)),
)
def test_the_patches_of_a_box_touch_it_and_cover_its_middle(
    rows: int, columns: int, side: float, box: tuple[float, float, float, float]
) -> None:
    grid = PatchGrid(rows, columns, Box(0, 0, side, side))
    width, height = columns * side, rows * side
    x, y, w, h = box
    target = Box(x * width, y * height, min(1, x + w) * width, min(1, y + h) * height)
    patches = grid.patches(target)
    assert patches
    assert all(grid.box(p).intersection(target) > 0 for p in patches)
    # Every patch at least a quarter covered is in; nothing else is unless it stands alone.
    covered = {p for p in range(grid.count) if grid.box(p).intersection(target) >= 0.25 * grid.box(p).area}
    assert set(patches) == covered or (not covered and len(patches) == 1)


def test_a_box_outside_the_image_has_no_patches() -> None:
    assert PatchGrid(3, 3, Box(0, 0, 10, 10)).patches(Box(40, 40, 50, 50)) == ()


# -- encoding ------------------------------------------------------------------------------------------------------


def test_positions_mean_what_they_say(model: Lvlm, example: Example) -> None:
    encoding = model.encode(example)
    words = model.processor.tokenizer.convert_ids_to_tokens(encoding.inputs["input_ids"][0])
    tokens = encoding.tokens
    assert [words[i] for i in tokens.question] == example.question.replace("?", " ?").split()
    assert {words[i] for i in tokens.image} == {"<image>"}
    assert words.count("<image>") == len(tokens.image) == tokens.grid.count == 49
    assert [words[i] for i in tokens.system] == ["USER", ":"]
    assert words[0] == "<s>"
    assert tokens.last == len(words) - 1
    thing = example.named_object()
    assert thing is not None
    selection = TokenSelection.parse("object:mean")
    decoder, vision, projector = (tokens.positions(selection, s) for s in ("decoder", "vision", "projector"))
    assert [tokens.image.index(p) for p in decoder] == [p - 1 for p in vision] == list(projector)
    for patch in projector:
        assert tokens.grid.box(patch).intersection(thing.box) > 0
    assert tokens.object(thing.id) == decoder
    with pytest.raises(SiteError, match="unknown object 'o9'"):
        tokens.object("o9")
    with pytest.raises(SiteError, match="does not apply to the vision"):
        tokens.positions(TokenSelection("last"), "vision")


def test_encoding_equals_the_processor(model: Lvlm, example: Example) -> None:
    direct = model.processor(images=[example.image.load()], text=model.prompt(example.question), return_tensors="pt")
    for name, value in model.encode(example).inputs.items():
        assert torch.equal(value, direct[name])


def test_logits_of_a_batch_equal_those_of_single_examples(model: Lvlm) -> None:
    data = scenes.dataset(20, seed=5).filter(lambda e: bool(e.candidates))
    logits: dict[int, torch.Tensor] = {}
    for batch in model.batches(data, size=7):
        assert len({e.tokens.length for e in batch.encodings}) == 1
        logits.update(zip(batch.index, model.logits(batch.inputs), strict=True))
    assert sorted(logits) == list(range(len(data)))
    for i in range(0, len(data), 9):
        torch.testing.assert_close(logits[i], model.logits(model.encode(data[i]).inputs)[0], atol=1e-5, rtol=0)


def test_a_resized_and_cropped_image_keeps_its_boxes(model: Lvlm) -> None:
    class Processor:
        image_token = "<image>"
        chat_template = None

        class image_processor:  # noqa: N801 - stands for an instance
            size = {"shortest_edge": 112}  # noqa: RUF012

    from lvlm.encoding.fixed_size import patch_grid

    stand_in: Any = type("M", (), {"hf": model.hf, "processor": Processor})
    grid = patch_grid(stand_in, (448, 224), (112, 112))
    # Twice as wide as high: scaled by 2, the middle 224 of 448 columns are seen.
    assert (grid.box(0).x0, grid.box(0).y0) == (112, 0)
    assert (grid.box(48).x1, grid.box(48).y1) == (336, 224)


# -- the proof that the family points at the right tensors -----------------------------------------------------------


def test_every_identity_holds_to_float_precision(model: Lvlm, example: Example) -> None:
    errors = validate(model, model.encode(example))
    assert len(errors) > 3 * (model.n_layers + model.n_vision_layers) - 2
    assert max(errors.values()) < 1e-5


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("mlp", "self_attn", "pre \\+ attn_out \\+ mlp_out = post fails .* override FamilySpec.decoder.mlp"),
        ("output_projection", "self_attn.v_proj", "sum of heads = attn_out fails .*decoder.output_projection"),
        ("attention", "attn", "no module 'attn' .* has self_attn, mlp, input_layernorm"),
        ("layers", "model.layers", "no module 'model.layers'"),
    ],
)
def test_a_wrong_path_is_found_and_named(field: str, value: str, message: str) -> None:
    spec = families["llava"]
    wrong = replace(spec, decoder=replace(StackSpec("model.language_model.layers"), **{field: value}))
    with pytest.raises(ModelError, match=message):
        wrap_lvlm(build_model(), build_processor(), spec=wrong)


def test_sites_are_tensors_of_the_modules(model: Lvlm, example: Example) -> None:
    record: dict[str, torch.Tensor] = {}
    layer = model.hf.model.language_model.layers[2]
    hooks = [
        model.locate("decoder.L2.z").watch(lambda x: record.update(z=x)),
        model.locate("decoder.L2.attn_out").watch(lambda x: record.update(out=x)),
        model.locate("decoder.L2.resid_mid").watch(lambda x: record.update(mid=x)),
        model.locate("decoder.L2.resid_pre").watch(lambda x: record.update(pre=x)),
    ]
    model.logits(model.encode(example).inputs)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(record["z"] @ layer.self_attn.o_proj.weight.T, record["out"], atol=1e-5, rtol=0)
    torch.testing.assert_close(record["pre"] + record["out"], record["mid"])


def test_hashes_differ_between_models(model: Lvlm) -> None:
    twin = wrap_lvlm(build_model(), build_processor(), validate=False)
    assert (twin.config_hash, twin.weights_hash) == (model.config_hash, model.weights_hash)
    with torch.no_grad():
        twin.hf.lm_head.weight[0, 0] += 1
    other = wrap_lvlm(twin.hf, build_processor(), validate=False)
    assert other.config_hash == model.config_hash
    assert other.weights_hash != model.weights_hash


# -- answers -------------------------------------------------------------------------------------------------------


def test_answers_are_read_where_the_model_would_begin_them(model: Lvlm, example: Example) -> None:
    key = answer_key(model, example)
    tokenizer = model.processor.tokenizer
    assert [tokenizer.convert_ids_to_tokens(list(ids)) for ids in key.tokens] == [[c] for c in example.candidates]
    logits = torch.arange(len(tokenizer), dtype=torch.float32)
    scores = key.scores(logits)
    np.testing.assert_allclose(scores, [ids[0] for ids in key.tokens])
    assert key.margin(logits, "purple") == key.tokens[-1][0] - key.tokens[-2][0]


def test_unknown_answers_are_refused(model: Lvlm, example: Example) -> None:
    with pytest.raises(DataError, match="answer 'maroon': its first word is unknown to the tokenizer of random"):
        answer_key(model, replace(example, candidates=("maroon", "red"), answer="red"))
    with pytest.raises(DataError, match="begin with the same token"):
        answer_key(model, replace(example, candidates=("red car", "red"), answer="red"))
    with pytest.raises(DataError, match="answer 'teal' is not one of red"):
        answer_key(model, replace(example, answer="teal"))


# -- loading -------------------------------------------------------------------------------------------------------


def test_a_loaded_model_equals_the_saved_one(model: Lvlm, example: Example, tmp_path: Path) -> None:
    model.hf.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    loaded = load_lvlm(tmp_path)
    inputs = model.encode(example).inputs
    assert torch.equal(loaded.logits(inputs), model.logits(inputs))
    assert loaded.weights_hash == model.weights_hash
    assert loaded.config_hash == model.config_hash


def test_bad_models_are_named(tmp_path: Path, model: Lvlm) -> None:
    with pytest.raises(ModelError, match="no model folder"):
        load_lvlm("./nowhere")
    with pytest.raises(ModelError, match="has no config"):
        load_lvlm(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ModelError, match="unknown family 'clip'; choose from llava"):
        load_lvlm(tmp_path)
    with pytest.raises(ModelError, match="dtype 'int8'"):
        load_lvlm("tiny", dtype="int8")
    with pytest.raises(ModelError, match="on the 'meta' device"):
        wrap_lvlm(torch.nn.Linear(2, 2, device="meta"), build_processor())
    for site, message in (
        ("decoder.L6.z", "has decoder layers 0-5"),
        ("vision.L4.z", "has vision layers 0-3"),
        ("decoder.L0.cross.z", "no cross-attention"),
        ("decoder.L0.cross.resid_pre", "is not part of cross-attention; choose from attn_out, z, q, k, v, pattern"),
    ):
        with pytest.raises(SiteError, match=message):
            model.locate(site)


def test_the_first_question_needs_no_apple(model: Lvlm) -> None:
    scene = sample_scene(generator(TEST, 2, 1), "s", nouns=["car", "dog"])
    absent = as_example(scene, existence(scene, "apple"), "neutral")
    tokens = model.encode(absent).tokens
    assert absent.named_object() is None
    assert tokens.positions(TokenSelection.parse("object:mean")) == ()


def test_a_configuration_is_validated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    proofs: list[str] = []

    def counted(model: Lvlm, encoding: Any) -> Any:
        proofs.append(model.name)
        return validate(model, encoding)

    monkeypatch.setattr("lvlm.identity_checks.validate", counted)
    shape: Any = build_model(seed=0).config
    shape.text_config.rms_norm_eps = 1.25e-6  # a configuration that no other test has
    networks = [type(build_model(seed=0))(shape) for _ in range(2)]
    for i, hf in enumerate(networks):
        wrap_lvlm(hf, build_processor(), name=f"model {i}")
    assert proofs == ["model 0"]
    wrap_lvlm(networks[0].double(), build_processor(), name="in double precision")
    assert proofs == ["model 0", "in double precision"]
    shape.text_config.rms_norm_eps = 1.5e-6
    wrap_lvlm(type(networks[0])(shape), build_processor(), name="not proved", validate=False)
    assert len(proofs) == 2
