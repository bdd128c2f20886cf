"""Stage `patch`: the patching effect of every head on counterfactual pairs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from concepts import counterfactuals
from experiments.data import is_scenes
from experiments.run.context import Context
from experiments.run.folder import write_json
from experiments.stages.illustrate import illustrate_heads
from groundscope.core.errors import ConfigError, DataError, PatchError

if TYPE_CHECKING:
    from circuits import HeadScores
    from concepts.counterfactuals import PairSet


FALLBACK = "blank"
"""The kind of pair that every image allows."""
KINDS = ("object", "color", "relation")
"""Kinds of pairs that are made by default."""
PHOTOGRAPH_KINDS = ("attribute", "action")
"""Further kinds that are made by default if photographs have such questions."""
MIN_RIGHT = 8
"""Least number of pairs with two right answers to use only these (or half of the pairs, if there are fewer than 16)."""


def check(context: Context) -> None:
    """Raise `ConfigError` for an unknown kind of pair or method."""
    options = context.config.patch
    if options.kinds == []:
        msg = f"patch.kinds=[]: choose from {', '.join(counterfactuals.KINDS)}"
        raise ConfigError(msg)
    if options.methods == []:
        msg = f"patch.methods=[]: choose from {', '.join(counterfactuals.METHODS)}, or null for all"
        raise ConfigError(msg)
    try:
        for kind in options.kinds or ():
            counterfactuals.check_kind(kind)
    except ConfigError as error:
        msg = f"patch.kinds: {error}"
        raise ConfigError(msg) from error
    try:
        for method in options.methods or ():
            _ = counterfactuals.METHODS[method]
    except ConfigError as error:
        msg = f"patch.methods: {error}"
        raise ConfigError(msg) from error


def make_head_scores(context: Context, root: Path) -> str:
    """Patch every head on counterfactual pairs of each kind that the data allow."""
    from circuits import top_heads

    options = context.config.patch
    kinds = _kinds(context)
    done: dict[str, Localization] = {}
    left_out: dict[str, str] = {}
    # Images that cannot be changed in one thing can still be blanked.
    for kind in dict.fromkeys((*kinds, FALLBACK)):
        if kind == FALLBACK and kind not in kinds and done:
            continue
        try:
            done[kind] = _localize(context, kind)
        except (ConfigError, DataError, PatchError) as error:
            left_out[kind] = str(error)
            continue
        done[kind].save(root, kind)
    scores = {kind: result.scores for kind, result in done.items()}
    n_heads = max((s.mean.size for s in scores.values()), default=0)
    top = top_heads(scores, min(options.top, n_heads)) if scores else ()
    packages = {kind: package for kind, package in counterfactuals.KINDS.origins.items() if kind in done}
    card = {
        "heads": [str(h) for h in top], "left_out": left_out, "kinds": list(done),
        "pairs": {kind: result.card for kind, result in done.items()},
    }  # fmt: skip
    write_json(root / "top.json", {**card, "packages": packages} if packages else card)
    illustrate_heads(context, root, scores, card["heads"])
    note = f"; left out: {', '.join(left_out)}" if left_out else ""
    if not done:
        return f"no head could be scored{note}: {next(iter(left_out.values()))}"
    counts = ", ".join(result.words(kind) for kind, result in done.items())
    return f"pairs: {counts}; every head patched exactly; top heads {', '.join(map(str, top))}{note}"


def _kinds(context: Context) -> list[str]:
    """Return the kinds of pairs to make: as configured, or those that the data may allow."""
    from concepts.counterfactuals.photographs.swap import pair_kind

    kinds = context.config.patch.kinds
    if kinds is not None:
        return list(kinds)
    if is_scenes(context.config.data):
        return list(KINDS)
    present = {pair_kind(example) for example in context.discovery if example.candidates}
    return [*KINDS, *(kind for kind in PHOTOGRAPH_KINDS if kind in present)]


@dataclass(frozen=True)
class Localization:
    """The head scores of one kind of pair, and how they were made."""

    scores: HeadScores
    """Of the pairs that localize heads."""
    card: dict[str, Any]
    """Method, counts and reasons, JSON-serializable."""
    controls: dict[str, HeadScores] = field(default_factory=dict)
    """``all``: the scores of all pairs, where only some localize; ``placebo``: those of placebo pairs."""

    def save(self, root: Path, kind: str) -> None:
        """Write the scores, and the controls into a folder of their own."""
        self.scores.save(root / f"{kind}.safetensors")
        for name, scores in self.controls.items():
            (root / "controls").mkdir(exist_ok=True)
            scores.save(root / "controls" / f"{kind}-{name}.safetensors")

    def words(self, kind: str) -> str:
        """Return the number of pairs, for the summary."""
        method = f" by {self.card['method']}" if self.card["method"] else ""
        return f"{self.scores.n_pairs} {kind}{method}"


def _localize(context: Context, kind: str) -> Localization:
    """Patch pairs of one kind; keep those with right answers to both images, and patch placebo pairs as a control."""
    from circuits import pair_outcomes, patch_heads
    from circuits.patching.outcomes import RIGHT

    options = context.config.patch
    pairs = counterfactuals.balanced_pairs(context.discovery, kind, method=options.methods, limit=options.pairs)
    every = patch_heads(context.model, pairs, tokens=options.tokens, min_effect=options.min_effect)
    outcomes = pair_outcomes(context.model, pairs)
    right = {i for i, outcome in zip(outcomes.ids, outcomes.outcomes, strict=True) if outcome == RIGHT}
    n_right = sum(i in right for i in every.ids)
    # A model that rarely answers both images has too few such pairs.
    selected = n_right >= min(MIN_RIGHT, every.n_pairs / 2)
    scores = outcomes.select(every) if selected else every
    card: dict[str, Any] = {
        "method": pairs.method, "made": len(pairs), "used": scores.n_pairs, "set": RIGHT if selected else "all",
        "outcomes": outcomes.counts, "excluded": every.excluded, "left_out": dict(pairs.left_out),
    }  # fmt: skip
    controls = {"all": every} if scores.n_pairs < every.n_pairs else {}
    if options.placebo and pairs.method:
        card["placebo"] = _placebo(context, pairs, every.scale, controls)
    return Localization(scores, card, controls)


def _placebo(context: Context, pairs: PairSet, scale: float, controls: dict[str, HeadScores]) -> dict[str, Any]:
    """Patch placebo pairs of the same kind and method and add their scores to `controls`; return their counts or a reason."""
    from circuits import patch_heads

    options = context.config.patch
    try:
        placebos = counterfactuals.balanced_pairs(
            context.discovery, pairs.kind, method=pairs.method, placebo=True, limit=options.pairs
        )
        control = patch_heads(context.model, placebos, tokens=options.tokens, scale=scale)
    except (ConfigError, DataError, PatchError) as error:
        return {"used": 0, "reason": str(error)}
    controls["placebo"] = control
    return {"used": control.n_pairs, "scale": scale, "moved": control.scale}
