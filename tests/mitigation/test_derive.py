"""Derivations against numpy in float64, and planted directions recovered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from activation_store import ConceptDirection
from circuits.patching.activation import pairs_digest
from concepts.schema import Example
from groundscope.core.errors import PatchError, SiteError
from lvlm import Head, Site
from lvlm.model import Lvlm
from mitigation import Contrast, SteeringVector, derive
from tests.toys.derivation import DIM, HEAD, Arrays, D, N, ledoit_wolf
from tests.toys.random_models import hooks_of, layers_of, pairs, shared_model

PLANTED = np.random.default_rng(9).standard_normal(D)
PLANTED /= np.linalg.norm(PLANTED)


def store(noise: float = 1.0) -> Arrays:
    rng = np.random.default_rng(0)
    y = rng.integers(2, size=N).astype(float)
    second = rng.integers(2, size=N).astype(float)
    x = noise * rng.standard_normal((N, D)) + 3 + 4 * np.outer(y - 0.5, PLANTED)
    x[:, 3] += 6 * second
    x[:7] = np.nan
    y[10:20] = np.nan
    return Arrays(x.astype(np.float32), {"object:named": y, "attribute:red": second})


def activations(s: Arrays, head: int | None) -> np.ndarray:
    return s.read("decoder.L2.z", "last", head).astype(np.float64)


def test_mean_difference_against_numpy() -> None:
    s = store()
    y = s.labels["object:named"]
    steering = derive.mean_difference(Contrast.from_store(s, "object:named"), heads=[HEAD], layers=[2], strength=15)
    for key, head in ((HEAD, 1), (2, None)):
        x = activations(s, head)
        ok = ~np.isnan(x).any(1)
        true, false = x[ok & (y == 1)], x[ok & (y == 0)]
        difference = true.mean(0) - false.mean(0)
        theta = difference / np.sqrt((difference**2).sum())
        projections = np.concatenate([true, false]) @ theta
        np.testing.assert_allclose(steering.changes[key].direction, theta, atol=1e-6)
        assert steering.changes[key].sigma == pytest.approx(
            np.sqrt(((projections - projections.mean()) ** 2).mean()), rel=1e-6
        )
    assert (steering.kind, steering.positions, steering.strength) == ("add", "last+generated", 15)
    assert (steering.model, steering.config_hash) == ("m", "c" * 64)
    assert steering.provenance["store"] == "s" * 64
    assert steering.provenance["concept"] == "object:named"


def test_masks_are_equivalent_to_a_concept() -> None:
    s = store()
    y = s.labels["object:named"]
    by_concept = derive.mean_difference(Contrast.from_store(s, "object:named"), heads=[HEAD])
    by_mask = derive.mean_difference(Contrast.from_store(s, positive=y == 1, negative=y == 0), heads=[HEAD])
    np.testing.assert_array_equal(by_concept.changes[HEAD].direction, by_mask.changes[HEAD].direction)
    with_missing = derive.mean_difference(Contrast.from_store(s, positive=y == 1), heads=[HEAD])
    assert not np.array_equal(with_missing.changes[HEAD].direction, by_mask.changes[HEAD].direction)
    other_way = derive.mean_difference(Contrast.from_store(s, positive=y == 0, negative=y == 1), heads=[HEAD])
    np.testing.assert_allclose(other_way.changes[HEAD].direction, -by_mask.changes[HEAD].direction)


def test_a_planted_direction_is_recovered() -> None:
    steering = derive.mean_difference(Contrast.from_store(store(noise=0.3), "object:named"), layers=[2])
    assert abs(steering.changes[2].direction @ PLANTED) >= 0.99


def test_concept_subspace_pushes_each_input_to_its_own_side() -> None:
    s = store(noise=0.5)
    x = activations(s, None)
    ok = ~np.isnan(x).any(1)
    steering = derive.concept_subspace(s, ["object:named"], layers=[2], strength=2)
    reads = steering.changes[2].reads
    assert reads is not None
    assert reads.shape == (1, D)
    y = s.labels["object:named"]
    true, false = x[ok & (y == 1)].mean(0), x[ok & (y == 0)].mean(0)
    theta = (true - false) / np.linalg.norm(true - false)
    np.testing.assert_allclose(np.abs(reads[0]), np.abs(theta), atol=1e-6)
    # Counted from the middle between the two means, along their difference.
    np.testing.assert_allclose(steering.changes[2].mean @ theta, (true + false) @ theta / 2, rtol=1e-5)
    both = derive.concept_subspace(s, ["object:named", "attribute:red"], layers=[2], strength=2)
    entry = both.changes[2]
    assert entry.reads is not None
    np.testing.assert_allclose(entry.reads @ entry.reads.T, np.eye(2), atol=1e-6)
    moved = x + 2 * (x - entry.mean) @ entry.reads.T @ entry.reads
    for name in ("object:named", "attribute:red"):
        y = s.labels[name]
        a, b = x[ok & (y == 1)].mean(0), x[ok & (y == 0)].mean(0)
        side = lambda v, a=a, b=b: (v - (a + b) / 2) @ (a - b)  # noqa: E731  # one line says it
        assert (np.sign(side(moved[ok])) == np.sign(side(x[ok]))).mean() > 0.97
        assert side(moved[ok & (y == 1)]).mean() == pytest.approx(3 * side(x[ok & (y == 1)]).mean(), rel=0.02)
    assert both.kind == "amplify"


@torch.no_grad()
def heads_by_hand(model: Lvlm, examples: list[Example], layer: int, first: Callable[[Any], int]) -> np.ndarray:
    """Mean z over positions from `first` on, one plain forward an example, float64 ``[n, H * head_dim]``."""
    out = []
    for example in examples:
        inputs_: list[torch.Tensor] = []
        hook = layers_of(model)[layer].self_attn.o_proj.register_forward_pre_hook(
            lambda _m, a, inputs_=inputs_: inputs_.append(a[0])
        )
        encoding = model.encode(example)
        model.hf(**encoding.inputs)
        hook.remove()
        out.append(inputs_[0][0, first(encoding.tokens) :].double().mean(0).numpy())
    return np.stack(out)


@pytest.mark.parametrize("doubt", [0.0, 0.7])
def test_discriminant_against_its_formula(doubt: float) -> None:
    s = store(noise=1.5)
    y = s.labels["object:named"]
    steering = derive.discriminant(
        Contrast.from_store(s, "object:named"), heads=[HEAD], layers=[2], strength=1.5, doubt=doubt
    )
    for key, head in ((HEAD, 1), (2, None)):
        x = activations(s, head)
        ok = ~np.isnan(x).any(1)
        true, false = x[ok & (y == 1)], x[ok & (y == 0)]
        difference = true.mean(0) - false.mean(0)
        # Each side's covariance, every coordinate scaled to unit variance for the shrinkage; priors of a half each.
        pooled = np.zeros((x.shape[1], x.shape[1]))
        for side in (true, false):
            centered = side - side.mean(0)
            units = centered.std(0)
            pooled += 0.5 * units[:, None] * ledoit_wolf(centered / units) * units
        weights = np.linalg.solve(pooled, difference)
        odds = x[ok] @ weights - weights @ (true.mean(0) + false.mean(0)) / 2
        expected = x[ok] + 1.5 * (odds - doubt)[:, None] * difference / (weights @ difference)
        entry = steering.changes[key]
        assert entry.reads is not None
        assert entry.writes is not None
        moved = x[ok] + 1.5 * (x[ok] - entry.mean) @ entry.reads.T @ entry.writes
        np.testing.assert_allclose(moved, expected, atol=2e-4)
        np.testing.assert_allclose(np.linalg.norm(entry.reads), 1, atol=1e-6)
        # The gap between the means grows by the strength, as a share of itself, and in its own direction.
        gap = moved[(y == 1)[ok]].mean(0) - moved[(y == 0)[ok]].mean(0)
        np.testing.assert_allclose(gap, 2.5 * difference, atol=2e-4)
    assert steering.provenance["doubt"] == doubt


def test_a_discriminant_ignores_a_confounder_that_misleads_the_mean_difference() -> None:
    """A coordinate that goes with the truth by habit: the mean difference follows it, the discriminant does not."""
    rng = np.random.default_rng(1)
    y = np.repeat([1.0, 0.0], 400)
    habit = np.where(rng.random(800) < 0.9, y, 1 - y)
    x = 0.3 * rng.standard_normal((800, D))
    x[:, 0] += 2 * y
    x[:, 1] += 6 * habit
    s = Arrays(x.astype(np.float32), {"object:named": y})
    astray = (habit == 1) & (y == 0)
    plain = derive.concept_subspace(s, ["object:named"], layers=[2]).changes[2]
    entry = derive.discriminant(Contrast.from_store(s, "object:named"), layers=[2]).changes[2]
    assert plain.reads is not None
    assert entry.reads is not None
    toward = x[y == 1].mean(0) - x[y == 0].mean(0)
    wrong = ((x[astray] - plain.mean) @ plain.reads.T @ plain.reads @ toward > 0).mean()
    right = ((x[astray] - entry.mean) @ entry.reads[0] < 0).mean()
    assert wrong > 0.95
    assert right > 0.95


@pytest.mark.parametrize("tokens", ["last", "suffix:mean"])
def test_from_pairs_against_numpy(tokens: str) -> None:
    model, data = shared_model(), pairs("blank")
    assert len({model.encode(p.clean).tokens.length for p in data}) > 1

    def first(t: Any) -> int:
        return t.length - 1 if tokens == "last" else t.image[-1] + 1

    head = Head(3, 2)
    columns = slice(2 * model.head_dim, 3 * model.head_dim)
    clean, corrupt = (
        heads_by_hand(model, side, 3, first)[:, columns]
        for side in ([p.clean for p in data], [p.corrupt for p in data])
    )
    theta = (clean - corrupt).mean(0)
    theta /= np.linalg.norm(theta)
    steering = derive.mean_difference(Contrast.from_pairs(model, data), heads=[head], layers=[3], tokens=tokens)
    np.testing.assert_allclose(steering.changes[head].direction, theta, atol=1e-4)
    assert steering.changes[head].sigma == pytest.approx(np.std(np.concatenate([clean, corrupt]) @ theta), rel=1e-4)
    assert steering.changes[3].direction.shape == (model.width,)
    assert steering.provenance["pairs_digest"] == pairs_digest(data)
    assert steering.provenance["kinds"] == ["blank"]

    amplified = derive.amplification(Contrast.from_pairs(model, data), heads=[head], tokens=tokens, strength=0.5)
    np.testing.assert_allclose(amplified.changes[head].mean, corrupt.mean(0), atol=1e-5)
    assert (amplified.kind, amplified.changes[head].reads, amplified.strength) == ("amplify", None, 0.5)

    removal = derive.prior_removal(Contrast.from_pairs(model, data), heads=[head], tokens=tokens)
    reads = removal.changes[head].reads
    assert reads is not None
    np.testing.assert_allclose(reads, -theta[None], atol=1e-4)
    np.testing.assert_allclose(removal.changes[head].mean, clean.mean(0), atol=1e-5)
    assert removal.strength == -1
    assert hooks_of(model) == 0
    steering.check(model)


def test_amplifying_moves_away_from_the_blank_image() -> None:
    model, data = shared_model(), pairs("blank")
    head = Head(3, 2)
    steering = derive.amplification(Contrast.from_pairs(model, data), heads=[head], strength=1)
    site = Site("decoder", 3, "z")
    inputs = model.encode(data[0].clean).inputs
    values: list[torch.Tensor] = []
    columns = slice(2 * model.head_dim, 3 * model.head_dim)
    model.logits(inputs)
    for strength in (0.0, 1.0, -1.0):
        with steering.applied(model, strength):
            hook = model.locate(site).watch(lambda x: values.append(x[0, -1, columns].clone()))
            model.logits(inputs)
            hook.remove()
    mean = torch.tensor(steering.changes[head].mean)
    torch.testing.assert_close(values[1] - mean, 2 * (values[0] - mean), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(values[2], mean, atol=1e-5, rtol=1e-5)


def direction(site: str = "decoder.L2.z", head: int | None = 1, sigma: float = 0.7) -> ConceptDirection:
    v = np.zeros(DIM if head is not None else D)
    v[2] = 1
    return ConceptDirection(site, "last", "attribute:red", v, head=head, sigma=sigma)


def test_probe_normal() -> None:
    steering = derive.probe_normal([direction(), direction("decoder.L2.resid_post", None)], store(), strength=3)
    assert list(steering.changes) == [HEAD, 2]
    assert steering.changes[HEAD].direction[2] == 1
    assert steering.changes[HEAD].sigma == pytest.approx(0.7)
    assert (steering.model, steering.config_hash, steering.provenance["concepts"]) == ("m", "c" * 64, ["attribute:red"])
    model = shared_model()
    assert derive.probe_normal([direction()], model).config_hash == model.config_hash


def of_store(**options: Any) -> Callable[[], SteeringVector]:
    def make() -> SteeringVector:
        sides = {name: options.pop(name) for name in ("concept", "positive", "negative") if name in options}
        return derive.mean_difference(Contrast.from_store(store(), **sides), **options)

    return make


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (of_store(concept="object:named"), PatchError, "no heads, layers or sites"),
        (of_store(heads=[HEAD]), PatchError, "either concept="),
        (of_store(concept="object:named", positive=np.ones(N, bool), heads=[HEAD]), PatchError, "either concept="),
        (of_store(concept="object:cat", heads=[HEAD]), SiteError, "choose from object:named, attribute:red"),
        (of_store(concept="object:named", heads=[Head(4, 0)]), SiteError, "L4"),
        (of_store(positive=np.ones(3, bool), heads=[HEAD]), PatchError, rf"boolean \[{N}\]"),
        (of_store(positive=np.ones(N), heads=[HEAD]), PatchError, "boolean"),
        (of_store(positive=np.ones(N, bool), heads=[HEAD]), PatchError, "no examples on one side at L2.H1"),
        (of_store(positive=np.ones(N, bool), negative=np.ones(N, bool), heads=[HEAD]), PatchError, "both"),
        (lambda: derive.concept_subspace(store(), [], heads=[HEAD]), PatchError, "no concepts"),
        (lambda: derive.discriminant(Contrast.from_store(store()), heads=[HEAD]), PatchError, "either concept="),
        (
            lambda: derive.discriminant(Contrast.from_store(store(), positive=np.arange(N) == 50), heads=[HEAD]),
            PatchError,
            "1 positive and",
        ),
        (lambda: derive.mean_difference(Contrast.from_pairs(shared_model(), []), heads=[HEAD]), PatchError, "no pairs"),
        (
            lambda: derive.mean_difference(Contrast.from_pairs(shared_model(), pairs("blank")), heads=[Head(0, 8)]),
            SiteError,
            "8 heads",
        ),
        (
            lambda: derive.amplification(Contrast.from_pairs(shared_model(), pairs("blank")), heads=[Head(6, 0)]),
            SiteError,
            "layers 0-5",
        ),
        (
            lambda: derive.amplification(Contrast.from_pairs(shared_model(), pairs("blank")), heads=[HEAD], tokens="x"),
            SiteError,
            "suffix:mean",
        ),
        (lambda: derive.probe_normal([], shared_model()), PatchError, "at least one"),
        (lambda: derive.probe_normal([direction(), direction()], shared_model()), SiteError, "two directions at L2.H1"),
        (lambda: derive.probe_normal([direction("vision.L2.z")], shared_model()), SiteError, "decoder 'z'"),
        (
            lambda: derive.probe_normal([direction("decoder.L2.q", 1)], shared_model()),
            SiteError,
            "a head of decoder 'z'",
        ),
        (lambda: derive.probe_normal([direction(sigma=0)], shared_model()), PatchError, "sigma"),
    ],
)
def test_invalid_arguments_are_refused(
    make: Callable[[], SteeringVector], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()


def test_means_that_coincide_have_no_direction() -> None:
    flat = Arrays(np.ones((N, D), np.float32), {"object:named": np.arange(N) % 2 * 1.0})
    for make in (
        lambda: derive.mean_difference(Contrast.from_store(flat, "object:named"), layers=[2]),
        lambda: derive.concept_subspace(flat, ["object:named"], layers=[2]),
    ):
        with pytest.raises(PatchError, match="are equal"):
            make()
