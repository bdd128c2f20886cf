"""CODE, VDGD, counterfactual keywords, Skip-newline and augmented prompts against what they are written to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

import groundscope as gs
from groundscope.core.errors import ConfigError, DataError, ModelError
from lvlm import Lvlm
from lvlm.decoding.decoder import AnswerRule, Step
from lvlm.decoding.loop import DecodingRun
from mitigation.training_free.methods.augment import ShuffledAugment, augment
from mitigation.training_free.methods.code import CODE
from mitigation.training_free.methods.counterfactual_keywords import CounterfactualKeywords, counterfactual_keywords
from mitigation.training_free.methods.skip_newline import SkipNewline, newline_tokens
from mitigation.training_free.methods.vdgd import VDGD, _AlongDescription, nucleus
from mitigation.training_free.prompt_methods import PromptDecoder
from tests.toys.decoding_oracle import double_model, naive_steps
from tests.toys.examples import example
from tests.toys.families import model
from tests.toys.rule_oracle import compare, doubled

FAMILIES = ("llava", "qwen2_5_vl", "gemma3")
PROMPT = "Describe the image."


def description(lvlm: Lvlm, question: Any, tokens: int) -> str:
    return lvlm.generate(question.image, lvlm.prompt(PROMPT), max_new_tokens=tokens)


# ---- CODE


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", ["paper", "release"])
def test_code_is_the_written_rule(family: str, variant: Any) -> None:
    def described(lvlm: Lvlm, question: Any, plain: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        text = description(lvlm, question, 5)
        words = lvlm.processor.tokenizer(text, add_special_tokens=variant == "release")["input_ids"]
        ids = plain["input_ids"][0].tolist()
        first = ids.index(lvlm.content_id)
        replaced = [*ids[:first], *words, *(i for i in ids[first:] if i != lvlm.content_id)]
        row = torch.tensor([replaced])
        zeros = {n: torch.zeros_like(row) for n in ("mm_token_type_ids", "token_type_ids") if n in plain}
        return [{"input_ids": row, "attention_mask": torch.ones_like(row), **zeros}]

    def rule(_: int, x: Sequence[Tensor]) -> Tensor:
        p, q = x[0].softmax(-1), x[1].softmax(-1)
        d = 0.5 * sum((p + q) * (((p - q).abs() ** 0.7 + 1).log() / math.log(2)))
        return torch.where(p < d * p.max(), -math.inf, (2 - d) * x[0] - (1 - d) * x[1])

    compare(CODE(prompt=PROMPT, max_new_tokens=5, variant=variant), family, described, rule)


def test_code_of_equal_distributions_is_plain() -> None:
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(CODE()._combine(Step(0, logits, (logits,)), []), logits, atol=1e-5, rtol=0)


def test_equal_images_are_described_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lvlm = model("llava")
    rows = [example(0), replace(example(0), id="again", question="Is there a cat?"), example(1)]
    encodings = [lvlm.encode(e) for e in rows]
    prompts: list[int] = []
    start = DecodingRun.start

    def count(run: DecodingRun) -> Tensor:
        prompts.append(run.size)
        return start(run)

    monkeypatch.setattr(DecodingRun, "start", count)
    from lvlm.model import Batch

    texts = CODE(prompt=PROMPT, max_new_tokens=4)._start(lvlm, Batch((0, 1, 2), tuple(encodings), {}))
    assert set(prompts) == {2}  # two prompts for three questions
    assert texts[0] == texts[1]


def test_code_needs_image_tokens() -> None:
    with pytest.raises(ModelError, match="mllama"):
        CODE().check(model("mllama"))


# ---- VDGD


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reduction", ["min", "avg"])
def test_vdgd_is_the_written_rule(family: str, reduction: Any) -> None:
    lvlm = double_model(family)
    template = "{description} {question}"
    method = VDGD(reduction, prompt=PROMPT, template=template, max_new_tokens=4)
    batch = next(lvlm.batches([example(0), example(1)], 2))
    answers = PromptDecoder(method).generate(lvlm, batch, 3)
    ends = {*_ends(lvlm), lvlm.content_id}
    for row, question in enumerate((example(0), example(1))):
        ask = doubled(lvlm.encode_prompt(lvlm.prompt(PROMPT), [question.image.load()])[0])
        written, logits = naive_steps(lvlm, [ask], lambda _, x: x[0], 4)
        count = next((i for i, token in enumerate(written) if token in ends), len(written))
        along = torch.stack([x.log_softmax(-1) for x in logits[:count]])
        divergence = -along  # KL(onehot(v) || p_j) for every v
        scores = -(divergence.min(0).values if reduction == "min" else divergence.mean(0))
        text = lvlm.processor.tokenizer.decode(written[:count], skip_special_tokens=True).strip()
        prompt = lvlm.prompt(template.format(description=text, question=question.question))
        inputs = doubled(lvlm.encode_prompt(prompt, [question.image.load()])[0])

        def rule(_: int, x: Sequence[Tensor], scores: Tensor = scores) -> Tensor:
            p = (x[0] / 0.5).softmax(-1)
            allowed, total = set(), 0.0
            for token in p.argsort(descending=True).tolist():
                if total >= 0.5:
                    break
                allowed.add(token)
                total += float(p[token])
            return torch.tensor([float(s) if v in allowed else -math.inf for v, s in enumerate(scores)])

        tokens, _ = naive_steps(lvlm, [inputs], rule, 3)
        stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
        assert answers[row] == tokens[:stop]


def _ends(lvlm: Lvlm) -> set[int]:
    value = lvlm.hf.generation_config.eos_token_id
    return set() if value is None else {value} if isinstance(value, int) else set(value)


def test_the_release_of_vdgd_divides_by_the_vocabulary() -> None:
    lvlm = model("llava")
    paper, release = (
        VDGD(prompt=PROMPT, template="{description}{question}", max_new_tokens=3, variant=v)
        for v in ("paper", "release")
    )
    rules = [method._prepared(lvlm, [example(0)])[1] for method in (paper, release)]
    logits = lvlm.logits(next(lvlm.batches([example(0)], 1)).inputs)
    scores = [rule.combine(Step(0, logits)) for rule in rules]
    finite = ~scores[0].isinf()
    torch.testing.assert_close(scores[1][finite] * logits.shape[-1], scores[0][finite], atol=1e-4, rtol=1e-4)


def test_distributions_after_the_end_of_a_description_do_not_count() -> None:
    along = _AlongDescription(frozenset({2}), average=True)
    steps = [[[5.0, 0, 0], [0, 5.0, 0]], [[0, 0, 5.0], [5.0, 0, 0]], [[5.0, 0, 0], [0, 0, 5.0]]]
    for number, logits in enumerate(steps):
        along.combine(Step(number, torch.tensor(logits)))
    p = torch.tensor(steps).log_softmax(-1)
    torch.testing.assert_close(along.scores(), torch.stack([p[0, 0], (p[0, 1] + p[1, 1]) / 2]))


def test_an_empty_description_scores_all_tokens_equally() -> None:
    along = _AlongDescription(frozenset({0}), average=False)
    along.combine(Step(0, torch.tensor([[5.0, 0, 0]])))
    assert along.scores().tolist() == [[0, 0, 0]]


def test_the_token_that_crosses_top_p_stays() -> None:
    p = torch.tensor([0.05, 0.5, 0.25, 0.2], dtype=torch.float64)
    assert nucleus(p.log(), 0.6).tolist() == [False, True, True, False]
    assert nucleus(p.log(), 1.0).all()


# ---- counterfactual keywords


def test_keywords_of_the_counterfactual_lines_only_are_used() -> None:
    text = "Factual Keywords: [dog, red]\nCounterfactual Keywords 1: [cat, _ , 'blue']\ncounterfactual keywords 2: cow, cat."
    assert counterfactual_keywords(text) == ("cat", "blue", "cow")
    assert counterfactual_keywords("no list") == ()


def test_the_question_follows_the_keywords(monkeypatch: pytest.MonkeyPatch) -> None:
    from mitigation.training_free.methods import counterfactual_keywords as module

    lvlm = model("llava")
    monkeypatch.setattr(module, "text_of", lambda *_: "Counterfactual Keywords 1: [cat, cow]")
    method = CounterfactualKeywords(max_new_tokens=1)
    (rewritten,) = method._rewritten(lvlm, [example(0)])
    assert rewritten.question.endswith(f"\nCounterfactual keywords: cat, cow.\nQuestion: {example(0).question}")
    monkeypatch.setattr(module, "text_of", lambda *_: "I do not know.")
    assert method._rewritten(lvlm, [example(0)]) == [example(0)]


# ---- Skip-newline


class Decodes:
    """A tokenizer that has newline tokens."""

    texts = ("a", "\n", " \n\n", " ", "b\n")

    def __len__(self) -> int:
        return len(self.texts)

    def decode(self, ids: list[int]) -> str:
        return self.texts[ids[0]]


def test_newline_only_tokens_are_excluded(monkeypatch: pytest.MonkeyPatch) -> None:
    lvlm = model("llava")
    monkeypatch.setattr(lvlm.processor, "tokenizer", Decodes())
    assert newline_tokens(lvlm) == (1, 2)
    with SkipNewline().applied(lvlm):
        assert lvlm.decoder is not None
        rule: AnswerRule = lvlm.decoder.start(lvlm, None)  # type: ignore[attr-defined, arg-type]
        logits = rule.combine(Step(0, torch.arange(5.0)[None]))
    assert logits.tolist() == [[0, -math.inf, -math.inf, 3, 4]]


def test_a_paragraph_is_requested_before_the_last_mark() -> None:
    method = SkipNewline("paragraph")
    (rewritten,) = method._rewritten(model("llava"), [replace(example(0), question="What is it?!")])
    assert rewritten.question == "What is it in one paragraph?!"


# ---- augmented prompts

TEXTS = {"image 1": "a dog .", "image 2": "a cat .", "image 3": "a bus ."}


def test_texts_are_put_before_the_question_by_group() -> None:
    examples = [replace(example(n), group=group) for n, group in enumerate(TEXTS)]
    rewritten = augment(TEXTS, key="group")._rewritten(model("llava"), examples)
    assert [e.question for e in rewritten] == [
        f"{text}\n{e.question}" for e, text in zip(examples, TEXTS.values(), strict=True)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_the_shuffled_control_gives_no_image_its_own_text(seed: int) -> None:
    method = augment(TEXTS, key="group", shuffled=seed)
    assert isinstance(method, ShuffledAugment)
    assert method.control
    texts = method._texts()
    assert sorted(texts.values()) == sorted(TEXTS.values())
    assert all(texts[key] != text for key, text in TEXTS.items())


def test_a_frame_is_a_table_of_texts() -> None:
    frame = pd.DataFrame({"group": ["a", "b", "a"], "caption": ["x", "y", "x"]})
    assert dict(augment(frame, key="group", column="caption").texts) == {"a": "x", "b": "y"}
    with pytest.raises(DataError, match="no column 'text'; its columns are: group, caption"):
        augment(frame, key="group")
    with pytest.raises(DataError, match="two texts for the group 'a'"):
        augment(frame.assign(caption=["x", "y", "z"]), key="group", column="caption")


def test_a_question_without_a_text_and_a_wrong_template_are_named() -> None:
    lvlm, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10)
    method = augment({"other": "a dog ."})
    assert "no text for the id" in str(method.problem(lvlm, data[0]))
    with method.applied(lvlm), pytest.raises(DataError, match="no text for its id"):
        gs.answer(lvlm, data)
    with pytest.raises(ConfigError, match=r"must contain \{text\} and \{question\}"):
        augment(TEXTS, template="{text}")
    with pytest.raises(DataError, match="the text for 'a' is empty"):
        augment({"a": " "})
    assert lvlm.decoder is None


def test_the_digest_of_the_texts_is_in_the_parameters() -> None:
    original, other = augment(TEXTS), augment({**TEXTS, "image 1": "a pear ."})
    assert original.parameters != other.parameters
    assert original._digest() != other._digest()
    assert original._digest() is not None
