"""Derivations in every family: they run, or a GroundscopeError names what the family lacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from circuits import head_table
from groundscope.core.errors import ModelError
from lvlm import Head, Lvlm, Site
from lvlm.text_only import read_text_only
from mitigation import Contrast, SteeringVector, derive
from mitigation.steering.derive.vti import Demonstration
from tests.toys.families import FAMILY, model
from tests.toys.patching_oracle import pair_of

ONE_VIEW = {
    *("llava", "paligemma", "paligemma2", "gemma3", "deepseek_vl", "janus", "kosmos2"),
    *("blip2_opt", "blip2_llama", "instructblip_llama", "instructblip_t5"),
}
ENCODERS = {"instructblip_t5", "florence2"}


def lacks(lvlm: Lvlm, make: Callable[[], Any]) -> str:
    """What a derivation names as missing; empty where it runs."""
    message = ""
    try:
        steering = make()
    except ModelError as error:
        steering, message = None, str(error)
    assert isinstance(steering, SteeringVector) != bool(message)
    assert not message or lvlm.name in message
    return message


@FAMILY
def test_every_family_runs_or_the_missing_site_is_named(family: str) -> None:
    lvlm = model(family)
    pairs = [pair_of(0), pair_of(2)]
    examples = [pair.clean for pair in pairs]
    text = [Demonstration(examples[0], "yes a dog", "no")]
    for variant in ("paper", "release"):
        away = lacks(lvlm, lambda v=variant: derive.project_away(lvlm, "dog", layers=[1], variant=v))
        assert bool(away) == (family in ENCODERS and variant == "paper")
        assert not lacks(lvlm, lambda v=variant: derive.vti_text(lvlm, text, variant=v))
    assert bool(lacks(lvlm, lambda: derive.vti_vision(lvlm, examples, copies=2))) == (family not in ONE_VIEW)
    last = lvlm.n_layers - 1
    for tokens in ("last", "suffix:mean"):
        assert not lacks(
            lvlm, lambda t=tokens: derive.mean_difference(Contrast.from_pairs(lvlm, pairs), layers=[last], tokens=t)
        )
        assert not lacks(
            lvlm,
            lambda t=tokens: derive.mean_difference(Contrast.from_pairs(lvlm, pairs), heads=[Head(1, 0)], tokens=t),
        )
        if family == "mllama":
            early = lacks(
                lvlm, lambda t=tokens: derive.mean_difference(Contrast.from_pairs(lvlm, pairs), layers=[0], tokens=t)
            )
            assert "layer 1, the first of mllama" in early
    if family in {*ENCODERS, "mllama"}:
        with pytest.raises(ModelError, match="cannot be removed from the prompt"):
            head_table(lvlm, examples, methods=["vhd"])
    else:
        head_table(lvlm, examples, methods=["vhd"])
    if family in ENCODERS:
        with pytest.raises(ModelError, match="an encoder reads the prompt"):
            derive.vsv(lvlm, examples[0])
    elif family in ("llava", "instructblip_llama", "mllama"):  # the toy's tokenizer does not know the others' templates
        derive.vsv(lvlm, examples[0], layers=[1])


@torch.no_grad()
@pytest.mark.parametrize("family", ["blip2_llama", "instructblip_llama", "kosmos2", "llava"])
def test_words_alone_are_what_the_language_model_gives(family: str) -> None:
    lvlm = model(family)
    decoder = {
        "blip2_llama": lambda: lvlm.hf.language_model.model,
        "instructblip_llama": lambda: lvlm.hf.language_model.model,
        "kosmos2": lambda: lvlm.hf.text_model.model,
        "llava": lambda: lvlm.hf.model.language_model,
    }[family]()
    ids = torch.tensor([[1, 20, 21, 30]])
    hidden = decoder(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    steering = derive.project_away(lvlm, "dog", layers=[1])
    own = lvlm.processor.tokenizer("dog")["input_ids"]
    t = decoder(input_ids=torch.tensor([own]), output_hidden_states=True, use_cache=False).hidden_states[2][0, -1]
    np.testing.assert_allclose(steering.changes[1].direction, (t / t.norm()).numpy(), atol=1e-5)

    sites = [Site("decoder", layer, "resid_post") for layer in (0, 1)]
    values = read_text_only(lvlm, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, sites)
    for site in sites:
        torch.testing.assert_close(values[str(site)], hidden[site.layer + 1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_layers_that_read_only_the_image_are_skipped_without_one() -> None:
    lvlm = model("mllama")
    ids = torch.tensor([[1, 20, 21, 30]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    plain = lvlm.read(inputs, ["decoder.L0.resid_post", "decoder.L2.resid_post"])
    steering = derive.project_away(lvlm, "dog", layers=[1])
    own = torch.tensor([lvlm.processor.tokenizer("dog")["input_ids"]])
    t = lvlm.read({"input_ids": own, "attention_mask": torch.ones_like(own)}, ["decoder.L0.resid_post"])
    t = t["decoder.L0.resid_post"][0, -1]
    np.testing.assert_allclose(steering.changes[1].direction, (t / t.norm()).numpy(), atol=1e-5)

    sites = [Site("decoder", i, "resid_post") for i in range(4)]
    values = read_text_only(lvlm, inputs, sites)
    for i, layer in enumerate((0, 0, 2, 2)):
        torch.testing.assert_close(values[f"decoder.L{i}.resid_post"], plain[f"decoder.L{layer}.resid_post"])
    with pytest.raises(ModelError, match="skips its layers of cross-attention"):
        read_text_only(lvlm, inputs, [Site("decoder", 1, "mlp_out")])
