"""Published derivations find a direction that was planted, where everything else differs by a twelfth of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from concepts.schema import Example
from lvlm import Head, Site
from mitigation import Contrast, SteeringVector, derive
from tests.toys.random_models import capture, examples, layers_of, pairs, shared_model

TIMES = 12
"""What is planted is so many times as long as what differs anyway."""
LAYER = 4


def random_unit(size: int, seed: int = 2) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal(size)
    return x / np.sqrt((x**2).sum())


@contextmanager
def planted(
    module: Any, push: np.ndarray, when: Callable[[Mapping[str, Any]], torch.Tensor], *, before: bool = False
) -> Iterator[None]:
    """A shared model in which a module's output, or input, is pushed in the rows of a batch that `when` picks."""
    flags: dict[str, torch.Tensor] = {}
    pushed = torch.tensor(push, dtype=torch.float32)

    def look(_m: Any, _a: Any, kwargs: Any) -> None:
        flags["rows"] = when(kwargs)

    def moved(x: torch.Tensor) -> torch.Tensor:
        return x + flags["rows"][:, None, None] * pushed

    hooks = [shared_model().hf.register_forward_pre_hook(look, with_kwargs=True)]
    if before:
        hooks.append(module.register_forward_pre_hook(lambda _m, args: (moved(args[0]),)))
    else:
        hooks.append(module.register_forward_hook(lambda _m, _a, out: moved(out)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def has_image_content(kwargs: Mapping[str, Any]) -> torch.Tensor:
    """Rows whose picture is not blank."""
    return kwargs["pixel_values"].flatten(2).std(-1).amax(1) > 1e-3


def typical_length(rows: Sequence[np.ndarray]) -> float:
    return float(np.sqrt(np.mean([(r**2).sum(-1).mean() for r in rows])))


def at_last(side: Sequence[Example], part: str, layer: int) -> np.ndarray:
    model = shared_model()
    return np.stack([capture(model, model.encode(e).inputs)[part][layer, -1] for e in side])


def test_ict_finds_the_planted_head_and_its_direction() -> None:
    model, data, head = shared_model(), pairs("blank"), Head(LAYER, 5)
    direction = random_unit(model.head_dim)
    columns = slice(head.head * model.head_dim, (head.head + 1) * model.head_dim)
    clean, corrupt = (
        at_last(side, "z", LAYER)[:, columns] for side in ([p.clean for p in data], [p.corrupt for p in data])
    )
    push = np.zeros(model.n_heads * model.head_dim)
    push[columns] = TIMES * typical_length([clean - corrupt]) * direction
    heads = [Head(LAYER, k) for k in range(model.n_heads)]
    with planted(layers_of(model)[LAYER].self_attn.o_proj, push, has_image_content, before=True):
        steering = derive.ict(Contrast.from_pairs(model, data), heads=heads, top=model.n_heads)
    assert steering.changes[head].direction @ direction >= 0.99
    without = derive.ict(Contrast.from_pairs(model, data), heads=heads, top=model.n_heads)
    assert without.changes[head].direction @ direction < 0.9


def test_vti_text_finds_what_correct_captions_have() -> None:
    model = shared_model()
    captions = (("a red apple", "a green apple"), ("a blue car", "a dog"), ("a dog", "a cat"), ("a red car", "a bus"))
    right = [f"{a} red" for a, _ in captions]
    shows = [
        derive.Demonstration(e, a, f"{b} green") for e, a, (_, b) in zip(examples(4), right, captions, strict=True)
    ]
    word = model.processor.tokenizer("red", add_special_tokens=False)["input_ids"][-1]
    natural = derive.vti_text(model, shows, layers=[LAYER])
    length = typical_length([at_last([d.example for d in shows], "resid_post", LAYER)])
    direction = random_unit(model.width)
    assert abs(float(natural.changes[Site("decoder", LAYER, "mlp_out")].direction @ direction)) < 0.5
    # Longer than the whole stream at that place, so also than what captions differ by.
    with planted(layers_of(model)[LAYER], TIMES * length * direction, lambda k: k["input_ids"][:, -1] == word):
        steering = derive.vti_text(model, shows, layers=[LAYER])
    assert steering.changes[Site("decoder", LAYER, "mlp_out")].direction @ direction >= 0.99


def test_vti_vision_finds_what_masked_images_have_at_every_token() -> None:
    model, chosen, layer = shared_model(), examples(3), 2
    deviations = [model.encode(e).inputs["pixel_values"].std().item() for e in chosen]
    width = model.output_projection("vision", 0).out_features
    direction = random_unit(width)
    tower = model.place("vision", layer, "resid_post").module
    length: list[np.ndarray] = []
    hook = tower.register_forward_hook(lambda _m, _a, out: length.append(out.double().numpy()))
    natural = derive.vti_vision(model, chosen, layers=[layer], copies=3)
    hook.remove()
    push = TIMES * typical_length(length) * direction

    def masked(kwargs: Mapping[str, Any]) -> torch.Tensor:
        return kwargs["pixel_values"].flatten(1).std(-1) < 0.5 * min(deviations)

    with planted(tower, push, masked):
        steering = derive.vti_vision(model, chosen, layers=[layer], copies=3)
    site = Site("vision", layer, "mlp_out")
    assert steering.changes[site].direction.shape == natural.changes[site].direction.shape
    assert (steering.changes[site].direction @ direction).min() >= 0.99
    assert (natural.changes[site].direction @ direction).max() < 0.9


def vsv() -> SteeringVector:
    return derive.vsv(shared_model(), examples()[0], layers=[LAYER])


def away() -> SteeringVector:
    return derive.project_away(shared_model(), "apple", layers=[LAYER])


@pytest.mark.parametrize("make", [vsv, away])
def test_vista_and_project_away_find_what_image_or_word_leaves(make: Callable[[], SteeringVector]) -> None:
    model = shared_model()
    direction = random_unit(model.width)
    natural = make()
    length = (
        natural.changes[LAYER].sigma if make is vsv else typical_length([at_last(examples(2), "resid_post", LAYER)])
    )

    def rows(kwargs: Mapping[str, Any]) -> torch.Tensor:
        active = ("pixel_values" in kwargs) == (make is vsv)
        return torch.full((len(kwargs["input_ids"]),), active)

    with planted(layers_of(model)[LAYER], TIMES * length * direction, rows):
        steering = make()
    assert steering.changes[LAYER].direction @ direction >= 0.99
    assert abs(float(natural.changes[LAYER].direction @ direction)) < 0.5
