"""Published derivations, each against its formula in numpy on activations taken by hand, and planted directions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from activation_store import ArrayInfo
from concepts.schema import Example
from groundscope.core.errors import ConfigError, DataError, PatchError, SiteError
from lvlm import Head, Site
from lvlm.model import Lvlm
from mitigation import Contrast, SteeringVector, combine, derive
from mitigation.steering.derive.head_selection import group_folds, probe_accuracies
from mitigation.steering.places import Key
from tests.toys.derivation import Arrays, D, ledoit_wolf
from tests.toys.random_models import capture, examples, hooks_of, layers_of, pairs, shared_model

MLP = Site("decoder", 3, "mlp_out")


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).sum())


def last_of(side: Sequence[Example], part: str, layer: int) -> np.ndarray:
    """What is at the last token of each example, float64 ``[n, d]``."""
    model = shared_model()
    return np.stack([capture(model, model.encode(e).inputs)[part][layer, -1] for e in side])


# ---- LDA ---------------------------------------------------------------------------------------------------------------


def misled(noise: float) -> tuple[Arrays, np.ndarray]:
    """Activations in which a loud coordinate varies whatever the truth, and goes a little with it."""
    rng = np.random.default_rng(3)
    y = np.repeat([1.0, 0.0], 1000)
    planted = np.eye(D)[0]
    x = noise * rng.standard_normal((len(y), D)) + 3 + np.outer(y - 0.5, 4 * planted)
    x[:, 1] += 6 * rng.standard_normal(len(y)) + 2 * y
    return Arrays(x.astype(np.float32), {"object:named": y}), planted


def test_lda_against_its_formula_and_where_means_mislead() -> None:
    s, planted = misled(0.3)
    steering = derive.lda(Contrast.from_store(s, "object:named"), layers=[2], strength=3)
    x, y = s.x.astype(np.float64), s.labels["object:named"]
    true, false = x[y == 1], x[y == 0]
    pooled = np.zeros((D, D))
    for side in (true, false):
        centered = side - side.mean(0)
        units = centered.std(0)
        pooled += 0.5 * units[:, None] * ledoit_wolf(centered / units) * units
    theta = unit(np.linalg.solve(pooled, true.mean(0) - false.mean(0)))
    entry = steering.changes[2]
    np.testing.assert_allclose(entry.direction, theta, atol=1e-5)
    assert entry.sigma == pytest.approx(np.std(x @ theta), rel=1e-5)
    assert (steering.kind, steering.strength, steering.provenance["method"]) == ("add", 3, "lda")
    assert entry.direction @ planted >= 0.99  # noise of .3, means 4 apart
    plain = derive.mean_difference(Contrast.from_store(s, "object:named"), layers=[2]).changes[2].direction
    assert plain @ planted < 0.95


# ---- pairs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["paper", "release"])
@pytest.mark.parametrize("key", [Head(3, 2), 2, MLP])
def test_paired_pca_against_numpy(variant: Any, key: Key) -> None:
    model, data = shared_model(), pairs("color")
    where: dict[str, Any] = (
        {"heads": [key]} if isinstance(key, Head) else {"sites": [key]} if key == MLP else {"layers": [key]}
    )
    steering = derive.paired_pca(Contrast.from_pairs(model, data), **where, variant=variant)
    part = "z" if isinstance(key, Head) else "mlp_out" if key == MLP else "resid_post"
    layer = key if isinstance(key, int) else key.layer
    clean, corrupt = (last_of(side, part, layer) for side in ([p.clean for p in data], [p.corrupt for p in data]))
    if isinstance(key, Head):
        clean, corrupt = (x[:, 2 * model.head_dim : 3 * model.head_dim] for x in (clean, corrupt))
    x = clean - corrupt
    ahead = x - x.mean(0) if variant == "release" else x
    values, vectors = np.linalg.eigh(ahead.T @ ahead)
    theta = vectors[:, -1]
    turned = (x @ theta > 0).mean() < 0.5 if variant == "release" else (x @ theta).mean() < 0
    theta = -theta if turned else theta
    assert values[-1] > 1.2 * values[-2]
    np.testing.assert_allclose(steering.changes[key].direction, theta, atol=1e-4)
    both = np.concatenate([clean, corrupt]) @ theta
    assert steering.changes[key].sigma == pytest.approx(np.std(both), rel=1e-3)


@contextmanager
def planted(layer: int, direction: np.ndarray, size: float) -> Iterator[None]:
    """A model that adds a direction to the residual stream where its picture is not blank."""
    flags: dict[str, torch.Tensor] = {}
    model, push = shared_model(), torch.tensor(size * direction, dtype=torch.float32)

    def look(_m: Any, _a: Any, kwargs: Any) -> None:
        flags["seen"] = kwargs["pixel_values"].flatten(2).std(-1).amax(1) > 1e-3

    hooks = [
        model.hf.register_forward_pre_hook(look, with_kwargs=True),
        layers_of(model)[layer].register_forward_hook(lambda _m, _a, out: out + flags["seen"][:, None, None] * push),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def test_a_planted_direction_is_recovered_from_pairs() -> None:
    model, data = shared_model(), pairs("blank")
    direction = unit(np.random.default_rng(2).standard_normal(model.width))
    natural = last_of([p.clean for p in data], "resid_post", 4) - last_of([p.corrupt for p in data], "resid_post", 4)
    noise = np.sqrt((natural**2).sum(1).mean())
    with planted(4, direction, 12 * noise):  # the pairs' own differences are a twelfth of what is planted
        for steering in (
            derive.paired_pca(Contrast.from_pairs(model, data), layers=[4]),
            derive.mean_difference(Contrast.from_pairs(model, data), layers=[4]),
        ):
            assert steering.changes[4].direction @ direction >= 0.99
        image_level = derive.ict(Contrast.from_pairs(model, data), heads=[Head(5, 0)], tokens="last")
    assert image_level.heads == (Head(5, 0),)


# ---- heads that know ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heads:
    """A store of 2 layers of 3 heads, in some of which a concept is planted."""

    x: np.ndarray
    y: np.ndarray

    provenance: Any = None
    digest: str = "s" * 64

    arrays = (ArrayInfo("decoder", "z", "last", n_layers=2, width=15, n_heads=3),)

    def read(self, site: str | Site, tokens: str, head: int | None = None, examples: Any = None) -> np.ndarray:
        assert head is not None
        layer = Site.parse(str(site)).layer
        return self.x[:, layer, head]

    def frame(self) -> pd.DataFrame:
        groups = [f"image{i // 4}" for i in range(len(self.y))]
        return pd.DataFrame({"group": groups, "object:named": self.y})

    def __len__(self) -> int:
        return len(self.y)


KNOWING: Mapping[Head, float] = {Head(0, 1): 3.0, Head(1, 2): 1.5, Head(1, 0): 0.75}
DIM = 5
TRUTHS = {head: unit(np.random.default_rng(i).standard_normal(DIM)) for i, head in enumerate(KNOWING)}


def head_store() -> Heads:
    rng = np.random.default_rng(0)
    y = rng.integers(2, size=600).astype(float)
    x = rng.standard_normal((600, 2, 3, DIM)) + 1
    for head, gap in KNOWING.items():
        x[:, head.layer, head.head] += gap * np.outer(y - 0.5, TRUTHS[head])
    x[5] = np.nan
    y[9] = np.nan
    return Heads(x.astype(np.float32), y, {"model": {"name": "m", "config": "c"}})


@pytest.mark.parametrize("variant", ["paper", "release"])
def test_iti_selects_the_planted_heads_and_their_mean_differences(variant: Any) -> None:
    s = head_store()
    steering = derive.iti(Contrast.from_store(s, "object:named"), top=3, variant=variant)
    assert set(steering.heads) == set(KNOWING)
    assert (steering.kind, steering.strength, steering.positions) == ("add", 15, "last+generated")
    used = np.flatnonzero(~np.isnan(s.y) & ~np.isnan(s.x[:, 0, 0, 0]))
    groups = s.frame()["group"].to_numpy()[used].tolist()
    train, validation = group_folds(groups, 5, 0)[0]
    rows = used[train] if variant == "paper" else used
    for head in KNOWING:
        x = s.x[:, head.layer, head.head].astype(np.float64)
        y = s.y[rows]
        theta = unit(x[rows][y == 1].mean(0) - x[rows][y == 0].mean(0))
        np.testing.assert_allclose(steering.changes[head].direction, theta, atol=1e-6)
        assert steering.changes[head].sigma == pytest.approx(np.std(x[rows] @ theta), rel=1e-6)
        probe = LogisticRegression(max_iter=10_000).fit(x[used[train]], s.y[used[train]])
        right = (probe.predict(x[used[validation]]) == s.y[used[validation]]).mean()
        assert steering.provenance["accuracy"][str(head)] == pytest.approx(right, abs=0.01)
    # Unit noise in 5 dimensions, 600 examples: means 3 apart are found to a cosine of .99.
    assert steering.changes[Head(0, 1)].direction @ TRUTHS[Head(0, 1)] >= 0.99
    assert derive.iti(Contrast.from_store(s, "object:named"), top=1).heads == (Head(0, 1),)
    assert derive.iti(Contrast.from_store(s, "object:named"), top=1, heads=[Head(1, 1), Head(1, 2)]).heads == (
        Head(1, 2),
    )
    assert len(derive.iti(Contrast.from_store(s, "object:named")).heads) == 6  # 48, or as many as there are


def test_folds_divide_no_group() -> None:
    groups = [f"g{i % 11}" for i in range(50)]
    folds = group_folds(groups, 5, 1)
    for train, validation in folds:
        assert not set(np.array(groups)[train]) & set(np.array(groups)[validation])
        assert (train ^ validation).all()
        assert 2 <= len(set(np.array(groups)[validation])) <= 3
    assert sum(validation.astype(int) for _, validation in folds).tolist() == [1] * 50


def test_accuracies_are_those_of_logistic_regression() -> None:
    rng = np.random.default_rng(0)
    y = rng.random(120) < 0.5
    x = rng.standard_normal((120, 3)) + y[:, None]
    folds = [(np.arange(120) % 2 == i, np.arange(120) % 2 != i) for i in (0, 1)]
    scores = [LogisticRegression(max_iter=10_000).fit(x[a], y[a]).score(x[b], y[b]) for a, b in folds]
    assert probe_accuracies([2], lambda _: x, y, folds) == {2: pytest.approx(np.mean(scores))}


def test_ict_against_numpy() -> None:
    model, data = shared_model(), pairs("blur")
    steering = derive.ict(Contrast.from_pairs(model, data))
    assert len(steering.heads) == 48
    assert (steering.strength, steering.positions, steering.kind) == (8, "last+generated", "add")
    clean, corrupt = (last_of(side, "z", 3) for side in ([p.clean for p in data], [p.corrupt for p in data]))
    for head in range(8):
        columns = slice(head * model.head_dim, (head + 1) * model.head_dim)
        theta = unit(clean[:, columns].mean(0) - corrupt[:, columns].mean(0))
        entry = steering.changes[Head(3, head)]
        np.testing.assert_allclose(entry.direction, theta, atol=1e-3)
        assert entry.sigma == pytest.approx(np.std(np.concatenate([clean, corrupt])[:, columns] @ theta), rel=1e-3)
    assert len(derive.ict(Contrast.from_pairs(model, data), top=5).heads) == 5


def test_ict_as_released_acts_on_slices_of_the_attention_output() -> None:
    model, data = shared_model(), pairs("blur")
    steering = derive.ict(Contrast.from_pairs(model, data), variant="release")
    assert steering.sites == tuple(Site("decoder", i, "attn_out") for i in range(6))
    clean, corrupt = (last_of(side, "attn_out", 1) for side in ([p.clean for p in data], [p.corrupt for p in data]))
    move = np.zeros(model.width)
    for start in range(0, model.width, 32):
        columns = slice(start, start + 32)
        theta = unit(clean[:, columns].mean(0) - corrupt[:, columns].mean(0))
        move[columns] = np.std(np.concatenate([clean, corrupt])[:, columns] @ theta) * theta
    entry = steering.changes[steering.sites[1]]
    np.testing.assert_allclose(entry.sigma * entry.direction, move, atol=2e-3 * np.abs(move).max())
    some = derive.ict(Contrast.from_pairs(model, data), variant="release", top=2)
    assert sum(int((np.abs(e.direction.reshape(-1, 32)).sum(1) > 0).sum()) for e in some.changes.values()) == 2


def test_both_levels_of_ict_are_one_vector() -> None:
    model = shared_model()
    levels = [
        derive.ict(Contrast.from_pairs(model, pairs(kind)), heads=[Head(2, 1), Head(3, k)])
        for k, kind in enumerate(("blur", "mask"))
    ]
    both = combine(levels)
    assert both.heads == (Head(2, 1), Head(3, 0), Head(3, 1))
    inputs = model.encode(pairs("blur")[0].clean).inputs
    with levels[0].applied(model), levels[1].applied(model):
        expected = model.logits(inputs)
    with both.applied(model):
        torch.testing.assert_close(model.logits(inputs), expected, atol=1e-4, rtol=1e-4)
    for wrong in ([], [levels[0], levels[1].at("all")], [levels[0].decaying(0.5)], [replace(levels[0], norm="kept")]):
        with pytest.raises(PatchError, match="cannot be combined"):
            combine(wrong)
    with pytest.raises(PatchError, match="the vectors cancel"):
        combine([levels[0], levels[0].scaled(-8)])


# ---- VTI ---------------------------------------------------------------------------------------------------------------


def demonstrations() -> list[derive.Demonstration]:
    captions = (("red", "a blue car"), ("a red apple", "green"), ("a dog", "a cat"), ("yes", "no"))
    return [derive.Demonstration(e, a, b) for e, (a, b) in zip(examples(4), captions, strict=True)]


def pc1_plus_mean(x: np.ndarray, *, released: bool) -> np.ndarray:
    mean = x.mean(0)
    u, _, v = np.linalg.svd(x - mean, full_matrices=False)
    # As released, svd_flip: the largest score is positive.
    sign = np.sign(u[np.abs(u[:, 0]).argmax(), 0] if released else v[0] @ mean)
    return mean + sign * v[0]


@pytest.mark.parametrize("variant", ["paper", "release"])
@torch.no_grad()
def test_vti_text_against_numpy(variant: Any) -> None:
    model = shared_model()
    steering = derive.vti_text(model, demonstrations(), variant=variant)
    rows = []
    for demo in demonstrations():
        e, sides = demo.example, []
        for caption in (demo.correct, demo.hallucinated):
            inputs, _ = model.encode_prompt(
                f"{model.prompt(e.question)} {caption}", [e.image.load()], question=e.question
            )
            hidden = model.hf(**inputs, output_hidden_states=True).hidden_states
            after = torch.tensor(capture(model, inputs)["resid_post"][:, -1])
            sides.append(np.concatenate([hidden[0][0, -1:].double(), after]))
            if variant == "release":  # what transformers gives last is normed
                sides[-1][-1] = hidden[-1][0, -1].double()
        rows.append(sides[0] - sides[1])
    x = np.stack(rows)
    if variant == "release":
        expected = pc1_plus_mean(x.reshape(len(x), -1), released=True).reshape(x.shape[1:])[1:]
    else:
        expected = np.stack([pc1_plus_mean(x[:, i + 1], released=False) for i in range(6)])
    assert steering.sites == tuple(Site("decoder", i, "mlp_out") for i in range(6))
    for layer, site in enumerate(steering.sites):
        np.testing.assert_allclose(steering.changes[site].direction, unit(expected[layer]), atol=2e-3)
        assert steering.changes[site].sigma == pytest.approx(0.1)
    assert (steering.norm, steering.positions, steering.strength) == ("relative", "all", 0.8)
    single = derive.vti_text(model, demonstrations()[:1], layers=[2])
    np.testing.assert_allclose(single.changes[Site("decoder", 2, "mlp_out")].direction, unit(x[0, 3]), atol=1e-3)


@pytest.mark.parametrize("variant", ["paper", "release"])
@torch.no_grad()
def test_vti_vision_against_numpy(variant: Any) -> None:
    model, chosen = shared_model(), examples(3)
    steering = derive.vti_vision(model, chosen, copies=4, ratio=0.9, seed=7, variant=variant)
    rng, rows = np.random.default_rng(7), []
    patch = model.hf.config.vision_config.patch_size

    def tower(pixels: torch.Tensor) -> np.ndarray:
        states = model.hf.model.vision_tower(pixels, output_hidden_states=True).hidden_states[1:]
        return torch.stack(states, 1)[0].double().numpy()

    for example in chosen:
        pixels = model.encode(example).inputs["pixel_values"]
        side = pixels.shape[-1] // patch
        masked = []
        for _ in range(4):
            copy = pixels.clone()
            for index in rng.permutation(side * side)[: int(0.9 * side * side)]:
                row, column = divmod(int(index), side)
                for channel in range(3):
                    mean = pixels[0, channel].mean()
                    copy[0, channel, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] = mean
            masked.append(tower(copy))
        rows.append(np.mean(masked, 0) - tower(pixels))
    x = np.stack(rows)  # [N, layers, tokens, D]
    n, depth, tokens, width = x.shape
    if variant == "release":
        flat = x.reshape(n, tokens, depth * width)
        expected = np.stack([pc1_plus_mean(flat[:, k], released=True) for k in range(tokens)]).reshape(x.shape[1:])
    else:
        expected = np.array([[pc1_plus_mean(x[:, i, k], released=False) for k in range(tokens)] for i in range(depth)])
    assert len(steering.sites) == depth == 4
    for layer, site in enumerate(steering.sites):
        assert site == Site("vision", layer, "mlp_out")
        vector = steering.changes[site].direction
        assert vector.shape == (tokens, width)
        cosine = (vector * expected[layer]).sum(1) / np.linalg.norm(expected[layer], axis=1)
        assert cosine.min() > 0.999
    inputs = model.encode(chosen[0]).inputs
    plain = model.logits(inputs)
    with steering.applied(model):
        assert not torch.allclose(model.logits(inputs), plain, atol=1e-4)
    assert hooks_of(model) == 0


# ---- VISTA and ProjectAway ---------------------------------------------------------------------------------------------


@torch.no_grad()
def words_alone(model: Lvlm, text: str) -> np.ndarray:
    """What every layer gives at the last token of a text, ``[L, d]``."""
    ids = torch.tensor([model.processor.tokenizer(text)["input_ids"]])
    return capture(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})["resid_post"][:, -1]


@pytest.mark.parametrize("variant", ["paper", "release", "simple"])
def test_vsv_is_what_the_image_adds(variant: Any) -> None:
    model, example = shared_model(), examples()[0]
    steering = derive.vsv(model, example, layers=[0, 1, 4], variant=variant)
    without_image = words_alone(model, model.prompt(example.question).replace(model.placeholder, "", 1).strip())
    with_image = capture(model, model.encode(example).inputs)["resid_post"][:, -1]
    for layer in (0, 1, 4):
        key = layer if variant == "paper" else Site("decoder", layer, "mlp_out")
        difference = with_image[layer] - without_image[layer]
        if layer == 0 and variant != "paper":
            difference[0] += 1  # what a principal component analysis of one sample leaves
        np.testing.assert_allclose(steering.changes[key].direction, unit(difference), atol=1e-3)
        length = np.linalg.norm(difference) if variant == "paper" else 1
        assert steering.changes[key].sigma == pytest.approx(length, rel=1e-3)
    assert steering.norm == {"paper": "kept", "release": "away", "simple": "relative"}[variant]
    assert steering.positions == ("last+generated" if variant == "paper" else "all")


@torch.no_grad()
def test_the_rule_of_vistas_run_scripts() -> None:
    """``x <- |x| unit(unit(x) + s (1 + max(0, cos(x, -v))) unit(v))`` at every MLP output and position, in float64."""
    model, example = shared_model(), examples()[0]
    steering = derive.vsv(model, example, layers=[2], strength=0.17, variant="release")
    inputs = model.encode(example).inputs
    v = steering.changes[Site("decoder", 2, "mlp_out")].direction.astype(float)
    x = capture(model, inputs)["mlp_out"][2]
    lengths = np.linalg.norm(x, axis=-1, keepdims=True)
    toward = (x @ -v)[:, None] / lengths / np.linalg.norm(v)
    assert (toward > 0.01).any()
    assert (toward < -0.01).any()
    moved = x / lengths + 0.17 * (1 + np.maximum(0, toward)) * v / np.linalg.norm(v)
    want = lengths * moved / np.linalg.norm(moved, axis=-1, keepdims=True)
    with steering.applied(model):
        after = capture(model, inputs)["mlp_out"][2]
    np.testing.assert_allclose(after, want, atol=1e-4)


def test_files_of_the_new_norm_rule(tmp_path: Path) -> None:
    steering = derive.vsv(shared_model(), examples()[0], layers=[2], variant="release")
    assert SteeringVector.load(steering.save(tmp_path / "v.safetensors")).norm == "away"
    card = json.loads((tmp_path / "v.json").read_text())
    assert card["version"] == 4
    plain = derive.vsv(shared_model(), examples()[0], layers=[2], variant="simple")
    plain.save(tmp_path / "w.safetensors")
    assert json.loads((tmp_path / "w.json").read_text())["version"] == 4


@pytest.mark.parametrize("variant", ["paper", "release"])
@torch.no_grad()
def test_project_away_removes_the_component_along_the_word(variant: Any) -> None:
    model, example = shared_model(), examples()[0]
    steering = derive.project_away(model, "apple", layers=[1, 2], text_layer=3, strength=0.8, variant=variant)
    if variant == "paper":
        t = words_alone(model, "apple")[3]
    else:
        ids = model.processor.tokenizer("apple", add_special_tokens=False)["input_ids"]
        t = model.hf.get_input_embeddings().weight[ids].double().mean(0).numpy()
    np.testing.assert_allclose(steering.changes[1].direction, unit(t), atol=1e-4)
    assert (steering.kind, steering.positions, steering.heads, steering.layers) == ("project", "image:all", (), (1, 2))
    encoding = model.encode(example)
    image = list(encoding.tokens.image)
    before = capture(model, encoding.inputs)["resid_post"][1]
    with steering.applied(model):
        after = capture(model, encoding.inputs)["resid_post"][1]
    expected = before.copy()
    for k in image:
        share = before[k] @ t / (t @ t)
        expected[k] -= 0.8 * max(share, 0) * t
    np.testing.assert_allclose(after, expected, atol=1e-3)
    assert not np.allclose(after[image], before[image], atol=1e-2)


# ---- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: derive.paired_pca(Contrast.from_pairs(shared_model(), pairs("blank")), layers=[1], variant="code"),
            ConfigError,
            "'release'",
        ),
        (lambda: derive.paired_pca(Contrast.from_pairs(shared_model(), []), layers=[1]), PatchError, "no pairs"),
        (
            lambda: derive.paired_pca(
                Contrast.from_pairs(shared_model(), pairs("blank")[:1]), layers=[1], variant="release"
            ),
            PatchError,
            "in the same way",
        ),
        (
            lambda: derive.lda(Contrast.from_store(misled(1)[0], "object:named")),
            PatchError,
            "no heads, layers or sites",
        ),
        (
            lambda: derive.iti(Contrast.from_store(head_store(), "object:named"), top=0),
            PatchError,
            "top=0: it must be at least 1",
        ),
        (lambda: derive.iti(Contrast.from_store(head_store(), "object:cat")), SiteError, "choose from object:named"),
        (
            lambda: derive.iti(Contrast.from_store(head_store(), "object:named"), accuracy={Head(0, 0): 1}),
            PatchError,
            r"L0\.H1",
        ),
        (
            lambda: derive.iti(Contrast.from_store(head_store(), "object:named"), folds=1000),
            PatchError,
            "cannot be divided",
        ),
        (
            lambda: derive.ict(Contrast.from_pairs(shared_model(), [*pairs("blur"), *pairs("mask")])),
            PatchError,
            "call ict once per kind",
        ),
        (lambda: derive.ict(Contrast.from_pairs(shared_model(), pairs("blur")[:1])), PatchError, "cannot be divided"),
        (
            lambda: derive.ict(Contrast.from_pairs(shared_model(), pairs("blur")), variant="release", slice_width=7),
            PatchError,
            "must divide",
        ),
        (lambda: derive.vti_text(shared_model(), []), PatchError, "no demonstrations"),
        (lambda: derive.vti_text(shared_model(), demonstrations(), layers=[6]), SiteError, "layers 0-5"),
        (
            lambda: derive.vti_text(shared_model(), [derive.Demonstration(examples()[0], " ", "red")]),
            DataError,
            "empty",
        ),
        (
            lambda: derive.vti_text(shared_model(), [derive.Demonstration(examples()[0], "red", "red")]),
            PatchError,
            "have equal activations",
        ),
        (lambda: derive.vti_vision(shared_model(), []), PatchError, "0 examples"),
        (lambda: derive.vti_vision(shared_model(), examples(1), ratio=2), PatchError, "ratio=2"),
        (lambda: derive.vti_vision(shared_model(), examples(1), layers=[9]), SiteError, "layers 0-3"),
        (lambda: derive.vsv(shared_model(), examples()[0], layers=[8]), SiteError, "layers 0-5"),
        (lambda: derive.project_away(shared_model(), "apple", layers=[]), PatchError, "no layers"),
        (lambda: derive.project_away(shared_model(), "qwxz", layers=[1]), DataError, "no tokens"),
        (lambda: derive.project_away(shared_model(), "", layers=[1], variant="release"), DataError, "no tokens"),
    ],
)
def test_invalid_arguments_are_refused(
    make: Callable[[], SteeringVector], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()
    assert hooks_of(shared_model()) == 0
