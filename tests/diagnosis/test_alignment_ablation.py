"""Alignment without a component, against forward passes with plain hooks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from concepts import ConceptDataset, NoImage, scenes
from diagnosis import ablate_alignment
from groundscope.core.errors import ConfigError, DataError, GroundscopeError, ProbeError, SiteError
from lvlm import Lvlm, load_lvlm
from probes import alignment


@pytest.fixture(scope="module")
def model() -> Lvlm:
    return load_lvlm("tiny")


@pytest.fixture(scope="module")
def data() -> ConceptDataset:
    return scenes.dataset(n_images=14, splits=["neutral"])


def hooked_rows(model: Lvlm, examples: list[Any], role: str, module: Any, change: Any) -> np.ndarray:
    """Mean residual of the last layer at a role's tokens, one example at a time, with a hook before or after a module."""
    rows: list[np.ndarray] = []
    hf: Any = model.hf
    for example in examples:
        encoding = model.encode(example)
        outputs: list[torch.Tensor] = []
        handles = [
            hf.model.language_model.layers[5].register_forward_hook(
                lambda _m, _i, out, outputs=outputs: outputs.append(out[0] if isinstance(out, tuple) else out)
            )
        ]
        if module is not None:
            handles.append(change(module))
        with torch.no_grad():
            hf(**encoding.inputs)
        for handle in handles:
            handle.remove()
        positions = encoding.tokens.image if role == "image" else encoding.tokens.question
        rows.append(outputs[0].reshape(encoding.tokens.length, -1)[list(positions)].mean(dim=0).numpy())
    return np.array(rows)


def test_changes_equal_those_of_plain_hooks(model: Lvlm, data: ConceptDataset) -> None:
    names = ["L2.mlp", "L1.H3"]
    result = ablate_alignment(model, data, names, layers=[0, 5], measures=["cosine", "cka"], progress=False)
    firsts = {e.group: e for e in reversed(data.examples)}
    first = [e for e in data if firsts[e.group] is e]
    sides = {
        "image": [replace(e, question="", suffix="") for e in first],
        "question": [replace(e, image=NoImage()) for e in first],
    }
    layers: Any = model.hf.model.language_model.layers  # type: ignore[attr-defined]
    mlp, projection = layers[2].mlp, layers[1].self_attn.o_proj
    head = slice(3 * model.head_dim, 4 * model.head_dim)
    values = {"whole": [], "L2.mlp": [], "L1.H3": []}
    for role, examples in sides.items():
        outputs: dict[str, list[torch.Tensor]] = {"mlp": [], "z": []}

        def record(_: Any, outputs: dict[str, list[torch.Tensor]] = outputs) -> Any:
            first_handle = mlp.register_forward_hook(lambda _m, _i, out: outputs["mlp"].append(out.flatten(0, -2)))
            second = projection.register_forward_pre_hook(lambda _m, i: outputs["z"].append(i[0].flatten(0, -2)))
            return _Both(first_handle, second)

        values["whole"].append(hooked_rows(model, examples, role, mlp, record))
        mean = torch.cat(outputs["mlp"]).mean(dim=0)
        of_head = torch.cat(outputs["z"]).mean(dim=0)[head]

        def replace_mlp(module: Any, mean: torch.Tensor = mean) -> Any:
            return module.register_forward_hook(lambda _m, _i, out: mean.expand_as(out))

        def replace_head(module: Any, of_head: torch.Tensor = of_head) -> Any:
            def change(_m: Any, inputs: Any) -> Any:
                z = inputs[0].clone()
                z[..., head] = of_head
                return (z, *inputs[1:])

            return module.register_forward_pre_hook(change)

        values["L2.mlp"].append(hooked_rows(model, examples, role, mlp, replace_mlp))
        values["L1.H3"].append(hooked_rows(model, examples, role, projection, replace_head))
    for k, function in enumerate((alignment.cosine, alignment.cka)):
        intact = function(*values["whole"])
        assert result.intact[1, k] == pytest.approx(intact, abs=1e-4)
        for i, name in enumerate(names):
            assert result.change[i, 1, k] == pytest.approx(function(*values[name]) - intact, abs=1e-4)
            assert abs(result.change[i, 1, k]) > 1e-3
            assert result.low[i, 1, k] < result.change[i, 1, k] < result.high[i, 1, k]
    assert (result.change[:, 0] == 0).all()  # layer 0 is before both components
    assert result.n_images == len(first) == len({e.group for e in data})
    table = result.table()
    assert len(table) == 8
    assert set(table["component"]) == set(names)


class _Both:
    def __init__(self, *handles: Any) -> None:
        self.handles = handles

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def test_bad_input_is_refused(model: Lvlm, data: ConceptDataset) -> None:
    without = ConceptDataset("none", (replace(data[0], image=NoImage()),))
    cases: list[tuple[Any, type[GroundscopeError], str]] = [
        (lambda: ablate_alignment(model, data, ["L9.H0"]), SiteError, "no head L9.H0"),
        (lambda: ablate_alignment(model, data, ["L9.mlp"]), SiteError, "9"),
        (lambda: ablate_alignment(model, data, []), ConfigError, "components is empty"),
        (
            lambda: ablate_alignment(model, data, "mlps", text="question:all", measures=["cka"]),
            SiteError,
            "several vectors",
        ),
        (lambda: ablate_alignment(model, data, "mlps", batch_size=0), ConfigError, "at least 1"),
        (lambda: ablate_alignment(model, data[:3], "mlps"), ProbeError, "needs 2 images, got 1"),
        (lambda: ablate_alignment(model, without, "mlps", measures=["cka"]), DataError, "no image"),
        (
            lambda: ablate_alignment(model, data, "mlps", text="image:mean", measures=["cka"]),
            SiteError,
            "no tokens of 'image:mean'",
        ),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
