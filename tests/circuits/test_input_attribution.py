"""Shares that add up: against a loop in float64, and planted priors of each sort."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from circuits import Sources
from circuits.input_attribution import matched_prefixes, matched_questions, split
from concepts import ConceptDataset, NoImage
from concepts.counterfactuals import EditedImage
from concepts.noun_replacement import nouns_of, replace_nouns
from concepts.scenes import dataset
from concepts.schema import Example
from groundscope.core.errors import ConfigError, DataError, ModelError, PatchError, StoreError
from lvlm.model import Lvlm
from tests.toys.families import model as family
from tests.toys.random_models import shared_model

BLANKS = ("blank", "white", "black")


def color_questions() -> ConceptDataset:
    return dataset(n_images=30, splits=("neutral",)).where(kind="color")


@torch.no_grad()
def odds(model: Lvlm, example: Example, answer: str, rival: str) -> float:
    """Log p(answer) - log p(rival) in one forward pass; the toy tokenizer has one token for each candidate."""
    logits = model.hf(**model.encode(example).inputs).logits[0, -1].double()
    p = logits.softmax(0).numpy()
    a, b = (model.processor.tokenizer.convert_tokens_to_ids(c) for c in (answer, rival))
    return math.log(p[a]) - math.log(p[b])


@pytest.mark.parametrize("kind", ["existence", "what_color", "relation"])
def test_shares_are_those_of_a_loop_in_float64(kind: str) -> None:
    model = shared_model()
    data = dataset(n_images=30, splits=("neutral",)).where(kind=kind)[:2]
    texts = matched_questions(model, data)
    result = split(model, data, neutral_images=BLANKS, neutral_questions=("N/A", "Answer ."), progress=False)
    for e, shares in zip(data, result.examples, strict=True):
        a, b = shares.answer, shares.rival
        assert a == e.answer
        assert (shares.said == a) == (shares.log_odds > 0)
        own = {c: odds(model, e, c, a) for c in e.candidates}
        assert b == max((c for c in e.candidates if c != a), key=own.__getitem__)  # the model's answer, or the next one
        lean, form, noun, pixels = [], [], [], []
        for name in BLANKS:
            blank = replace(e, image=EditedImage(e.image, name))
            lean.append(np.mean([odds(model, replace(blank, question=q), a, b) for q in ("N/A", "Answer .")]))
            each = [odds(model, replace(blank, question=q), a, b) for q in texts[e.id]]
            form.append(np.mean(each))
            noun.append(odds(model, blank, a, b))
            pixels.append(each)
        whole = odds(model, e, a, b)
        expected = [
            np.mean(lean),
            np.mean(form) - np.mean(lean),
            np.mean(noun) - np.mean(form),
            whole - np.mean(noun),
        ]
        np.testing.assert_allclose([shares.lean, shares.form, shares.knowledge, shares.image], expected, atol=2e-4)
        assert shares.lean + shares.form + shares.knowledge + shares.image == pytest.approx(whole, abs=2e-4)
        assert abs(shares.lean + shares.form + shares.knowledge + shares.image - shares.log_odds) < 1e-9
        assert shares.words == pytest.approx(np.mean(noun), abs=2e-4)
        assert shares.noun_spread == pytest.approx(np.std(np.mean(pixels, axis=0), ddof=1), abs=2e-4)
        assert shares.blank_spread["image"] == pytest.approx(np.std(noun, ddof=1), abs=2e-4)
        assert shares.blank_spread["form"] == pytest.approx(np.std(np.subtract(form, lean), ddof=1), abs=2e-4)
        without = replace(e, image=NoImage(), objects=(), subject=None)
        assert shares.no_image == pytest.approx(odds(model, without, a, b), abs=2e-4)
        swapped = split(model, [e], of="said", matched_texts=texts, progress=False)[0]
        assert {swapped.answer, swapped.rival} == {a, b}
        assert swapped.answer == swapped.said


class Planted(Lvlm):
    """The random model, with a number of nats added to "yes" if a function of tokens and pixels holds."""

    def __init__(self, holds: Callable[[set[str], torch.Tensor], bool], nats: float) -> None:
        plain = shared_model()
        super().__init__(plain.hf, plain.processor, plain.spec, "planted")
        self.holds, self.nats = holds, nats

    def logits(self, inputs: Mapping[str, Any], *args: Any, **options: Any) -> torch.Tensor:
        values = super().logits(inputs, *args, **options) * 0.01  # the random model's own shares are small
        tokenizer, yes = self.processor.tokenizer, self.processor.tokenizer.convert_tokens_to_ids("yes")
        for i, ids in enumerate(inputs["input_ids"].tolist()):
            pixels = inputs["pixel_values"][i] if "pixel_values" in inputs else torch.zeros(3, 2, 2)
            if self.holds(set(tokenizer.convert_ids_to_tokens(ids)), pixels):
                values[i, yes] += self.nats
        return values


def varies(pixels: torch.Tensor) -> bool:
    return bool(pixels.flatten(1).std(1).max() > 1e-3)


PRIORS: dict[str, Callable[[set[str], torch.Tensor], bool]] = {
    "lean": lambda tokens, pixels: True,
    "form": lambda tokens, pixels: {"Is", "the"} <= tokens,
    "knowledge": lambda tokens, pixels: "banana" in tokens,
    "image": lambda tokens, pixels: {"Is", "the"} <= tokens and varies(pixels),
}


@pytest.mark.parametrize("nats", [4.0, -4.0])
@pytest.mark.parametrize("sort", PRIORS)
def test_a_planted_prior_gets_its_share(sort: str, nats: float) -> None:
    data = [e for e in dataset(n_images=150) if e.kind == "color" and "banana" in e.question][:20]
    among = color_questions()
    assert len(data) == 20
    model = Planted(PRIORS[sort], nats)
    texts = matched_questions(model, data, among=[*among, *data])
    result = split(model, data, matched_texts=texts, progress=False)
    hits = 0
    for e, shares in zip(data, result.examples, strict=True):
        each = {name: getattr(shares, name) for name in PRIORS}
        assert abs(sum(each.values()) - shares.log_odds) < 1e-5
        planted = nats if e.answer == "yes" else -nats
        assert each[sort] == pytest.approx(planted, abs=1.0)
        hits += abs(each[sort]) >= 0.8 * sum(map(abs, each.values()))
    assert hits >= 0.95 * len(data)


def test_equal_inputs_run_once() -> None:
    model, data = shared_model(), color_questions()[:3]
    other = "Is the car red?"
    texts = {e.id: [other] for e in data}
    sources = split(
        model, data, matched_texts=texts, neutral_images=["white"], neutral_questions=["N/A"], progress=False
    )
    # Own image, own question about white, matched, neutral, no image; the white image of equal size is one image.
    assert sources[0].forwards == 5
    assert all(s.forwards <= 3 for s in sources.examples[1:])
    assert math.isnan(sources[0].noun_spread)
    assert math.isnan(sources[0].blank_spread["image"])


def test_matched_questions_have_other_nouns_and_the_same_form() -> None:
    model, data = shared_model(), color_questions()
    for e, texts in zip(data[:4], matched_questions(model, data[:4], among=data).values(), strict=True):
        words = e.question.split()
        for text in texts:
            assert [a == b for a, b in zip(words, text.split(), strict=True)] == [True, True, False, True]
    assert "banana" in nouns_of(data)
    nouns = ["dog", "cat", "hot dog", "apple", "people", "bananas", "umbrella", "puppy", "skis"]
    assert set(replace_nouns("Is there a hot dog in the image?", "object", nouns, count=9)) == {
        f"Is there {a} in the image?" for a in ("a dog", "a cat", "an apple", "an umbrella", "a puppy")
    }
    assert set(replace_nouns("Are the dogs red?", "attribute", nouns, count=9)) == {
        f"Are the {a} red?" for a in ("people", "bananas", "skis")
    }
    dogs = replace_nouns("Is the dog left of the cat?", "relation", nouns, count=9)
    assert dogs
    assert all("dog" not in q.split()[2] and "puppy" not in q and "cat" not in q for q in dogs)
    assert replace_nouns("Is it raining?", "object", nouns, count=9) == ()
    # A question without a noun of the data is replaced by others of its kind.
    rain = [
        replace(e, question=q, objects=(), labels={})
        for e, q in zip(data, ("Is it raining?", "Is it sunny?"), strict=False)
    ]
    assert list(matched_questions(model, rain).values()) == [("Is it sunny?",), ("Is it raining?",)]


def test_words_after_a_prefix_are_split_by_other_prefixes() -> None:
    model = shared_model()
    texts = ("a red car and a", "a blue dog and a", "the green apple")
    data = [replace(e, prefix=text) for e, text in zip(color_questions(), texts, strict=False)]
    assert matched_prefixes(model, data)[data[0].id] == (texts[1], texts[2])  # equal length first
    result = split(
        model, data[:2], matched="prefix", neutral_images=["blank"], neutral_questions=["N/A"], progress=False
    )
    e, shares = data[0], result[0]
    a, b = shares.answer, shares.rival
    blank = replace(e, image=EditedImage(e.image, "blank"))
    lean = odds(model, replace(blank, question="N/A", prefix=texts[1]), a, b)
    form = odds(model, replace(blank, prefix=texts[1]), a, b)
    own = odds(model, blank, a, b)
    expected = [lean, form - lean, own - form, odds(model, e, a, b) - own]
    np.testing.assert_allclose([shares.lean, shares.form, shares.knowledge, shares.image], expected, atol=2e-4)


@pytest.mark.parametrize("name", ["qwen2_vl", "blip2_opt", "florence2"])
def test_other_families_have_shares(name: str) -> None:
    model = family(name)
    data = dataset(n_images=10, splits=("neutral",)).where(kind="existence")[:1]
    shares = split(model, data, matched_texts={data[0].id: ["Is there a cat in the image?"]}, progress=False)[0]
    assert abs(shares.lean + shares.form + shares.knowledge + shares.image - shares.log_odds) < 1e-5
    assert math.isnan(shares.no_image) == (name != "qwen2_vl")


def test_summary_frame_and_file(tmp_path: Path) -> None:
    sources = split(shared_model(), color_questions()[:4], progress=False)
    frame = sources.frame()
    np.testing.assert_allclose(frame[["lean", "form", "knowledge", "image"]].sum(axis=1), frame["log_odds"], atol=1e-9)
    table = sources.summary(("level", "said_true"))
    mean = table.pivot_table(index=["level", "said_true"], columns="part", values="mean")
    total = mean["lean"] + mean["form"] + mean["knowledge"] + mean["image"]
    np.testing.assert_allclose(total, mean["log_odds"], atol=1e-9)
    loaded = Sources.load(sources.save(tmp_path / "sources.safetensors"))
    assert loaded.frame().equals(frame)
    np.testing.assert_array_equal(loaded[1].matched, sources[1].matched)
    assert str(loaded[0]).startswith(f"'{sources[0].answer}' against '{sources[0].rival}'")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(StoreError, match="damaged"):
        Sources.load(tmp_path / "broken.safetensors")
    with pytest.raises(ConfigError, match="unknown column 'color' in by"):
        sources.summary(("color",))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"of": "false"}, ConfigError, "true or said"),
        ({"method": "shaply"}, ConfigError, "did you mean 'shapley'|unknown method 'shaply'"),
        ({"image": "objects"}, ConfigError, "only for method='shapley'"),
        ({"method": "shapley", "matched": "prefix"}, ConfigError, "options of method='telescoping'"),
        ({"matched": "words"}, ConfigError, "question or prefix"),
        ({"matched": "prefix"}, PatchError, "has no prefix"),
        ({"neutral_images": ("noise",)}, ConfigError, "unknown blank image 'noise'"),
        ({"neutral_images": ()}, ConfigError, "neutral_images is empty"),
        ({"neutral_questions": {}}, ConfigError, "a list of questions without content"),
        ({"matched_texts": {}}, PatchError, "has no matched text"),
    ],
)
def test_a_mistake_is_named(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        split(shared_model(), color_questions()[:2], **options)


def test_examples_that_cannot_be_split() -> None:
    first = color_questions()[0]
    with pytest.raises(PatchError, match="examples is empty"):
        split(shared_model(), [])
    with pytest.raises(DataError, match="fewer than two candidate"):
        split(shared_model(), [replace(first, candidates=("yes",), answer="yes")])
    with pytest.raises(PatchError, match="has no matched text"):
        split(shared_model(), [replace(first, question="Is it raining?")])
    broken = Planted(PRIORS["lean"], math.nan)
    with pytest.raises(ModelError, match="not finite"):
        split(broken, [first], matched_texts={first.id: ["Is the car red?"]}, progress=False)
