"""Attribution patching against finite differences in float64, a linear read-out, and gradients stopped by hand."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from circuits import attribution, patch_heads
from concepts.counterfactual_pair import CounterfactualPair
from concepts.schema import Example
from groundscope.core.errors import ConfigError, ModelError, PatchError, SiteError
from lvlm.model import Lvlm
from tests.toys.random_models import hooks_of, layers_of, pairs, random_model, shared_model


@cache
def precise() -> Lvlm:
    model = random_model(seed=2)
    model.hf.double()
    return model


def difference(model: Lvlm, logits: torch.Tensor, pair: CounterfactualPair) -> torch.Tensor:
    """Log-odds of the two answers; the toy tokenizer has one token for each."""
    right, wrong = (model.processor.tokenizer.convert_tokens_to_ids(e.answer) for e in (pair.clean, pair.corrupt))
    return logits[right] - logits[wrong]


@torch.no_grad()
def heads_of(model: Lvlm, example: Example) -> list[torch.Tensor]:
    """Input of every output projection, ``[1, T, H * head_dim]`` by layer."""
    values: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _m, args: values.append(args[0].clone()))
        for layer in layers_of(model)
    ]
    model.hf(**model.collate([model.encode(example)]))
    for hook in hooks:
        hook.remove()
    return values


@torch.no_grad()
def moved(model: Lvlm, pair: CounterfactualPair, layer: int, head: int, by: float, first: int) -> float:
    """Log-odds in the corrupt run with one head moved a part of the way to the clean run."""
    clean, corrupt = heads_of(model, pair.clean)[layer], heads_of(model, pair.corrupt)[layer]
    columns = slice(head * model.head_dim, (head + 1) * model.head_dim)

    def shift(_module: object, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        z = args[0].clone()
        z[:, first:, columns] += by * (clean - corrupt)[:, first:, columns]
        return (z,)

    hook = layers_of(model)[layer].self_attn.o_proj.register_forward_pre_hook(shift)
    logits = model.hf(**model.collate([model.encode(pair.corrupt)])).logits[0, -1]
    hook.remove()
    return float(difference(model, logits, pair))


@pytest.mark.parametrize("tokens", ["last", "suffix:all"])
def test_estimates_equal_finite_differences(tokens: str) -> None:
    model, pair = precise(), pairs("color")[0]
    estimates = attribution.heads(model, [pair], tokens=tokens, min_effect=0)  # type: ignore[arg-type]
    encoding = model.encode(pair.clean)
    first = encoding.tokens.last if tokens == "last" else max(encoding.tokens.image) + 1
    gap = float(estimates.clean[0] - estimates.corrupt[0])
    for layer, head in ((0, 1), (2, 5), (model.n_layers - 1, 0)):
        step = 2e-2  # norms are computed in float32: smaller steps drown in its rounding
        up, down = (moved(model, pair, layer, head, s, first) for s in (step, -step))
        slope = (up - down) / (2 * step)
        np.testing.assert_allclose(estimates.effects[0, layer, head], slope / gap, rtol=5e-3, atol=1e-4)


@pytest.mark.parametrize("mode", ["denoise", "noise"])
@pytest.mark.parametrize("point", ["run", "source", "path"])
def test_where_the_answer_is_linear_in_a_head_the_estimate_is_the_patch(mode: str, point: str) -> None:
    model = random_model(seed=1)
    text = model.hf.model.language_model
    text.norm = nn.Identity().eval()
    nn.init.zeros_(text.layers[-1].mlp.down_proj.weight)
    options = {"mode": mode, "min_effect": 1e-3}
    exact = patch_heads(model, pairs("color"), tokens="last", **options)  # type: ignore[arg-type]
    estimate = attribution.heads(model, pairs("color"), tokens="last", point=point, **options)  # type: ignore[arg-type]
    if point != "path":  # on the way, what enters the last layer is neither run's, but its read-out is the same
        np.testing.assert_array_equal(estimate.clean, exact.clean)
    np.testing.assert_allclose(estimate.effects[:, -1], exact.effects[:, -1], atol=2e-4)
    assert np.abs(exact.effects[:, -1]).max() > 0.01
    assert np.abs(estimate.effects[:, 0] - exact.effects[:, 0]).max() > 1e-3  # elsewhere it is an estimate


def test_path_averages_equal_explicit_gradients() -> None:
    model, pair = precise(), pairs("color")[1]
    steps = 3
    estimates = attribution.heads(model, [pair], tokens="last", point="path", steps=steps, min_effect=0)
    clean, corrupt = heads_of(model, pair.clean), heads_of(model, pair.corrupt)
    layers = layers_of(model)
    entering: list[torch.Tensor] = []
    for example in (pair.clean, pair.corrupt):
        hook = layers[0].register_forward_pre_hook(lambda _m, args: entering.append(args[0].detach().clone()))
        with torch.no_grad():
            model.hf(**model.collate([model.encode(example)]))
        hook.remove()
    total = [torch.zeros_like(z) for z in clean]
    for k in range(1, steps + 1):
        zs: list[torch.Tensor] = []
        start = (entering[1] + k / steps * (entering[0] - entering[1])).requires_grad_()
        hooks = [layers[0].register_forward_pre_hook(lambda _m, args, x=start: (x, *args[1:]))]
        hooks += [
            layer.self_attn.o_proj.register_forward_pre_hook(lambda _m, args, zs=zs: zs.append(args[0]))
            for layer in layers
        ]
        score = difference(model, model.hf(**model.collate([model.encode(pair.corrupt)])).logits[0, -1], pair)
        for hook in hooks:
            hook.remove()
        total = [t + g for t, g in zip(total, torch.autograd.grad(score, zs), strict=True)]
    gap = float(estimates.clean[0] - estimates.corrupt[0])
    for layer in range(model.n_layers):
        product = ((clean[layer] - corrupt[layer]) * total[layer] / steps)[0, -1]
        truth = product.reshape(model.n_heads, -1).sum(-1).detach().numpy() / gap
        np.testing.assert_allclose(estimates.effects[0, layer], truth, rtol=1e-5, atol=1e-9)


def test_gradient_drop_equals_a_model_with_a_detached_layer() -> None:
    model, pair = precise(), pairs("color")[2]
    estimates = attribution.heads(model, [pair], tokens="last", drop=True, min_effect=0)
    clean, corrupt = heads_of(model, pair.clean), heads_of(model, pair.corrupt)
    layers = layers_of(model)
    total = np.zeros((model.n_layers, model.n_heads))
    for left_out in range(model.n_layers):
        zs: list[torch.Tensor] = []
        stop = [
            part.register_forward_hook(
                lambda _m, _a, out: (out[0].detach(), *out[1:]) if isinstance(out, tuple) else out.detach()
            )
            for part in (layers[left_out].self_attn, layers[left_out].mlp)
        ]
        hooks = [
            layer.self_attn.o_proj.register_forward_pre_hook(lambda _m, args, zs=zs: zs.append(args[0]))
            for layer in layers
        ]
        score = difference(model, model.hf(**model.collate([model.encode(pair.corrupt)])).logits[0, -1], pair)
        for hook in (*stop, *hooks):
            hook.remove()
        slopes = torch.autograd.grad(score, zs, allow_unused=True)
        for layer, slope in enumerate(slopes):
            if slope is not None:
                product = ((clean[layer] - corrupt[layer]) * slope)[0, -1]
                total[layer] += np.abs(product.reshape(model.n_heads, -1).sum(-1).detach().numpy())
    gap = abs(float(estimates.clean[0] - estimates.corrupt[0]))
    np.testing.assert_allclose(estimates.effects[0], total / (model.n_layers - 1) / gap, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("drop", [False, True])
def test_nodes_are_heads_position_by_position(drop: bool) -> None:
    model = shared_model()
    some, options = pairs("color")[:2], {"min_effect": 0, "drop": drop}
    whole = attribution.heads(model, some, tokens="suffix:all", **options)  # type: ignore[arg-type]
    at_once = attribution.nodes(model, some, "z", tokens="suffix:all", **options)  # type: ignore[arg-type]
    assert at_once.sites[9] == "L1.H1"
    np.testing.assert_allclose(at_once.effects[:, 9, 0], whole.effects[:, 1, 1], rtol=1e-4, atol=1e-6)
    assert "estimated from gradients at the run" in at_once.path
    if not drop:
        each = attribution.nodes(model, some, ["z", "mlp_out", "embeddings"], tokens="suffix:each", min_effect=0)
        np.testing.assert_allclose(np.nansum(each.effects[:, :48], -1), whole.effects.reshape(2, -1), atol=1e-4)
        assert len(each.sites) == 48 + 6 + 1
        assert each.sites[-1] == "decoder.L0.resid_pre"


def test_an_embedding_and_an_mlp_have_the_slope_of_the_answer() -> None:
    model, pair = precise(), pairs("color")[0]
    estimates = attribution.nodes(
        model, [pair], ["embeddings", "decoder.L2.mlp_out", "decoder.L2.resid_mid"], tokens="all", min_effect=0
    )
    layers = layers_of(model)
    places = (  # a module, whether its input is the node, and what else has to be moved by as much
        (layers[0], True),
        (layers[2].mlp, False),
        (layers[2].self_attn, False),  # what attention adds makes the stream between attention and MLP
    )
    gap = float(estimates.clean[0] - estimates.corrupt[0])
    entered: list[torch.Tensor] = []
    for number, (module, is_input) in enumerate(places):

        def run(
            example: Example, by: torch.Tensor | float, module: nn.Module = module, is_input: bool = is_input
        ) -> Any:
            values: list[torch.Tensor] = []

            def before(_m: object, args: tuple[Any, ...]) -> Any:
                values.append(args[0])
                return (args[0] + by, *args[1:])

            def after(_m: object, _a: object, out: Any) -> Any:
                x = out[0] if isinstance(out, tuple) else out
                values.append(x)
                return (x + by, *out[1:]) if isinstance(out, tuple) else x + by

            hook = module.register_forward_pre_hook(before) if is_input else module.register_forward_hook(after)
            with torch.no_grad():
                logits = model.hf(**model.collate([model.encode(example)])).logits[0, -1]
            hook.remove()
            return values[0], difference(model, logits, pair)

        if number == 2:  # all of the stream moves, and not only what this layer's attention adds
            hook = layers[2].post_attention_layernorm.register_forward_pre_hook(
                lambda _m, args: entered.append(args[0])
            )
            for example in (pair.clean, pair.corrupt):
                run(example, 0.0)
            hook.remove()
            delta = entered[0] - entered[1]
        else:
            delta = run(pair.clean, 0.0)[0] - run(pair.corrupt, 0.0)[0]
        step = 2e-2  # as above
        up, down = (float(run(pair.corrupt, s * delta)[1]) for s in (step, -step))
        np.testing.assert_allclose(
            estimates.effects[0, number, 0], (up - down) / (2 * step) / gap, rtol=5e-3, atol=1e-4
        )


def test_no_hook_remains_and_pairs_do_not_mix() -> None:
    model = shared_model()
    before = hooks_of(model)
    joint = attribution.heads(model, pairs("color"), tokens="suffix:all", min_effect=0)
    separate = [attribution.heads(model, [pair], tokens="suffix:all", min_effect=0) for pair in pairs("color")]
    np.testing.assert_allclose(
        joint.effects, np.concatenate([scores.effects for scores in separate]), rtol=1e-3, atol=1e-5
    )
    assert hooks_of(model) == before
    assert all(parameter.grad is None for parameter in model.hf.parameters())
    assert joint.provenance["method"] == "attribution patching"


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"tokens": "first"}, SiteError, "unknown token selection 'first'"),
        ({"mode": "up"}, ConfigError, "unknown mode 'up'"),
        ({"point": "middle"}, ConfigError, "unknown point 'middle'"),
        ({"steps": 0}, ConfigError, "steps=0"),
        ({"min_effect": 1e9}, PatchError, "below min_effect"),
    ],
)
def test_a_mistake_is_named(options: dict[str, object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        attribution.heads(shared_model(), pairs("color"), **options)  # type: ignore[arg-type]


def test_attention_without_gradients_is_named() -> None:
    model = random_model(seed=3)

    class Blocked(nn.Module):
        """A projection that gradients do not pass, as kernels for inference alone."""

        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x).detach()

    model.hf.lm_head = Blocked(model.hf.lm_head).eval()
    with pytest.raises(ModelError, match="no gradient reaches"):
        attribution.heads(model, pairs("color"))
