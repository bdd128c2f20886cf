"""Sampled tokens: frequencies, the nucleus of transformers, and independence of the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import TopPLogitsWarper

from behavior import answer
from behavior.metrics import compute_metrics
from behavior.repeated_sampling import divide_seeds
from concepts import scenes
from groundscope.core.errors import ConfigError
from lvlm import Sampling, load_lvlm


def test_tokens_are_drawn_with_the_probabilities_of_the_nucleus() -> None:
    n, logits = 4000, torch.tensor([1.0, 3.0, 2.0, -1.0, 2.5])
    names = [f"question {i}" for i in range(n)]
    for temperature, top_p in ((0.7, 1.0), (1.5, 0.8), (1.0, 0.3)):
        draws = Sampling(temperature, top_p).tokens(logits.expand(n, -1), names, step=2)
        warped = TopPLogitsWarper(top_p)(None, logits[None] / temperature)[0].softmax(-1).numpy()
        shares = np.bincount(draws.numpy(), minlength=5) / n
        assert np.abs(shares - warped).max() < 4 * np.sqrt(0.25 / n)
        assert not shares[warped == 0].any()


def test_a_draw_depends_on_seed_name_and_step_only() -> None:
    logits = torch.zeros(3, 1000)
    names = ["a", "b", "c"]
    whole = Sampling(seed=1).tokens(logits, names, 0)
    assert [int(Sampling(seed=1).tokens(logits[:1], [name], 0)) for name in names] == whole.tolist()
    others = [Sampling(seed=2).tokens(logits, names, 0), Sampling(seed=1).tokens(logits, names, 1)]
    assert all(not torch.equal(whole, other) for other in others)
    assert len(set(whole.tolist())) == 3


def test_a_low_temperature_is_greedy() -> None:
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    draws = Sampling(1e-4).tokens(logits, [str(i) for i in range(20)], 0)
    assert torch.equal(draws, logits.argmax(-1))


@pytest.mark.parametrize(
    ("values", "words"),
    [((0.0,), "temperature=0: must be above 0"), ((1.0, 0.0), "top_p=0: must be above 0"), ((1.0, 1.5), "top_p=1.5")],
)
def test_wrong_values_are_named(values: tuple[float, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Sampling(*values)


def test_sampled_answers_do_not_depend_on_batches_and_are_scored_over_all_seeds() -> None:
    model, data = load_lvlm("tiny", validate=False), scenes.dataset(10)
    chosen = data.filter(lambda e: e.kind in {"caption", "existence"})[-12:]
    assert {e.kind for e in chosen} == {"caption", "existence"}
    sampling = Sampling(3.0, 0.95, seed=4)
    options = {"generate": True, "sampling": sampling, "seeds": 2, "max_new_tokens": 3}
    first, second = (answer(model, chosen, batch_size=size, **options) for size in (5, 32))
    assert [a.text for a in first.answers] == [a.text for a in second.answers]
    parts = divide_seeds(first)
    assert [len(part) for part in parts] == [12, 12]
    assert [a.text for a in parts[0].answers] != [a.text for a in parts[1].answers]
    rates = [compute_metrics(part, chosen)["all: right"].value for part in (parts[0],)]
    both = compute_metrics(first, chosen)
    values = [a.correct for a in first.answers if a.correct is not None]
    assert both["all: right"].value == pytest.approx(sum(values) / len(values))
    assert both["all: right"].n == 2 * sum(bool(e.candidates) for e in chosen)
    assert 0 <= rates[0] <= 1
    # Without `generate`, only questions without candidates are drawn.
    scored = answer(model, chosen, sampling=sampling, seeds=2, max_new_tokens=3)
    assert len(scored) == 12 + sum(not e.candidates for e in chosen)
    with pytest.raises(ConfigError, match="seeds=2: must be at least 1, and above 1 only with sampling"):
        answer(model, chosen, seeds=2)
