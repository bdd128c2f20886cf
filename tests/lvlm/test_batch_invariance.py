"""Values do not depend on padding, on other examples of a batch, or on other images of the same prompt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from activation_store import trace
from concepts import ConceptDataset
from groundscope.core.errors import DataError, ModelError
from lvlm import Lvlm, wrap_lvlm
from lvlm.encoding.processor import Parts
from lvlm.encoding.registry import image_encodings
from tests.toys.examples import QUESTION, example, picture
from tests.toys.families import BUILDERS, model

# Whatever has an axis of tokens that belong to the prompt; the Q-Former reads the question apart, padded on the right.
OF_TOKENS = (
    "input_ids",
    "attention_mask",
    "mm_token_type_ids",
    "token_type_ids",
    "image_embeds_position_mask",
    "cross_attention_mask",
)


def lengthened(lvlm: Lvlm, name: str, x: torch.Tensor, to: int) -> torch.Tensor:
    """Fill the second axis up: with padding tokens where it holds tokens, with zeros where it says which are meant.

    On the left, where a decoder continues after the last token; an encoder that counts positions from the first token, padding
    included, as Florence-2's does whatever the mask says, and a Q-Former are filled up on the right.
    """
    fill = lvlm.processor.tokenizer.pad_token_id if name.endswith("input_ids") else 0
    more = x.new_full((len(x), to - x.shape[1], *x.shape[2:]), fill)
    right = name.startswith("qformer") or lvlm.spec.model_type == "florence2"
    return torch.cat([x, more] if right else [more, x], dim=1)


@pytest.mark.parametrize("family", list(BUILDERS))
def test_a_row_of_a_padded_batch_equals_the_row_alone(family: str) -> None:
    lvlm = model(family)
    short = lvlm.encode(example(0)).inputs
    long = lvlm.encode(replace(example(1), question=f"{example(1).question} Is there a cat in the image?")).inputs
    padded = {}
    for name, x in short.items():
        if name in OF_TOKENS or name.startswith("qformer"):
            x = lengthened(lvlm, name, x, long[name].shape[1])
        padded[name] = torch.cat([x, long[name]])
    more = long["input_ids"].shape[1] - short["input_ids"].shape[1]
    assert more > 3
    sites = [f"decoder.L{n}.{c}" for n in range(lvlm.n_layers) for c in ("resid_post", "mlp_out")]
    both, both_logits = lvlm.read(padded, sites), lvlm.logits(padded)
    first = 0 if lvlm.encoder_decoder else more
    for row, alone, start in ((0, short, first), (1, long, 0)):
        single = lvlm.read(alone, sites)
        for site in sites:
            scale = max(1.0, float(single[site].abs().max()))
            torch.testing.assert_close(both[site][row, start:], single[site][0], rtol=0, atol=1e-5 * scale, msg=site)
        torch.testing.assert_close(both_logits[row], lvlm.logits(alone)[0], rtol=0, atol=1e-5)
    # It is the mask that does it: without it the padding is read.
    bare = {**padded, "attention_mask": torch.ones_like(padded["attention_mask"])}
    assert not torch.allclose(lvlm.logits(bare)[0], both_logits[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", [f for f in BUILDERS if f != "kosmos2"])
def test_a_second_image_does_not_change_the_tokens_of_the_first(family: str) -> None:
    """In the tower everywhere; in the decoder where a token sees only what is before it, or its own image."""
    lvlm = model(family)
    like = image_encodings[lvlm.spec.view].axis == 0 and lvlm.spec.view != "packed"
    sizes = [(112, 112), (112, 112)] if like else [(112, 70), (60, 90)]
    images = [picture(size, n) for n, size in enumerate(sizes)]
    single, single_map = lvlm.encode_prompt(lvlm.prompt(QUESTION), images[:1], question=QUESTION)
    double, two_map = lvlm.encode_prompt(lvlm.prompt(QUESTION, 2), images, question=QUESTION)
    # PaliGemma and encoders read the whole prompt both ways, the second image too; Llama-3.2's decoder has no image tokens.
    causal = not (family.startswith(("paligemma", "mllama")) or lvlm.encoder_decoder)
    sites = {}
    if lvlm.n_vision_layers:  # Chameleon has none
        sites["vision"] = [f"vision.L{lvlm.n_vision_layers - 1}.{c}" for c in ("resid_post", "mlp_out")]
    if causal:
        sites["decoder"] = [f"decoder.L{n}.resid_post" for n in range(lvlm.n_layers)]
    for stack, some in sites.items():
        alone, both = lvlm.read(single, some), lvlm.read(double, some)
        at = [[p for v in m.views[stack] if v.image == 0 for p in v.positions] for m in (single_map, two_map)]
        assert len(at[0]) == len(at[1]) > 0
        for site in some:
            x, y = (values[site].flatten(0, -2)[p] for values, p in ((alone, at[0]), (both, at[1])))
            scale = max(1.0, float(x.abs().max()))
            torch.testing.assert_close(y, x, rtol=0, atol=1e-5 * scale, msg=lambda m, site=site: f"{site}: {m}")


@pytest.mark.parametrize("family", ["qwen2_5_vl", "idefics3", "mistral3", "llava_next", "mllama"])
def test_an_example_traced_in_a_batch_equals_the_example_traced_alone(family: str, tmp_path: Path) -> None:
    lvlm = model(family)
    target = example(0)
    others = (example(1, (60, 60)), example(2, (60, 110)), example(3))
    sites = ["resid_post", "mlp_out", "vision.resid_post"]

    def traced(where: str, *examples: object) -> dict[str, np.ndarray]:
        data = ConceptDataset("d", tuple(examples))  # type: ignore[arg-type]
        store = trace(lvlm, data, sites, ["last", "image:mean"], tmp_path / where, answers=False)
        return {
            **{f"decoder.L{n}.{c}": store.read(f"decoder.L{n}.{c}", "last")
               for n in range(lvlm.n_layers) for c in ("resid_post", "mlp_out")},
            "vision.L0.resid_post": store.read("vision.L0.resid_post", "image:mean"),
        }  # fmt: skip

    alone, among = traced("alone", target), traced("among", others[0], target, *others[1:])
    assert not any(np.allclose(x[0], x[1], rtol=0, atol=1e-4) for x in among.values())
    for site, x in alone.items():
        scale = max(1.0, float(np.abs(x).max()))
        np.testing.assert_allclose(among[site][1], x[0], rtol=0, atol=1e-5 * scale, err_msg=site)


# -- what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "idefics3", "mllama"])
def test_unlike_shapes_in_one_batch_are_refused_by_what_differs(family: str) -> None:
    lvlm = model(family)
    short = lvlm.encode(example(0))
    long = lvlm.encode(replace(example(1), id="long", question=f"{example(1).question} Is there a cat?"))
    a, b = short.inputs["input_ids"].shape[1], long.inputs["input_ids"].shape[1]
    with pytest.raises(
        DataError, match=r"'long' differ in .*batches are not padded; batch them with model\.batches$"
    ) as error:
        lvlm.collate([short, short, long])
    assert f"examples '{short.example.id}' and 'long' differ in " in str(error.value)
    assert f"input_ids ([1, {a}] and [1, {b}])" in str(error.value)
    assert "pixel_values" not in str(error.value)


def test_unlike_images_in_one_batch_are_refused_by_what_differs() -> None:
    lvlm = model("qwen2_vl")
    with pytest.raises(DataError, match=r"differ in .*pixel_values \(\[\d+, \d+\] and \[\d+, \d+\]\)"):
        lvlm.collate([lvlm.encode(example(0)), lvlm.encode(example(1, (60, 60)))])


def test_two_images_for_a_model_that_takes_one_are_refused() -> None:
    lvlm = model("kosmos2")
    with pytest.raises(ModelError, match="kosmos2 takes one image per prompt, not 2"):
        lvlm.encode_prompt(lvlm.prompt(QUESTION, 2), [picture((60, 60)), picture((60, 60), 1)])


def test_no_encodings_are_no_batch() -> None:
    with pytest.raises(DataError, match="no examples to put into a batch"):
        model("llava").collate([])


def without(token: str) -> Parts:
    """LLaVA's processor with a tokenizer that does not know the placeholder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    processor = model("llava").processor
    words = {w: i for w, i in processor.tokenizer.get_vocab().items() if w != token}
    words_model = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    words_model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Parts(
        PreTrainedTokenizerFast(tokenizer_object=words_model, unk_token="<unk>"), processor.image_processor, token
    )


def test_a_tokenizer_without_an_image_token_is_named() -> None:
    parts = without("<image>")
    with pytest.raises(
        ModelError, match=r"the tokenizer of mine has no token \d+, the configuration's image token; use"
    ):
        wrap_lvlm(model("llava").hf, parts, name="mine")
    with pytest.raises(ModelError, match=r"Parts has no image token; set processor\.image_token"):
        wrap_lvlm(model("llava").hf, Parts(parts.tokenizer, parts.image_processor, None))  # type: ignore[arg-type]
