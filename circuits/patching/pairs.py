"""Checks of counterfactual pairs before patching, and the plan of each pair."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import zip_longest

import numpy as np

from circuits.patching.metrics import Metric, pair_key
from circuits.patching.sweep import PairPlan
from concepts.counterfactual_pair import CounterfactualPair
from groundscope.core.errors import DataError, PatchError, SiteError
from groundscope.core.text import format_count
from lvlm.answer_keys import answer_tokens
from lvlm.model import Encoding, Lvlm
from lvlm.token_map import TokenMap
from lvlm.token_selection import TokenSelection

MODES = ("denoise", "noise")


class UnequalLengthError(PatchError):
    """The two examples of a pair have different token positions."""

    def __init__(self, pair: CounterfactualPair, lengths: tuple[int, int], reason: str) -> None:
        super().__init__(f"pair '{pair.clean.id}' ({pair.change}): {reason}")
        self.pair, self.lengths = pair, lengths


def combined_error(errors: Sequence[UnequalLengthError], count: int) -> PatchError:
    """Return one error for all pairs of unequal length among `count` pairs: which ones, and how many."""
    if len(errors) == 1:
        return errors[0]
    examples = ", ".join(f"'{e.pair.clean.id}' ({e.lengths[0]} and {e.lengths[1]})" for e in errors[:3])
    more = f" and {len(errors) - 3} more" if len(errors) > 3 else ""
    return PatchError(
        f"{len(errors)} of {format_count(count, 'pair')} have different numbers or positions of tokens in their two "
        f"examples, which patching needs equal: {examples}{more}; put all images on one canvas, with "
        "counterfactuals.on_canvas or data.canvas=WxH"
    )


def plan_pair(
    model: Lvlm, pair: CounterfactualPair, tokens: TokenSelection, metric: Metric, *, placebo: bool = False
) -> PairPlan:
    """Check a pair and return its plan; `placebo`: accept placebo pairs.

    Raises
    ------
    PatchError
        If its answers cannot be distinguished, it is a placebo that is not accepted, its sides differ in token positions, or it
        lacks the requested tokens.
    """
    if pair.placebo and not placebo:
        msg = f"pair '{pair.clean.id}' ({pair.change}) is a placebo, whose two true answers are equal; use patch_heads or patch"
        raise PatchError(msg)
    key = pair_key(model, pair) if metric.needs_key else None
    clean, corrupt = check_pair(model, pair)
    answer: tuple[int, ...] = ()
    if metric.needs_answer:
        answer = _answer(model, pair)
    return PairPlan(pair, key, clean, corrupt, positions_for(pair, clean.tokens, tokens), answer)


def check_pair(model: Lvlm, pair: CounterfactualPair) -> tuple[Encoding, Encoding]:
    """Return both examples encoded; raise `PatchError` if their token positions differ."""
    clean, corrupt = model.encode(pair.clean), model.encode(pair.corrupt)
    if clean.tokens.length != corrupt.tokens.length:
        both = [
            model.processor.tokenizer.convert_ids_to_tokens(e.inputs["input_ids"][0].tolist()) for e in (clean, corrupt)
        ]
        differing = enumerate(zip_longest(*both, fillvalue="nothing"))
        position, (clean_token, corrupt_token) = next((i, words) for i, words in differing if words[0] != words[1])
        reason = (
            f"clean has {clean.tokens.length} tokens, corrupt "
            f"{corrupt.tokens.length}; they first differ at position {position}, '{clean_token}' and '{corrupt_token}'; "
            "patching needs equal length"
        )
        raise UnequalLengthError(pair, (clean.tokens.length, corrupt.tokens.length), reason)
    if clean.tokens.image != corrupt.tokens.image:
        reason = "clean and corrupt differ in image positions; patching needs equal ones"
        raise UnequalLengthError(pair, (clean.tokens.length, corrupt.tokens.length), reason)
    return clean, corrupt


def positions_for(pair: CounterfactualPair, tokens: TokenMap, selection: TokenSelection) -> tuple[tuple[int, ...], ...]:
    """Return the sets of positions to patch; the positions of a set are patched jointly.

    Parameters
    ----------
    pair
        The pair of the tokens; named in errors.
    tokens
        Its token map.
    selection
        Of `lvlm.token_selection.PATCHABLE`; with ``:each`` every position is a set.

    Raises
    ------
    PatchError
        If the pair lacks the positions.
    """
    try:
        positions = tuple(sorted(tokens.positions(selection)))
    except SiteError as error:
        msg = f"pair '{pair.clean.id}': {error}"
        raise PatchError(msg) from error
    if not positions:
        msg = f"pair '{pair.clean.id}': tokens='{selection}': it has no such tokens; it has positions 0-{tokens.length - 1}"
        raise PatchError(msg)
    return tuple((p,) for p in positions) if selection.reduction == "each" else (positions,)


def check_evaluating(model: Lvlm) -> None:
    """Raise `PatchError` if any module is in training mode: dropout would make runs random."""
    training = next((name for name, module in model.hf.named_modules() if module.training), None)
    if training is not None:
        msg = f"{model.name} is in training mode (module '{training or 'model'}'): call model.hf.eval() first"
        raise PatchError(msg)


def check_enough_pairs(clean: np.ndarray, corrupt: np.ndarray, usable: np.ndarray, min_effect: float) -> None:
    """Raise `PatchError` if more than half of the pairs are excluded."""
    excluded = int((~usable).sum())
    if 2 * excluded > len(usable):
        msg = (
            f"{excluded} of {format_count(len(usable), 'pair')} have |M_clean - M_corrupt| below "
            f"min_effect={min_effect:g}: the model hardly distinguishes clean from corrupt (median "
            f"{np.median(np.abs(clean - corrupt)):.3g}); use pairs that it distinguishes, or lower min_effect"
        )
        raise PatchError(msg)


def pairs_digest(pairs: Sequence[CounterfactualPair]) -> str:
    """Return the SHA-256 of all pairs in order; independent of the machine."""
    h = hashlib.sha256()
    for pair in pairs:
        record_ = [pair.clean.record(), pair.corrupt.record(), pair.kind, pair.change]
        h.update(json.dumps(record_, sort_keys=True).encode() + b"\n")
    return h.hexdigest()


def _answer(model: Lvlm, pair: CounterfactualPair) -> tuple[int, ...]:
    if pair.clean.answer == pair.corrupt.answer and not pair.placebo:
        msg = (
            f"pair '{pair.clean.id}' ({pair.change}): clean and corrupt have the same answer '{pair.clean.answer}'; "
            "patching needs pairs whose true answers differ"
        )
        raise PatchError(msg)
    try:
        ids = answer_tokens(model, pair.clean, pair.clean.answer)
    except DataError as error:
        msg = f"pair '{pair.clean.id}' ({pair.change}): {error}"
        raise PatchError(msg) from error
    if not ids or model.processor.tokenizer.unk_token_id in ids:
        msg = f"pair '{pair.clean.id}': {model.name} cannot tokenize the answer '{pair.clean.answer}'"
        raise PatchError(msg)
    return tuple(ids)
