"""Greedy answers under every generation configuration, and chat templates that fail."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from activation_store import trace
from concepts import ConceptDataset
from groundscope.core.errors import DataError, ModelError
from lvlm import Lvlm, load_lvlm
from lvlm.generation import end_tokens, greedy, ignored_settings
from lvlm.prompting import find_question
from tests.toys.examples import example
from tests.toys.families import model

STEPS = 5
RULES: list[tuple[str, Any]] = [
    ("repetition_penalty", 1.9),
    ("num_beams", 3),
    ("no_repeat_ngram_size", 1),
    ("suppress_tokens", list(range(40))),
    ("forced_eos_token_id", 1),
    ("min_new_tokens", 5),
    ("guidance_scale", 3.0),
    ("do_sample", True),
]


def by_hand(lvlm: Lvlm, batch: Any) -> list[list[int]]:
    """Take the largest logit of a whole forward at each step."""
    inputs = dict(batch.inputs)
    name = "decoder_input_ids" if lvlm.encoder_decoder else "input_ids"
    rows: list[list[int]] = [[] for _ in batch.encodings]
    with torch.no_grad():
        for _ in range(STEPS):
            new = lvlm.hf(**inputs, use_cache=False).logits[:, -1].argmax(-1)
            for row, token in zip(rows, new.tolist(), strict=True):
                row.append(token)
            inputs[name] = torch.cat([inputs[name], new[:, None]], 1)
            if not lvlm.encoder_decoder:
                inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    ends = lvlm.hf.generation_config.eos_token_id
    stops = set(ends if isinstance(ends, list) else [ends])
    return [row[: next((i for i, t in enumerate(row) if t in stops), len(row))] for row in rows]


def test_an_answer_ends_before_a_placeholder_of_an_image() -> None:
    lvlm = model("llava")
    batch = next(lvlm.batches([example(0)], 1))
    (answer,) = greedy(lvlm, batch.inputs, STEPS)
    assert len(answer) == STEPS

    def third(tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        written = tokens.shape[1] - batch.inputs["input_ids"].shape[1]
        return logits.index_fill(1, torch.tensor([lvlm.content_id]), 1e9) if written == 2 else logits

    assert greedy(lvlm, batch.inputs, STEPS, choose=third) == [answer[:2]]


@pytest.mark.parametrize("family", ["llava", "florence2", "blip2_opt", "instructblip_t5"])
def test_answers_are_greedy_under_every_generation_configuration(
    family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lvlm = model(family)
    data = ConceptDataset("d", (example(0), replace(example(0), id="again")))
    batch = next(lvlm.batches(data.examples, 2))
    parts = [m for m in lvlm.hf.modules() if vars(m).get("generation_config") is not None]
    unused = len(lvlm.processor.tokenizer) - 1
    for part in parts:
        monkeypatch.setattr(part.generation_config, "eos_token_id", [unused])
    row = by_hand(lvlm, batch)[0]
    end = next((token for token in row if token != row[0]), unused)  # the first new token of an answer ends it
    for part in parts:
        monkeypatch.setattr(part.generation_config, "eos_token_id", [end])
    rows = by_hand(lvlm, batch)
    texts = [lvlm.processor.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]
    assert rows[0]
    own = set(ignored_settings(lvlm))
    for name, value in RULES:
        with monkeypatch.context() as changed:
            for part in parts:
                changed.setattr(part.generation_config, name, value)
            assert lvlm.generate_batch(batch, STEPS) == texts, name
            assert set(ignored_settings(lvlm)) == own | ({name} - {"do_sample"})
            assert getattr(parts[0].generation_config, name) == value
    for part in parts:
        monkeypatch.setattr(part.generation_config, "repetition_penalty", 1.9)
    store = trace(lvlm, data, ["resid_post"], ["generated:mean"], tmp_path, answers=False, generate=STEPS)
    assert list(store.columns["generated"]) == texts
    assert store.provenance["generate"] == {
        "most_tokens": STEPS,
        "decoding": "greedy",
        "ends": [end],
        "left-out": sorted({*own, "repetition_penalty"}),
    }


def test_the_end_token_is_in_neither_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model says and the same words put after its prompt are the same positions: their means are equal."""
    lvlm = model("llava")
    ids = lvlm.processor.tokenizer("a big cat", add_special_tokens=False)["input_ids"]
    end = lvlm.hf.generation_config.eos_token_id

    def generate(**inputs: torch.Tensor) -> torch.Tensor:
        del inputs["generation_config"]
        answer = torch.tensor([[*ids, end, 0, 0]]).expand(len(inputs["input_ids"]), -1)
        return torch.cat([inputs["input_ids"], answer], 1)

    monkeypatch.setattr(lvlm.hf, "generate", generate)
    site = "decoder.L2.resid_post"
    data = ConceptDataset("d", (replace(example(0), answer="a big cat", candidates=()),))
    generated = trace(lvlm, data, ["resid_post"], ["generated:mean", "generated:3"], tmp_path / "a", generate=6)
    forced = trace(lvlm, data, ["resid_post"], ["answer:mean"], tmp_path / "b")
    np.testing.assert_array_equal(generated.read(site, "generated:mean"), forced.read(site, "answer:mean"))
    assert np.isnan(generated.read(site, "generated:3")).all()
    monkeypatch.setattr(lvlm.hf.generation_config, "eos_token_id", [ids[0]])
    silent = trace(lvlm, data, ["resid_post"], ["generated:mean"], tmp_path / "c", generate=6)
    assert np.isnan(silent.read(site, "generated:mean")).all()
    assert list(silent.columns["generated"]) == [""]
    assert end_tokens(lvlm) == {ids[0]}


def test_a_model_that_does_not_write_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lvlm = model("llava")
    batch = next(lvlm.batches([example(0)], 1))
    monkeypatch.setattr(lvlm.hf, "generation_config", None)
    with pytest.raises(ModelError, match="llava has no generation_config"):
        lvlm.generate_batch(batch, 2)


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATES = {
    "content is text": ("{% for m in messages %}{{ 'USER: ' + m['content'] }}{% endfor %}", "can only concatenate"),
    "raises": ("{{ raise_exception('Conversation roles must alternate') }}", "Conversation roles must alternate"),
    "syntax": ("{% for m in messages %}{{ m }", "TemplateSyntaxError"),
    "loops": (LOOP, "runs more than 100000 steps"),
    "writes too much": ("{{ 'x' * 2000000 }}", "returns 2000000 characters"),
}


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_a_chat_template_that_fails_is_named_with_the_question(name: str) -> None:
    lvlm = load_lvlm("tiny", validate=False)
    lvlm.processor.chat_template, reason = TEMPLATES[name]
    with pytest.raises(ModelError, match=rf"the chat template of tiny fails for the question 'Is there .*{reason}"):
        lvlm.encode(example(0))


def test_a_question_is_found_where_its_template_keeps_its_words() -> None:
    lvlm = load_lvlm("tiny", validate=False)
    parts = "{% for c in messages[0]['content'] %}{% if c['type'] == 'image' %}<image>{% else %}WORDS{% endif %}{% endfor %}"
    plain = lvlm.encode(example(0)).tokens.question
    for words in ("{{ c['text'] }}", "{{ c['text'] | lower }}"):
        lvlm.processor.chat_template = parts.replace("WORDS", words)
        assert len(lvlm.encode(example(0)).tokens.question) == len(plain)
    lvlm.processor.chat_template = parts.replace("WORDS", "{{ c['text'] | replace('there', 'here') }}")
    with pytest.raises(DataError, match="chat template of tiny does not repeat the question 'Is there"):
        lvlm.encode(example(0))
    assert find_question("a b a b", " b ") == (6, 7)
    assert find_question("a", "") == (0, 0)
    assert find_question("a", "b") is None


def test_logits_that_are_not_finite_are_no_text() -> None:
    """The largest of several NaN is the first token, which would be text like any other."""
    lvlm = load_lvlm("tiny", validate=False)
    (batch,) = lvlm.batches([example()])
    with torch.no_grad():
        lvlm.hf.lm_head.weight[3, 0] = float("nan")
    with pytest.raises(ModelError, match="the logits of tiny are not finite"):
        lvlm.generate_batch(batch, 3)
