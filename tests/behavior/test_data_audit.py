"""Audits of data: planted faults, each cause by hand, error rates, rarity, and the data of every loader."""

from __future__ import annotations

import doctest
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import groundscope as gs
from behavior.data_audit import CAUSES, SENSES, caption_fit
from behavior.data_audit.images import measure_image
from concepts.annotated_object import AnnotatedObject, Box
from concepts.image_files import BytesImage
from concepts.nouns import canonical_noun
from concepts.schema import ConceptDataset, Example
from groundscope.core.errors import ConfigError, DataError
from groundscope.testing.data_faults import plant_data_faults
from tests.docstrings import OPTIONS, examples
from tests.packages import ROOT

IMAGES = {"duplicate images", "blurred images"}


def plain(seed: int = 0) -> BytesImage:
    """Return an image of 40 x 30 pixels of noise."""
    import io

    pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, format="PNG")
    return BytesImage(data.getvalue(), f"{seed}.png")


def question(identity: str, text: str, answer: str, **fields: object) -> Example:
    """Return a yes-no question about image 0, or with the given fields."""
    example = Example(identity, plain(), text, answer, ("yes", "no"), "object", "existence", "random", "0.png")
    return replace(example, **fields)  # type: ignore[arg-type]


def caption(identity: str, text: str, group: str, *nouns: str, seed: int = 0) -> Example:
    objects = tuple(AnnotatedObject(f"{group}{n}", n, None) for n in nouns)
    return Example(identity, plain(seed), "Describe.", text, (), "object", "caption", "caption", group, objects=objects)


def reported_examples(cause: str, *rows: Example) -> list[tuple[str, ...]]:
    """Return the examples of each finding."""
    return [f.examples for f in gs.audit(ConceptDataset("by hand", rows), causes=[cause]).cause(cause).findings]


@pytest.fixture(scope="module")
def faults() -> tuple[gs.Audit, dict[str, frozenset[str]], dict[str, str]]:
    data = gs.scenes.dataset(60, seed=5).filter(lambda e: e.split != "conflict")
    planted = plant_data_faults(data, share=0.08, seed=5)
    audit = gs.audit(planted.data, causes=list(planted.examples))
    return audit, dict(planted.examples), {e.id: e.group for e in planted.data}


@pytest.mark.parametrize(
    "cause", ["duplicate images", "blurred images", "contradictions", "present under another name", "swapped captions"]
)
def test_planted_faults_are_reported_and_nothing_else(
    cause: str, faults: tuple[gs.Audit, dict[str, frozenset[str]], dict[str, str]]
) -> None:
    audit, truth, groups = faults
    planted: set[str] = set(truth[cause])
    assert len(planted) >= 3
    findings = [set(f.examples) for f in audit.cause(cause).findings]
    if cause in IMAGES:
        planted = {groups[name] for name in planted}
        findings = [{groups[name] for name in names} for names in findings]
    assert sum(bool(names & planted) for names in findings) >= 0.9 * len(findings)
    assert len(planted & set().union(*findings)) >= 0.8 * len(planted)


def test_contradictions_by_hand() -> None:
    same = question("a", "Is there a dog in the image?", "yes"), question("b", "is there a Dog in the image", "no")
    assert reported_examples("contradictions", *same) == [("a", "b")]
    assert reported_examples("contradictions", same[0], replace(same[1], group="1.png", image=plain(1))) == []
    left = question("a", "Is the dog to the left of the cat?", "yes", level="relation", kind="relation")
    right = replace(left, id="b", question="Is the dog to the right of the cat?")
    assert reported_examples("contradictions", left, right) == [("a", "b")]
    assert reported_examples("contradictions", left, replace(right, answer="no")) == []
    mirrored = replace(left, id="b", question="Is the cat to the left of the dog?")
    assert reported_examples("contradictions", left, mirrored) == [("a", "b")]
    red = question("a", "Is the car red?", "yes", level="attribute", kind="color", subject="o1")
    assert reported_examples("contradictions", red, replace(red, id="b", question="Is the car blue?")) == [("a", "b")]
    assert (
        reported_examples("contradictions", red, replace(red, id="b", question="Is the car blue?", subject="o2")) == []
    )
    no_dog = question("a", "Is there a dog in the image?", "no")
    assert reported_examples("contradictions", no_dog, caption("c", "A dog sleeps.", "0.png")) == [("a", "c")]
    assert reported_examples("contradictions", no_dog, caption("c", "A cat sleeps.", "0.png")) == []
    assert reported_examples("contradictions", replace(no_dog, objects=(AnnotatedObject("1", "dog", None),))) == [
        ("a",)
    ]


@pytest.mark.parametrize(
    ("absent_noun", "annotated", "reported"),
    [("puppy", "dog", True), ("bananas", "banana", True), ("person", "woman", True), ("table", "coffee table", True),
     ("dog", "hot dog", False), ("cat", "dog", False)],
)  # fmt: skip
def test_absent_objects_that_are_present_under_another_name(absent_noun: str, annotated: str, reported: bool) -> None:
    row = question(
        "a", f"Is there a {absent_noun} in the image?", "no", objects=(AnnotatedObject("1", annotated, None),)
    )
    assert bool(reported_examples("present under another name", row)) is reported


def test_captions_by_hand() -> None:
    rows = [
        caption("1", "A dog chases a cat on the grass.", "1", "dog", "cat", seed=1),
        caption("2", "A bus next to a car.", "2", "bus", "car", seed=2),
        caption("3", "A bus.", "3", "zebra", seed=3),
        caption("4", "This is a picture of some things.", "4", "zebra", seed=4),
    ]
    assert reported_examples("swapped captions", *rows) == [("3",)]
    assert reported_examples("poor captions", *rows) == [("3",), ("4",)]
    assert reported_examples("shared captions", *rows, replace(rows[1], id="5", group="5", image=plain(5))) == [
        ("2",),
        ("5",),
    ]
    audit = gs.audit(
        ConceptDataset("c", tuple(rows)), causes=["mismatched captions"], caption_scores={"1": -0.5, "2": 0.1}
    )
    assert audit.cause("mismatched captions").examples == {"1"}


def test_objects_by_hand() -> None:
    def about(box: Box) -> Example:
        item = AnnotatedObject("1", "ring", box)
        return question("a", "Is there a ring in the image?", "yes", objects=(item,), subject="1")

    assert reported_examples("small objects", about(Box(10, 10, 13, 14))) == [("a",)]  # 12 of 1200 pixels
    assert reported_examples("small objects", about(Box(10, 10, 13, 15))) == []
    assert reported_examples("cut-off objects", about(Box(10, 10, 40, 20))) == [("a",)]
    assert reported_examples("cut-off objects", about(Box(10, 10, 30, 20))) == []
    assert reported_examples("polysemous nouns", about(Box(1, 1, 3, 3))) == [("a",)]
    assert len(SENSES) >= 60
    assert all(len(senses) >= 2 for senses in SENSES.values())
    assert all(sense == " ".join(sense.split()) for senses in SENSES.values() for sense in senses)


def test_imbalance_and_cooccurrence_by_hand() -> None:
    images = [(f"{i}.png", plain(i)) for i in range(24)]
    rows = [
        question(str(i), "Is there a dog in the image?", "yes" if i < 21 else "no", group=group, image=image,
                 objects=(AnnotatedObject("1", "leash", None), *((AnnotatedObject("2", "dog", None),) if i < 21 else ())))
        for i, (group, image) in enumerate(images)
    ]  # fmt: skip
    report = gs.audit(ConceptDataset("d", tuple(rows)), causes=["answer imbalance"]).cause("answer imbalance")
    assert report.values == {"share of yes, object/existence/random": 21 / 24}
    assert len(report.findings) == 1
    assert [names for (names,) in reported_examples("co-occurrence", *rows)] == [
        "21",
        "22",
        "23",
    ]  # 21 of 24 images with a leash


def test_near_duplicates_have_close_hashes_and_noise_has_not() -> None:
    image = gs.scenes.dataset(10)[0].image.load()
    copy = image.resize((300, 300), Image.Resampling.BICUBIC)

    def distance(a: Image.Image, b: Image.Image) -> int:
        bits = [int.from_bytes(measure_image(i).bits, "big") for i in (a, b)]
        return (bits[0] ^ bits[1]).bit_count()

    assert distance(image, copy) <= 24 < distance(plain(1).load(), plain(2).load())


def test_rarity_is_pmi_of_mentions_and_terciles() -> None:
    data = gs.scenes.dataset(60)
    rarity = gs.composition_rarity(data)
    mentions = {
        (e.group, o.id, canonical_noun(o.noun), v) for e in data for o in e.objects for v in o.attributes.values()
    }
    pairs = Counter((noun, value) for _, _, noun, value in mentions)
    total = pairs.total()
    checked = 0
    for example in data:
        row = rarity.get(example.id)
        if row is not None and example.level == "attribute" and row.count:
            noun, value = row.composition
            share = sum(n for (a, _), n in pairs.items() if a == noun) * sum(
                n for (_, b), n in pairs.items() if b == value
            )
            assert row.pmi == pytest.approx(math.log(row.count * total / share))
            checked += 1
    assert checked > 20
    counts = Counter(row.bin for row in rarity.values())
    assert max(counts[b] for b in ("rare", "middle", "frequent")) <= 2 * min(
        counts[b] for b in ("rare", "middle", "frequent")
    )
    train, test = gs.hold_out_compositions(data, share=0.1, seed=1)
    held_out = {rarity[e.id].composition for e in test}
    assert held_out.isdisjoint(rarity[e.id].composition for e in train)
    assert {e.group for e in train}.isdisjoint(e.group for e in test)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        gs.hold_out_compositions(data, share=1)
    with pytest.raises(DataError, match="no question is about"):
        gs.split_by_rarity(data.where(kind="existence"))


def test_error_rates_of_concerned_questions() -> None:
    data = gs.scenes.dataset(60).filter(lambda e: bool(e.candidates))
    concerned = gs.audit(data, causes=["polysemous nouns"]).cause("polysemous nouns").examples
    rng = np.random.default_rng(0)
    rows = []
    for e in data:
        right = bool(rng.random() > (0.6 if e.id in concerned else 0.2))
        given = e.answer if right else next(c for c in e.candidates if c != e.answer)
        rows.append(
            gs.Answer(e.id, e.group, e.split, e.level, e.kind, e.question, e.answer, e.candidates, given, right)
        )
    answers = gs.BehaviorResult(tuple(rows), gs.Cost(None, None, len(rows)))
    audit = gs.audit(data, answers, pixels=False)
    row = next(row for row in audit.errors if row.cause == "polysemous nouns")
    wrong = np.array([not r.correct for r in rows])
    flags = np.array([r.id in concerned for r in rows])
    assert row.concerned.value == pytest.approx(wrong[flags].mean())
    assert row.others.value == pytest.approx(wrong[~flags].mean())
    assert row.difference.value == pytest.approx(wrong[flags].mean() - wrong[~flags].mean())
    assert 0 < row.difference.low < 0.4 < row.difference.high
    assert audit.frame().set_index("cause").loc["polysemous nouns", "error_difference"] == row.difference.value
    with pytest.raises(DataError, match="none of the"):
        gs.audit(data, gs.BehaviorResult((replace(rows[0], id="other"),), answers.cost), pixels=False)


def test_an_audit_is_read_back(tmp_path: Path) -> None:
    audit = gs.audit(gs.scenes.dataset(10), pixels=False)
    audit.save(tmp_path / "audit.json")
    assert gs.Audit.load(tmp_path / "audit.json") == audit
    (tmp_path / "audit.json").write_text((tmp_path / "audit.json").read_text().replace("s0-1", "s0-2"))
    with pytest.raises(DataError, match=r"audit\.json"):
        gs.Audit.load(tmp_path / "audit.json")


def test_bad_input_is_one_sentence() -> None:
    images_alone = ConceptDataset("images", (question("a", "Is there a dog in the image?", "yes"),))
    with pytest.raises(DataError, match="cause 'swapped captions': the data have no"):
        gs.audit(images_alone, causes=["swapped captions"])
    with pytest.raises(DataError, match="cause 'poor captions': the data have no captions"):
        gs.audit(images_alone, causes=["poor captions"])
    with pytest.raises(ConfigError, match="blurred images"):
        gs.audit(images_alone, causes=["blured images"])
    with pytest.raises(DataError, match="no examples"):
        gs.audit(ConceptDataset("none", ()))
    assert "no captions" in gs.audit(images_alone).cause("poor captions").reason


@pytest.mark.parametrize("loader", [name for name in gs.loaders.LOADERS if name != "pairs"])
def test_the_data_of_every_loader_can_be_audited(loader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example in the docstring of each loader makes its data."""
    datasets: list[ConceptDataset] = []
    original = ConceptDataset.__post_init__

    def record(self: ConceptDataset) -> None:
        original(self)
        datasets.append(self)

    monkeypatch.setattr(ConceptDataset, "__post_init__", record)
    monkeypatch.chdir(tmp_path)
    for test in examples(ROOT / "concepts" / "loaders" / f"{loader}.py"):
        doctest.DocTestRunner(optionflags=OPTIONS, verbose=False).run(test, out=lambda _: None, clear_globs=False)
    data = [dataset for dataset in datasets if len(dataset)]
    assert data
    audit = gs.audit(data[-1])
    assert [report.name for report in audit.causes] == list(CAUSES)
    assert any(report.measured for report in audit.causes)


def test_captions_fit_by_a_model_as_a_loop_over_images_says() -> None:
    """log p(caption | own image) minus the mean over all other images, one forward pass at a time."""
    from lvlm.answer_keys import answer_tokens

    model = gs.load_lvlm("tiny")
    requests = gs.scenes.dataset(30).filter(lambda e: e.kind == "caption")[:3]
    written = gs.answer(model, requests).texts
    texts = [written[e.id] for e in requests]
    texts = [texts[1], texts[0], texts[2]]  # the first two are captions of each other's image
    data = ConceptDataset("captions", tuple(replace(e, answer=t) for e, t in zip(requests, texts, strict=True)))
    fit = caption_fit(model, data, others=9, batch_size=4)

    def log_p(example: Example, about: Example) -> float:
        request = replace(
            example, image=about.image, question="Describe the image.", answer="", objects=(), subject=None
        )
        tokens = answer_tokens(model, request, example.answer)
        total = 0.0
        for n, token in enumerate(tokens):
            words = model.processor.tokenizer.decode(tokens[:n])
            batch = next(model.batches([replace(request, prefix=words)]))
            total += float(model.answer_logits(batch)[0].double().log_softmax(-1)[token])
        return total

    for example in data:
        others = [log_p(example, other) for other in data if other.id != example.id]
        assert fit[example.id] == pytest.approx(log_p(example, example) - sum(others) / len(others), abs=1e-3)
    assert [fit[e.id] > 0 for e in data] == [False, False, True]
    audited = gs.audit(data, causes=["mismatched captions"], pixels=False, caption_scores=fit)
    assert {i for f in audited.cause("mismatched captions").findings for i in f.examples} == {
        i for i in fit if fit[i] < 0
    }
    with pytest.raises(DataError, match="caption fit needs captions"):
        caption_fit(model, data[:1])
