"""Compare two models in memory on the same data, for example before and after fine-tuning, steering or quantization."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from activation_store import trace
from behavior import answer
from circuits import patch_heads
from concepts.counterfactuals import balanced_pairs
from concepts.schema import ConceptDataset
from diagnosis.comparison import ModelComparison, ModelProfile, compare_profiles
from diagnosis.fit import fit_directions, training_rows
from diagnosis.pipeline import diagnose
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
    progress: bool | None = None,
) -> ModelComparison:
    """Ask two models the same questions, analyze their activations, and compare the results.

    Parameters
    ----------
    first, second
        The models; pass the same model twice if only the vectors differ.
    data
        Questions with candidate answers; examples without are left out.
    vectors
        Steering vectors that are applied to each model.
    kinds
        Kinds of counterfactual pairs whose heads are patched; kinds that the data do not allow are left out.
    pairs
        Largest number of pairs of each kind.
    seed
        Seed of the probes' split and of the diagnosis.
    progress
        Whether to show progress; by default on a terminal only.

    Raises
    ------
    DataError, SiteError, ModelError
        As for `activation_store.trace`, `circuits.patch_heads` and `diagnosis.diagnose`.

    Examples
    --------
    The model alone, and with a steering vector:

    >>> import numpy as np
    >>> import groundscope as gs
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(20, splits=("neutral",)).where(level="object")
    >>> changes = {2: gs.AddChange(np.eye(model.width)[0], sigma=3.0)}
    >>> vector = gs.SteeringVector(changes, "last", 1.0, model.name, model.config_hash)
    >>> comparison = gs.compare_models(model, model, data, vectors=(None, vector), kinds=("object",), pairs=2)
    >>> comparison.first, comparison.second
    ('tiny', 'tiny, steered')
    >>> comparison.frame("answers")["measure"].tolist()[:3]
    ['all: right', 'neutral: right', 'neutral, object: right']
    """
    profiles = [
        profile_model(m, data, vector=v, kinds=kinds, pairs=pairs, seed=seed, progress=progress)
        for m, v in zip((first, second), vectors, strict=True)
    ]
    return compare_profiles(profiles[0], profiles[1], seed=seed)


def profile_model(
    model: Lvlm,
    data: ConceptDataset,
    *,
    vector: SteeringVector | None = None,
    kinds: Sequence[str] = KINDS,
    pairs: int = 60,
    seed: int = 0,
    progress: bool | None = None,
) -> ModelProfile:
    """Return answers, probes, head scores and diagnoses of one model.

    Activations are kept in a temporary folder. Parameters are as for `compare_models`; `vector` is applied to the model.

    Examples
    --------
    >>> import groundscope as gs
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(30, splits=("neutral",)).where(level="object")
    >>> profile = gs.profile_model(model, data, kinds=("object",), pairs=2)
    >>> len(profile.answers) == len(data), sorted(profile.grids), sorted(profile.heads)
    (True, ['decoder.resid_post@last', 'decoder.z@last'], ['object'])
    """
    questions = data.filter(lambda e: len(e.candidates) > 1)
    applied: AbstractContextManager[object] = vector.applied(model) if vector is not None else nullcontext()
    with applied, tempfile.TemporaryDirectory() as folder:
        answers = answer(model, questions, batch_size=64)
        store = trace(model, questions, sites=SITES, tokens=TOKENS, out=Path(folder) / "store", progress=progress)
        rows = training_rows(store, seed=seed)
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
                heads[kind] = patch_heads(model, balanced_pairs(questions, kind, limit=pairs), progress=progress)
            except (DataError, PatchError):
                continue  # the comparison notes a kind that only one of the models has
        try:
            directions = fit_directions(store, rows, model=model, data=questions, seed=seed)
            examples = [e for e in questions if e.group not in directions.train_groups]
            diagnoses = None
            if examples:
                diagnoses = diagnose(
                    model, store, directions, examples, with_sources=False, seed=seed, progress=progress
                )
        except ProbeError:
            diagnoses = None
    about = {"model": model.name, "config_hash": model.config_hash, "weights_hash": model.weights_hash}
    name = model.name if vector is None else f"{model.name}, steered"
    return ModelProfile(name, answers, grids, heads, diagnoses, {**about, "data_digest": questions.digest})
