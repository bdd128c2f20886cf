"""A planted error of vision: the nearest word at the object's tokens predicts the wrong answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

import groundscope as gs
from concepts.scenes.scene import Scene
from probes.analysis.nearest_word import predict_wrong_answers, score_vectors

COLORS = ("blue", "green", "orange", "purple", "red", "yellow")


def test_a_recolored_object_is_read_in_its_wrong_color_and_answered_so(tmp_path: Path) -> None:
    model = gs.load_lvlm("tiny")
    data = gs.scenes.dataset(120, seed=5, splits=("neutral",)).where(kind="what_color")
    assert len(data) >= 40
    rng = np.random.default_rng(0)
    planted = []
    for i, example in enumerate(data):
        item, image = example.named_object(), example.image
        assert item is not None
        assert isinstance(image, Scene)
        wrong = str(rng.choice([c for c in COLORS if c != example.answer]))
        # Every second image shows another color than the annotation says: the model errs, because it sees something else.
        shown = image.recolored(item.noun, wrong) if i % 2 else image
        planted.append(replace(example, image=shown))
    options = {"sites": ["resid_post"], "tokens": ["object:mean"], "progress": False}
    store = gs.trace(model, replace(data, examples=tuple(planted)), out=tmp_path / "planted", **options)
    fitted = gs.scenes.dataset(120, seed=6, splits=("neutral",)).where(kind="what_color")
    other = gs.trace(model, fitted, out=tmp_path / "other", **options)
    layer = model.n_layers // 2
    site = f"decoder.L{layer}.resid_post"
    x, names = other.read(site, "object:mean"), np.array([e.answer for e in fitted])
    vectors = {color: x[names == color].mean(axis=0) for color in COLORS}
    scores = score_vectors(store, vectors, site, tokens="object:mean")
    truth, said = [e.answer for e in planted], [str(a) for a in store.columns["model_answer"]]
    wrong = np.array([a != t for a, t in zip(said, truth, strict=True)])
    assert wrong[1::2].mean() > 0.8 > 0.2 > wrong[::2].mean()  # the errors are the planted ones
    near = scores.words_at(layer)
    assert np.mean([n == a for n, a in zip(near[1::2], said[1::2], strict=True)]) > 0.8
    row = predict_wrong_answers(scores, truth, said, resamples=100).iloc[0]
    assert row["auc_low"] > 0.9
    assert row["odds_ratio_low"] > 2
    # The same answers of other images: neither word nor answer belongs to the row.
    moved = list(rng.permutation(np.array(said)))
    null = predict_wrong_answers(scores, truth, moved, resamples=100).iloc[0]
    assert null["auc"] < 0.8
