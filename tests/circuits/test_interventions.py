"""The one primitive: what it changes, where, and that nothing of it stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits import Add, Amplify, Intervention, Replace, Zero, intervened
from circuits.patching.metrics import logit_difference, pair_key, probability
from concepts.counterfactual_pair import CounterfactualPair
from groundscope.core.errors import PatchError, SiteError
from lvlm import Site, answer_key
from lvlm.model import Batch, Lvlm
from tests.toys.random_models import examples, hooks_of, layers_of, random_model, shared_model

SITE = Site("decoder", 3, "z")


def batch(model: Lvlm) -> Batch:
    """Two rows of equal length."""
    return next(b for b in model.batches(examples(), 2) if len(b.index) == 2)


def values_at(model: Lvlm, site: Site, interventions: list[Intervention]) -> torch.Tensor:
    """What the site holds after an intervention."""
    values: list[torch.Tensor] = []
    with intervened(model, interventions):
        hook = model.locate(site).watch(lambda x: values.append(x.clone()))
        model.logits(batch(model).inputs)
        hook.remove()
    return values[-1]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_nothing_to_do_is_bitwise_nothing() -> None:
    model = shared_model()
    plain = model.logits(batch(model).inputs)
    with intervened(model, []):
        assert hooks_of(model) == 0
        assert torch.equal(model.logits(batch(model).inputs), plain)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_afterwards_what_it_was(fails: bool) -> None:
    model = random_model()
    state = {name: p.clone() for name, p in model.hf.state_dict().items()}
    plain = model.logits(batch(model).inputs)
    change: Callable[[torch.Tensor], torch.Tensor] = (lambda x: x.reshape(7, 11, 13)) if fails else Zero()
    items = [Intervention(SITE, change, "suffix:all"), Intervention(Site("decoder", 0, "resid_post"), Zero())]
    if fails:
        with pytest.raises(RuntimeError), intervened(model, items):
            model.logits(batch(model).inputs)
    else:
        with intervened(model, items):
            assert not torch.equal(model.logits(batch(model).inputs), plain)
    assert hooks_of(model) == 0
    assert all(torch.equal(p, state[name]) for name, p in model.hf.state_dict().items())
    assert torch.equal(model.logits(batch(model).inputs), plain)


def test_nothing_is_hooked_where_an_intervention_is_refused() -> None:
    model = shared_model()
    fine = Intervention(SITE, Zero())
    with pytest.raises(SiteError), intervened(model, [fine, Intervention(Site("decoder", 99, "z"), Zero())]):
        pass
    assert hooks_of(model) == 0


def test_positions_heads_and_rows() -> None:
    model = shared_model()
    base, b = values_at(model, SITE, []), batch(model)
    image = list(b.encodings[0].tokens.image)
    after = list(range(image[-1] + 1, base.shape[1]))
    dim = model.head_dim
    cases: list[tuple[Any, list[int]]] = [
        ("all", list(range(base.shape[1]))),
        ("last", [base.shape[1] - 1]),
        ("last+generated", [base.shape[1] - 1]),
        ("image:all", image),
        ("suffix:all", after),
        ("suffix+generated", after),
        ("generated:all", []),
        ((0, 4), [0, 4]),
    ]
    for rule, where in cases:
        for head, columns in ((None, slice(None)), (2, slice(2 * dim, 3 * dim))):
            for rows, members in ((None, [0, 1]), ((1,), [1])):
                expected = base.clone()
                for r in members:
                    for t in where:
                        expected[r, t, columns] = 0
                got = values_at(model, SITE, [Intervention(SITE, Zero(), rule, head, rows)])
                assert torch.equal(got, expected), (rule, head, rows)
    each = torch.tensor([[1, 2], [5, 6]])
    expected = base.clone()
    expected[0, [1, 2]] = 7
    expected[1, [5, 6]] = 7
    assert torch.equal(values_at(model, SITE, [Intervention(SITE, Replace(torch.tensor(7.0)), each)]), expected)


def test_changes() -> None:
    model = shared_model()
    base = values_at(model, SITE, [])
    d = base.shape[-1]
    v = torch.randn(d, generator=generator())
    reads = torch.linalg.qr(torch.randn(d, 3, generator=generator(1)))[0].T
    writes = torch.linalg.qr(torch.randn(d, 3, generator=generator(2)))[0].T
    last = base[:, -1]
    deviation = last - v
    for change, expected in (
        (Replace(v), v.expand_as(last)),
        (Add(v), last + v),
        (Amplify(v, 0.5), v + 1.5 * (last - v)),
        (Amplify(v, -1.0), v.expand_as(last)),
        (Amplify(v, 2.0, reads), last + 2 * (deviation @ reads.T) @ reads),
        (Amplify(v, 2.0, reads, writes), last + 2 * (deviation @ reads.T) @ writes),
        (lambda x: -x, -last),
    ):
        got = values_at(model, SITE, [Intervention(SITE, change, "last")])
        torch.testing.assert_close(got[:, -1], expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(got[:, :-1], base[:, :-1])
    # Removing a subspace leaves nothing in it; another way to write keeps every deviation's length.
    projected = values_at(model, SITE, [Intervention(SITE, Amplify(torch.zeros(d), -1.0, reads), "all")])
    assert float((projected @ reads.T).abs().max()) < 1e-5
    turned = values_at(model, SITE, [Intervention(SITE, Amplify(v, 1.0, reads, writes), "all")])
    straight = values_at(model, SITE, [Intervention(SITE, Amplify(v, 1.0, reads), "all")])
    torch.testing.assert_close((turned - base).norm(dim=-1), (straight - base).norm(dim=-1), rtol=1e-4, atol=1e-5)


def test_changes_at_one_site_happen_in_order_and_contexts_nest() -> None:
    model = shared_model()
    base = values_at(model, SITE, [])
    direction = torch.ones(base.shape[-1])
    both = values_at(model, SITE, [Intervention(SITE, Zero()), Intervention(SITE, Add(direction))])
    assert torch.equal(both[:, -1], direction.expand_as(both[:, -1]))
    with intervened(model, [Intervention(SITE, Zero())]):
        nested = values_at(model, SITE, [Intervention(SITE, Add(direction))])
    assert torch.equal(nested, both)


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), layer=st.integers(0, 5), head=st.integers(0, 7))
def test_adding_before_the_projection_is_adding_its_image_after(seed: int, layer: int, head: int) -> None:
    model = shared_model()
    site, out = Site("decoder", layer, "z"), Site("decoder", layer, "attn_out")
    delta = torch.randn(model.head_dim, generator=generator(seed))
    weight = layers_of(model)[layer].self_attn.o_proj.weight[:, head * model.head_dim : (head + 1) * model.head_dim]
    moved = values_at(model, out, [Intervention(site, Add(delta), "last", head)])
    base = values_at(model, out, [])
    torch.testing.assert_close(moved[:, -1], base[:, -1] + weight.detach() @ delta, atol=1e-4, rtol=1e-5)
    assert torch.equal(moved[:, :-1], base[:, :-1])


def test_every_site_with_a_tensor_can_be_intervened_on() -> None:
    model = shared_model()
    plain = model.logits(batch(model).inputs)
    components = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z")
    sites = [Site(stack, 1, c) for stack in ("decoder", "vision") for c in components]  # pyright: ignore[reportArgumentType]  # from the lists
    for site in [*sites, Site("projector", 0, "out")]:
        with intervened(model, [Intervention(site, Zero(), "all")]):
            assert not torch.equal(model.logits(batch(model).inputs), plain), site


@pytest.mark.parametrize("stack", ["decoder", "vision"])
def test_replacing_resid_mid_changes_resid_post(stack: str) -> None:
    model = shared_model()
    mid, out, mlp = (Site(stack, 1, c) for c in ("resid_mid", "resid_post", "mlp_out"))  # pyright: ignore[reportArgumentType]
    value = torch.randn(values_at(model, mid, []).shape[-1], generator=generator())
    item = Intervention(mid, Replace(value), "all")
    torch.testing.assert_close(values_at(model, mid, [item])[0, 3], value, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        values_at(model, out, [item]), value + values_at(model, mlp, [item]), atol=1e-4, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("item", "error", "message"),
    [
        (lambda: Intervention(Site("decoder", 6, "z"), Zero()), SiteError, "layers 0-5"),
        (lambda: Intervention(SITE, Zero(), head=8), SiteError, "heads 0-7"),
        (lambda: Intervention(Site("vision", 0, "z"), Zero(), "all", head=4), SiteError, "heads 0-3"),
        (
            lambda: Intervention(Site("decoder", 0, "resid_post"), Zero(), head=0),
            SiteError,
            "a head needs component 'z'",
        ),
        (lambda: Intervention(Site("vision", 0, "z"), Zero(), "image:all"), SiteError, "are for the decoder only"),
        (lambda: Intervention(Site("decoder", 0, "pattern"), Zero()), SiteError, "cannot be changed"),
        (lambda: Intervention(SITE, Add(torch.ones(24))), PatchError, "must be 192"),
        (lambda: Intervention(SITE, Add(torch.ones(192)), head=0), PatchError, "must be 24"),
        (lambda: Intervention(SITE, Add(torch.full((192,), torch.nan))), PatchError, "NaN"),
        (lambda: Intervention(SITE, Zero(), "first"), SiteError, "choose from last, last\\+generated"),  # pyright: ignore[reportArgumentType]  # a mistake
        (lambda: Intervention(SITE, Zero(), (-1,)), PatchError, "use 'last'"),
        (lambda: Intervention(SITE, Zero(), (0, 999)), PatchError, "position 999"),
        (lambda: Intervention(SITE, Zero(), torch.tensor([[1], [2], [3]])), PatchError, "for 3 rows, but 2"),
        (lambda: Intervention(SITE, Zero(), rows=(2,)), PatchError, "row 2"),
    ],
)
def test_invalid_interventions_are_refused(
    item: Callable[[], Intervention], error: type[Exception], message: str
) -> None:
    model = shared_model()
    with pytest.raises(error, match=message), intervened(model, [item()]):
        model.logits(batch(model).inputs)
    assert hooks_of(model) == 0


def test_image_positions_need_the_models_own_inputs() -> None:
    model = shared_model()
    embedded = torch.zeros(1, 5, model.width)
    with pytest.raises(PatchError, match="input_ids"), intervened(model, [Intervention(SITE, Zero(), "image:all")]):
        model.hf(inputs_embeds=embedded)


def test_prompt_positions_are_in_no_later_step_of_generation() -> None:
    model, b = shared_model(), batch(shared_model())
    lengths: list[int] = []

    def change(x: torch.Tensor) -> torch.Tensor:
        lengths.append(x.shape[1])
        return x

    with intervened(model, [Intervention(SITE, change, (3, 5))]):
        model.generate_batch(b, max_new_tokens=4)
    assert lengths == [2]


# ---- metrics -----------------------------------------------------------------------------------------------------------


def test_metrics_against_the_softmax() -> None:
    model = shared_model()
    example = examples()[0]
    key = answer_key(model, example)
    logits = torch.randn(2, 3, model.hf.config.text_config.vocab_size, generator=generator()).double()
    tokens = {c: model.processor.tokenizer.convert_tokens_to_ids(c) for c in example.candidates}
    p = logits.softmax(-1)
    for a, b in (("red", "green"), ("blue", "red")):
        odds = (p[..., tokens[a]] / p[..., tokens[b]]).log()
        torch.testing.assert_close(logit_difference(logits, key, a, b).double(), odds, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(probability(logits, key, a).double(), p[..., tokens[a]], atol=1e-6, rtol=1e-4)


def test_pair_key_holds_the_two_true_answers() -> None:
    model = shared_model()
    from tests.toys.random_models import pairs

    for pair in pairs("color"):
        assert isinstance(pair, CounterfactualPair)
        assert pair_key(model, pair).candidates == (pair.clean.answer, pair.corrupt.answer)
