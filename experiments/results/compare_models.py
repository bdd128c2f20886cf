"""Two models in memory on the same data: before and after fine-tuning, steering or quantisation, from a notebook."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from activation_store import trace
from behavior import answer
from circuits import patch_heads
from concepts.counterfactuals import balanced_pairs
from concepts.schema import ConceptDataset
from diagnosis import diagnose
from experiments.results.comparison import Comparison, Measured, compare
from experiments.stages.diagnose import fit_directions, learning_rows
from groundscope.core.errors import DataError, PatchError, ProbeError
from lvlm import Lvlm
from probes import fit_grid, plan_grids

if TYPE_CHECKING:
    from mitigation import SteeringVector

SITES = ("resid_post", "z", "mlp_out", "vision.resid_post", "projector.out")
KINDS = ("object", "color", "relation")
TOKENS = ("last", "image:mean", "object:mean")


def compare_models(
    first: Lvlm,
    second: Lvlm,
    data: ConceptDataset,
    *,
    vectors: tuple[SteeringVector | None, SteeringVector | None] = (None, None),
    kinds: Sequence[str] = KINDS,
    pairs: int = 60,
    seed: int = 0,
) -> Comparison:
    """Ask two models the same questions, look inside both, and say what changed.

    Parameters
    ----------
    first, second
        The models; the same one twice where only a vector differs.
    data
        Questions with candidate answers.
    vectors
        Steering vectors applied to either while it is measured.
    kinds
        Kinds of counterfactual pairs whose heads are patched; those the data cannot make are left out.
    pairs
        Pairs of each kind at most.
    seed
        Of the probes' split and of the diagnosis.

    Raises
    ------
    DataError, SiteError, ModelError
        As `trace`, `patch_heads` and `diagnose`.
    """
    found = [
        measure(m, data, vector=v, kinds=kinds, pairs=pairs, seed=seed)
        for m, v in zip((first, second), vectors, strict=True)
    ]
    return compare(found[0], found[1], seed=seed)


def measure(
    model: Lvlm,
    data: ConceptDataset,
    *,
    vector: SteeringVector | None = None,
    kinds: Sequence[str] = KINDS,
    pairs: int = 60,
    seed: int = 0,
) -> Measured:
    """Return answers, probes, head scores and diagnoses of one model; parameters as of `compare_models`.

    Activations are kept in a folder that is removed again.
    """
    asked = data.filter(lambda e: len(e.candidates) > 1)
    applied: AbstractContextManager[object] = vector.applied(model) if vector is not None else nullcontext()
    with applied, tempfile.TemporaryDirectory() as folder:
        answers = answer(model, asked, 64)
        store = trace(model, asked, sites=SITES, tokens=TOKENS, out=Path(folder) / "store")
        frame: Any = store.frame()
        rows = learning_rows(frame, seed)
        plan = plan_grids(store, folds=4, rows=rows)
        grids = {
            e.name: fit_grid(
                store,
                e.concepts,
                e.site,
                tokens=e.tokens,
                folds=4,
                control=0,
                rows=rows,
                skip_unplaceable=True,
                seed=seed,
            )
            for e in plan
        }
        heads = {}
        for kind in kinds:
            try:
                heads[kind] = patch_heads(model, balanced_pairs(asked, kind, limit=pairs))
            except (DataError, PatchError):
                continue  # the comparison notes what is missing in one of the two; what is missing in both says nothing
        try:
            directions = fit_directions(store, rows, seed=seed)
            known = {g for d in directions for g in d.train_groups}
            free = [e for e in asked if e.group not in known]
            diagnoses = diagnose(model, store, directions, free, with_sources=False, seed=seed) if free else None
        except ProbeError:
            diagnoses = None
    about = {"model": model.name, "config_hash": model.config_hash, "weights_hash": model.weights_hash}
    name = model.name if vector is None else f"{model.name}, steered"
    return Measured(name, answers, grids, heads, diagnoses, {**about, "data_digest": asked.digest})
