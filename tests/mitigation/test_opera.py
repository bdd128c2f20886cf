"""OPERA against a search with whole forwards and attention of every row, and its rules on hand-made attention."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import groundscope as gs
from groundscope.core.errors import ConfigError, ModelError
from lvlm import Lvlm, Sampling
from mitigation import training_free_methods
from mitigation.training_free.methods.opera import OPERA, Trust
from tests.toys.decoding_oracle import double_model
from tests.toys.examples import example
from tests.toys.families import model

SMALL = OPERA(beams=3, candidates=2, scale=0.5, recurrences=2, first=2, returns=1)
STEPS = 6


def naive_opera(lvlm: Lvlm, encoding: Any, method: OPERA, ends: set[int]) -> tuple[list[int], int]:
    """Return the answer and the number of returns; every candidate is a whole forward with all attention rows."""
    plain = {n: x.double() if x.is_floating_point() else x for n, x in encoding.inputs.items()}

    def forward(tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        inputs = dict(plain)
        inputs["input_ids"] = torch.cat([plain["input_ids"], torch.tensor([tokens], dtype=torch.long)], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in inputs:
                inputs[name] = torch.cat([inputs[name], torch.zeros(1, len(tokens), dtype=torch.long)], 1)
        with torch.no_grad(), lvlm.eager():
            out = lvlm.hf(**inputs, use_cache=False, output_attentions=True)
        w = out.attentions[-1][0].double().amax(0)
        image = inputs["input_ids"][0] == lvlm.content_id
        if method.variant == "release":
            image = image.clone()
            image[int(image.nonzero()[-1]) + 1] = True
        return out.logits[0, -1], w / w.sum(-1, keepdim=True), image

    beams: list[tuple[list[int], float, list[int]]] = [([], 0.0, [])]
    stored = {0: beams}
    finished: list[tuple[float, list[int]]] = []
    rejected: dict[int, set[int]] = {}
    returned: dict[int, int] = {}
    while len(beams[0][0]) < STEPS:
        n = len(beams[0][0])
        options = []
        for tokens, score, positions in beams:
            logits = forward(tokens)[0].clone()
            logits[list(rejected.get(n, ()))] = -math.inf
            chosen = logits.topk(method.candidates).indices.tolist()
            values, stars = [], []
            for token in chosen:
                _, w, image = forward([*tokens, token])
                local = w[-(n + 1) :, -(n + 1) :]
                products = [math.prod(method.sigma * float(local[i, j]) for i in range(j, n + 1)) for j in range(n + 1)]
                stars.append(products.index(max(products)))
                change = float(w[-1][image].sum()) if n + 1 <= method.first else -method.scale * max(products)
                values.append(float(logits[token]) + change)
            log_p = torch.tensor(values, dtype=torch.float64).log_softmax(0).tolist()
            options += [
                (score + p, [*tokens, token], [*positions, star])
                for p, token, star in zip(log_p, chosen, stars, strict=True)
            ]
        options.sort(key=lambda option: -option[0])
        running = []
        for rank, (score, tokens, positions) in enumerate(options):
            if tokens[-1] in ends or n + 1 == STEPS:
                if rank < method.beams:
                    answer = tokens[:-1] if tokens[-1] in ends else tokens
                    finished.append((score / (n + 1) ** method.length_penalty, answer))
            elif len(running) < method.beams:
                running.append((tokens, score, positions))
        finished = sorted(finished, key=lambda item: -item[0])[: method.beams]
        full = len(finished) == method.beams
        if not running or (full and running[0][1] / (n + 1) ** method.length_penalty <= finished[-1][0]):
            break
        beams = running
        stored[n + 1] = beams
        modes = []
        for _, _, positions in beams:
            count = max(positions.count(p) for p in positions)
            modes.append((min(p for p in positions if positions.count(p) == count), count))
        if all(count > method.recurrences for _, count in modes):
            position = min(p for p, _ in modes)
            while position >= method.first and returned.get(position, 0) >= method.returns:
                position -= 1
            if position >= method.first:
                returned[position] = returned.get(position, 0) + 1
                rejected = {k: v for k, v in rejected.items() if k <= position + 1}
                rejected.setdefault(position + 1, set()).update(tokens[position + 1] for tokens, _, _ in beams)
                beams = stored[position + 1]
    return finished[0][1], sum(returned.values())


@pytest.mark.parametrize(
    ("family", "variant"), [("llava", "paper"), ("llava", "release"), ("qwen2_5_vl", "paper"), ("gemma3", "paper")]
)
def test_opera_is_the_search_with_whole_forwards(family: str, variant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lvlm = double_model(family)
    batch = next(lvlm.batches([example(0), example(1)], 2))
    method = replace(SMALL, variant=variant, first=1 if family == "llava" else 2)
    ranked = lvlm.logits(batch.inputs)[0].argsort(descending=True).tolist()
    ends = {ranked[3], lvlm.content_id}
    monkeypatch.setattr("mitigation.training_free.methods.opera.end_tokens", lambda _: frozenset(ends))
    with method.applied(lvlm):
        assert lvlm.decoder is not None
        answers = lvlm.decoder.generate(lvlm, batch, STEPS)
    expected = [naive_opera(lvlm, encoding, method, ends) for encoding in batch.encodings]
    assert answers == [answer for answer, _ in expected]


def test_some_searches_return_and_follow_other_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    lvlm = double_model("llava")
    batch = next(lvlm.batches([example(0), example(1)], 2))
    method = replace(SMALL, first=0, recurrences=1, returns=2)
    monkeypatch.setattr("mitigation.training_free.methods.opera.end_tokens", lambda _: frozenset())
    with method.applied(lvlm):
        assert lvlm.decoder is not None
        answers = lvlm.decoder.generate(lvlm, batch, STEPS)
    expected = [naive_opera(lvlm, encoding, method, {lvlm.content_id}) for encoding in batch.encodings]
    assert answers == [answer for answer, _ in expected]
    assert all(returns > 0 for _, returns in expected)


def test_products_and_positions_of_hand_made_attention() -> None:
    rows = [[0.4], [0.3, 0.1], [0.2, 0.05, 0.5]]
    trust = Trust()
    for row in rows:
        trust = trust.extended(torch.tensor(row), sigma=10.0)
    products = [4 * 3 * 2, 1 * 0.5, 5.0]
    assert [math.exp(x) for x in trust.products] == pytest.approx(products, rel=1e-6)
    assert trust.positions == (0, 0, 0)
    assert trust.over_trust(1e-7) == pytest.approx(24e-7, rel=1e-6)
    assert trust.recurring() == (0, 3)
    assert Trust((0.0,), (4, 2, 4, 2)).recurring() == (2, 2)
    assert Trust((2000.0,), (0,)).over_trust(1e-7) < math.inf


def test_parameters_and_families_are_checked() -> None:
    for problem, options in {
        "sigma=0: must be a number above 0": {"sigma": 0},
        "candidates=0: must be a number at least 1": {"candidates": 0},
        "recurrences=1.5: must be an integer": {"recurrences": 1.5},
        "unknown variant 'code'; choose from paper, release": {"variant": "code"},
        "count=0: the number of beams": {"beams": 0},
    }.items():
        with pytest.raises(ConfigError, match=problem):
            OPERA(**options)
    with pytest.raises(ModelError, match="OPERA acts on image tokens of the decoder, and in mllama"):
        OPERA().check(model("mllama"))
    lvlm = gs.load_lvlm("tiny")
    with OPERA().applied(lvlm), pytest.raises(ConfigError, match="draws none"):
        gs.answer(lvlm, gs.scenes.dataset(20).where(kind="caption"), sampling=Sampling())
    assert training_free_methods["opera"] is OPERA
    assert lvlm.decoder is None
