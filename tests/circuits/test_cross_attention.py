"""Heads that read the image by cross-attention, and decoders of one token: the same as raw hooks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from activation_store import trace
from circuits import HeadSet, ablate, head_table, patch
from circuits.execution.conditions import logits_under
from concepts import ConceptDataset
from concepts.schema import Example
from groundscope.core.errors import GroundscopeError, ModelError, PatchError, SiteError
from lvlm import Head, Lvlm
from mitigation import Contrast, SteeringVector, derive, export
from mitigation.steering.changes import AddChange
from tests.toys.families import model
from tests.toys.patching_oracle import naive, pair_of, projections

READ_ELSEWHERE = ("mllama", "instructblip_t5", "florence2")


@torch.no_grad()
def hooked(
    lvlm: Lvlm, example: Example, module: Any, change: Callable[[torch.Tensor], torch.Tensor], *, out: bool
) -> torch.Tensor:
    """Logits at the last position with one module's input, or output, changed."""

    def before(_m: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    def after(_m: Any, _a: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    hook = module.register_forward_hook(after) if out else module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        return lvlm.logits(lvlm.encode(example).inputs)[0]
    finally:
        hook.remove()


def margin(lvlm: Lvlm, logits: torch.Tensor, example: Example) -> float:
    ids = {c: lvlm.processor.tokenizer.convert_tokens_to_ids(c) for c in ("yes", "no")}
    other = "no" if example.answer == "yes" else "yes"
    return float(logits[ids[example.answer]] - logits[ids[other]])


@pytest.mark.parametrize("family", READ_ELSEWHERE)
def test_ablation_equals_raw_hooks(family: str) -> None:
    lvlm, data = model(family), [pair_of(k).clean for k in (0, 2)]
    modules, width = projections(lvlm, family), lvlm.head_dim
    for tokens in ("all", "last"):
        ablation = ablate(lvlm, data, method="zero", tokens=tokens)  # pyright: ignore[reportArgumentType]
        for n, example in enumerate(data):
            for s, ((head,),) in enumerate(zip(ablation.heads, strict=True)):

                def zero(z: torch.Tensor, h: int = head.head, tokens: str = tokens) -> torch.Tensor:
                    z = z.clone()
                    z[:, -1 if tokens == "last" else slice(None), h * width : (h + 1) * width] = 0
                    return z

                expected = margin(lvlm, hooked(lvlm, example, modules[head.layer], zero, out=False), example)
                assert ablation.ablated[n, s] == pytest.approx(expected, abs=1e-5)
        assert np.abs(ablation.effects).max(axis=0).min() > 1e-6, "every head does something"
    with pytest.raises(PatchError, match="requires image tokens"):
        ablate(lvlm, data, method="zero", tokens="image:all")


@pytest.mark.parametrize("family", READ_ELSEWHERE)
def test_scores_of_heads(family: str) -> None:
    lvlm, data = model(family), [pair_of(k).clean for k in (0, 2)]
    scores = head_table(lvlm, data, methods=["ablation"]).values["ablation"]
    means = ablate(lvlm, data, method="mean", tokens="last").effects
    np.testing.assert_array_equal(scores.reshape(means.shape), means)
    assert np.abs(scores).max() > 1e-5
    with pytest.raises(ModelError, match="has no image tokens"):
        head_table(lvlm, data, methods=["vhd"])


def test_direct_attribution_through_the_gate() -> None:
    """The sum over a cross layer's heads is what its attention adds, after its gate, to the margin."""
    lvlm, example = model("mllama"), pair_of(0).clean
    direct = head_table(lvlm, [example], methods=["direct"]).values["direct"][0]  # [L, H]
    sites = ["decoder.L3.resid_post", "decoder.L1.cross.attn_out"]
    values = lvlm.read(lvlm.encode(example).inputs, sites)
    x, added = (values[site][0, -1].detach().double() for site in sites)
    norm, head = lvlm.hf.model.language_model.norm, lvlm.hf.lm_head
    scale = norm.weight.detach().double() / (x.pow(2).mean() + norm.variance_epsilon).sqrt()
    ids = [lvlm.processor.tokenizer.convert_tokens_to_ids(c) for c in ("yes", "no")]
    sign = 1 if example.answer == "yes" else -1
    direction = sign * (head.weight[ids[0]] - head.weight[ids[1]]).detach().double()
    assert float(direct[1].sum()) == pytest.approx(float((added * scale) @ direction), abs=1e-5)


@pytest.mark.parametrize("component", ["resid_pre", "resid_post", "mlp_out"])
def test_residual_and_mlp_sites_of_llama_vision(component: str) -> None:
    lvlm, data = model("mllama"), [pair_of(0), pair_of(2)]
    scores = patch(lvlm, data, component, tokens="last", min_effect=0)
    layers = lvlm.hf.model.language_model.layers
    for k, pair in enumerate(data):
        clean, corrupt = (
            margin(lvlm, lvlm.logits(lvlm.encode(e).inputs)[0], pair.clean) for e in (pair.clean, pair.corrupt)
        )
        for i, layer in enumerate(layers):
            module, out = (layer.mlp if component == "mlp_out" else layer), component != "resid_pre"
            clean_values: list[torch.Tensor] = []
            hooked(
                lvlm,
                pair.clean,
                module,
                lambda x, clean_values=clean_values: clean_values.append(x.clone()) or x,
                out=out,
            )

            def patch_last(x: torch.Tensor, clean_values: list[torch.Tensor] = clean_values) -> torch.Tensor:
                x = x.clone()
                x[:, -1] = clean_values[0][:, -1]
                return x

            expected = (margin(lvlm, hooked(lvlm, pair.corrupt, module, patch_last, out=out), pair.clean) - corrupt) / (
                clean - corrupt
            )
            assert float(scores.effects[k, i, 0]) == pytest.approx(expected, abs=1e-4)


def test_steering_and_deriving_at_the_heads_that_patching_ranks(tmp_path: Any) -> None:
    lvlm, pairs = model("mllama"), [pair_of(0), pair_of(2)]
    modules, head, dim = projections(lvlm, "mllama"), Head(1, 2), lvlm.head_dim
    sides = []
    for examples in ([p.clean for p in pairs], [p.corrupt for p in pairs]):
        values: list[torch.Tensor] = []
        for example in examples:
            hooked(lvlm, example, modules[1], lambda z, values=values: values.append(z[0, -1].clone()) or z, out=False)
        sides.append(torch.stack(values)[:, 2 * dim : 3 * dim].double().numpy())
    difference = sides[0].mean(0) - sides[1].mean(0)
    vector = derive.mean_difference(Contrast.from_pairs(lvlm, pairs), heads=["L1.H2"], tokens="last")
    np.testing.assert_allclose(vector.changes[head].direction, difference / np.linalg.norm(difference), atol=1e-5)

    def push(z: torch.Tensor) -> torch.Tensor:
        z = z.clone()
        z[:, -1, 2 * dim : 3 * dim] += 2 * vector.changes[head].sigma * torch.tensor(vector.changes[head].direction)
        return z

    example = pairs[0].clean
    want = hooked(lvlm, example, modules[1], push, out=False)
    with vector.applied(lvlm, 2.0):
        torch.testing.assert_close(lvlm.logits(lvlm.encode(example).inputs)[0], want, atol=1e-5, rtol=1e-5)
    batch = next(iter(lvlm.batches([example])))
    both = logits_under(lvlm, [[], vector.interventions(2.0)])(batch)
    torch.testing.assert_close(both[1][0], want, atol=1e-5, rtol=1e-5)
    # From a store, and in the files of honest_llama: all layers' heads, each from the attention it has.
    every = [e for p in pairs for e in (p.clean, p.corrupt)]
    data = ConceptDataset("d", tuple(replace(e, id=f"e{n}") for n, e in enumerate(every)))
    sites = ["z", "cross.z", "resid_post", "decoder.L0.resid_pre"]
    store = trace(lvlm, data, sites, ["last"], tmp_path / "store", batch_size=1, answers=False, progress=False)
    positive = np.arange(len(data)) % 2 == 0
    stored = derive.mean_difference(Contrast.from_store(store, positive=positive), heads=["L1.H2", Head(2, 1)])
    x = store.read("decoder.L1.cross.z", "last", head=2).astype(float)
    d = x[positive].mean(0) - x[~positive].mean(0)
    np.testing.assert_allclose(stored.changes[head].direction, d / np.linalg.norm(d), atol=1e-5)
    path, *_ = export.iti_activations(Contrast.from_store(store, positive=positive), tmp_path / "out", lvlm)
    heads = np.load(path, allow_pickle=False)
    np.testing.assert_array_equal(heads[:, 1], store.read("decoder.L1.cross.z", "last"))
    np.testing.assert_array_equal(heads[:, 2], store.read("decoder.L2.z", "last"))


def test_patches_at_all_tokens_after_an_image_that_is_no_token() -> None:
    """``suffix`` means every token there: patching, deriving and ablating agree."""
    lvlm, pair = model("mllama"), pair_of(0)
    vector = derive.mean_difference(Contrast.from_pairs(lvlm, [pair]), layers=[1], tokens="suffix:mean")
    site = "decoder.L1.resid_post"
    means = [lvlm.read(lvlm.encode(e).inputs, [site])[site][0].double().mean(0) for e in (pair.clean, pair.corrupt)]
    difference = (means[0] - means[1]).numpy()
    np.testing.assert_allclose(vector.changes[1].direction, difference / np.linalg.norm(difference), atol=1e-5)
    want = naive(lvlm, projections(lvlm, "mllama"), pair, 0)
    assert want.shape[:2] == (lvlm.n_layers, lvlm.n_heads)


def test_heads_as_text_wherever_heads_are() -> None:
    from circuits import attention_to_image, random_heads
    from circuits.patching.path import patch_paths

    lvlm, pair = model("llava"), pair_of(0)
    head, other = Head(0, 1), Head(1, 2)
    same = {
        "ablate": lambda h, o: ablate(lvlm, [pair.clean], [h, HeadSet([h, o])], method="zero").ablated,
        "patch": lambda h, o: patch(lvlm, [pair], [h, HeadSet([h, o])], min_effect=0).effects,
        "patch together": lambda h, o: patch(lvlm, [pair], HeadSet([h, o]), min_effect=0).effects,
        "paths": lambda h, o: patch_paths(lvlm, [pair], [h], [o], min_effect=0).effects,
        "attention": lambda h, o: attention_to_image(lvlm, [pair.clean], [h, o]).image_mass,
        "derive": lambda h, o: (
            derive.mean_difference(Contrast.from_pairs(lvlm, [pair]), heads=[h, o]).changes[other].direction
        ),
        "ict": lambda h, o: (
            derive.mean_difference(Contrast.from_pairs(lvlm, [pair]), heads=[o]).on_heads([h]).changes[head].direction
        ),
        "random": lambda h, o: np.array([x.head for x in random_heads((2, 4), 3, exclude=[h, o], seed=0)]),
        "vector": lambda h, o: np.stack(
            [
                e.direction  # pyright: ignore[reportAttributeAccessIssue]
                for e in SteeringVector(
                    {h: AddChange(np.eye(8)[0]), o: AddChange(np.eye(8)[1])}, "last+generated", 1.0, "", ""
                ).changes.values()
            ]
        ),
    }
    for name, make in same.items():
        np.testing.assert_array_equal(make("L0.H1", "L1.H2"), make(head, other), err_msg=name)
    for wrong in ("L0H1", "0.1", 3):
        with pytest.raises(SiteError, match="not a head"):
            ablate(lvlm, [pair.clean], [[wrong]], method="zero")  # pyright: ignore[reportArgumentType]
        with pytest.raises(GroundscopeError):
            derive.mean_difference(Contrast.from_pairs(lvlm, [pair]), heads=[wrong])  # pyright: ignore[reportArgumentType]
