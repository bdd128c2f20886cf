"""Models with a known circuit: patching finds it wherever it was put, and attention does not."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from circuits import attention_to_image, patch_heads, patch_paths
from groundscope.core.errors import ConfigError
from groundscope.testing.planted_circuits import ANSWERS, Planted, Square, plant, usual
from lvlm import Head

PLANTINGS = 50
NOISE = 0.005
"""Share of the answer: what heads in junk move it by, as all of them change the norm a little."""


@cache
def planted(**options: object) -> Planted:
    return plant(7, **options)


def every_head(p: Planted) -> list[Head]:
    return [Head(i, h) for i in range(p.model.n_layers) for h in range(p.model.n_heads)]


@pytest.fixture(scope="module")
def plantings() -> list[Planted]:
    return [plant(seed) for seed in range(PLANTINGS)]


def test_the_grounding_head_ranks_first_wherever_it_is(plantings: list[Planted]) -> None:
    heads = []
    for p in plantings:
        scores = patch_heads(p.model, p.pairs(3))
        assert p.grounding is not None
        assert scores.top(1) == (p.grounding,), p.seed
        assert scores.mean[p.grounding.layer, p.grounding.head] == pytest.approx(1, abs=0.01)
        decoys = [scores.mean[h.layer, h.head] for h in p.decoys]
        assert np.abs(decoys).max() < NOISE, p.seed
        assert p.prior is not None
        assert abs(scores.mean[p.prior.layer, p.prior.head]) < NOISE, p.seed
        heads.append(p.grounding)
    assert len(set(heads)) > 12, "of 16 places"


def test_decoys_rank_as_high_by_attention(plantings: list[Planted]) -> None:
    for p in plantings[:20]:
        heads = every_head(p)
        mass = attention_to_image(p.model, p.examples(3), heads).image_mass.mean(0)
        by_mass = [heads[i] for i in np.argsort(-mass)]
        looking = {p.grounding, *p.decoys}
        assert set(by_mass[: len(looking)]) == looking, p.seed
        assert min(mass[heads.index(h)] for h in p.decoys) > 0.999
        boxes = attention_to_image(p.model, p.examples(3), p.decoys).box_mass
        assert boxes[:, 0].min() > 0.999
        assert boxes[:, 1].max() < 0.001


def test_directions_agree_where_one_linear_path_carries_all() -> None:
    for p in (planted(), planted(circuit="two_step"), planted(backups=2)):
        denoise, noise = (patch_heads(p.model, p.pairs(4), tokens="suffix:all", mode=d) for d in ("denoise", "noise"))
        np.testing.assert_allclose(denoise.mean, noise.mean, atol=NOISE)


def test_two_steps_are_found_where_each_acts() -> None:
    for seed in range(8):
        p = plant(seed, "two_step")
        assert p.mover is not None
        assert p.reader is not None
        assert p.grounding is None
        assert p.mover.layer < p.reader.layer
        last, suffix = (patch_heads(p.model, p.pairs(3), tokens=tokens) for tokens in ("last", "suffix:all"))
        assert last.top(1) == (p.reader,)
        assert abs(last.mean[p.mover.layer, p.mover.head]) < NOISE
        assert set(suffix.top(2)) == {p.mover, p.reader}
        assert suffix.mean.ravel()[np.argsort(suffix.mean, axis=None)[:-2]].max() < NOISE


def test_path_patching_recovers_the_two_steps() -> None:
    for seed in range(4):
        p = plant(seed, "two_step")
        mover, reader = p.mover, p.reader
        assert mover is not None
        assert reader is not None
        senders = [head for head in every_head(p) if head.layer < reader.layer]
        paths = patch_paths(p.model, p.pairs(3), senders, [reader], tokens="suffix:all")
        mean = dict(zip(paths.sites, paths.mean.ravel(), strict=True))
        first = f"{mover}->{reader}"
        assert mean[first] == pytest.approx(1, abs=NOISE)  # all that the reader says, it has from the mover
        assert max(abs(v) for name, v in mean.items() if name != first) < NOISE
        direct = patch_paths(p.model, p.pairs(3), [mover, reader], "logits", tokens="suffix:all")
        direct_effects = dict(zip(direct.sites, direct.mean.ravel(), strict=True))
        assert abs(direct_effects[f"{mover}->logits"]) < NOISE
        assert direct_effects[f"{reader}->logits"] == pytest.approx(1, abs=NOISE)


def test_logits_are_the_sum_of_image_evidence_and_prior() -> None:
    p = planted()
    examples = p.examples(24)
    assert {e.split for e in examples} == {"neutral", "typical", "conflict"}
    red, blue = (p.model.processor.tokenizer.convert_tokens_to_ids(a) for a in ANSWERS)
    for example in examples:
        logits = p.model.logits(p.model.encode(example).inputs)[0]
        sign = 1 if example.answer == "red" else -1
        expected = 6 * (sign + 0.5 * usual(example.objects[0].noun))
        assert float(logits[red] - logits[blue]) == pytest.approx(expected, rel=0.03)


def test_a_seed_decides_everything() -> None:
    a, b, c = plant(1), plant(1), plant(2)
    assert (a.grounding, a.decoys, a.prior) == (b.grounding, b.decoys, b.prior)
    assert a.model.weights_hash == b.model.weights_hash != c.model.weights_hash
    assert a.model.config_hash == c.model.config_hash
    assert [x.record() for x in a.examples(5)] == [x.record() for x in c.examples(5)]
    assert [x.record() for x in a.examples(5, 1)] != [x.record() for x in a.examples(5)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        before = torch.random.get_rng_state()
        plant(3)
        assert torch.equal(torch.random.get_rng_state(), before)


def test_pictures_and_boxes_agree() -> None:
    square = Square(6, "blue")
    pixels = np.asarray(square.load())
    lit = np.argwhere(pixels.any(-1))
    assert (lit.min(0).tolist(), lit.max(0).tolist()) == ([4, 8], [7, 11])
    example = planted().examples(1)[0]
    tokens = planted().model.encode(example).tokens
    assert isinstance(example.image, Square)
    assert tokens.objects["square"] == (example.image.cell,)


def test_invalid_circuits_are_refused() -> None:
    for options in (
        {"circuit": "three_step"},
        {"circuit": "two_step", "backups": 1},
        {"backups": 4},
        {"decoys": 16},
        {"decoys": -1},
    ):
        with pytest.raises(ConfigError):
            plant(0, **options)
