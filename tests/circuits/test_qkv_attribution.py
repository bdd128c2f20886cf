"""The query/key fix against one forward a patched key, and toys in which a plain gradient sees next to nothing."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from circuits import attribution
from concepts.counterfactual_pair import CounterfactualPair
from concepts.schema import Example
from groundscope.core.errors import ConfigError, SiteError
from lvlm import Lvlm, wrap_lvlm
from tests.toys.families import build
from tests.toys.patching_oracle import pair_of


@cache
def readout(sharp: float = 1.0) -> Lvlm:
    """A model whose answer is linear in what the last layer's heads put out; their queries are `sharp` times as long."""
    network, processor = build("llava")
    network = deepcopy(network)
    text = network.model.language_model
    text.norm = nn.Identity().eval()
    nn.init.zeros_(text.layers[-1].mlp.down_proj.weight)
    with torch.no_grad():
        text.layers[-1].self_attn.q_proj.weight *= sharp
    return wrap_lvlm(network.double(), processor, name="readout", validate=False)


def last(lvlm: Lvlm) -> Any:
    return lvlm.hf.model.language_model.layers[-1].self_attn


@torch.no_grad()
def run(
    lvlm: Lvlm, example: Example, pair: CounterfactualPair, edits: dict[str, Any]
) -> tuple[float, dict[str, Tensor]]:
    """One plain forward with the last attention's projections edited: log-odds, and what they were given or gave."""
    values: dict[str, Tensor] = {}
    hooks = []
    for name in ("q_proj", "k_proj", "v_proj"):

        def after(_m: Any, _a: Any, out: Tensor, name: str = name) -> Tensor:
            values[name] = edits[name](out) if name in edits else out
            return values[name]

        hooks.append(getattr(last(lvlm), name).register_forward_hook(after))

    def before(_m: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        values["z"] = edits["z"](args[0]) if "z" in edits else args[0]
        return (values["z"],)

    hooks.append(last(lvlm).o_proj.register_forward_pre_hook(before))
    logits = lvlm.hf(**lvlm.collate([lvlm.encode(example)]), use_cache=False).logits[0, -1]
    for hook in hooks:
        hook.remove()
    right, wrong = (lvlm.processor.tokenizer.convert_tokens_to_ids(e.answer) for e in (pair.clean, pair.corrupt))
    return float(logits[right] - logits[wrong]), {k: v.clone() for k, v in values.items()}


def brute(lvlm: Lvlm, pair: CounterfactualPair, part: str) -> np.ndarray:
    """For each head of the last layer, what patching one position after another does, added up."""
    clean, source = run(lvlm, pair.clean, pair, {})
    corrupt, base = run(lvlm, pair.corrupt, pair, {})
    name, width = f"{part}_proj", lvlm.head_dim
    groups = lvlm.n_heads * width // base[name].shape[-1]
    total = np.zeros(lvlm.n_heads)
    for position in range(base[name].shape[1]):
        if part == "q" and position != base[name].shape[1] - 1:
            continue  # no other query of the last layer is read
        for shared in range(lvlm.n_heads // groups):

            def patched(x: Tensor, position: int = position, shared: int = shared) -> Tensor:
                x = x.clone()
                columns = slice(shared * width, (shared + 1) * width)
                x[:, position, columns] = source[name][:, position, columns]
                return x

            _, heard = run(lvlm, pair.corrupt, pair, {name: patched})
            for head in range(shared * groups, (shared + 1) * groups):
                columns = slice(head * width, (head + 1) * width)

                def only(z: Tensor, columns: slice = columns, heard: dict[str, Tensor] = heard) -> Tensor:
                    z = z.clone()
                    z[..., columns] = heard["z"][..., columns]
                    return z

                total[head] += run(lvlm, pair.corrupt, pair, {"z": only})[0] - corrupt
    return total / (clean - corrupt)


@pytest.mark.parametrize("part", ["q", "k", "v"])
@pytest.mark.parametrize("sharp", [1.0, 30.0])
def test_the_query_key_fix_equals_patching_key_by_key(part: Any, sharp: float) -> None:
    lvlm, pair = readout(sharp), pair_of(0)
    exact = brute(lvlm, pair, part)
    estimates = attribution.inputs(lvlm, [pair], part, min_effect=0)
    np.testing.assert_allclose(estimates.effects[0, -1], exact, rtol=2e-3, atol=2e-5)
    assert estimates.provenance["fix"] == (part != "v")
    assert np.abs(exact).max() > 1e-3
    plain = attribution.inputs(lvlm, [pair], part, fix=False, min_effect=0).effects[0, -1]
    if part == "v":
        np.testing.assert_allclose(plain, exact, rtol=2e-3, atol=2e-5)
    elif sharp > 1:
        assert np.abs(plain - exact).max() > 0.02 * np.abs(exact).max()


def test_the_fix_recovers_effects_that_saturated_attention_hides_from_gradients() -> None:
    lvlm, pair = deepcopy(readout()), pair_of(0)
    inputs_ = []
    for example in (pair.clean, pair.corrupt):
        hook = last(lvlm).q_proj.register_forward_pre_hook(lambda _m, args: inputs_.append(args[0][0, -1]))
        lvlm.logits(lvlm.encode(example).inputs)
        hook.remove()
    # The first head's last query is one vector in the clean run and its opposite in the corrupt one: it looks at the key
    # most like it in the one, at the key least like it in the other, and at no other.
    sides = torch.linalg.lstsq(torch.stack(inputs_), torch.tensor([[1.0], [-1.0]], dtype=torch.float64)).solution[:, 0]
    with torch.no_grad():
        last(lvlm).q_proj.weight[: lvlm.head_dim] = 400 * torch.outer(torch.ones(lvlm.head_dim), sides)
    exact = brute(lvlm, pair, "q")[0]
    plain, fixed = (
        attribution.inputs(lvlm, [pair], "q", fix=fix, min_effect=0).effects[0, -1, 0] for fix in (False, True)
    )
    assert abs(plain) < 0.01 * abs(exact)
    assert fixed == pytest.approx(exact, rel=1e-3)
    assert abs(exact) > 0.01


class Saturating(nn.Module):
    """The margin's own scale is cut off on both sides: flat where either run is, steep between them."""

    def __init__(self, weight: Tensor, middle: float, half: float) -> None:
        super().__init__()
        self.weight, self.middle, self.scale = weight, middle, 6 / half

    def forward(self, x: Tensor) -> Tensor:
        margin = x @ self.weight  # [..., 2]: right, wrong
        squashed = torch.tanh(self.scale * (margin[..., 0] - margin[..., 1] - self.middle))
        logits = torch.zeros(*x.shape[:-1], 256, dtype=x.dtype)
        logits[..., 0], logits[..., 1] = squashed, -squashed
        return logits


def test_where_the_answer_saturates_a_gradient_at_either_run_sees_nothing_and_the_path_all() -> None:
    lvlm, pair = deepcopy(readout()), pair_of(0)
    ids = [lvlm.processor.tokenizer.convert_tokens_to_ids(e.answer) for e in (pair.clean, pair.corrupt)]
    margins = [run(lvlm, e, pair, {})[0] for e in (pair.clean, pair.corrupt)]
    weight = lvlm.hf.lm_head.weight.detach()[ids].T
    head = Saturating(weight, sum(margins) / 2, (margins[0] - margins[1]) / 2)
    order = [ids[0], ids[1], *(i for i in range(256) if i not in ids)]
    back = [order.index(i) for i in range(256)]
    head.register_forward_hook(lambda _m, _a, out: out[..., back])
    lvlm.hf.lm_head = head.eval()
    options: dict[str, Any] = {"min_effect": 0, "sites": "embeddings", "tokens": "all"}
    plain = [attribution.nodes(lvlm, [pair], point=p, **options).effects[0, 0, 0] for p in ("run", "source")]
    path = attribution.nodes(lvlm, [pair], point="path", steps=100, **options).effects[0, 0, 0]
    assert max(map(abs, plain)) < 0.01  # of 1, the whole difference
    assert path == pytest.approx(1, abs=0.02)
    edges = attribution.edges(lvlm, [pair], steps=100, min_effect=0)
    assert edges.scores[0].sum() == pytest.approx(1, abs=0.02)


def test_earlier_layers_and_positions() -> None:
    lvlm, pair = readout(), pair_of(0)
    separate = [
        attribution.inputs(lvlm, [pair], "k", tokens=tokens, min_effect=0).effects  # type: ignore[arg-type]
        for tokens in ("image:all", "suffix:all")
    ]
    joint = attribution.inputs(lvlm, [pair], "k", tokens="all", min_effect=0).effects
    # Before the image nothing differs between the runs, so that its patch changes nothing.
    np.testing.assert_allclose(sum(separate), joint, atol=1e-5)
    assert np.abs(joint[0, 1]).max() > 1e-4
    with torch.no_grad():  # whoever asks need not ask for gradients
        noise = attribution.inputs(lvlm, [pair], "k", mode="noise", point="source", min_effect=0)
    assert noise.mode == "noise"
    assert np.isfinite(noise.effects).all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"part": "z"}, "unknown part 'z'"),
        ({"tokens": "first"}, "unknown token selection 'first'"),
        ({"point": "up"}, "unknown point 'up'"),
    ],
)
def test_a_mistake_is_named(options: dict[str, Any], match: str) -> None:
    with pytest.raises((ConfigError, SiteError), match=match):
        attribution.inputs(readout(), [pair_of(0)], **options)
