"""Which tokens an intervention acts on: the token map's, in every family, and the same ones in every form of generation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DynamicCache

from activation_store import trace
from circuits import Add, Intervention, intervened
from concepts import ConceptDataset
from groundscope.core.errors import DataError, ModelError, PatchError
from lvlm import Lvlm, Site, wrap_lvlm
from lvlm.image_tokens import image_tokens
from tests.toys.examples import example
from tests.toys.families import BUILDERS, FAMILY, WHERE, at, model
from tests.toys.random_models import hooks_of

FIRST = Site("decoder", 0, "resid_post")
OUTSIDE = {"mllama", "instructblip_t5", "florence2"}
"""Families whose decoder has no image tokens in its sequence."""

EMBEDDED = {"blip2_opt", "blip2_llama", "instructblip_llama"}
"""Families whose `generate` hands embeddings to the language model's, which then always uses a cache."""


def runs(*spans: tuple[int, int]) -> list[int]:
    """Positions from the first to the last of each span."""
    return [p for first, last in spans for p in range(first, last + 1)]


# Of a picture of 140 x 100 pixels, counted by hand in the tokens of each prompt.
BY_HAND: dict[str, list[int]] = {
    "llava": runs((3, 18)),  # <s> USER :, then 4 x 4 patches
    # [INST] has three tokens, 4 x 4 of the thumbnail, then 6 rows of 8, each with an end.
    "llava_next": runs((4, 19), *((20 + 9 * r, 27 + 9 * r) for r in range(6))),
    "llava_onevision": runs((8, 23), *((24 + 9 * r, 31 + 9 * r) for r in range(6))),
    "idefics3": runs(
        (5, 8), (11, 14), (18, 21), (24, 27), (32, 35)
    ),  # four tiles with names and line ends, a thumbnail
    "smolvlm": runs((5, 8), (11, 14), (18, 21), (24, 27), (32, 35)),
    "kosmos2": runs((2, 5)),  # after <s> and the opening bracket, which bears the placeholder's id
    "gemma3": runs((9, 12)),  # after <start_of_image>, the placeholder
    "mistral3": runs((4, 7), (9, 12), (14, 17)),  # rows of four and a separator
    # Two rows of three tiles with separators, then <|image|>, the placeholder, and the thumbnail.
    "llama4": runs((2, 5), (7, 10), (12, 15), (17, 20), (22, 25), (27, 30), (33, 36)),
    "blip2_opt": runs((0, 3)),
    "blip2_llama": runs((0, 3)),
    "instructblip_llama": runs((0, 3)),
    "paligemma": runs((0, 15)),
    "paligemma2": runs((0, 15)),
    "chameleon": runs((1, 196)),
}


def moved(lvlm: Lvlm, inputs: dict[str, torch.Tensor], rule: Any) -> list[int]:
    """Positions at which a forward's residual stream differs after an addition of 1 at a rule's positions."""
    before = lvlm.read(inputs, [FIRST])[str(FIRST)]
    with intervened(lvlm, [Intervention(FIRST, Add(torch.ones(lvlm.width)), rule)]):
        after = lvlm.read(inputs, [FIRST])[str(FIRST)]
    return (after - before).abs().sum(-1)[0].gt(1e-3).nonzero().flatten().tolist()


def pixels_reach(lvlm: Lvlm, inputs: dict[str, torch.Tensor]) -> list[int]:
    """Positions at which what the first layer is given depends on the pixels."""
    noise = torch.randn(inputs["pixel_values"].shape, generator=torch.Generator().manual_seed(1))
    site = "decoder.L0.resid_pre"
    first, second = (
        lvlm.read({**inputs, "pixel_values": inputs["pixel_values"] + k * noise}, [site])[site] for k in (0, 1)
    )
    return (first - second).abs().sum(-1)[0].gt(1e-6).nonzero().flatten().tolist()


@FAMILY
def test_rules_act_on_the_tokens_of_the_map(family: str) -> None:
    lvlm = model(family)
    encoding = lvlm.encode(example())
    inputs, tokens = lvlm.collate([encoding]), encoding.tokens
    every = list(range(tokens.length))
    if family in OUTSIDE:
        assert tokens.image == ()
        assert pixels_reach(lvlm, inputs) == []
        with pytest.raises(ModelError, match=f"{family} .* has none"):
            moved(lvlm, inputs, "image:all")
        with pytest.raises(ModelError, match="has none"):
            image_tokens(lvlm, inputs)
        suffix = every
    else:
        image = list(tokens.image)
        if family == "chameleon":  # eight codes: a picture's change leaves some tokens as they were
            assert set(pixels_reach(lvlm, inputs)) < set(image)
        else:
            assert pixels_reach(lvlm, inputs) == image
        assert image == BY_HAND.get(family, list(range(image[0], image[-1] + 1)))
        assert moved(lvlm, inputs, "image:all") == image
        suffix = every[max(image) + 1 :]
        assert set(tokens.question) <= set(suffix)
    assert list(tokens.suffix) == suffix
    assert moved(lvlm, inputs, "suffix+generated") == suffix
    assert moved(lvlm, inputs, "suffix:all") == suffix
    assert moved(lvlm, inputs, "all") == every
    assert moved(lvlm, inputs, "last") == every[-1:]
    assert moved(lvlm, inputs, "last+generated") == every[-1:]
    assert moved(lvlm, inputs, "generated:all") == []
    assert moved(lvlm, inputs, (0,)) == [0]
    assert hooks_of(lvlm) == 0


@contextmanager
def recorded(lvlm: Lvlm, item: Intervention) -> Iterator[list[torch.Tensor]]:
    """What is added at each token of each forward of a generation, ``[rows, positions]``."""
    changes: list[torch.Tensor] = []
    layer = at(lvlm.hf, WHERE[lvlm.name][0])[0] if lvlm.name in WHERE else lvlm.layers("decoder")[0]
    before_: list[torch.Tensor] = []

    def plain(_m: Any, _a: Any, out: Any) -> None:
        before_.append((out[0] if isinstance(out, tuple) else out).clone())

    def changed(_m: Any, _a: Any, out: Any) -> None:
        changes.append(((out[0] if isinstance(out, tuple) else out) - before_[-1]).mean(-1))

    first = layer.register_forward_hook(plain)
    with intervened(lvlm, [item]):
        last = layer.register_forward_hook(changed)
        yield changes
    first.remove()
    last.remove()


def strengths(rule: str, image: list[int], prompt: int, length: int, decay: float) -> list[float]:
    """What is added at each position of a sequence, by the definitions of the rules."""
    end = max(image, default=-1)
    selected = {
        "all": lambda p: True,
        "last": lambda p: p == prompt - 1,
        "last+generated": lambda p: p >= prompt - 1,
        "image:all": lambda p: p in image,
        "suffix+generated": lambda p: p > end,
        "suffix:all": lambda p: end < p < prompt,
        "generated:all": lambda p: p >= prompt,
    }[rule]
    return [decay ** max(0, p - prompt + 1) if selected(p) else 0.0 for p in range(length)]


@pytest.mark.parametrize("cache", [True, False])
@FAMILY
def test_generation_means_the_same_with_and_without_a_cache(family: str, cache: bool) -> None:
    lvlm = model(family)
    encoding = lvlm.encode(example())
    inputs, prompt = lvlm.collate([encoding]), encoding.tokens.length
    cached = cache or family in EMBEDDED
    for rule, decay in (
        ("image:all", 1.0),
        ("suffix+generated", 0.5),
        ("last+generated", 0.5),
        ("generated:all", 0.5),
        ("last", 1.0),
    ):
        if rule == "image:all" and family in OUTSIDE:
            continue
        item = Intervention(FIRST, Add(torch.ones(lvlm.width)), rule, decay=decay)  # pyright: ignore[reportArgumentType]
        with recorded(lvlm, item) as changes:
            lvlm.hf.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, use_cache=cache)
        start = 0
        for added in changes:
            length = start + added.shape[1]
            want = strengths(rule, list(encoding.tokens.image), prompt, length, decay)[start:]
            np.testing.assert_allclose(added[0], want, atol=1e-4)
            start = length if cached else 0
        assert len(changes) == 3
        assert changes[-1].shape[1] == (1 if cached else prompt + 2)
    assert hooks_of(lvlm) == 0
    assert "generate" not in vars(lvlm.hf)


def pushed(lvlm: Lvlm, **form: Any) -> torch.Tensor:
    """Logits at each step of a generation in some form."""
    inputs = lvlm.collate([lvlm.encode(example())])
    out = lvlm.hf.generate(
        **inputs, max_new_tokens=4, min_new_tokens=4, output_logits=True, return_dict_in_generate=True, **form
    )
    return torch.stack(out.logits, 1)


@pytest.mark.parametrize(
    "rule", ["last", "last+generated", "all", "image:all", "suffix+generated", "suffix:all", "generated:all", (1, 20)]
)
def test_forms_of_generation(rule: Any) -> None:
    """A static cache and no cache give what a cache gives."""
    lvlm = model("llava")
    u = torch.randn(lvlm.width, generator=torch.Generator().manual_seed(0))
    forms = {
        "static": {"cache_implementation": "static"},
        "no cache": {"use_cache": False},
    }
    for decay in (1.0, 0.5):
        item = Intervention(FIRST, Add(3 * u), rule, decay=decay)
        plain = pushed(lvlm, do_sample=False)
        with intervened(lvlm, [item]):
            want = pushed(lvlm, do_sample=False)
            for name, form in forms.items():
                torch.testing.assert_close(pushed(lvlm, do_sample=False, **form), want, atol=1e-3, rtol=1e-3, msg=name)
        assert (plain - want).abs().max() > 1e-2


@pytest.mark.parametrize("rule", ["last", "last+generated", "all", "generated:all", "suffix+generated"])
def test_a_prefill_in_chunks_and_candidates_of_several_tokens(rule: Any) -> None:
    """Without an image: transformers takes no pixels in these forms."""
    lvlm = model("llava")
    text = torch.tensor([[1, *range(20, 40), *range(20, 30)]])
    item = Intervention(FIRST, Add(torch.linspace(-2, 3, lvlm.width)), rule, decay=0.5)
    options: dict[str, Any] = {
        "max_new_tokens": 4,
        "min_new_tokens": 4,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    with intervened(lvlm, [item]):
        want, chunked, tried = (
            torch.stack(lvlm.hf.generate(input_ids=text, **options, **form).logits)
            for form in ({}, {"prefill_chunk_size": 7}, {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1})
        )
    torch.testing.assert_close(chunked, want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(tried, want, atol=1e-4, rtol=1e-4)
    number = Intervention(FIRST, Add(torch.ones(lvlm.width)), (2, 20))
    with intervened(lvlm, [number]), pytest.raises(ModelError, match="the prompt is read in chunks"):
        lvlm.hf.generate(input_ids=text, **options, prefill_chunk_size=7)


def test_a_custom_decoding_loop_gets_the_same_positions() -> None:
    """A prompt and single tokens after a cache are distinguished; several tokens after one are refused if positions matter."""
    lvlm = model("llava")
    inputs = lvlm.collate([lvlm.encode(example())])
    more = torch.tensor([[25, 26]])
    factors_of = {
        "last": 0,
        "last+generated": 1,
        "generated:all": 1,
        "image:all": 0,
        "suffix:all": 0,
        "suffix+generated": 1,
    }
    for rule, factor in factors_of.items():
        factors = [0, factor, factor]
        item = Intervention(FIRST, Add(torch.ones(lvlm.width)), rule, decay=0.5)  # pyright: ignore[reportArgumentType]
        with recorded(lvlm, item) as changes, torch.no_grad():
            out = lvlm.hf(**inputs, use_cache=True)
            for token in more[0]:
                out = lvlm.hf(input_ids=token[None, None], past_key_values=out.past_key_values)
        assert [float(x[0, -1].round(decimals=3)) for x in changes[1:]] == [factors[k] * 0.5**k for k in (1, 2)], rule
    cache = DynamicCache()
    with intervened(lvlm, [Intervention(FIRST, Add(torch.ones(lvlm.width)), "last+generated")]), torch.no_grad():
        lvlm.hf(**inputs, past_key_values=cache)
        with pytest.raises(ModelError, match="2 tokens after a cache of 30 outside of generate"):
            lvlm.hf(input_ids=more, past_key_values=cache)
    with intervened(lvlm, [Intervention(FIRST, Add(torch.ones(lvlm.width)), "all")]), torch.no_grad():
        lvlm.hf(
            input_ids=more, past_key_values=lvlm.hf(**inputs, use_cache=True).past_key_values
        )  # needs to know nothing
    image = Intervention(FIRST, Add(torch.ones(lvlm.width)), "image:all")
    with intervened(lvlm, [image]), pytest.raises(PatchError, match="need input_ids"):
        lvlm.hf.model.language_model(inputs_embeds=torch.zeros(1, 30, lvlm.width))
    with (
        intervened(lvlm, [Intervention(FIRST, Add(torch.ones(lvlm.width)), "last+generated")]),
        pytest.raises(ModelError, match="batching"),
    ):
        lvlm.hf.generate_batch([[1, 2]])


def test_beams_share_their_prompt() -> None:
    lvlm = model("llava_next")
    inputs = lvlm.collate([lvlm.encode(example(k)) for k in (0, 0)])
    image = list(lvlm.encode(example()).tokens.image)
    with recorded(lvlm, Intervention(FIRST, Add(torch.ones(lvlm.width)), "image:all")) as changes:
        lvlm.hf.generate(**inputs, max_new_tokens=2, num_beams=3, do_sample=False)
    assert changes[0].shape[0] == 6
    expected = torch.zeros(changes[0].shape)
    expected[:, image] = 1
    torch.testing.assert_close(changes[0], expected, atol=1e-4, rtol=0)


def test_contexts_nest_and_restore_generate() -> None:
    lvlm = model("llava")
    before = lvlm.hf.generate
    items = [Intervention(FIRST, Add(torch.ones(lvlm.width)), "generated:all")]
    inputs = lvlm.collate([lvlm.encode(example())])
    with intervened(lvlm, items), recorded(lvlm, items[0]) as changes:
        lvlm.hf.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False, use_cache=False)
    expected = torch.zeros(changes[-1].shape)
    expected[:, -1] = 1
    torch.testing.assert_close(changes[-1], expected, atol=1e-4, rtol=0)
    assert lvlm.hf.generate == before


def test_missing_sizes_and_masks_are_named() -> None:
    lvlm = model("llava_next")
    inputs = lvlm.encode(example()).inputs
    with pytest.raises(DataError, match="image_sizes are needed to find the row ends"):
        image_tokens(lvlm, {"input_ids": inputs["input_ids"]})
    with pytest.raises(DataError, match="do not fit 1 image"):
        image_tokens(lvlm, {**inputs, "input_ids": inputs["input_ids"][:, :20]})
    kosmos = model("kosmos2")
    with pytest.raises(DataError, match="image_embeds_position_mask"):
        image_tokens(kosmos, {"input_ids": kosmos.encode(example()).inputs["input_ids"]})


def test_two_images_in_one_row_and_rows_without_any() -> None:
    lvlm = model("llava_next")
    pictures = [Image.new("RGB", (140, 100), "red"), Image.new("RGB", (140, 100), "blue")]
    inputs, tokens = lvlm.encode_prompt(lvlm.prompt("which?", 2), pictures, question="which?")
    assert moved(lvlm, inputs, "image:all") == list(tokens.image)
    assert moved(lvlm, inputs, "suffix+generated") == list(tokens.suffix)
    text = {"input_ids": torch.tensor([[1, 20, 21]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    assert moved(lvlm, text, "image:all") == []
    assert moved(lvlm, text, "suffix+generated") == [0, 1, 2]


def test_a_class_token_is_no_part_of_the_image() -> None:
    """LLaVA with the strategy ``full``: the class token of each image is a token of the decoder."""
    network, processor = BUILDERS["llava"]()
    network.config.vision_feature_select_strategy = "full"
    lvlm = wrap_lvlm(network.eval(), processor, name="full", validate=False)
    encoding = lvlm.encode(example())
    assert list(encoding.tokens.image) == runs((4, 19))
    assert encoding.tokens.separators == (3,)
    inputs = lvlm.collate([encoding])
    assert pixels_reach(lvlm, inputs) == runs((3, 19))
    assert moved(lvlm, inputs, "image:all") == runs((4, 19))


def test_answers_that_are_read_in_one_forward_count_as_generated(tmp_path: Path) -> None:
    """Traced with its answer after the prompt, a vector acts as while the answer is generated."""
    lvlm = model("llava")
    data, site = ConceptDataset("d", (example(0),)), "decoder.L1.resid_pre"
    tokens = lvlm.encode(example(0)).tokens
    for rule, decay in (
        ("generated:all", 0.5),
        ("last+generated", 0.5),
        ("suffix+generated", 1.0),
        ("image:all", 1.0),
        ("suffix:all", 1.0),
    ):
        stores = []
        for strength in (0.0, 1.0):
            item = Intervention(FIRST, Add(strength * torch.ones(lvlm.width)), rule, decay=decay)  # pyright: ignore[reportArgumentType]
            with intervened(lvlm, [item]):
                path = tmp_path / f"{rule}{strength}"
                stores.append(trace(lvlm, data, [site], ["last", "answer:0"], path, answers=False, progress=False))
        want = strengths(rule, list(tokens.image), tokens.length, tokens.length + 1, decay)
        for selection, position in (("last", -2), ("answer:0", -1)):
            plain, steered = (store.read(site, selection)[0] for store in stores)
            np.testing.assert_allclose(steered - plain, want[position], atol=1e-4, err_msg=f"{rule} {selection}")
    assert lvlm.answer_from is None
