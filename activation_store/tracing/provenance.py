"""The provenance of a store: model, data, sites, and the definitions of its token selections and columns."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from activation_store.format.model_tensors import BFLOAT16, FLOAT16, LazyTensor
from activation_store.format.provenance_versions import VERSION
from activation_store.format.schema import shard_numbers
from activation_store.row_input import RowInput
from activation_store.tracing.plan import Plan
from concepts.schema import ConceptDataset
from groundscope.core.errors import StoreError
from lvlm.access.weights import named_weights
from lvlm.active_interventions import intervention_record, unidentified_changes
from lvlm.family.registry import families
from lvlm.family.specification import resolve
from lvlm.generation import end_tokens, ignored_settings
from lvlm.model import Lvlm
from lvlm.processor_digest import processor_digest, sampled_processor_digest
from lvlm.token_map import COVER
from lvlm.token_selection import TokenSelection
from lvlm.weights_hash import sampled_weights_hash

ANSWER_RULE = (
    "model_answer: the candidate with the largest log-score of its first tokens at the last prompt token; margin: the "
    "score of the true answer minus the best other; both missing where an example has fewer than two candidates"
)
"""Definition of the table's columns of the model's own answers; `correct` is 1 where `model_answer` is the true answer."""
MENTION_RULE = (
    "mention:log_p: the log-probability of the tokens of a mention, each after the tokens before it, summed, in nats; "
    "mention:first_log_p: that of the first of them; mention:present: 1 where the object is annotated or in a reference caption"
)
"""Definition of the table's columns of mentions."""
_ROLES = {
    "last": "the last prompt token, where the answer is read",
    "prefix": "the tokens of the prefix, the written start of the answer; NaN where the example has none",
    "bos": "the first token",
    "system": "the tokens before the image, without the first",
    "image": "the image tokens",
    "question": "the tokens of the question's own words",
    "mention": "of each object that the prefix mentions",
    "suffix": "the prompt tokens after the last image token",
    "all": "all tokens",
    "positions": "the prompt tokens at positions",
    "generated": "the tokens of the model's own answer, without the token that ends it; NaN after them",
    "answer": "the tokens of the true answer, put after the prompt",
    "object": (
        f"the image tokens whose patch is covered to at least {COVER} by the box of the object the question is about, or "
        "else the one covered most; NaN where the image has no such object"
    ),
}
_PACKAGES = ("groundscope", "torch", "transformers", "nnsight", "numpy", "h5py")


def describe(
    model: Lvlm,
    data: ConceptDataset,
    plan: Plan,
    batch_size: int,
    *,
    answers: bool,
    generate: int = 0,
    shared: bool = False,
    seen: RowInput = "both",
) -> dict[str, Any]:
    """Return the provenance of a store: JSON values, equal for equal stores except for ``environment``.

    Parameters
    ----------
    model, data, plan
        The traced model, the dataset, and the plan of sites and tokens.
    batch_size
        Recorded as part of the environment: it can change when a store is continued.
    answers
        Whether the model's own answers are recorded.
    generate
        Maximum number of tokens of a generated answer; 0 for no generation.
    shared
        Whether examples about one image share the run of their prefix; recorded as part of the environment.
    seen
        What the rows have seen; recorded as ``input`` if it is one modality alone.
    """
    selections = dict.fromkeys(s for group in plan.selections.values() for s in group)
    stacks = {s: sorted(stack for stack, group in plan.selections.items() if s in group) for s in selections}
    ends, rules = (sorted(end_tokens(model)), list(ignored_settings(model))) if generate else ([], [])
    return {
        "version": VERSION,
        "model": {
            "name": model.name,
            "config": model.config_hash,
            "weights": model.weights_hash,
            # For comparison with stores of earlier releases.
            "weights-sample": sampled_weights_hash(model.hf),
            "family": asdict(model.spec),
            **({"family-package": package} if (package := families.origins.get(model.spec.model_type)) else {}),
            "dtype": str(model.dtype).removeprefix("torch."),
            "attention": model.attention,
            **({"revision": model.revision} if model.revision else {}),
            **({"unused-weights": list(model.unused_weights)} if model.unused_weights else {}),
        },
        "processor": {
            "class": type(model.processor).__name__,
            "digest": processor_digest(model.processor),
            "settings": sampled_processor_digest(model.processor),
        },
        # Active changes to the model during the trace: ``interventions``, ``hooks``.
        **intervention_record(model.hf),
        "dataset": {
            "name": data.name,
            "examples": len(data),
            "digest": data.digest,
            "provenance": json.loads(json.dumps(dict(data.provenance), default=str)),
        },
        **({"input": seen} if seen != "both" else {}),
        "sites": [str(read.site) for read in plan.reads],
        "tokens": {str(s): {"definition": _definition(s), "stacks": used} for s, used in stacks.items()},
        **({"reductions": reduced} if (reduced := _reductions(plan)) else {}),
        "answers": ANSWER_RULE if answers else "not recorded",
        **({"mentions": MENTION_RULE} if any(s.role == "mention" for s in selections) else {}),
        **(
            {"generate": {"most_tokens": generate, "decoding": "greedy", "ends": ends, "left-out": rules}}
            if generate
            else {}
        ),
        # Recorded, but can differ when a store is continued.
        "environment": {
            "python": platform.python_version(),
            "packages": {name: _installed(name) for name in _PACKAGES},
            "device": str(model.device),
            "batch_size": batch_size,
            **({"prefixes": "shared"} if shared else {}),
        },
    }


def _reductions(plan: Plan) -> dict[str, Any]:
    """Return the reductions by token selection and name, with what determines their values."""
    return {
        str(selection): {r.name: {"values": list(r.values), **json.loads(json.dumps(dict(r.record())))} for r in chosen}
        for selection, chosen in plan.reductions.items()
    }


def read_unembedding(model: Lvlm, plan: Plan) -> Mapping[str, LazyTensor] | None:
    """Return the parameters that map a decoder residual to logits: final norm and unembedding, in the type of the weights.

    They are copied in blocks of rows. None if no site of the decoder is traced.
    """
    if "decoder" not in plan.selections:
        return None
    parts = {"final_norm": model.spec.final_norm, "unembedding": model.spec.unembedding}
    return {
        f"{name}.{kind}": _rows(parameter.detach())
        for name, path in parts.items()
        if path
        for kind, parameter in named_weights(resolve(model.hf, path, model.spec))
    }


def check_hooks(model: Lvlm, folder: Path, workers: int) -> None:
    """Raise `StoreError` if rows would be added to other rows while hooks of unknown effect act on the model."""
    hooks = unidentified_changes(model.hf)
    if not hooks:
        return
    started = folder.is_dir() and any(shard_numbers(p.name) or p.name.startswith("manifest") for p in folder.iterdir())
    if started or workers > 1:
        first, *others = hooks
        more = f" and {len(others)} more" if others else ""
        msg = (
            f"{folder}: rows cannot be added to a store, or shared between workers, while hooks act on {model.name} whose "
            f"effect is not known: {first}{more}; remove them, mark hooks that change nothing with "
            "lvlm.active_interventions.mark_observer, or trace in one process into a new folder"
        )
        raise StoreError(msg)


def _rows(x: Tensor) -> LazyTensor:
    shape = tuple(x.shape)
    wide = LazyTensor(shape, np.dtype("<f4"), lambda part: x[part].float().cpu().numpy())
    if x.dtype == torch.float16:
        return LazyTensor(shape, np.dtype("<f2"), lambda part: x[part].cpu().numpy(), FLOAT16, wide)
    if x.dtype == torch.bfloat16:
        bits = lambda part: x[part].cpu().view(torch.uint16).numpy()  # noqa: E731
        return LazyTensor(shape, np.dtype("<u2"), bits, BFLOAT16, wide)
    return wide


def _definition(selection: TokenSelection) -> str:
    if selection.role == "mention":
        which = {"before": "the token before the first one", "first": "the first token", "last": "the last token"}
        return f"{which[selection.name]} {_ROLES['mention']}"
    reduction = {None: "", "mean": "mean in float32 over ", "all": "every one, kept apart, of "}[selection.reduction]
    step = "" if selection.step is None else f"number {selection.step}, counted from 0, of "
    named = f" (object '{selection.name}')" if selection.name else ""
    listed = f" {', '.join(map(str, selection.indices))}" if selection.indices else ""
    return reduction + step + _ROLES.get(selection.role, selection.role) + named + listed


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
