"""Preference tuning: losses in float64, log-probabilities by a naive loop, adapters, resumption and refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from concepts import scenes
from concepts.schema import Example
from groundscope.core.errors import ConfigError, DataError, ModelError, StoreError
from lvlm import Lvlm, load_lvlm
from lvlm.encoding.continued_inputs import append_tokens
from mitigation import Adapter, PreferenceData, PreferencePair, TuneOptions, Tuning, tune, write_preferences
from mitigation.preference.loss import check_answers, dpo_loss, pair_batch, sft_loss
from tests.toys import families

QUICK = TuneOptions(epochs=2, batch_size=4, learning_rate=2e-3, validation_share=0.3)


@cache
def model() -> Lvlm:
    return load_lvlm("tiny")


@cache
def examples() -> tuple[Example, ...]:
    return tuple(scenes.dataset(60).where(split="conflict", kind="what_color"))


def colors(n: int = 10) -> PreferenceData:
    pairs = [PreferencePair.of(e, e.answer, str(e.prior_answer), source="labels") for e in examples()[:n]]
    return PreferenceData("colors", tuple(pairs))


@cache
def tuned() -> Tuning:
    return tune(model(), colors(), QUICK)


def test_dpo_is_the_formula_of_the_paper() -> None:
    rng = np.random.default_rng(0)
    policy, reference = rng.normal(-5, 3, (40, 2)), rng.normal(-5, 3, (40, 2))
    ours = dpo_loss(torch.from_numpy(policy), torch.from_numpy(reference), 0.3).numpy()
    ratio = (policy[:, 0] - reference[:, 0]) - (policy[:, 1] - reference[:, 1])
    np.testing.assert_allclose(ours, -np.log(1 / (1 + np.exp(-0.3 * ratio))), rtol=1e-12)
    np.testing.assert_allclose(sft_loss(torch.from_numpy(policy)).numpy(), -policy[:, 0])


def naive_log_probability(lvlm: Lvlm, pair: PreferencePair, answer: str) -> float:
    """One answer after its prompt, by transformers' own processor, in float64."""
    processor = lvlm.processor
    text = f"{lvlm.prompt(pair.prompt)} "
    inputs = processor(images=[i.load() for i in pair.images], text=text, return_tensors="pt")
    answer_ids = processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
    answer_ids = [*answer_ids, processor.tokenizer.eos_token_id]
    ids = torch.cat([inputs["input_ids"], torch.tensor([answer_ids])], dim=1)
    with torch.no_grad():
        logits = lvlm.hf(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0].double()
    total, start = 0.0, inputs["input_ids"].shape[1]
    for at, token in enumerate(answer_ids):
        row = logits[start + at - 1]
        total += float(row[token] - torch.log(torch.exp(row).sum()))
    return total


def test_log_probabilities_are_those_of_a_naive_loop() -> None:
    """Answers of different lengths in one batch: the shorter ones are padded."""
    pairs = list(colors(3))
    pairs[0] = replace(pairs[0], rejected="red and a big green apple")
    pairs[1] = replace(pairs[1], chosen="a cat")
    tokens = check_answers(model(), pairs)
    (batch,) = model().batches([p.example() for p in pairs])
    with torch.no_grad():
        ours = pair_batch(model(), batch.encodings, [tokens[i] for i in batch.index], batch.index).log_probabilities(
            model()
        )
    for row, i in zip(ours.tolist(), batch.index, strict=True):
        expected = [naive_log_probability(model(), pairs[i], text) for text in (pairs[i].chosen, pairs[i].rejected)]
        np.testing.assert_allclose(row, expected, atol=2e-4)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "mllama"])
def test_two_answers_share_a_batch_in_other_families(family: str) -> None:
    """Log-probabilities of a batch with padding are those of each answer alone."""
    lvlm = families.model(family)
    pairs = [
        PreferencePair.of(e, text, "no", source="labels")
        for e, text in zip(examples()[:2], ("yes", "it is red"), strict=True)
    ]
    tokens = check_answers(lvlm, pairs)
    for batch in lvlm.batches([p.example() for p in pairs]):
        both = [tokens[i] for i in batch.index]
        with torch.no_grad():
            ours = pair_batch(lvlm, batch.encodings, both, batch.index).log_probabilities(lvlm)
            for row, encoding, i in zip(ours.tolist(), batch.encodings, batch.index, strict=True):
                for value, ids in zip(row, tokens[i], strict=True):
                    inputs = append_tokens(lvlm, lvlm.collate([encoding]), [ids])
                    logits = lvlm.hf(**inputs).logits[0, -len(ids) - 1 : -1].double()
                    total = sum(float(logits[n, t] - logits[n].logsumexp(-1)) for n, t in enumerate(ids))
                    assert value == pytest.approx(total, abs=2e-4)


def test_tuning_lowers_the_validation_loss_and_leaves_the_model_alone() -> None:
    before = model().weights_hash
    gradients = [p.requires_grad for p in model().hf.parameters()]
    result = tuned()
    assert result.history[0].validation_loss == pytest.approx(np.log(2))
    assert result.history[result.epoch].validation_loss == min(e.validation_loss for e in result.history)
    assert result.history[-1].validation_loss < result.history[0].validation_loss
    assert model().weights_hash == before
    assert [p.requires_grad for p in model().hf.parameters()] == gradients
    assert model().unregistered_hooks == ()
    assert model().interventions == ()
    assert sum(result.pairs) == 10
    assert result.adapter.provenance["training"]["pairs"] == result.pairs[0]
    repeated = tune(model(), colors(), QUICK)
    assert all(np.array_equal(repeated.adapter.up[p], result.adapter.up[p]) for p in result.adapter.up)


def test_a_merged_model_has_the_weights_of_the_formula_and_shares_the_others() -> None:
    adapter = tuned().adapter
    merged = adapter.merged(model())
    before, after = dict(model().hf.named_parameters()), dict(merged.hf.named_parameters())
    for name, weight in before.items():
        path = name.removesuffix(".weight")
        if path not in adapter.up:
            assert after[name] is weight
            continue
        change = adapter.alpha / adapter.rank * adapter.up[path].astype(np.float64) @ adapter.down[path]
        np.testing.assert_allclose(after[name].detach().numpy(), weight.detach().numpy() + change, atol=1e-6)
    assert merged.name == "tiny, tuned"
    assert merged.weights_hash != model().weights_hash
    with pytest.raises(ModelError, match="tiny-unbiased is another model"):
        adapter.merged(load_lvlm("tiny-unbiased"))


def test_training_sees_the_merged_model() -> None:
    """The validation loss of the chosen epoch, computed with hooks, is that of the merged weights by the naive loop."""
    result = tuned()
    _, held_out = colors().split(QUICK.validation_share, seed=QUICK.seed)
    lvlms = [result.adapter.merged(model()), model()]
    values = np.array(
        [[[naive_log_probability(m, p, t) for t in (p.chosen, p.rejected)] for p in held_out] for m in lvlms]
    )
    ratio = values[0] - values[1]
    losses = np.log1p(np.exp(-QUICK.beta * (ratio[:, 0] - ratio[:, 1])))
    assert result.history[result.epoch].validation_loss == pytest.approx(losses.mean(), abs=1e-4)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("stop", [1, 2])
def test_an_interrupted_training_resumes_to_the_same_bits(
    stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mitigation.preference import trainer

    run_epoch = trainer.Trainer.run_epoch

    def interrupted(self: trainer.Trainer) -> None:
        if len(self.history) > stop:
            raise Interrupted
        run_epoch(self)

    options = replace(QUICK, epochs=3)
    whole = tune(model(), colors(), options)
    monkeypatch.setattr(trainer.Trainer, "run_epoch", interrupted)
    with pytest.raises(Interrupted):
        tune(model(), colors(), options, out=tmp_path)
    assert model().interventions == ()
    monkeypatch.undo()
    resumed = tune(model(), colors(), options, out=tmp_path)
    assert resumed.history == whole.history
    for path in whole.adapter.up:
        np.testing.assert_array_equal(resumed.adapter.up[path], whole.adapter.up[path])
        np.testing.assert_array_equal(resumed.adapter.down[path], whole.adapter.down[path])
    loaded = Adapter.load(tmp_path)
    assert dict(loaded.provenance) == json.loads(json.dumps(dict(whole.adapter.provenance)))
    with pytest.raises(ConfigError, match="another model, other data or options"):
        tune(model(), colors(), replace(options, seed=1), out=tmp_path)


def test_a_saved_adapter_is_read_back_and_damage_is_named(tmp_path: Path) -> None:
    adapter = tuned().adapter
    folder = adapter.save(tmp_path / "adapter")
    loaded = Adapter.load(folder)
    assert loaded.merged(model()).weights_hash == adapter.merged(model()).weights_hash
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 8, 16.0)
    weights = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(weights[:-1] + b"\1")
    with pytest.raises(StoreError, match="does not match its digest"):
        Adapter.load(folder)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    record = (folder / "groundscope.json").read_text()
    (folder / "groundscope.json").write_text(record.replace('"alpha": 16.0', '"alpha": 32.0'))
    with pytest.raises(StoreError, match="does not match its digest"):
        Adapter.load(folder)
    with pytest.raises(StoreError, match="no adapter at"):
        Adapter.load(tmp_path)


def test_sft_learns_the_chosen_answers_only() -> None:
    result = tune(model(), colors(), replace(QUICK, loss="sft", targets=("o_proj",)))
    _, held_out = colors().split(QUICK.validation_share, seed=QUICK.seed)
    expected = -np.mean([naive_log_probability(model(), p, p.chosen) for p in held_out])
    assert result.history[0].validation_loss == pytest.approx(expected, abs=1e-4)
    assert all(path.endswith("o_proj") for path in result.adapter.up)
    assert len(result.adapter.up) == 6


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rejected": "xylophone"}, DataError, "does not know all words of its answers"),
        ({"rejected": "red  ", "chosen": " red ,"}, DataError, None),
        ({"rejected": "red ,", "chosen": "red,"}, DataError, "gives both answers the same tokens"),
    ],
)
def test_answers_that_cannot_be_learned_are_refused(
    change: dict[str, Any], error: type[Exception], message: str | None
) -> None:
    data = colors(4)
    wrong = PreferenceData("wrong", (replace(data[0], **change), *data.pairs[1:]))
    if message is None:  # "red" and "red ,": different tokens
        assert check_answers(model(), wrong.pairs)
        return
    with pytest.raises(error, match=message):
        tune(model(), wrong, QUICK)


def test_other_refusals(tmp_path: Path) -> None:
    data = colors(6)
    with pytest.raises(DataError, match=r"validation pair '.*' is about an image of the training pairs"):
        tune(model(), data[:4], QUICK, validation=data[3:])
    with pytest.raises(DataError, match="have no pairs; nothing can be learned"):
        tune(model(), data[:0], QUICK)
    with pytest.raises(DataError, match="have no pairs; nothing can be chosen"):
        tune(model(), data, QUICK, validation=data[:0])
    with pytest.raises(ConfigError, match=r"targets: no linear layer is named 'oproj'.*did you mean o_proj"):
        tune(model(), data, replace(QUICK, targets=("oproj",)))
    wrong = {"loss": "ppo", "beta": 0, "rank": 0, "epochs": 1.5, "learning_rate": float("nan"), "warmup": 1.0}
    for name, value in {**wrong, "validation_share": 0}.items():
        with pytest.raises(ConfigError, match=name):
            replace(QUICK, **{name: value})


# PEFT 0.21 reads a name that transformers 5.23 renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_peft_computes_what_the_merged_model_computes(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", exc_type=ImportError)
    folder = tuned().adapter.save(tmp_path)
    merged = tuned().adapter.merged(model())
    inputs = model().collate([model().encode(e) for e in examples()[:2]])
    expected = merged.logits(inputs)
    base = load_lvlm("tiny")
    wrapped = peft.PeftModel.from_pretrained(base.hf, str(folder)).eval()
    with torch.no_grad():
        ours = wrapped(**inputs).logits[:, -1]
    assert (expected - model().logits(inputs)).abs().max() > 0.1
    np.testing.assert_allclose(ours.numpy(), expected.numpy(), atol=1e-4)


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>USER:{% for c in m.content %}{% if c.type == 'image' %}<image>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %} ASSISTANT:{% else %} {{ m.content[0].text }}</s>{% endif %}{% endfor %}"
)
"""The embedded model's prompt as a chat template, which TRL needs."""


@pytest.mark.filterwarnings("ignore")  # of TRL and its dependencies, which only this test imports
def test_trl_reads_the_file_and_computes_the_same_log_probabilities(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trl = pytest.importorskip("trl", exc_type=ImportError)
    import datasets

    data = colors(6)
    file = write_preferences(data, tmp_path)
    monkeypatch.chdir(tmp_path)  # paths of images are relative to the file
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    loaded = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    loaded = loaded.cast_column("images", datasets.List(datasets.Image()))
    lvlm = load_lvlm("tiny")
    lvlm.processor.chat_template = TEMPLATE
    options: dict[str, Any] = {"report_to": [], "use_cpu": True, "bf16": False, "max_length": None, "logging_steps": 1}
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=len(data),
        max_steps=1,
        gradient_checkpointing=False,
        save_strategy="no",
        **options,
    )
    trainer = trl.DPOTrainer(model=lvlm.hf, args=arguments, train_dataset=loaded, processing_class=lvlm.processor)
    trainer.train()
    record = trainer.state.log_history[0]
    for side in ("chosen", "rejected"):
        ours = np.mean([naive_log_probability(model(), pair, getattr(pair, side)) for pair in data])
        assert record[f"logps/{side}"] == pytest.approx(ours, abs=2e-3)
    assert record["loss"] == pytest.approx(np.log(2), abs=1e-4)
