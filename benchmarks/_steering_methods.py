"""The methods that benchmarks/steering_tiny_model.py compares: how each is made, where it acts, at which strengths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from activation_store import ActivationStore, ConceptDirection
from circuits import random_heads
from concepts import counterfactuals
from concepts.counterfactual_pair import CounterfactualPair
from concepts.object_mentions import mentioned_objects
from concepts.scenes import questions
from concepts.scenes.icons import NOUNS
from concepts.schema import ConceptDataset
from lvlm import Head, Lvlm
from mitigation import Contrast, SteeringVector, combine, derive
from mitigation.published_methods import preserved
from mitigation.steering.derive import Demonstration
from mitigation.steering.places import Key, site_of
from mitigation.steering.shuffling import shuffle_mask

MISLEADING = ("conflict", "adversarial", "popular", "random")
SIGMAS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
SHARES = (0.5, 1.0, 1.5, 2.0, 3.0)
LENGTHS = (0.1, 0.2, 0.4, 0.8, 1.6)

Make = Callable[[int | None], SteeringVector]
"""From the seed by which labels are shuffled, None for the true ones, to a vector."""


@dataclass(frozen=True)
class Method:
    """One method at every place it is tried at."""

    places: Mapping[str, Make | None]
    """Name of the place to how its vector is made; None where `parts` makes them."""
    strengths: Sequence[float]
    elsewhere: Callable[[int], SteeringVector] | None = None
    """The same rule at other heads, drawn by a seed; None for a method that does not act on heads."""
    labels: bool = True
    """Whether it is made from labels that can be shuffled."""
    late: bool = True
    """Whether it acts at the last token alone, so that questions under it cost little more than without."""
    parts: Callable[[ConceptDataset], list[tuple[ConceptDataset, SteeringVector | None]]] | None = None
    """For a vector that belongs to a question: the questions divided by vector, None for those that have none."""


@dataclass(frozen=True)
class World:
    """What vectors are derived from."""

    model: Lvlm
    store: ActivationStore
    frame: Any
    discovery: ConceptDataset
    heads: tuple[Head, ...]
    pairs: int
    """Pairs that a method is given at most."""

    def others(self, seed: int) -> tuple[Head, ...]:
        """Return as many heads that were not selected."""
        return random_heads((self.model.n_layers, self.model.n_heads), len(self.heads), exclude=self.heads, seed=seed)

    def blank(self) -> Sequence[CounterfactualPair]:
        """Pair neutral questions, spread over the images, with blanked images."""
        return self._spread("blank", self.pairs)

    def changed(self) -> Sequence[CounterfactualPair]:
        """Pair neutral questions with images in which the answer is another."""
        return [p for kind in ("object", "color", "relation") for p in self._spread(kind, self.pairs // 3)]

    def destroyed(self, kind: str) -> Sequence[CounterfactualPair]:
        """Pair neutral questions with images that are blurred, or whose object is masked."""
        return self._spread(kind, self.pairs // 2)

    def _spread(self, kind: str, count: int) -> Sequence[CounterfactualPair]:
        candidates = counterfactuals.pairs(self.discovery.where(split="neutral"), kind)
        return candidates[:: max(1, len(candidates) // count)][:count]

    def demonstrations(self, count: int) -> list[Demonstration]:
        """Describe scenes rightly, and with a thing that is not there in the place of the last one."""
        described = []
        for example in {e.group: e for e in self.discovery}.values():
            scene: Any = example.image
            question = questions.caption(scene)
            present = {o.noun for o in scene.objects}
            absent = sorted(set(NOUNS) - present)[len(described) % 8]
            last = mentioned_objects(question.answer, {n: n for n in NOUNS})[-1]
            wrong = absent.join(question.answer.rsplit(last, 1))
            described.append(Demonstration(questions.as_example(scene, question, "caption"), question.answer, wrong))
        return described[:count]


def right_and_wrong(world: World, shuffle: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return masks of the misleading questions that the model gets right, and of those it gets wrong."""
    misleading = world.frame["split"].isin(MISLEADING).to_numpy()
    right = misleading & world.frame["correct"].to_numpy(dtype=bool)
    groups = world.frame["group"].tolist()
    right = right if shuffle is None else shuffle_mask(right, shuffle, misleading, groups=groups)
    return right, misleading & ~right


def yes_and_no(world: World, shuffle: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return masks of the questions whose true answer is yes, and of those whose is no."""
    answers = world.frame["answer"].to_numpy()
    parsed = (answers == "yes") | (answers == "no")
    groups = world.frame["group"].tolist()
    yes = answers == "yes" if shuffle is None else shuffle_mask(answers == "yes", shuffle, parsed, groups=groups)
    return yes, parsed & ~yes


def _normals(world: World, keys: Sequence[Key], shuffle: int | None) -> SteeringVector:
    """Fit a logistic probe at each place that tells right from wrong, and steer along its normal."""
    from sklearn.linear_model import LogisticRegression

    right, wrong = right_and_wrong(world, shuffle)
    directions = []
    for key in keys:
        head = key.head if isinstance(key, Head) else None
        x = world.store.read(site_of(key), "last", head=head)[right | wrong].astype(np.float64)
        y = right[right | wrong]
        weights = LogisticRegression(C=0.01, class_weight="balanced", max_iter=2000).fit(x, y).coef_[0]
        unit = weights / np.linalg.norm(weights)
        sigma = float(np.std(x @ unit))
        directions.append(ConceptDirection(str(site_of(key)), "last", "attribute:named", unit, head, sigma))
    return derive.probe_normal(directions, world.store)


def only(vector: SteeringVector, keys: Sequence[Key]) -> SteeringVector:
    """Return a vector at some of its places alone."""
    return replace(vector, changes={key: vector.changes[key] for key in keys})


def methods(world: World) -> dict[str, Method]:
    """Return every method by its name in the table."""
    w, store = world, world.store
    every = [Head(i, k) for i in range(w.model.n_layers) for k in range(w.model.n_heads)]
    upper = range(1, w.model.n_layers)
    everywhere: dict[str, dict[str, Any]] = {
        "heads": {"heads": every},
        "residual": {"layers": upper},
        "MLP": {"sites": [f"decoder.L{layer}.mlp_out" for layer in upper]},
    }

    def masked(
        derivation: Callable[..., SteeringVector], masks: Callable, **more: Any
    ) -> Callable[..., SteeringVector]:
        def make(where: dict[str, Any], shuffle: int | None) -> SteeringVector:
            positive, negative = masks(w, shuffle)
            return derivation(Contrast.from_store(store, positive=positive, negative=negative), **where, **more)

        return make

    def paired(
        derivation: Callable[..., SteeringVector], pairs: Sequence[CounterfactualPair]
    ) -> Callable[..., SteeringVector]:
        contrast = Contrast.from_pairs(w.model, pairs)
        return lambda where, s: derivation(contrast if s is None else contrast.shuffled(s), **where)

    def tried(make: Callable[..., SteeringVector], strengths: Sequence[float], where: str = "heads") -> Method:
        # Derived everywhere at once: reading activations is most of what it takes.
        whole = cache(lambda s: make(everywhere[where], s))
        if where == "heads":
            return Method(
                {"heads": lambda s: only(whole(s), w.heads)}, strengths, lambda s: only(whole(None), w.others(s))
            )
        places = {f"{where} L{key if isinstance(key, int) else key.layer}": key for key in whole(None).changes}
        return Method({n: lambda s, key=key: only(whole(s), [key]) for n, key in places.items()}, strengths)

    def ict(pairs: Sequence[Sequence[CounterfactualPair]], shuffle: int | None) -> SteeringVector:
        contrasts = [Contrast.from_pairs(w.model, p) for p in pairs]
        contrasts = contrasts if shuffle is None else [c.shuffled(shuffle) for c in contrasts]
        return combine([derive.ict(c, top=len(w.heads), strength=1.0) for c in contrasts])

    blank, changed = w.blank(), w.changed()
    destroyed = [w.destroyed("blur"), w.destroyed("mask")]
    difference, lda = masked(derive.mean_difference, right_and_wrong), masked(derive.lda, right_and_wrong)
    tell, pca = masked(derive.discriminant, yes_and_no, doubt=0.5), paired(derive.paired_pca, changed)
    colors = sorted(c for c in w.frame.columns if c.startswith("attribute:"))
    optimized = cache(lambda: _optimized(w))
    iti = masked(derive.iti, right_and_wrong, top=len(w.heads))
    return {
        "mean_difference": tried(difference, SIGMAS),
        "mean_difference, residual": tried(difference, SIGMAS, "residual"),
        "mean_difference, MLP": tried(difference, SIGMAS, "MLP"),
        "lda": tried(lda, SIGMAS),
        "lda, residual": tried(lda, SIGMAS, "residual"),
        "probe_normal": tried(lambda where, s: _normals(w, where["heads"], s), SIGMAS),
        "iti": Method({"its heads": lambda s: iti({}, s)}, SIGMAS),
        "ict, image and object": Method({"its heads": lambda s: ict(destroyed, s)}, SIGMAS),
        "from_pairs": tried(paired(derive.mean_difference, changed), SIGMAS),
        "paired_pca": tried(pca, SIGMAS),
        "paired_pca, residual": tried(pca, SIGMAS, "residual"),
        "discriminant": tried(tell, SHARES),
        "discriminant, residual": tried(tell, SHARES, "residual"),
        "discriminant, MLP": tried(tell, SHARES, "MLP"),
        "concept_subspace": replace(
            tried(lambda where, _: derive.concept_subspace(store, colors, **where), SHARES), labels=False
        ),
        "amplification": tried(paired(derive.amplification, blank), SHARES),
        "prior_removal": tried(paired(derive.prior_removal, blank), (-0.25, -0.5, -1.0)),
        "discriminant, all tokens": Method(
            {"heads": lambda s: tell({"heads": w.heads, "positions": "all"}, s)}, SHARES[:4], late=False
        ),
        "optimize, all tokens": Method(
            {"residual, middle": lambda _: optimized()}, (0.6, 0.8, 1.0), labels=False, late=False
        ),
        "vti_text": Method(
            {"MLP": lambda _: derive.vti_text(w.model, w.demonstrations(w.pairs // 3))}, LENGTHS, late=False
        ),
        "vti_vision": Method(
            {"vision MLP": lambda _: derive.vti_vision(w.model, _images(w.discovery, w.pairs // 3), copies=20)},
            LENGTHS,
            late=False,
        ),
        "vsv": Method({"residual": None}, LENGTHS[:4], late=False, parts=lambda data: _probed_objects(w.model, data)),
        "project_away": Method({"image tokens": None}, SHARES[:4], late=False, parts=lambda d: _named(w.model, d)),
    }


def _optimized(world: World) -> SteeringVector:
    """Fit one addition for every token to the questions about every second scene."""
    first = set(list(dict.fromkeys(e.group for e in world.discovery))[::2])
    part = world.discovery.filter(lambda e: e.group in first)
    middle = world.model.n_layers // 2
    return derive.optimize(world.model, list(part), **preserved(world.model, part), layers=[middle, middle + 1])


def _probed_objects(model: Lvlm, data: ConceptDataset) -> list[tuple[ConceptDataset, SteeringVector | None]]:
    """Derive a vector from every question and its image."""
    return [(ConceptDataset("one", (e,)), derive.vsv(model, e)) for e in data]


def _named(model: Lvlm, data: ConceptDataset) -> list[tuple[ConceptDataset, SteeringVector | None]]:
    """Take the thing that a question of existence names out of the image, in the middle layers; nothing for the others."""
    nouns = {
        e.id: noun
        for e in data
        if e.kind == "existence"
        for noun in mentioned_objects(e.question, {n: n for n in NOUNS})
    }
    parts: list[tuple[ConceptDataset, SteeringVector | None]] = [(data.filter(lambda e: e.id not in nouns), None)]
    for noun in sorted(set(nouns.values())):
        vector = derive.project_away(model, noun, layers=(1, 2, 3))
        parts.append((data.filter(lambda e, noun=noun: nouns.get(e.id) == noun), vector))
    return [(part, vector) for part, vector in parts if len(part)]


def _images(data: ConceptDataset, count: int) -> list[Any]:
    return list({e.group: e for e in data}.values())[:count]
