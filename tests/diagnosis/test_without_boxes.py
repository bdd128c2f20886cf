"""Diagnosis without boxes: nouns placed by labels of whole images, readings at their places, and what shows absence."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from activation_store import ActivationStore, ConceptDirection, trace
from behavior import answer
from concepts import scenes
from concepts.nouns import asked_noun
from concepts.schema import ConceptDataset, Example
from diagnosis import DirectionSet, diagnose, exclude_images, fit_directions
from diagnosis.claims import Claim, claims_of, presence_noun
from diagnosis.fit import _with_answer_labels
from diagnosis.fit_without_boxes import PLACED, POOLING, add_unlabelled, presence_labels
from diagnosis.image_tokens import ImageTokens, read_image_tokens, read_picked_tokens
from diagnosis.noun_probes import Presence, _balance, _threshold, fit_nouns
from diagnosis.probe_sets import ProbeSet
from diagnosis.readings import TokenReadings, read_live
from experiments.config import DataConfig, DiagnoseConfig, RunConfig
from experiments.data import probe_data
from groundscope.core.errors import ConfigError, DataError
from groundscope.testing import planted_failures
from lvlm import load_lvlm

# ---- nouns from labels of whole images ---------------------------------------------------------------------------------


def planted_nouns(words: np.ndarray, images: int = 120, seed: int = 0) -> tuple[ImageTokens, Presence, np.ndarray]:
    """Place three nouns in each image, at one token each, along their direction; return also the places, -1 if absent."""
    rng = np.random.default_rng(seed)
    nouns, width = len(words), words.shape[1]
    x = rng.normal(size=(images, 9, width))
    places = np.full((images, nouns), -1)
    for image in range(images):
        for noun, token in zip(rng.permutation(nouns)[:3], rng.permutation(9)[:3], strict=True):
            x[image, token] += 6 * words[noun]
            places[image, noun] = token
    image, noun = (a.ravel() for a in np.meshgrid(np.arange(images), np.arange(nouns), indexing="ij"))
    labels = Presence(image, noun, places[image, noun] >= 0)
    numbers = {str(i): i for i in range(images)}
    values = torch.tensor(x, dtype=torch.float32)
    return ImageTokens("projector.out", numbers, values, torch.ones(images, 9, dtype=torch.bool), None), labels, places


def test_labels_of_whole_images_show_where_a_noun_is() -> None:
    words = np.linalg.qr(np.random.default_rng(1).normal(size=(24, 8)))[0].T
    tokens, labels, places = planted_nouns(words)
    probes = fit_nouns(tokens, labels, 8, np.arange(120) % 3 == 0)
    new, new_labels, new_places = planted_nouns(words, seed=5)
    decisions = probes.decide(new)
    read = decisions.max(1)[new_labels.image, new_labels.noun] > 0
    assert (read == new_labels.holds).mean() > 0.95
    present = new_places >= 0
    assert (decisions.argmax(1)[present] == new_places[present]).mean() > 0.95
    assert probes.accuracy > 0.95
    shuffled = replace(labels, holds=np.random.default_rng(2).permutation(labels.holds))
    assert abs(fit_nouns(tokens, shuffled, 8, np.arange(120) % 3 == 0).accuracy - 0.5) < 0.15
    assert places.shape == (120, 8)


def test_a_shared_probe_reads_nouns_that_it_was_not_fitted_to() -> None:
    rng = np.random.default_rng(3)
    embeddings = rng.normal(size=(40, 6))
    words = embeddings @ np.linalg.qr(rng.normal(size=(24, 6)))[0].T
    words /= np.linalg.norm(words, axis=1, keepdims=True)
    tokens, labels, _ = planted_nouns(words)
    validation = np.arange(120) % 3 == 0
    assert fit_nouns(tokens, labels, 40, validation, embeddings).accuracy > 0.7
    unrelated = rng.normal(size=(40, 6))
    assert fit_nouns(tokens, labels, 40, validation, unrelated).accuracy < 0.65


def test_weights_and_thresholds_equal_plain_loops() -> None:
    rng = np.random.default_rng(4)
    labels = Presence(np.arange(200), rng.integers(0, 5, 200), rng.random(200) < 0.3)
    labels.holds[labels.noun == 4] = True
    weights = _balance(labels)
    assert weights.mean() == pytest.approx(1)
    for noun in range(4):
        sums = [weights[(labels.noun == noun) & (labels.holds == h)].sum() for h in (False, True)]
        assert sums[0] == pytest.approx(sums[1])
    scores = rng.normal(size=200) + labels.holds

    def balanced(edge: float) -> float:
        return ((scores[labels.holds] > edge).mean() + (scores[~labels.holds] <= edge).mean()) / 2

    best = max(balanced(float(edge)) for edge in scores)
    assert balanced(_threshold(scores, labels.holds)) == pytest.approx(best)
    assert _threshold(scores, np.ones(200, bool)) == 0.0


def test_labels_come_from_columns_answers_and_presupposition() -> None:
    frame = pd.DataFrame(
        {
            "level": ["object", "object", "attribute", "relation"],
            "question": [
                "Is there a dog in the image?",
                "Is there a red bus in this image? Please answer yes or no.",
                "Are the dogs brown?",
                "Is the dog left of the cat?",
            ],
            "answer": ["no", "yes", "yes", "no"],
            "kind": ["existence", "existence", "color", "relation"],
            "object:dog": [0.0, np.nan, np.nan, np.nan],
            "object:cat": [1.0, np.nan, np.nan, np.nan],
        }
    )
    labels = presence_labels(frame, np.ones(4, bool))
    stated = [(0, "dog", False), (0, "cat", True), (1, "red bus", True)]
    assert sorted(labels) == sorted([*stated, (2, "dog", True), (3, "dog", True), (3, "cat", True)])
    assert presence_noun("Is the dog red?") is None
    more = add_unlabelled({(0, 0): True, (1, 0): False}, 20, 0)
    assert sum(not holds for holds in more.values()) == 4
    assert more[0, 0]
    assert not more[1, 0]
    # Labels that follow from the answers: of statements, and of choices.
    choices = frame.assign(answer=["red", "blue", "yes", "no"], kind="what_color")
    derived = _with_answer_labels(choices)
    assert derived["object:red"].tolist()[:2] == [1.0, 0.0]
    assert np.isnan(derived["object:red"][2])
    assert derived["attribute:named"].tolist()[2] == 1.0
    assert derived["relation:named"].tolist()[3] == 0.0


# ---- readings ----------------------------------------------------------------------------------------------------------


def direction(concept: str, intercept: float = 0.0, tokens: str = "image:all", **more: Any) -> ConceptDirection:
    return ConceptDirection(
        "projector.out", tokens, concept, np.eye(4, dtype=np.float32)[0], intercept=intercept, **more
    )


def claim(level: str, concept: str, nouns: tuple[str, ...], *, holds: bool = True, **more: Any) -> Claim:
    kind = f"{level} kind"
    return Claim(0, "e", "g", kind, level, concept, holds, True, "yes", "no", (), nouns, -1.0, **more)


def test_attributes_and_relations_are_read_at_their_nouns() -> None:
    example = scenes.dataset(10)[0]
    example = replace(example, id="e")
    concepts = {"object:cat": 0.0, "object:dog": 0.0, "attribute:red": 0.5, "relation:left of": 0.25}
    provenance = {POOLING: "max"}
    probes = ProbeSet(
        "projector", "projector.out", "image:all", "", {c: direction(c, b, provenance=provenance) for c, b in concepts.items()}
    )  # fmt: skip
    table = np.arange(20.0).reshape(5, 4) % 7
    key = (example.image.identity, "projector.out")
    readings = TokenReadings({key: table}, {}, {key: {"object:cat": 1, "object:dog": 3}})

    def read(*claims: Claim) -> list[float]:
        return [float(v[0]) for v in read_live(readings, probes, claims, {"e": example}).values]

    assert read(claim("object", "object:dog", ())) == [table[:, 1].max()]
    assert read(claim("attribute", "attribute:red", ("object:dog",))) == [table[3, 2]]
    assert read(claim("attribute", "attribute:red", ("object:dog",), holds=False)) == [-table[3, 2]]
    # The difference of two decisions has no intercept: it is added once.
    assert read(claim("relation", "relation:left of", ("object:cat", "object:dog"))) == [
        table[1, 3] - table[3, 3] + 0.25
    ]
    assert read(claim("attribute", "attribute:red", ("object:bird",)), claim("attribute", "attribute:red", ())) == []


@pytest.mark.parametrize(
    ("tokens", "statistics", "store", "readable", "absent"),
    [
        ("image:mean", {}, "here", True, False),
        ("object:mean", {"balanced_accuracy": 0.9}, "here", False, True),
        ("object:mean", {"balanced_accuracy": 0.9}, "other", False, False),  # the data may differ
        ("object:mean", {"balanced_accuracy": 0.5}, "other", False, True),  # at chance there too
        ("image:all", {PLACED: 0.9}, "here", False, True),
        ("image:all", {PLACED: 0.0}, "here", False, False),  # the noun is not placed
    ],
)
def test_chance_shows_absence_only_with_a_control(
    tokens: str, statistics: dict[str, float], store: str, readable: bool, absent: bool
) -> None:
    red = direction("attribute:red", tokens=tokens, statistics=statistics, provenance={"store": store})
    cat = direction("object:cat", tokens=tokens)
    probes = ProbeSet("projector", "projector.out", tokens, "", {"attribute:red": red, "object:cat": cat})
    about = claim("attribute", "attribute:red", ("object:cat",))
    assert probes.shows_absence(about, "here", readable=readable) == absent


@torch.no_grad()
def test_tokens_are_those_of_a_plain_forward() -> None:
    model, data = load_lvlm("tiny"), scenes.dataset(10, 3)
    images = list({e.image.identity: e for e in data}.values())[:3]
    sites = ["vision.L1.resid_post", "projector.out"]
    read = {t.site: t for t in read_image_tokens(model, images, sites, memory=1)}
    picked = read_picked_tokens(model, images, {s: {i: np.array([i, 4]) for i in range(3)} for s in sites})
    for i, example in enumerate(images):
        inputs = model.encode(example).inputs
        expected = model.read(inputs, ["projector.out"])["projector.out"].reshape(-1, model.width)
        torch.testing.assert_close(read["projector.out"].values[i], expected, atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(picked["projector.out"][i], expected[[i, 4]], atol=1e-5)
    assert read["vision.L1.resid_post"].values.shape == (3, 49, 128)


# ---- planted causes on photographs without boxes -----------------------------------------------------------------------


def without_boxes(example: Example) -> Example:
    """Return a question with labels of the nouns in its image, or of the attributes of its object."""
    prefix = f"{example.level}:"
    labels = {name: v for name, v in example.labels.items() if name.startswith(prefix) and name != "object:named"}
    return replace(example, labels=labels, objects=(), subject=None)


@pytest.fixture(scope="module")
def lost(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ActivationStore, ConceptDataset, DirectionSet]:
    """Color removed at the projector; questions without boxes, of each kind one per image, and their probes."""
    kinds = {"existence", "what_color", "relation"}
    scene_data = scenes.dataset(480, 7, splits=("neutral",))
    first = {(e.group, e.kind): without_boxes(e) for e in reversed(scene_data) if e.kind in kinds}
    data = ConceptDataset("photographs", tuple(first.values()))
    model = planted_failures.erase_color(load_lvlm("tiny"), scenes.dataset(120, 98))
    sites = ["vision.L3.resid_post", "projector.out", "decoder.L3.resid_post", "z"]
    out = tmp_path_factory.mktemp("store") / "s"
    store = trace(model, data, sites, ["last", "image:mean"], out, progress=False, batch_size=64)
    rows = np.array([int(g.split("-")[1]) % 3 > 0 for g in store.frame()["group"]])
    return model, store, data, fit_directions(store, rows, model=model, data=data)


def test_a_planted_cause_is_diagnosed_without_boxes(
    lost: tuple[Any, ActivationStore, ConceptDataset, DirectionSet],
) -> None:
    model, store, data, directions = lost
    intact = load_lvlm("tiny")
    before = {a.id for a in answer(intact, data, batch_size=64, progress=False).answers if a.correct}
    frame = store.frame()
    correct = dict(zip(frame["id"], frame["correct"], strict=True))
    free = [e for e in data if e.group not in directions.train_groups]
    wrong = [e for e in free if not correct[e.id] and e.id in before and e.level == "attribute"][:40]
    right = [e for e in free if correct[e.id]]
    diagnoses = diagnose(model, store, directions, [*wrong, *right], with_sources=False, progress=False)
    assert len(diagnoses.wrong) >= 15
    counts = Counter(d.verdict for d in diagnoses.wrong)
    assert counts["lost at the projector"] >= 0.9 * len(diagnoses.wrong), counts
    named = [d for d in diagnoses.wrong if d.verdict == "lost at the projector"]
    assert all("read at the image token at which its noun is most decodable" in str(d) for d in named)
    assert all(d.true_clause.startswith("the ") for d in named)


def test_wrong_answers_without_a_verdict_calibrate_the_image_tokens(
    lost: tuple[Any, ActivationStore, ConceptDataset, DirectionSet],
) -> None:
    model, store, data, directions = lost
    frame = store.frame()
    correct = dict(zip(frame["id"], frame["correct"], strict=True))
    colors = [e for e in data if e.kind == "what_color" and e.group not in directions.train_groups]
    wrong, right = ([e for e in colors if correct[e.id] == side] for side in (0, 1))
    alone, more = (
        diagnose(model, store, directions, [wrong[0], *right], with_sources=False, calibrate_on=others, progress=False)
        for others in ((), wrong)
    )
    assert [d.example["id"] for d in more.wrong] == [wrong[0].id]
    for a, b in zip(alone.places, more.places, strict=True):
        at_each_token = a.tokens == "image:all"
        assert b.n - a.n == (len(wrong) - 1 if at_each_token else 0)
        assert not at_each_token or b.high - b.low < a.high - a.low


def test_images_that_probes_of_other_data_were_fitted_to_are_not_diagnosed(
    lost: tuple[Any, ActivationStore, ConceptDataset, DirectionSet], tmp_path: Path
) -> None:
    model, _, data, directions = lost
    groups = list(dict.fromkeys(e.group for e in data if e.group in directions.train_groups))[:6]
    renamed = [replace(e, group=f"other {e.group}", id=f"other {e.id}") for e in data if e.group in groups]
    other_data = ConceptDataset("other", tuple(renamed))
    other = trace(
        model, other_data, ["decoder.L3.resid_post", "z"], ["last", "image:mean"], tmp_path / "o", progress=False
    )
    of_decoder = tuple(d for d in directions if d.site == "decoder.L3.resid_post")
    at_decoder = DirectionSet(of_decoder, {}, directions.train_images)
    diagnoses = diagnose(model, other, at_decoder, renamed, with_sources=False, progress=False)
    assert diagnoses.wrong
    assert {d.verdict for d in diagnoses.wrong} == {"other"}
    assert all("probes were fitted to questions about this image" in d.reason for d in diagnoses.wrong)
    assert {e.group for e in exclude_images(data, renamed)} == {e.group for e in data} - set(groups)
    with pytest.raises(DataError, match="all images of 'photographs' are among those that are diagnosed"):
        exclude_images(data, list(data))


def test_concepts_of_probes_are_found_in_questions_without_labels(
    lost: tuple[Any, ActivationStore, ConceptDataset, DirectionSet],
) -> None:
    _, store, data, _ = lost
    claims = claims_of(store, {}, ["attribute:shiny", "object:bell"])
    by_id = {c.id: c for c in claims if c is not None}
    assert all(by_id[e.id].concept == f"object:{asked_noun(e.question)}" for e in data if e.level == "object")
    color = next(by_id[e.id] for e in data if e.kind == "what_color")
    assert len(color.nouns) == 1


# ---- bad input ---------------------------------------------------------------------------------------------------------


def test_bad_input_is_named(lost: tuple[Any, ActivationStore, ConceptDataset, DirectionSet]) -> None:
    model, store, _, _ = lost
    with pytest.raises(ConfigError, match="give both model and data"):
        fit_directions(store, model=model)
    for options, words in (
        ({"fit_questions": "q.json"}, r"diagnose\.fit_questions needs diagnose\.fit=FORMAT"),
        ({"fit": "cocoo"}, r"diagnose\.fit=cocoo: choose from .*; did you mean coco"),
        ({"fit": "coco"}, r"diagnose\.fit=coco needs diagnose\.fit_questions=FILE and diagnose\.fit_images=FOLDER"),
    ):
        with pytest.raises(ConfigError, match=words):
            probe_data(RunConfig(diagnose=DiagnoseConfig(**options)))
    data = DataConfig(source="pope", questions="a", images="b", suffix="Answer yes or no.")
    other = probe_data(RunConfig(data=data, diagnose=DiagnoseConfig(fit="coco", fit_questions="c", fit_images="d")))
    assert (other.source, other.questions, other.images, other.suffix) == ("coco", "c", "d", "Answer yes or no.")
