"""What has to be true of counterfactual pairs before they are patched, and what is known of each then."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import zip_longest

import numpy as np

from circuits.patching.metrics import Metric, pair_key
from circuits.patching.sweep import Plan
from concepts.schema import CounterfactualPair
from groundscope.core.errors import ConfigError, PatchError, SiteError
from lvlm.answers import answer_tokens
from lvlm.model import Encoding, Lvlm
from lvlm.sites import TokenSelection
from lvlm.token_map import TokenMap

DIRECTIONS = ("denoise", "noise")
TOKENS = ("last", "suffix", "question", "image", "object", "all")


def plan_pair(model: Lvlm, pair: CounterfactualPair, tokens: str, metric: Metric) -> Plan:
    """Check a pair and return what is known of it.

    Raises
    ------
    PatchError
        Where its two sides cannot be told apart or do not lie alike, or the tokens asked for are not in it.
    """
    key = pair_key(model, pair) if metric.needs_key else None
    clean, corrupt = check_pair(model, pair)
    answer: tuple[int, ...] = ()
    if metric.name == "log_probability":
        answer = _answer(model, pair)
    return Plan(pair, key, clean, corrupt, positions_for(pair, clean.tokens, tokens), answer)


def check_pair(model: Lvlm, pair: CounterfactualPair) -> tuple[Encoding, Encoding]:
    """Return both examples encoded; raises `PatchError` where the corrupt one's tokens do not lie like the clean one's."""
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
    return clean, corrupt


def positions_for(pair: CounterfactualPair, tokens: TokenMap, asked: str) -> tuple[tuple[int, ...], ...]:
    """Return the sets of positions that are patched at once.

    Parameters
    ----------
    pair
        Whose tokens these are; it is named in errors.
    tokens
        Its token map.
    asked
        ``last``; ``suffix`` (all after the image), ``question``, ``image``, ``object`` or ``all``, all of them at once or,
        with ``:each``, each apart; or positions counted from 0, as in ``12`` or ``12,13``.

    Raises
    ------
    ConfigError
        For text that means no tokens.
    PatchError
        For positions that the pair does not have.
    """
    role, _, how = asked.partition(":")
    if how not in ("", "each") or not (role in TOKENS or all(p.strip().isdecimal() for p in role.split(","))):
        msg = f"tokens='{asked}': choose {', '.join(TOKENS)}, all but the first also with ':each', or positions as '12,13'"
        raise ConfigError(msg)
    try:
        match role:
            case "last":
                found: tuple[int, ...] = (tokens.last,)
            case "suffix":
                found = tokens.suffix
            case "all":
                found = tuple(range(tokens.length))
            case "question" | "image" | "object":
                found = tuple(sorted(tokens.positions(TokenSelection(role, "all"))))
            case _:
                found = tuple(sorted({int(p) for p in role.split(",")}))
    except SiteError as error:
        msg = f"pair '{pair.clean.id}': {error}"
        raise PatchError(msg) from error
    if not found or found[-1] >= tokens.length:
        there = f"it has positions 0-{tokens.length - 1}"
        msg = f"pair '{pair.clean.id}': tokens='{asked}' are {f'at {found[-1]}' if found else 'none'}; {there}"
        raise PatchError(msg)
    return tuple((p,) for p in found) if how == "each" else (found,)


def check_evaluating(model: Lvlm) -> None:
    """Raise `PatchError` where any module is in training mode: dropout would make two runs differ by chance."""
    training = next((name for name, module in model.hf.named_modules() if module.training), None)
    if training is not None:
        msg = f"{model.name} is in training mode (module '{training or 'model'}'): call model.hf.eval() first"
        raise PatchError(msg)


def check_kept(clean: np.ndarray, corrupt: np.ndarray, kept: np.ndarray, min_effect: float) -> None:
    """Raise `PatchError` where more than half of the pairs were left out."""
    excluded = int((~kept).sum())
    if 2 * excluded > len(kept):
        msg = (
            f"{excluded} of {len(kept)} pairs have |LD_clean - LD_corrupt| under min_effect={min_effect:g}: the model "
            f"hardly tells clean from corrupt (median {np.median(np.abs(clean - corrupt)):.3g}); "
            "use pairs it does, or lower min_effect"
        )
        raise PatchError(msg)


def pairs_digest(pairs: Sequence[CounterfactualPair]) -> str:
    """Return the SHA-256 over every pair in order: equal for equal pairs, whatever machine made them."""
    h = hashlib.sha256()
    for pair in pairs:
        record_ = [pair.clean.record(), pair.corrupt.record(), pair.kind, pair.change]
        h.update(json.dumps(record_, sort_keys=True).encode() + b"\n")
    return h.hexdigest()


def _answer(model: Lvlm, pair: CounterfactualPair) -> tuple[int, ...]:
    if pair.clean.answer == pair.corrupt.answer:
        msg = (
            f"pair '{pair.clean.id}' ({pair.change}): clean and corrupt have the same answer '{pair.clean.answer}'; "
            "patching needs pairs whose true answers differ"
        )
        raise PatchError(msg)
    ids = answer_tokens(model, pair.clean.question, pair.clean.answer)
    if not ids or model.processor.tokenizer.unk_token_id in ids:
        msg = f"pair '{pair.clean.id}': its answer '{pair.clean.answer}' has no tokens of {model.name}"
        raise PatchError(msg)
    return tuple(ids)
