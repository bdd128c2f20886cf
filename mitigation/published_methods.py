"""Entries of `mitigation.mitigations` for the published derivations: the data that each one uses, and what data must have.

Each entry holds the arguments of a `mitigation.MitigationMethod`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from activation_store.direction import ConceptDirection
from concepts import counterfactuals
from concepts.counterfactual_pair import CounterfactualPair
from concepts.nouns import canonical_noun
from concepts.object_mentions import mentioned_objects
from concepts.schema import ConceptDataset, Example
from groundscope.core.errors import DataError
from lvlm.sites import Head
from mitigation.free_text_prompts import caption_prompts, plain_texts
from mitigation.method_data import (
    MAX_PAIRS,
    DerivationData,
    change_contrast,
    right_contrast,
    without_changes,
)
from mitigation.steering import derive
from mitigation.steering.contrast import Contrast
from mitigation.steering.derive import Demonstration
from mitigation.steering.places import Key, site_of
from mitigation.steering.vector import SteeringVector, combine

if TYPE_CHECKING:
    from lvlm.model import Lvlm

PLAIN = 16
"""Texts without an image that `optimize` preserves."""
DESCRIBED = 24
"""Images whose descriptions `optimize` preserves."""
MOST_WRONG = 80
"""Largest number of wrong answers that `optimize` corrects; they are spread over the images."""
DEMONSTRATIONS = 50
"""Demonstrations of `vti_text`, and images of `vti_vision`, as in the paper."""
HIDDEN_KINDS = ("blur", "mask")
"""Kinds of pairs of ICT: image level and object level."""


def _mean_difference(data: DerivationData) -> SteeringVector:
    return derive.mean_difference(right_contrast(data), **data.where)


def _lda(data: DerivationData) -> SteeringVector:
    return derive.lda(right_contrast(data), **data.where)


def _iti(data: DerivationData) -> SteeringVector:
    return derive.iti(right_contrast(data), top=max(1, len(data.heads)), **data.at)


def _paired_pca(data: DerivationData) -> SteeringVector:
    return derive.paired_pca(change_contrast(data), **data.where)


def _hidden_pairs(examples: ConceptDataset, kind: str, limit: int | None = None) -> list[CounterfactualPair]:
    neutral = examples.where(split="neutral")
    pairs = counterfactuals.pairs(neutral if len(neutral) else examples, kind, limit=limit)
    step = max(1, 2 * len(pairs) // MAX_PAIRS)
    return list(pairs[::step][: MAX_PAIRS // 2])


def _ict(data: DerivationData) -> SteeringVector:
    vectors = []
    for kind in HIDDEN_KINDS:
        with suppress(DataError):  # data without boxes have no object level
            pairs = _hidden_pairs(data.examples, kind)
            if pairs:
                contrast = data.shuffle(Contrast.from_pairs(data.model, pairs))
                vectors.append(derive.ict(contrast, top=max(1, len(data.heads)), strength=1.0, **data.at))
    return combine(vectors)


def _concept_subspace(data: DerivationData) -> SteeringVector:
    store = _store(data, "concept_subspace")
    concepts = data.options.get("concepts") or _both_sides(store.frame(), "attribute:")
    return derive.concept_subspace(store, concepts, **data.where)


def _both_sides(frame: Any, prefix: str) -> list[str]:
    names = [str(c) for c in frame.columns if str(c).startswith(prefix)]
    return [name for name in names if {0.0, 1.0} <= set(frame[name].dropna().unique().tolist())]


def _probe_normal(data: DerivationData) -> SteeringVector:
    """Fit a logistic probe at each place that separates right from wrong answers, and steer along its normal."""
    from sklearn.linear_model import LogisticRegression

    directions = []
    for key, right, wrong in right_contrast(data).read(_keys(data), "last"):
        x = np.concatenate([right, wrong])
        y = np.r_[np.ones(len(right)), np.zeros(len(wrong))]
        weights = LogisticRegression(C=0.01, class_weight="balanced", max_iter=2000).fit(x, y).coef_[0]
        unit = weights / np.linalg.norm(weights)
        head = key.head if isinstance(key, Head) else None
        directions.append(
            ConceptDirection(str(site_of(key)), "last", "object:right", unit, head, float(np.std(x @ unit)))
        )
    return derive.probe_normal(directions, _store(data, "probe_normal"), **data.at)


def _keys(data: DerivationData) -> tuple[Key, ...]:
    places = data.places
    return (*places.get("heads", ()), *places.get("layers", ()), *places.get("sites", ()))


def _vti_text(data: DerivationData) -> SteeringVector:
    return derive.vti_text(data.model, demonstrations(data.examples))


def demonstrations(examples: ConceptDataset, limit: int = DEMONSTRATIONS) -> list[Demonstration]:
    """Return captions of the data, each with the last object that it names replaced by one that is not in the image.

    Empty for data without written captions of annotated images.
    """
    nouns = sorted({canonical_noun(o.noun) for e in examples for o in e.objects})
    demonstrations: list[Demonstration] = []
    for example in examples:
        if example.kind != "caption" or not example.answer or not example.objects:
            continue
        present = {canonical_noun(o.noun) for o in example.objects}
        absent = [noun for noun in nouns if noun not in present]
        named = mentioned_objects(example.answer, {noun: noun for noun in present})
        if named and absent:
            wrong = absent[len(demonstrations) % len(absent)].join(example.answer.rsplit(named[-1], 1))
            demonstrations.append(Demonstration(example, example.answer, wrong))
        if len(demonstrations) == limit:
            break
    return demonstrations


def _vti_vision(data: DerivationData) -> SteeringVector:
    return derive.vti_vision(data.model, _one_of_each_image(data.examples)[:DEMONSTRATIONS])


def _one_of_each_image(examples: ConceptDataset) -> list[Example]:
    return list({e.group: e for e in examples}.values())


def _vsv(data: DerivationData) -> SteeringVector:
    example = next((e for e in data.examples if e.id == data.options["example"]), None)
    if example is None:
        msg = f"no example '{data.options['example']}' among the discovery examples, such as '{data.examples[0].id}'"
        raise DataError(msg)
    return derive.vsv(data.model, example, **data.at)


def _project_away(data: DerivationData) -> SteeringVector:
    n = data.model.n_layers
    layers = data.options.get("layers") or range(n // 6, n // 2 + 1)
    return derive.project_away(data.model, str(data.options["phrase"]), layers=tuple(layers), **data.at)


def _optimize(data: DerivationData) -> SteeringVector:
    questions = [e for e in data.examples if e.candidates]
    right = _right(data)
    wrong = [e for e in questions if not right.get(e.id, True)]
    if right and wrong:  # those that `optimize` selects, so that it need not ask the others
        others = [e for e in questions if right.get(e.id, False)]
        wrong = wrong[:: max(1, -(-len(wrong) // MOST_WRONG))]
        questions = wrong + others[:: max(1, len(others) // (derive.RIGHT * len(wrong)))]
    middle = data.model.n_layers // 2
    places = data.places if data.site is not None else {"layers": [middle, min(middle + 1, data.model.n_layers - 1)]}
    return derive.optimize(
        data.model,
        questions,
        **preserved(data.model, data.examples),
        **places,
        **data.at,
        **data.options.get("optimize", {}),
    )


def preserved(model: Lvlm, examples: ConceptDataset) -> dict[str, Any]:
    """Return what `optimize` preserves, as its arguments: prompts for descriptions of images, and texts without an image."""
    plain = plain_texts(model, examples, PLAIN) or ()
    return {
        "texts": list(caption_prompts(examples, DESCRIBED)),
        "plain": [(text.tokens, text.start) for text in plain],
    }


def _right(data: DerivationData) -> dict[str, bool]:
    """Return for each example of the store whether the model answers it correctly; empty without a store."""
    if data.store is None:
        return {}
    frame = data.store.frame()
    return (
        dict(zip(frame["id"].tolist(), frame["correct"].astype(bool).tolist(), strict=True))
        if "correct" in frame
        else {}
    )


def _store(data: DerivationData, name: str) -> Any:
    if data.store is None:
        msg = f"{name} needs activations; pass a store"
        raise DataError(msg)
    return data.store


# ---- what data must have


def _without_candidates(examples: ConceptDataset) -> str | None:
    if any(e.candidates for e in examples):
        return None
    return "it needs questions with candidate answers, such as yes and no; use the method amplify"


def _without_hidden(examples: ConceptDataset) -> str | None:
    for kind in HIDDEN_KINDS:
        with suppress(DataError):
            if counterfactuals.pairs(examples, kind, limit=1):
                return None
    return "it needs images that can be blurred or objects with boxes; use the method discriminant"


def _without_captions(examples: ConceptDataset) -> str | None:
    if demonstrations(examples, 1):
        return None
    return "it needs written captions of images with annotated objects; use the method vti_vision or discriminant"


def _without_attributes(examples: ConceptDataset) -> str | None:
    if any(str(c).startswith("attribute:") for e in examples for c in e.labels):
        return None
    return "it needs labels of attributes; name other concepts with +steer.options.concepts=[…], or use the method discriminant"


ENTRIES: Mapping[str, Mapping[str, Any]] = {
    "mean_difference": {"make": _mean_difference, "problem": _without_candidates, "reads": "z"},
    "lda": {"make": _lda, "problem": _without_candidates, "reads": "z"},
    "iti": {"make": _iti, "problem": _without_candidates, "reads": "z", "own_places": True},
    "probe_normal": {"make": _probe_normal, "problem": _without_candidates, "reads": "z"},
    "paired_pca": {"make": _paired_pca, "problem": without_changes},
    "ict": {"make": _ict, "problem": _without_hidden, "own_places": True},
    "concept_subspace": {"make": _concept_subspace, "problem": _without_attributes, "reads": "z"},
    "vti_text": {
        "make": _vti_text,
        "problem": _without_captions,
        "own_places": True,
        "own_positions": True,
        "unit": 0.2,
    },
    "vti_vision": {"make": _vti_vision, "own_places": True, "own_positions": True, "unit": 0.2},
    "vsv": {"make": _vsv, "required": ("example",), "own_places": True, "unit": 0.1},
    "project_away": {"make": _project_away, "required": ("phrase",), "own_places": True},
    "optimize": {"make": _optimize, "problem": _without_candidates},
}
"""Name of a derivation to the arguments of its `mitigation.MitigationMethod`."""
