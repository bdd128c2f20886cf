"""Attention to the image against weights computed by hand, and that nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from circuits import attention_to_image
from concepts.annotated_object import Box
from concepts.schema import Example
from groundscope.core.errors import DataError, ModelError, SiteError
from lvlm import Head
from lvlm.model import Lvlm
from tests.toys.random_models import examples, hooks_of, layers_of, random_model, shared_model

HEADS = (Head(4, 1), Head(0, 7), Head(4, 0))


@torch.no_grad()
def by_hand(model: Lvlm, example: Example, head: Head) -> np.ndarray:
    """Softmax of rotated queries and keys, from the layer's own projections, float64 ``[T]``."""
    states: list[torch.Tensor] = []
    attention = layers_of(model)[head.layer].self_attn
    hook = attention.register_forward_pre_hook(lambda _m, _a, kw: states.append(kw["hidden_states"]), with_kwargs=True)
    model.logits(model.encode(example).inputs)
    hook.remove()
    x = states[0][0].double()
    dim = model.head_dim
    q, k = (
        (x @ projection.weight.double().T)[:, head.head * dim : (head.head + 1) * dim]
        for projection in (attention.q_proj, attention.k_proj)
    )
    angle = torch.arange(len(x)).double()[:, None] / 10000 ** (torch.arange(0, dim, 2).double() / dim)

    def rotate(v: torch.Tensor) -> torch.Tensor:
        a, b = v[:, : dim // 2], v[:, dim // 2 :]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=1)

    return ((rotate(q) @ rotate(k).T)[-1] / dim**0.5).softmax(-1).numpy()


def test_weights_against_a_computation_by_hand() -> None:
    model = shared_model()
    data = examples()[:5]
    attention = attention_to_image(model, data, HEADS, batch_size=2)
    assert attention.heads == HEADS
    assert attention.maps.shape == (5, 3, 49)
    assert attention.maps.dtype == np.float32
    assert attention.grid == (7, 7)
    for i, example in enumerate(data):
        tokens = model.encode(example).tokens
        for j, head in enumerate(HEADS):
            weights = by_hand(model, example, head)
            np.testing.assert_allclose(attention.maps[i, j], weights[list(tokens.image)], atol=1e-5)
            assert attention.image_mass[i, j] == pytest.approx(weights[list(tokens.image)].sum(), abs=1e-5)
            if tokens.subject is None:
                assert np.isnan(attention.box_mass[i, j])
            else:
                assert attention.box_mass[i, j] == pytest.approx(
                    weights[list(tokens.object(tokens.subject))].sum(), abs=1e-5
                )
    assert np.isnan(attention.box_mass[3]).all()
    assert np.isfinite(attention.box_mass[[0, 1, 2, 4]]).all()


@pytest.mark.parametrize("setting", ["sdpa", "eager"])
def test_no_other_forward_is_affected(setting: str) -> None:
    model = random_model()
    model.hf.set_attn_implementation({"text_config": setting, "vision_config": "sdpa"})
    example = examples()[0]
    plain = model.logits(model.encode(example).inputs)

    def settings() -> list[str]:
        return [m.config._attn_implementation for m in model.hf.modules() if hasattr(m, "config")]

    before = settings()
    attention_to_image(model, [example], HEADS)
    assert settings() == before
    assert hooks_of(model) == 0
    assert torch.equal(model.logits(model.encode(example).inputs), plain)
    broken = replace(example, question="<image> <image>?")
    with pytest.raises(DataError):
        attention_to_image(model, [broken], HEADS)
    assert settings() == before
    assert hooks_of(model) == 0


def test_attention_that_gives_no_weights_is_named() -> None:
    model = random_model()
    attention = layers_of(model)[4].self_attn
    forward = attention.forward
    attention.forward = lambda *args, **kwargs: (forward(*args, **kwargs)[0], None)
    with pytest.raises(ModelError, match="returns no attention weights"):
        attention_to_image(model, examples()[:1], HEADS)


def test_invalid_arguments_are_refused() -> None:
    model = shared_model()
    for heads in ([Head(6, 0)], [Head(0, 8)], []):
        with pytest.raises(SiteError, match="6 layers of 8 heads"):
            attention_to_image(model, examples()[:1], heads)
    with pytest.raises(DataError, match="examples is empty"):
        attention_to_image(model, [], HEADS)


def test_an_object_outside_the_image_has_no_mass() -> None:
    example = examples()[0]
    outside = replace(example, objects=(replace(example.objects[0], box=Box(500, 500, 520, 520)), *example.objects[1:]))
    attention = attention_to_image(shared_model(), [outside], HEADS)
    np.testing.assert_array_equal(attention.box_mass, 0)
