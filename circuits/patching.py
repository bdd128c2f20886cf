"""Exact activation patching of every attention head: what each carries from the changed image to the answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from circuits.engine import Recording, check_resumable, record, resume
from circuits.heads import HeadScores
from circuits.metrics import logit_difference, pair_key
from circuits.progress import progress_bar
from concepts.errors import ConfigError, PatchError
from concepts.schema import CounterfactualPair, Example
from lvlm.answers import AnswerKey
from lvlm.model import Encoding, Lvlm
from lvlm.sites import Head

Direction = Literal["denoise", "noise"]
TOKENS = ("last", "suffix")
DIRECTIONS = ("denoise", "noise")


@dataclass(frozen=True, eq=False)
class _Plan:
    """What is known of a pair before anything runs."""

    pair: CounterfactualPair
    key: AnswerKey
    length: int
    start: int
    """First patched position."""


def patch_heads(
    model: Lvlm,
    pairs: Sequence[CounterfactualPair],
    tokens: Literal["last", "suffix"] = "last",
    direction: Direction = "denoise",
    *,
    batch_rows: int = 512,
    min_effect: float = 0.5,
    progress: bool | None = None,
) -> HeadScores:
    """Patch each attention head of the decoder, one at a time, for each pair, and measure what it does to the answer.

    With LD the log-odds of the clean image's answer against the corrupt image's answer, and
    ``PE = (LD_patched - LD_corrupt) / (LD_clean - LD_corrupt)``, the effect of a head is

    - ``denoise``: its output of the clean run put into the corrupt run; effect = PE: the share of the difference that
      this head alone brings back;
    - ``noise``: its output of the corrupt run put into the clean run; effect = 1 - PE: the share of the difference
      that is lost with this head alone.

    Either way 0 means that the head carries nothing of what was changed (Wang et al. 2023, arXiv 2211.00593;
    Zhang & Nanda 2024, arXiv 2309.16042). Every effect is an actual run of the model, none is an approximation.

    Parameters
    ----------
    model
        In evaluation mode.
    pairs
        Pairs of equal token length whose true answers differ.
    tokens
        Where a head is patched: ``last``, the last prompt token; ``suffix``, every token after the image at once.
    direction
        ``denoise`` or ``noise``.
    batch_rows
        Most patches that run side by side; memory grows with it, results do not depend on it.
    min_effect
        Pairs with ``|LD_clean - LD_corrupt|`` below this (in logits) are left out and counted in
        `HeadScores.excluded`; a share of next to nothing is noise.
    progress
        Show progress; by default where standard error is a terminal.

    Returns
    -------
    HeadScores
        Effects ``[n_pairs, n_layers, n_heads]`` of the pairs kept, in their order.

    Raises
    ------
    PatchError
        Before anything runs, for no pairs, pairs of unlike length or with images at other positions, answers that are
        equal or begin with the same token, or a model in training mode; afterwards where more than half of the pairs
        fall under `min_effect`.
    ConfigError
        For an option that does not exist.
    ModelError
        Where the family's layers cannot be run one by one.
    """
    _check_options(model, tokens, direction, batch_rows, min_effect)
    with progress_bar(progress) as bar:
        plans = []
        task = bar.add_task("checking pairs", total=len(pairs))
        for pair in pairs:
            plans.append(_plan(model, pair, tokens))
            bar.advance(task)
        if not plans:
            msg = "no pairs to patch: counterfactuals.pairs(data, kind=…) makes them"
            raise PatchError(msg)
        effects = np.full((len(plans), model.n_layers, model.n_heads), np.nan, np.float32)
        baseline = np.empty((2, len(plans)), np.float32)  # clean, corrupt
        task = bar.add_task("patching heads", total=len(plans))
        for number, group in enumerate(_groups(plans, max(1, batch_rows // (model.n_layers * model.n_heads)))):
            members = [plans[i] for i in group]
            clean, corrupt = (_record(model, members, side) for side in ("clean", "corrupt"))
            if number == 0:
                check_resumable(model, corrupt)
            differences = [_differences(run.logits, members, range(len(members))) for run in (clean, corrupt)]
            baseline[:, group] = differences
            gap = differences[0] - differences[1]
            kept = [k for k in range(len(members)) if abs(gap[k]) >= min_effect and gap[k] != 0]
            source, run = (clean, corrupt) if direction == "denoise" else (corrupt, clean)
            unpatched = differences[1] if direction == "denoise" else differences[0]
            sign = 1 if direction == "denoise" else -1
            for rows in _rows(model, kept, batch_rows):
                owners = [k for k, _ in rows]
                patched = _differences(resume(model, run, rows, source), members, owners)
                share = sign * (patched - unpatched[owners]) / gap[owners]
                for (k, head), effect in zip(rows, share, strict=True):
                    effects[group[k], head.layer, head.head] = effect
            bar.advance(task, len(group))
    kept = np.abs(baseline[0] - baseline[1]) >= min_effect
    kept &= baseline[0] != baseline[1]
    excluded = int((~kept).sum())
    if 2 * excluded > len(plans):
        msg = (
            f"{excluded} of {len(plans)} pairs have |LD_clean - LD_corrupt| under min_effect={min_effect:g}: the model "
            f"hardly tells clean from corrupt (median {np.median(np.abs(baseline[0] - baseline[1])):.3g}); "
            "use pairs it does, or lower min_effect"
        )
        raise PatchError(msg)
    chosen = [plan.pair for plan, keep in zip(plans, kept, strict=True) if keep]
    return HeadScores(
        effects=effects[kept],
        clean=baseline[0, kept],
        corrupt=baseline[1, kept],
        ids=tuple(p.clean.id for p in chosen),
        groups=tuple(p.group for p in chosen),
        levels=tuple(p.clean.level for p in chosen),
        kinds=tuple(p.kind for p in chosen),
        tokens=tokens,
        direction=direction,
        min_effect=min_effect,
        excluded=excluded,
        model=model.name,
        config_hash=model.config_hash,
        weights_hash=model.weights_hash,
        pairs_digest=pairs_digest(pairs),
    )


def pairs_digest(pairs: Sequence[CounterfactualPair]) -> str:
    """Return the SHA-256 over every pair in order: equal for equal pairs, whatever machine made them."""
    h = hashlib.sha256()
    for pair in pairs:
        record_ = [pair.clean.record(), pair.corrupt.record(), pair.kind, pair.change]
        h.update(json.dumps(record_, sort_keys=True).encode() + b"\n")
    return h.hexdigest()


def check_pair(model: Lvlm, pair: CounterfactualPair) -> Encoding:
    """Return the encoded clean example; raises `PatchError` where the corrupt one's tokens do not lie like its own."""
    clean, corrupt = model.encode(pair.clean), model.encode(pair.corrupt)
    if clean.tokens.length != corrupt.tokens.length:
        both = [
            model.processor.tokenizer.convert_ids_to_tokens(e.inputs["input_ids"][0].tolist()) for e in (clean, corrupt)
        ]
        differing = enumerate(zip_longest(*both, fillvalue="nothing"))
        position, (left, right) = next((i, words) for i, words in differing if words[0] != words[1])
        msg = (
            f"pair '{pair.clean.id}' ({pair.change}): clean has {clean.tokens.length} tokens, corrupt "
            f"{corrupt.tokens.length}; they first differ at position {position}, '{left}' against '{right}'; "
            "patching needs equal length"
        )
        raise PatchError(msg)
    if clean.tokens.image != corrupt.tokens.image:
        msg = f"pair '{pair.clean.id}' ({pair.change}): the image is at other positions in clean than in corrupt"
        raise PatchError(msg)
    return clean


def _check_options(model: Lvlm, tokens: str, direction: str, batch_rows: int, min_effect: float) -> None:
    if tokens not in TOKENS or direction not in DIRECTIONS:
        msg = f"tokens='{tokens}', direction='{direction}': choose tokens of {TOKENS} and a direction of {DIRECTIONS}"
        raise ConfigError(msg)
    if batch_rows < 1 or not min_effect >= 0:
        msg = f"batch_rows={batch_rows} must be at least 1, min_effect={min_effect} at least 0"
        raise ConfigError(msg)
    check_evaluating(model)


def check_evaluating(model: Lvlm) -> None:
    """Raise `PatchError` where any module is in training mode: dropout would make two runs differ by chance."""
    training = next((name for name, module in model.hf.named_modules() if module.training), None)
    if training is not None:
        msg = f"{model.name} is in training mode (module '{training or 'model'}'): call model.hf.eval() first"
        raise PatchError(msg)


def _plan(model: Lvlm, pair: CounterfactualPair, tokens: str) -> _Plan:
    key = pair_key(model, pair)
    positions = check_pair(model, pair).tokens
    start = positions.last if tokens == "last" else max(positions.image) + 1
    return _Plan(pair, key, positions.length, start)


def _groups(plans: Sequence[_Plan], size: int) -> Iterator[list[int]]:
    """Yield numbers of pairs that can run side by side, at most `size` at a time."""
    alike: dict[tuple[int, int], list[int]] = {}
    for number, plan in enumerate(plans):
        alike.setdefault((plan.length, plan.start), []).append(number)
    for _, members in sorted(alike.items()):
        for k in range(0, len(members), size):
            yield members[k : k + size]


def _rows(model: Lvlm, kept: Sequence[int], size: int) -> Iterator[list[tuple[int, Head]]]:
    """Yield the patches of some examples, layers ascending, at most `size` at a time."""
    every = [(k, Head(i, h)) for i in range(model.n_layers) for h in range(model.n_heads) for k in kept]
    for k in range(0, len(every), size):
        yield every[k : k + size]


def _record(model: Lvlm, members: Sequence[_Plan], side: Literal["clean", "corrupt"]) -> Recording:
    examples: list[Example] = [plan.pair.clean if side == "clean" else plan.pair.corrupt for plan in members]
    return record(model, model.collate([model.encode(e) for e in examples]), members[0].start)


def _differences(logits: Tensor, members: Sequence[_Plan], owners: Sequence[int]) -> np.ndarray:
    """Return clean against corrupt answer for each row of logits, float32 ``[rows]``; `owners` says whose row it is."""
    out = torch.empty(len(logits))
    owner = torch.tensor(list(owners))
    for k in dict.fromkeys(owners):
        plan, mine = members[k], owner == k
        out[mine] = logit_difference(
            logits[mine.to(logits.device)], plan.key, plan.pair.clean.answer, plan.pair.corrupt.answer
        ).cpu()
    return out.numpy()
