"""Stage `patch`: the patching effect of every head on counterfactual pairs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from concepts import counterfactuals
from experiments.run.context import Context
from experiments.run.folder import write_json
from experiments.stages.illustrate import illustrate_heads
from groundscope.core.errors import ConfigError, DataError, PatchError

if TYPE_CHECKING:
    from circuits import HeadScores


FALLBACK = "blank"
"""The kind of pair that every image allows."""


def check(context: Context) -> None:
    """Raise `ConfigError` for an unknown kind of pair."""
    kinds = list(context.config.patch.kinds)
    if not kinds:
        msg = f"patch.kinds=[]: choose from {', '.join(counterfactuals.KINDS)}"
        raise ConfigError(msg)
    try:
        for kind in kinds:
            counterfactuals.check_kind(kind)
    except ConfigError as error:
        msg = f"patch.kinds: {error}"
        raise ConfigError(msg) from error


def make_head_scores(context: Context, root: Path) -> str:
    """Patch every head on counterfactual pairs of each kind that the data allow."""
    from circuits import patch_heads, top_heads

    options = context.config.patch
    done: dict[str, HeadScores] = {}
    left_out: dict[str, str] = {}
    # Images that cannot be changed in one thing can still be blanked.
    for kind in dict.fromkeys((*options.kinds, FALLBACK)):
        if kind == FALLBACK and kind not in options.kinds and done:
            continue
        try:
            pairs = counterfactuals.balanced_pairs(context.discovery, kind, limit=options.pairs)
            done[kind] = patch_heads(
                context.model,
                pairs,
                tokens=options.tokens,
                min_effect=options.min_effect,
            )
        except (DataError, PatchError) as error:
            left_out[kind] = str(error)
            continue
        done[kind].save(root / f"{kind}.safetensors")
    n_heads = max((scores.mean.size for scores in done.values()), default=0)
    top = top_heads(done, min(options.top, n_heads)) if done else ()
    packages = {kind: package for kind, package in counterfactuals.KINDS.origins.items() if kind in done}
    card = {"heads": [str(h) for h in top], "left_out": left_out, "kinds": list(done)}
    write_json(root / "top.json", {**card, "packages": packages} if packages else card)
    illustrate_heads(context, root, done, card["heads"])
    note = f"; left out: {', '.join(left_out)}" if left_out else ""
    if not done:
        return f"no head could be scored{note}: {next(iter(left_out.values()))}"
    counts = ", ".join(f"{s.n_pairs} {kind}" for kind, s in done.items())
    return f"{counts} pairs, every head patched exactly; top heads {', '.join(map(str, top))}{note}"
