"""Methods whose branch sees a part of the image tokens (SID, AvisC, DAMRO), against the written rules in whole forwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from groundscope.core.errors import ConfigError, ModelError
from lvlm import Lvlm
from mitigation.training_free.method import TrainingFree
from mitigation.training_free.methods.avisc import AvisC, outlying
from mitigation.training_free.methods.damro import DAMRO
from mitigation.training_free.methods.only import ONLY, mixed_logits
from mitigation.training_free.methods.sid import SID, lowest
from tests.toys.attention_oracle import Call, by_hand, plain
from tests.toys.decoding_oracle import naive_steps
from tests.toys.exact_decoding import assert_exact, difference
from tests.toys.examples import example
from tests.toys.families import model
from tests.toys.hidden_state_oracle import appended
from tests.toys.random_models import hooks_of

FAMILIES = ("llava", "qwen2_5_vl", "mistral3")
STEPS = 3


def contrasted(alpha: float, beta: float) -> Callable[[int, Any], Tensor]:
    def combine(_step: int, logits: Any) -> Tensor:
        main, other = logits
        mixed = (1 + alpha) * main - alpha * other
        return mixed.masked_fill(main.softmax(-1) < beta * main.softmax(-1).max(), -math.inf)

    return combine


def assert_rule(
    family: str,
    method: TrainingFree,
    branch: Callable[[Lvlm, dict[str, Tensor]], Any],
    combine: Callable[[int, Any], Tensor],
    weight: float,
) -> None:
    """`branch` returns the inputs of the branch, and a function that opens its changes of the model."""

    def write(lvlm: Lvlm, _question: Any, inputs: dict[str, Tensor]) -> tuple[list[int], list[Tensor]]:
        other, context = branch(lvlm, inputs)
        contexts = [lambda: by_hand(lvlm, plain, 0), context]
        tokens, expected = naive_steps(lvlm, [inputs, other], combine, STEPS, contexts)
        assert difference(expected[0], main_of(lvlm, inputs)) > 1e-3
        return tokens, expected

    assert_exact(family, method, write, STEPS, weight=weight)


def main_of(lvlm: Lvlm, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return lvlm.hf(**inputs, use_cache=False).logits[0, -1].log_softmax(-1)


# ---- SID


def sid_by_hand(count: Callable[[int], int]) -> Callable[[Call], Tensor]:
    sets: dict[int, list[int]] = {}

    def rule(call: Call) -> Tensor:
        if call.layer == 1:
            mean = call.scores.softmax(-1).mean(0)
            image = call.image.nonzero().flatten().tolist()
            for query in call.live:
                sets[query] = sorted(image, key=lambda j, q=query: float(mean[q, j]))[: count(len(image))]
        if call.layer < 2:
            return call.plain
        scores = call.scores.clone()
        for query in range(scores.shape[1]):
            stays = sets[max(query, call.prompt - 1)]
            for key in call.image.nonzero().flatten().tolist():
                if key not in stays:
                    scores[:, query, key] = -math.inf
        return scores.softmax(-1) @ call.values

    return rule


@pytest.mark.parametrize(("variant", "beta"), [("paper", 0.1), ("paper", 0), ("release", 0)])
@pytest.mark.parametrize("family", FAMILIES)
def test_sid_is_the_written_rule(family: str, variant: Any, beta: float) -> None:
    def branch(lvlm: Lvlm, inputs: dict[str, Tensor]) -> Any:
        rule = sid_by_hand(lambda n: max(1, math.floor(200 / 576 * n + 0.5)))
        return dict(inputs), lambda: by_hand(lvlm, rule, inputs["input_ids"].shape[1])

    combine = contrasted(1 if variant == "paper" else 0.5, beta)
    assert_rule(family, SID(count=200, beta=beta, variant=variant), branch, combine, 1)


def test_the_lowest_image_tokens_stay() -> None:
    weights = torch.tensor([[[0.1, 0.4, 0.3, 0.2]]])
    image = torch.tensor([[[False, True, True, True]]])
    assert lowest(weights, image, torch.tensor([2])).tolist() == [[[False, False, True, True]]]


# ---- AvisC


def outliers_by_hand(weights: Tensor, image: Tensor) -> list[int]:
    """From head means of the last query ``[layers, n]`` to the positions of the image tokens that stay."""
    sums = weights[:, image].sum(-1)
    shares = (sums / sums.sum()).tolist()
    chosen, total = [], 0.0
    for layer in sorted(range(len(shares)), key=lambda i: -shares[i]):
        chosen.append(layer)
        total += shares[layer]
        if total >= 0.5:
            break
    mean = torch.stack([weights[layer] for layer in chosen]).mean(0)
    values = mean[image]
    threshold = values.mean() + (((values - values.mean()) ** 2).sum() / (len(values) - 1)).sqrt()
    return [j for j in image.nonzero().flatten().tolist() if mean[j] >= threshold]


@contextmanager
def zeroed(lvlm: Lvlm, positions: list[int]) -> Iterator[None]:
    def before(_m: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        x = kwargs["inputs_embeds"].clone()
        x[:, positions] = 0
        return args, {**kwargs, "inputs_embeds": x}

    handle = lvlm.hf.model.language_model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("beta", [0.1, 0])
@pytest.mark.parametrize("family", FAMILIES)
def test_avisc_is_the_written_rule(family: str, beta: float) -> None:
    def branch(lvlm: Lvlm, inputs: dict[str, Tensor]) -> Any:
        weights: dict[int, Tensor] = {}

        def read(call: Call) -> Tensor:
            weights[call.layer] = call.scores.softmax(-1)[:, -1].mean(0)
            return call.plain

        with torch.no_grad(), by_hand(lvlm, read, 0):
            lvlm.hf(**inputs, use_cache=False)
        image = inputs["input_ids"][0] == lvlm.content_id
        stays = outliers_by_hand(torch.stack([weights[i] for i in range(3)]), image)
        assert 0 < len(stays) < int(image.sum())
        return dict(inputs), lambda: zeroed(lvlm, [j for j in image.nonzero().flatten().tolist() if j not in stays])

    assert_rule(family, AvisC(2.5, beta), branch, contrasted(2.5, beta), 2.5)


def test_outlying_tokens_of_hand_made_attention() -> None:
    image = torch.tensor([[False, True, True, True, True]])
    concentrated = [0.1, 0.0, 0.0, 0.0, 0.9]
    weights = torch.tensor([[[0.9, 0.1, 0.0, 0.0, 0.0], concentrated]])
    assert outlying(weights, image, 0.5, 1).tolist() == [[False, False, False, False, True]]
    # Both layers: mean .05, 0, 0, .45; its mean is .125 and its deviation .218.
    assert outlying(weights, image, 1, 1.5).tolist() == [[False] * 5]
    assert outlying(weights, image, 1, 1.4).tolist() == [[False] * 4 + [True]]


# ---- DAMRO


@pytest.mark.parametrize("variant", ["paper", "release"])
def test_damro_is_the_written_rule(variant: Any) -> None:
    def branch(lvlm: Lvlm, inputs: dict[str, Tensor]) -> Any:
        # The toy's projector reads the output of the last of two blocks.
        block = lvlm.hf.model.vision_tower.encoder.layers[1]
        record: dict[str, Tensor] = {}
        hook = block.layer_norm1.register_forward_hook(lambda _m, _a, out: record.__setitem__("x", out[0]))
        with torch.no_grad():
            lvlm.hf(**inputs, use_cache=False)
            hook.remove()
            q, k = (getattr(block.self_attn, f"{name}_proj")(record["x"]) for name in "qk")
        heads = 1 if variant == "release" else lvlm.n_vision_heads
        width = q.shape[-1] // heads
        means = torch.zeros(len(k), dtype=torch.float64)
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            means += (k[:, part] @ q[0, part] / math.sqrt(width)).softmax(-1) / heads
        patches = means[1:]
        order = patches.argsort(descending=True).tolist()[: max(1, math.floor(300 / 576 * len(patches) + 0.5))]
        chosen = order if variant == "release" else sorted(order)
        ids = inputs["input_ids"][0].tolist()
        first = ids.index(lvlm.content_id)
        text = [i for i in ids if i != lvlm.content_id]
        tokens = torch.tensor([[*text[:first], *[lvlm.content_id] * len(chosen), *text[first:]]])
        assert 1 < len(chosen) < len(patches)

        @contextmanager
        def selected() -> Iterator[None]:
            projector = lvlm.hf.model.multi_modal_projector
            handle = projector.register_forward_hook(lambda _m, _a, out: out[:, chosen])
            try:
                yield
            finally:
                handle.remove()

        return {**inputs, "input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, selected

    combine = contrasted(2, 0.1) if variant == "paper" else contrasted(2, 0)
    assert_rule("llava", DAMRO(count=300, variant=variant), branch, combine, 2)


@pytest.mark.parametrize(
    ("family", "problem"),
    [
        ("qwen2_5_vl", "class token, and qwen2_5_vl .* has none"),
        ("llava_next", "patches of one image, and those of llava_next"),
        ("blip2_opt", "patches of one image"),
        ("mllama", "DAMRO acts on image tokens of the decoder.*cross-attention"),
    ],
)
def test_families_without_a_class_token_or_single_patches_are_refused_by_damro(family: str, problem: str) -> None:
    with pytest.raises(ModelError, match=problem):
        DAMRO().check(model(family))


# ---- ONLY


def only_by_hand(lvlm: Lvlm, inputs: dict[str, Tensor], threshold: float, beta: float) -> Tensor:
    """The rule's logits ``[V]`` after one whole forward."""
    record: dict[str, Tensor] = {}
    layers = lvlm.hf.model.language_model.layers
    image = inputs["input_ids"][0] == lvlm.content_id
    text = ~image
    text[0] = False

    def read(call: Call) -> Tensor:
        if call.layer == 0:
            weights = call.scores.softmax(-1)[:, -1].clone()
            for h in range(len(weights)):
                for part in (text, image):
                    values = weights[h][part]
                    large = part & (weights[h] > values.mean() + values.std())
                    weights[h, large] = 0
            ratios = []
            for h in range(len(weights)):
                p, q = (weights[h][part] / weights[h][part].sum() for part in (text, image))
                ratios.append(float(-torch.xlogy(p, p).sum() / -torch.xlogy(q, q).sum()))
            for h in range(len(weights)):
                if ratios[h] < sum(ratios) / len(ratios):
                    weights[h] = 0
            record["heads"] = torch.cat([weights[h] @ call.values[h] for h in range(len(weights))])
        return call.plain

    def entering(_m: Any, args: Any, kwargs: Any) -> None:
        record["h"] = (args[0] if args else kwargs["hidden_states"])[0, -1]

    def leaving(_m: Any, _a: Any, out: Any) -> None:
        record["h_L"] = (out[0] if isinstance(out, tuple) else out)[0, -1]

    hooks = [
        layers[-1].register_forward_pre_hook(entering, with_kwargs=True),
        layers[-1].register_forward_hook(leaving),
    ]
    with torch.no_grad(), by_hand(lvlm, read, 0):
        main = lvlm.hf(**inputs, use_cache=False).logits[0, -1]
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        last, norm = layers[-1], lvlm.hf.model.language_model.norm
        u = layers[0].self_attn.o_proj(record["heads"])
        u = last.input_layernorm(u) + 0.2 * record["h"]
        u = u + last.mlp(last.post_attention_layernorm(u))
        other = lvlm.hf.lm_head(norm(u) + 0.5 * norm(record["h_L"]))
    distance = (main.softmax(-1) - other.softmax(-1)).abs().sum()
    mixed = main + 3 * other if distance < threshold else 2 * main - other
    return mixed.masked_fill(main.softmax(-1) < beta * main.softmax(-1).max(), -math.inf)


@pytest.mark.parametrize(("threshold", "beta"), [(0.2, 0.1), (2, 0.1), (0.2, 0)])
@pytest.mark.parametrize("family", FAMILIES)
def test_only_is_the_written_rule(family: str, threshold: float, beta: float) -> None:
    def write(lvlm: Lvlm, _question: Any, inputs: dict[str, Tensor]) -> tuple[list[int], list[Tensor]]:
        tokens: list[int] = []
        scores: list[Tensor] = []
        for _ in range(STEPS):
            scores.append(only_by_hand(lvlm, inputs, threshold, beta))
            tokens.append(int(scores[-1].argmax()))
            inputs = appended(inputs, tokens[-1])
        return tokens, scores

    # Heads of layer 0 are those of the prompts' rows, which decode without branches, so nothing is padded.
    assert_exact(family, ONLY(threshold=threshold, beta=beta), write, STEPS, forms=("cached", "whole"), weight=3)


def test_only_adds_where_distributions_are_close() -> None:
    logits, other = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.1], [-3.0, 3.0]])
    mixed = mixed_logits(logits, other, 3, 1, 0.2, 0)
    torch.testing.assert_close(mixed, torch.tensor([[4.0, 0.3], [5.0, -3.0]]))


def test_only_refuses_layers_of_another_form() -> None:
    with pytest.raises(ModelError, match=r"ONLY runs the last layer of decoders in the form of LLaMA.*gemma3"):
        ONLY().check(model("gemma3"))
    with pytest.raises(ModelError, match=r"ONLY runs the last layer of decoders in the form of LLaMA.*blip2_opt"):
        ONLY().check(model("blip2_opt"))


# ---- all


METHODS = [SID(), AvisC(), DAMRO(), ONLY()]


@pytest.mark.parametrize(
    "method",
    [SID(alpha=0, beta=0), AvisC(alpha=0, beta=0), DAMRO(alpha=0, beta=0), ONLY(0, 0, beta=0)],
    ids=lambda m: m.label,
)
def test_neutral_parameters_leave_the_model_alone(method: TrainingFree) -> None:
    lvlm = model("llava")
    batch = next(lvlm.batches([example(0), example(1)], 2))
    before, written = lvlm.answer_logits(batch), lvlm.generate_batch(batch, 4)
    with method.applied(lvlm):
        assert torch.equal(lvlm.answer_logits(batch), before)
        assert lvlm.generate_batch(batch, 4) == written


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.label)
def test_the_model_is_unchanged_after_the_context_and_after_an_error(method: TrainingFree) -> None:
    lvlm = model("llava")
    batch = next(lvlm.batches([example(0)], 1))
    before = lvlm.attention, hooks_of(lvlm), lvlm.logits(batch.inputs)
    with method.applied(lvlm):
        lvlm.generate_batch(batch, 2)
        assert [record.name for record in lvlm.interventions] == [method.name]
        assert lvlm.unregistered_hooks == ()
    with pytest.raises(RuntimeError), method.applied(lvlm):
        raise RuntimeError
    assert (lvlm.attention, hooks_of(lvlm)) == before[:2]
    assert torch.equal(lvlm.logits(batch.inputs), before[2])


def test_families_that_lack_what_a_method_needs_are_refused() -> None:
    for method in (SID(), AvisC()):
        with pytest.raises(ModelError, match=f"{method.label} acts on image tokens.*cross-attention"):
            method.check(model("mllama"))
    with pytest.raises(ModelError, match=r"AvisC changes embeddings of the image, and in chameleon .* entries"):
        AvisC().check(model("chameleon"))
    with pytest.raises(ConfigError, match="count=0: must be a whole number of at least 1"):
        SID(count=0)
