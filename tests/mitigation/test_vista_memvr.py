"""VISTA and MemVR against the written formulas, with whole uncached forwards in float64 and plain torch hooks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize, silu

import groundscope as gs
from groundscope.core.errors import ConfigError, ModelError
from lvlm import wrap_lvlm
from lvlm.decoding.loop import generate, merges_caches
from mitigation.training_free.methods.memvr import MemVR, scaled_addition, uncertainty
from mitigation.training_free.methods.vista import VISTA, away_from_blindness, steered, with_equal_length
from tests.toys.answers import assert_equal_answers
from tests.toys.decoding_oracle import double_model, text_only
from tests.toys.exact_decoding import EXACT, assert_exact
from tests.toys.examples import example
from tests.toys.families import L, at, build_new, model
from tests.toys.float64 import float64_inside
from tests.toys.hidden_state_oracle import doubled, naive_answer, norm_and_head, whole_pass
from tests.toys.random_models import hooks_of

FAMILIES = ("llava", "qwen2_5_vl", "gemma3")
STEPS = 4


@contextmanager
def hooked(modules: dict[Any, Any], *, before: dict[Any, Any] | None = None) -> Iterator[None]:
    """Replace the outputs of modules by functions of their input and output, and watch the inputs of others."""
    with ExitStack() as stack:
        for module, change in modules.items():

            def hook(_m: Any, args: Any, out: Any, change: Any = change) -> Any:
                x = args[0] if args else None
                new = change(x, out[0] if isinstance(out, tuple) else out)
                return new if not isinstance(out, tuple) or new is None else (new, *out[1:])

            stack.callback(module.register_forward_hook(hook).remove)
        for module, read in (before or {}).items():
            stack.callback(
                module.register_forward_pre_hook(
                    lambda _m, a, kw, read=read: read(a[0] if a else kw["hidden_states"]), with_kwargs=True
                ).remove
            )
        yield


# ---- VISTA


def vectors_of(lvlm: Any, inputs: Any) -> list[Tensor]:
    image = whole_pass(lvlm, doubled(lvlm, inputs)).streams
    blind = whole_pass(lvlm, text_only(lvlm, inputs)).streams
    return [a[-1] - b[-1] for a, b in zip(image[1:], blind[1:], strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", ["paper", "release"])
def test_vista_is_the_written_rule(family: str, variant: Any) -> None:
    strength, gamma = 0.7, 0.4
    method = VISTA(strength=strength, gamma=gamma, layers=(1, 2), variant=variant)

    def write(lvlm: Any, _question: Any, inputs: Any) -> tuple[list[int], list[Tensor]]:
        layers, (_, head) = at(lvlm.hf, L), norm_and_head(lvlm)
        vectors, length = vectors_of(lvlm, inputs), inputs["input_ids"].shape[1]
        if variant == "release":
            vectors[0] = vectors[0] + torch.eye(len(vectors[0]), dtype=torch.float64)[0]

        def at_block(v: Tensor) -> Any:
            def change(_x: Tensor, h: Tensor) -> Tensor:
                h = h.clone()
                live = h[:, length - 1 :]
                h[:, length - 1 :] = live.norm(dim=-1, keepdim=True) * normalize(live + strength * v, dim=-1)
                return h

            return change

        def at_mlp(v: Tensor) -> Any:
            def change(_x: Tensor, m: Tensor) -> Tensor:
                away = 1 + cosine_similarity(m, -v.expand_as(m), dim=-1)[..., None].clamp_min(0)
                return m.norm(dim=-1, keepdim=True) * normalize(
                    normalize(m, dim=-1) + strength * away * normalize(v, dim=0), dim=-1
                )

            return change

        if variant == "paper":
            changes = {layer: at_block(v) for layer, v in zip(layers, vectors, strict=True)}
        else:  # what Gemma 3 adds to the residual stream is the norm after the MLP
            norm = "post_feedforward_layernorm" if family == "gemma3" else "mlp"
            changes = {getattr(layer, norm): at_mlp(v) for layer, v in zip(layers, vectors, strict=True)}

        def rule(_step: int, p: Any) -> Tensor:
            return (1 - gamma) * p.logits + gamma * (head(p.streams[2][-1]) + head(p.streams[3][-1])) / 2

        return naive_answer(lvlm, inputs, rule, STEPS, lambda: hooked(changes))

    # The vectors are those of the prompts' rows, which decode without branches, so nothing is padded.
    assert_exact(family, method, write, STEPS, forms=("cached", "whole"))


@pytest.mark.parametrize("variant", ["paper", "release"])
@float64_inside()
def test_cached_steps_of_vista_have_the_logits_of_whole_passes(variant: Any) -> None:
    from lvlm.decoding.decoder import AnswerRule, Step

    lvlm = double_model("qwen2_5_vl")
    batch = next(lvlm.batches([example(0), example(1)], 2))
    merged: list[Tensor] = []

    class Reads(AnswerRule):
        def combine(self, step: Step) -> Tensor:
            merged.append(step.logits)
            return step.logits

    with steered(lvlm, batch, 0.5, variant):
        answers = generate(lvlm, batch, Reads(), STEPS, ends=False)
        for number in range(STEPS):
            inputs = dict(batch.inputs)
            written = torch.tensor([answer[:number] for answer in answers], dtype=torch.long)
            inputs["input_ids"] = torch.cat([inputs["input_ids"], written], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(written)], 1)
            with lvlm.reading_answers(batch.inputs["input_ids"].shape[1]):
                whole = lvlm.logits(inputs)
            torch.testing.assert_close(merged[number].log_softmax(-1), whole.log_softmax(-1), atol=EXACT, rtol=0)


@pytest.mark.parametrize("method", [VISTA(), MemVR(threshold=0)], ids=lambda m: m.label)
def test_the_check_of_a_cache_does_not_depend_on_the_method_under_which_it_is_measured(method: Any) -> None:
    """The hooks of both belong to the rows of one batch, and the check has other rows."""
    lvlm = wrap_lvlm(*build_new("llava"), name="new", validate=False)
    batch = next(lvlm.batches([example(0), example(1)], 2))
    with method.applied(lvlm):
        answers = lvlm.decoder.generate(lvlm, batch, STEPS)  # type: ignore[union-attr]
        assert merges_caches(lvlm)
        assert lvlm.decoder.generate(lvlm, batch, STEPS) == answers  # type: ignore[union-attr]


def test_steering_rules_on_numbers_by_hand() -> None:
    x, v = torch.tensor([[[3.0, 0.0]]]), torch.tensor([[[0.0, 2.0]]])
    torch.testing.assert_close(with_equal_length(x, v, 2.0), torch.tensor([[[9 / 5, 12 / 5]]]))
    half = math.sqrt(1.25)
    torch.testing.assert_close(away_from_blindness(x, v, 0.5), torch.tensor([[[3 / half, 1.5 / half]]]))
    opposite = away_from_blindness(torch.tensor([[[0.0, -3.0]]]), v, 0.25)  # twice as strong: -1 + 2 * .25
    torch.testing.assert_close(opposite, torch.tensor([[[0.0, -3.0]]]))


def test_vista_without_strength_and_logits_of_blocks_is_the_model_alone() -> None:
    lvlm, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10)[:20]
    plain = gs.answer(lvlm, data)
    with VISTA(strength=0, gamma=0).applied(lvlm):
        assert lvlm.decoder is None
        assert_equal_answers(gs.answer(lvlm, data), plain)
    double, batch = double_model("llava"), next(double_model("llava").batches([example(0)], 1))
    with VISTA(strength=1e-12, gamma=1e-12).applied(double):
        forced = double.answer_logits(batch)
    torch.testing.assert_close(forced, double.logits(batch.inputs), atol=1e-5, rtol=0)


def test_vista_refuses_families_that_do_not_run_without_an_image() -> None:
    with pytest.raises(ModelError, match="VISTA compares with the prompt without its image, and kosmos2"):
        VISTA().check(model("kosmos2"))
    with pytest.raises(ModelError, match="VISTA acts on image tokens"):
        VISTA().check(model("mllama"))


# ---- MemVR


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", ["paper", "release"])
@pytest.mark.parametrize("threshold", [0.0, 0.93])
def test_memvr_is_the_written_rule(family: str, variant: Any, threshold: float) -> None:
    method = MemVR(ratio=0.5, threshold=threshold, layers=(0, 1), variant=variant)
    fired: list[int] = []

    def write(lvlm: Any, _question: Any, inputs: Any) -> tuple[list[int], list[Tensor]]:
        layers, (norm, head) = at(lvlm.hf, L), norm_and_head(lvlm)
        length, state = inputs["input_ids"].shape[1], {}
        image = (inputs["input_ids"][0] == lvlm.content_id).nonzero().flatten()

        def start(x: Tensor) -> None:
            state.update(z=x[0, image], done=set(), now=[])

        def measure(_x: Any, h: Tensor) -> None:
            state["now"] = []
            for position in range(length - 1, h.shape[1]):
                top = head(norm(h[0, position])).sort(descending=True).values[:10].softmax(-1)
                if position not in state["done"] and -(top * top.log()).sum() / math.log(10) > threshold:
                    state["done"].add(position)
                    state["now"].append(position)
                    fired.append(position)

        def look(x: Tensor, out: Tensor) -> Tensor:
            new, z = out.clone(), state["z"]
            phi = silu if family != "gemma3" else lvlm.hf.model.language_model.layers[0].mlp.act_fn
            for position in state["now"]:
                if variant == "paper":
                    added = sum(phi(x[0, position] @ zi) * zi for zi in z)
                    new[0, position] = 0.5 * out[0, position] + 0.5 * added
                else:
                    part = slice(0, length) if position == length - 1 else slice(position, position + 1)
                    added = torch.stack([sum((t @ zi) * zi for zi in z) for t in x[0, part]])  # type: ignore[arg-type]
                    scale = out[0, part].abs().mean() / added.abs().mean()
                    new[0, part] = 0.5 * out[0, part] + 0.5 * scale * added
            return new

        changes = {layers[0]: measure, layers[1]: measure, layers[1].mlp: look, layers[2].mlp: look}

        def context() -> Any:
            return hooked(changes, before={layers[0]: start})

        return naive_answer(lvlm, inputs, lambda _, p: p.logits, STEPS, context)

    # The memory is that of the prompts' rows, which decode without branches, so nothing is padded.
    assert_exact(family, method, write, STEPS, forms=("cached", "whole"))
    assert fired


def test_memvr_changes_passes_outside_of_answers_at_the_last_token_only() -> None:
    lvlm = double_model("llava")
    batch = next(lvlm.batches([example(0)], 1))
    site = "decoder.L1.resid_post"
    plain = lvlm.read(batch.inputs, [site])[site]
    with MemVR(threshold=0, layers=(0,)).applied(lvlm):
        changed = lvlm.read(batch.inputs, [site])[site]
    assert torch.equal(plain[:, :-1], changed[:, :-1])
    assert not torch.allclose(plain[:, -1], changed[:, -1])


def test_memvr_above_the_largest_uncertainty_and_without_ratio_is_the_model_alone() -> None:
    lvlm, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10)[:20]
    plain = gs.answer(lvlm, data)
    for method in (MemVR(ratio=0), MemVR(threshold=1.1)):
        with method.applied(lvlm):
            margins = [a.margin for a in gs.answer(lvlm, data).answers]
        assert margins == pytest.approx([a.margin for a in plain.answers], abs=1e-4)


def test_uncertainty_and_scale_on_numbers_by_hand() -> None:
    logits = torch.tensor([0.7, 0.2, 0.1, 1e-9]).log()
    p = [7 / 9, 2 / 9]
    expected = -sum(x * math.log(x) for x in p) / math.log(2)
    assert float(uncertainty(logits, 2)) == pytest.approx(expected, abs=1e-6)
    scaled = scaled_addition(torch.tensor([4.0, -8.0]), torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(scaled, torch.tensor([1.0, -2.0]))


def test_memvr_refuses_families_by_name() -> None:
    with pytest.raises(ModelError, match=r"blip2_opt .* it is no separate module"):
        MemVR().check(model("blip2_opt"))
    with pytest.raises(ModelError, match="MemVR acts on image tokens"):
        MemVR().check(model("florence2"))


# ---- both


@pytest.mark.parametrize("method", [VISTA(), VISTA(variant="release"), MemVR(threshold=0)])
def test_hooks_are_gone_after_the_context_and_after_an_error(method: Any) -> None:
    lvlm = model("llava")
    batch = next(lvlm.batches([example(0)], 1))
    before, plain = hooks_of(lvlm), lvlm.logits(batch.inputs)
    with method.applied(lvlm):
        lvlm.answer_logits(batch)

    def fail(*_: Any) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError), method.applied(lvlm), hooked({lvlm.layers("decoder")[1]: fail}):
        lvlm.answer_logits(batch)
    assert hooks_of(lvlm) == before
    assert torch.equal(lvlm.logits(batch.inputs), plain)
    assert lvlm.decoder is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VISTA(strength=-1), "strength=-1: must be a number at least 0"),
        (lambda: VISTA(gamma=1.5), "gamma=1.5: must be a number at least 0 and at most 1"),
        (lambda: VISTA(variant="code"), "unknown variant 'code'"),  # type: ignore[arg-type]
        (lambda: MemVR(ratio=2), "ratio=2: must be"),
        (lambda: MemVR(top_k=1), "top_k=1: must be a whole number of at least 2"),
        (lambda: MemVR(threshold=-0.1), "threshold=-0.1: must be"),
    ],
)
def test_parameters_out_of_range_are_named(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
