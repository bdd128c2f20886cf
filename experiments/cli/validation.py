"""Options that do not fit each other, told before anything is loaded: one line of `RULES` each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import PurePosixPath

from experiments.config import STAGES, RunConfig
from groundscope.core.errors import ConfigError
from groundscope.core.text import nearest


def check(config: RunConfig) -> None:
    """Raise `ConfigError` for the first rule that a configuration breaks."""
    for rule in RULES:
        broken = rule(config)
        if broken:
            raise ConfigError(broken)


def _stages(config: RunConfig) -> str | None:
    unknown = [s for s in config.stages if s not in STAGES]
    if unknown:
        return f"no stage '{unknown[0]}': there are {', '.join(STAGES)}{nearest(unknown[0], STAGES)}"
    return None if config.stages else f"stages=[] asks for nothing: choose from {', '.join(STAGES)}"


def _name(config: RunConfig) -> str | None:
    path = PurePosixPath(config.name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        return f"name='{config.name}': a run lies inside '{config.root}', so give a plain name; root=… moves them all"
    return None


def _scenes(config: RunConfig) -> str | None:
    data = config.data
    given = [n for n in ("questions", "images") if getattr(data, n) is not None] + [f"loader.{n}" for n in data.loader]
    if data.source == "scenes" and given:
        return f"data.{given[0]} is given, but data=scenes draws its own: name the format too, data=pope for one"
    return None


def _twin(config: RunConfig) -> str | None:
    model = config.model
    asked = "evaluate" in config.stages and "twin" in (config.evaluate.conditions or ["twin"])
    if asked and model.twin == "tiny-unbiased" and model.path not in {"tiny", "tiny-unbiased"}:
        return (
            f"model.path={model.path} with the embedded model's twin: say model=hf model.path={model.path}, "
            "or name its own control, model.twin=…"
        )
    return None


def _parts(config: RunConfig) -> str | None:
    trace, later = config.trace, [s for s in config.stages if s not in {"examples", "trace"}]
    if trace.shards < 1 or (trace.shard is not None and not 0 <= trace.shard < trace.shards):
        return f"trace.shard={trace.shard} of trace.shards={trace.shards}: parts are numbered from 0 to shards - 1"
    if trace.shard is not None and (later or "trace" not in config.stages):
        return (
            f"trace.shard={trace.shard} traces one part, so nothing can follow it: run stages=[examples,trace] for every "
            "part, then the same without trace.shard"
        )
    if trace.shard is not None and config.force:
        return "force=true would throw away what other parts made: remove the run's folder 'activations' instead"
    return None


def _positive(config: RunConfig) -> str | None:
    for name, value in (
        ("trace.batch_size", config.trace.batch_size),
        ("evaluate.batch_size", config.evaluate.batch_size),
        ("threads", config.threads if config.threads is not None else 1),
    ):
        if value < 1:
            return f"{name}={value}: give at least 1"
    return None


def _steered_sites(config: RunConfig) -> str | None:
    trace, chosen = config.trace, {"trace", "steer"} <= set(config.stages)
    kept = any(site == "z" or site.endswith(".z") for site in trace.sites) and "last" in trace.tokens
    if chosen and config.steer.method == "discriminant" and not kept:
        return (
            "steer.method=discriminant learns from z at the last token, which would not be traced: "
            "add z to trace.sites and last to trace.tokens, or choose another method (steer.method=amplify)"
        )
    return None


RULES: Sequence[Callable[[RunConfig], str | None]] = (
    _stages,
    _name,
    _scenes,
    _twin,
    _parts,
    _positive,
    _steered_sites,
)
"""Each returns what is wrong and what to do, or nothing."""
