"""What is read after the prompt: the model's own answer, and the true one put in its place."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from activation_store import trace
from concepts import ConceptDataset
from groundscope.core.errors import ConfigError, DataError
from lvlm import Lvlm
from lvlm.identity_checks import validate
from tests.toys.examples import example
from tests.toys.families import model
from tests.toys.processes import run_code

STEPS = 4


def stepwise(lvlm: Lvlm, example_: Any, site: str) -> tuple[list[int], list[np.ndarray]]:
    """Generate with raw hooks; return the new tokens and the site's value at the last position of each forward."""
    states: list[np.ndarray] = []
    hook = lvlm.locate(site).watch(lambda x: states.append(x[0, -1].numpy().copy()))
    inputs = lvlm.encode(example_).inputs
    name = "decoder_input_ids" if lvlm.encoder_decoder else "input_ids"
    try:
        with torch.no_grad():
            out = lvlm.hf.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
    finally:
        hook.remove()
    return out[0, inputs[name].shape[1] :].tolist(), states


@pytest.mark.parametrize(
    "family",
    ["llava", "qwen2_5_vl", "gemma3", "paligemma", "mllama", "idefics3", "instructblip_t5", "florence2", "blip2_opt"],
)
def test_generated_steps_are_those_of_generation(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lvlm = model(family)
    data = ConceptDataset("d", (example(0), example(1)))
    site = "decoder.L1.resid_post"
    first, _ = stepwise(lvlm, data[0], site)
    # One example's second token becomes the end: its answer stops there.
    end = first[min(1, len(first) - 1)]
    monkeypatch.setattr(lvlm.hf.generation_config, "eos_token_id", end)
    wants = [stepwise(lvlm, question, site) for question in data]
    tokens = ["last", *(f"generated:{k}" for k in range(STEPS)), "generated:mean"]
    store = trace(lvlm, data, [site], tokens, tmp_path, answers=False, generate=STEPS)
    for row, (ids, states) in enumerate(wants):
        ids = ids[: ids.index(end)] if end in ids else ids  # the end is no part of the answer, as in `answer:mean`
        np.testing.assert_allclose(store.read(site, "last")[row], states[0], atol=2e-5)
        for k in range(STEPS):
            got = store.read(site, f"generated:{k}")[row]
            if k >= len(ids):
                assert np.isnan(got).all()
            else:
                assert np.isfinite(got).all()
                if k + 1 < len(states):  # generation itself never reads its last token
                    np.testing.assert_allclose(got, states[k + 1], atol=2e-5, err_msg=f"step {k}")
        steps = [store.read(site, f"generated:{k}")[row] for k in range(len(ids))]
        mean = np.mean(steps, axis=0) if steps else np.full(len(states[0]), np.nan)
        np.testing.assert_allclose(store.read(site, "generated:mean")[row], mean, atol=1e-5)
        text = lvlm.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert store.columns["generated"][row] == text


def test_a_forced_answer_is_read_as_if_it_were_generated(tmp_path: Path) -> None:
    lvlm = model("llava")
    data = ConceptDataset("d", (example(0), replace(example(1), answer="a big cat", candidates=())))
    store = trace(lvlm, data, ["resid_post"], ["last", "answer:0", "answer:2", "answer:mean"], tmp_path)
    prompt = lvlm.encode(data[1])
    ids = torch.tensor([lvlm.processor.tokenizer("a big cat", add_special_tokens=False)["input_ids"]])
    inputs = {**prompt.inputs, "input_ids": torch.cat([prompt.inputs["input_ids"], ids], 1)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    outputs: list[torch.Tensor] = []
    hook = lvlm.hf.model.language_model.layers[2].register_forward_hook(lambda _m, _a, out: outputs.append(out))
    with torch.no_grad():
        lvlm.hf(**inputs)
    hook.remove()
    x = outputs[0][0].numpy()
    for k in (0, 2):
        np.testing.assert_allclose(
            store.read("decoder.L2.resid_post", f"answer:{k}")[1], x[prompt.tokens.length + k], atol=1e-5
        )
    np.testing.assert_allclose(store.read("decoder.L2.resid_post", "answer:mean")[1], x[-3:].mean(0), atol=1e-5)
    assert np.isnan(store.read("decoder.L2.resid_post", "answer:2")[0]).all()
    # The model's own answer is still the one after the prompt.
    logits = lvlm.logits(lvlm.encode(data[0]).inputs)[0]
    from lvlm import answer_key

    key = answer_key(lvlm, data[0])
    assert store.columns["margin"][0] == pytest.approx(float(key.margin(logits, data[0].answer)), abs=1e-5)


def test_incompatible_options_are_refused(tmp_path: Path) -> None:
    lvlm, data = model("llava"), ConceptDataset("d", (example(0),))
    with pytest.raises(ConfigError, match="cannot follow the same prompt"):
        trace(lvlm, data, ["z"], ["answer:mean"], tmp_path / "a", generate=2)
    with pytest.raises(ConfigError, match="generate=-1"):
        trace(lvlm, data, ["z"], ["last"], tmp_path / "a", generate=-1)
    odd = ConceptDataset("d", (replace(example(0), answer="zyzzyva", candidates=()),))
    with pytest.raises(DataError, match="cannot encode its answer 'zyzzyva'"):
        trace(lvlm, odd, ["z"], ["answer:0"], tmp_path / "b")


def test_a_pattern_is_kept_for_examples_of_one_length(tmp_path: Path) -> None:
    lvlm = model("llava")
    data = ConceptDataset("d", (example(0), replace(example(0), id="again")))
    store = trace(lvlm, data, ["decoder.L1.pattern"], ["last"], tmp_path, answers=False)
    rows = store.read("decoder.L1.pattern", "last").reshape(2, lvlm.n_heads, -1)
    np.testing.assert_allclose(rows.sum(-1), 1, atol=1e-5)
    pattern = lvlm.read(lvlm.encode(data[0]).inputs, ["decoder.L1.pattern"])["decoder.L1.pattern"]
    np.testing.assert_array_equal(rows[0], pattern[0, :, -1].numpy())
    assert lvlm.hf.config.text_config._attn_implementation == "sdpa"


def test_the_switch_to_eager_attention_for_patterns_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lvlm = model("llava")
    data = ConceptDataset("d", tuple(replace(example(0), id=f"e{n}") for n in range(4)))
    inputs = lvlm.encode(data[0]).inputs

    def warnings_() -> list[str]:
        messages = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
        caplog.clear()
        return messages

    def traced(*sites: str, where: str) -> None:
        trace(lvlm, data, sites, ["last"], tmp_path / where, batch_size=2, answers=False)

    traced("z", where="plain")
    lvlm.read(inputs, ["decoder.L0.z"])
    assert warnings_() == []
    for _ in range(2):  # each call says it, and only once, whatever the number of forwards and layers
        lvlm.read(inputs, ["decoder.L0.pattern", "decoder.L1.pattern"])
        (text,) = warnings_()
        assert text.startswith(
            "attention patterns are requested: for this call llava computes attention step by step (eager)"
        )
        assert "instead of sdpa" in text
    traced("pattern", "z", where="patterns")
    assert len(warnings_()) == 1
    traced("pattern", "z", where="patterns")  # it is there: no forward over the data, nothing to say
    assert warnings_() == []
    with lvlm.eager():  # nothing changes
        lvlm.read(inputs, ["decoder.L0.pattern"])
    assert warnings_() == []
    validate(lvlm, lvlm.encode(data[0]))
    assert warnings_() == []


def test_the_warning_is_printed_without_logging_configuration(tmp_path: Path) -> None:
    code = (
        "from concepts import ConceptDataset\nfrom tests.toys.examples import example\n"
        "from tests.toys.families import model\n"
        "lvlm = model('llava')\nfor _ in range(2): lvlm.read(lvlm.encode(example(0)).inputs, ['decoder.L0.pattern'])"
    )
    done = run_code(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("attention patterns are requested") == 2
