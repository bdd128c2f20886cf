"""The model class for lmms-eval: its texts and losses are those of the model, and its evaluator scores an instance."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import groundscope as gs
from concepts.schema import Example
from groundscope.core.errors import ConfigError
from lvlm import Lvlm
from mitigation.lmms_eval_model import Request, continuation_losses, generate_texts, manifest


@pytest.fixture(scope="module")
def tiny() -> Lvlm:
    return gs.load_lvlm("tiny")


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return [e for e in gs.scenes.dataset(10) if e.kind == "existence"][:4]


@pytest.fixture(scope="module")
def questions() -> list[Example]:
    """Questions of which PAI at a high strength changes some answers."""
    return [e for e in gs.scenes.dataset(10) if e.kind in ("existence", "what_color")][:12]


def answers_under(tiny: Lvlm, questions: list[Example], mitigation: gs.Mitigation | None) -> list[str]:
    with nullcontext() if mitigation is None else mitigation.applied(tiny):
        return [tiny.ask(e.image.load(), e.question, max_new_tokens=1).strip() for e in questions]


def requests_of(examples: list[Example], **options: Any) -> list[Request]:
    return [Request(e.question, (e.image.load(),), options) for e in examples]


def test_texts_are_those_that_the_model_writes(tiny: Lvlm, examples: list[Example]) -> None:
    texts = generate_texts(tiny, requests_of(examples, max_new_tokens=3), nullcontext(), batch_size=3)
    assert texts == [tiny.ask(e.image.load(), e.question, max_new_tokens=3) for e in examples]
    stops = generate_texts(tiny, requests_of(examples, max_new_tokens=3, until=["e", "o"]), nullcontext())
    assert stops == [min(t.split("e")[0], t.split("o")[0], key=len) for t in texts]
    with pytest.raises(ConfigError, match="num_beams=2"):
        generate_texts(tiny, requests_of(examples, num_beams=2), nullcontext())


def test_a_mitigation_changes_the_texts(tiny: Lvlm, questions: list[Example]) -> None:
    mitigation = gs.named_mitigation("pai(alpha=3)", tiny)
    expected = answers_under(tiny, questions, mitigation)
    assert expected != answers_under(tiny, questions, None)
    requests = requests_of(questions, max_new_tokens=1)
    assert generate_texts(tiny, requests, mitigation.applied(tiny), batch_size=4) == expected


def test_losses_are_those_of_the_logits(tiny: Lvlm, examples: list[Example]) -> None:
    """One-token answers: the loss is the log-sum-exp of the last logits minus the token's logit."""
    for example in examples[:2]:
        losses = continuation_losses(
            tiny,
            [Request(example.question, (example.image.load(),), {}, word) for word in ("yes", "no")],
            nullcontext(),
        )
        batch = next(tiny.batches([example]))
        logits = tiny.answer_logits(batch)[0].double()
        from lvlm.answer_keys import answer_tokens

        for word, (loss, greedy) in zip(("yes", "no"), losses, strict=True):
            (token,) = answer_tokens(tiny, example, word)
            assert loss == pytest.approx(float(torch.logsumexp(logits, -1) - logits[token]), abs=1e-5)
            assert greedy == (int(logits.argmax()) == token)


TASK = """
task: {task}
dataset_path: json
dataset_kwargs:
  data_files: {file}
test_split: train
output_type: {output}
doc_to_visual: !function functions.visual
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
{more}
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
"""


def test_the_evaluator_of_lmms_eval_scores_an_instance(
    tiny: Lvlm, questions: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lmms_eval", reason="lmms-eval is installed in an environment of its own: see CONTRIBUTING.md")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from lmms_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lmms_eval.models.registry_v2 import ModelRegistryV2  # pyright: ignore[reportMissingImports]
    from lmms_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    rows = []
    for i, example in enumerate(questions):
        example.image.load().save(tmp_path / f"{i}.png")
        rows.append({"path": str(tmp_path / f"{i}.png"), "question": example.question, "answer": example.answer})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "functions.py").write_text(
        "from PIL import Image\n\n\ndef visual(doc):\n    return [Image.open(doc['path'])]\n"
    )
    generation = "generation_kwargs:\n  max_new_tokens: 1\n  until: ['.']"
    (tmp_path / "scenes.yaml").write_text(
        TASK.format(
            task="scenes", file=tmp_path / "rows.jsonl", output="generate_until", more=generation, metric="exact_match"
        )
    )
    registry = ModelRegistryV2()
    registry.register_manifest(manifest())  # as its entry point does
    model_class = registry.get_model_class("groundscope")
    mitigation = gs.named_mitigation("pai(alpha=3)", tiny)
    instance = model_class(model=tiny, mitigation=mitigation, batch_size=4)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False, model_name="groundscope")
    results = simple_evaluate(instance, tasks=["scenes"], task_manager=manager, log_samples=True, bootstrap_iters=0)
    samples = results["samples"]["scenes"]
    texts = [s["filtered_resps"][0] for s in samples]
    assert texts == answers_under(tiny, questions, mitigation) != answers_under(tiny, questions, None)
    right = sum(t == e.answer for t, e in zip(texts, questions, strict=True)) / len(questions)
    score = results["results"]["scenes"]
    assert next(v for k, v in score.items() if k.startswith("exact_match,")) == pytest.approx(right)
