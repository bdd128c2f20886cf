"""Options that do not fit each other, told before anything is loaded: one line of `RULES` each."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from concepts.schema import LEVELS
from experiments.config import STAGES, SWEEPS, RunConfig
from groundscope.core.errors import ConfigError, SiteError
from groundscope.core.paths import name_problem
from groundscope.core.text import nearest
from lvlm.sites import LAYER_COMPONENTS
from lvlm.token_selection import TokenSelection

_LONGEST_PATH = 3900
"""Bytes of a run's path: what Linux allows, less the names of files in it."""


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
    problem = name_problem(config.name)
    if problem is not None:
        return (
            f"name='{_shown(config.name)}': a run is inside '{_shown(config.root)}', so give a plain name ({problem}); "
            "root=… moves all runs"
        )
    first, *rest = config.name.split("/")
    if first.startswith(".") or (first == SWEEPS and len(rest) != 2):
        return f"name='{config.name}': '{first}' is kept for the project's own files, choose another name"
    name = config.sweep.name
    if name is not None and (problem := name_problem(name) or ("/" in name and "it holds '/'") or None):
        return f"sweep.name='{_shown(name)}': a sweep is inside ROOT/{SWEEPS}, so give one plain name ({problem})"
    try:
        longest = len(os.path.abspath(os.path.join(config.root, config.name, "circuits")).encode())  # noqa: PTH100, PTH118
    except (UnicodeEncodeError, ValueError):
        return f"root='{_shown(config.root)}': the path is not valid UTF-8, choose another folder"
    if longest > _LONGEST_PATH:
        return f"root and name make a path of {longest} bytes, more than {_LONGEST_PATH}: choose shorter ones"
    return None


def _shown(text: str) -> str:
    """Return text for a message: lone surrogates as escapes, and not longer than a line."""
    plain = text.encode("utf-8", "backslashreplace").decode()
    return plain if len(plain) <= 100 else f"{plain[:97]}…"


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


_AT_LEAST: Mapping[str, float] = MappingProxyType(
    {
        "threads": 1,
        "trace.batch_size": 1,
        "trace.shards": 1,
        "evaluate.batch_size": 1,
        "data.n_images": 1,
        "data.test_images": 1,
        "data.seed": 0,
        "data.test_seed": 0,
        "data.limit": 1,
        "probe.folds": 2,
        "probe.seed": 0,
        "patch.pairs": 1,
        "patch.top": 1,
        "patch.min_effect": 0,
        "steer.max_drop": 0,
        "steer.strengths": 0,
        "diagnose.limit": 0,
        "diagnose.compared": 0,
        "diagnose.seed": 0,
        "diagnose.shown": 0,
    }
)
"""Option to its least value; of a list, each value."""
_BETWEEN = ("probe.test_fraction", "data.test_share")
"""Options that are shares above 0 and below 1."""
_DTYPES = ("float32", "bfloat16", "float16")


def _value(config: RunConfig, key: str) -> Any:
    found: Any = config
    for part in key.split("."):
        found = getattr(found, part)
    return found


def _bounds(config: RunConfig) -> str | None:
    for key, least in _AT_LEAST.items():
        value = _value(config, key)
        for one in value if isinstance(value, list) else [value]:
            if one is not None and not least <= one < math.inf:  # NaN too
                return f"{key}={one:g}: give at least {least:g}"
    for key in _BETWEEN:
        if not 0 < _value(config, key) < 1:
            return f"{key}={_value(config, key):g}: give a share above 0 and below 1, as in {key}=0.3"
    wrong = next((c for c in config.probe.C if not 0 < c < math.inf), None)
    if wrong is not None or not config.probe.C:
        return f"probe.C={config.probe.C}: give at least one number above 0"
    if math.isnan(config.steer.doubt) or math.isinf(config.steer.doubt):
        return f"steer.doubt={config.steer.doubt}: give a number"
    return None


def _words(config: RunConfig) -> str | None:
    """Check what is one of a few words."""
    for key, choices in (
        ("model.dtype", _DTYPES),
        ("trace.dtype", _DTYPES),
        ("trace.on_error", ("raise", "skip")),
        ("patch.tokens", ("last", "suffix:all")),
    ):
        value = _value(config, key)
        if value not in choices:
            return f"{key}={value}: choose from {', '.join(choices)}{nearest(value, choices)}"
    return None


_SITE = re.compile(rf"(?:(?:vision|decoder)\.)?(?:L\d+\.)?(?:cross\.)?(?:{'|'.join(LAYER_COMPONENTS)})|projector\.out")


def _places(config: RunConfig) -> str | None:
    """Check how sites and token selections are written; whether this model has them, the trace says."""
    trace = config.trace
    if "trace" not in config.stages:
        return None
    if not trace.sites or not trace.tokens:
        return "trace.sites and trace.tokens must name at least one site and one token selection"
    known = [*LAYER_COMPONENTS, *(f"vision.{c}" for c in LAYER_COMPONENTS), "projector.out"]
    for site in trace.sites:
        if not _SITE.fullmatch(site):
            return (
                f"trace.sites: '{site}' is not a site: write a component of the decoder ({', '.join(LAYER_COMPONENTS)}), "
                f"of a named stack ('vision.z'), 'projector.out', or a single layer ('decoder.L3.z'){nearest(site, known)}"
            )
    for tokens in trace.tokens:
        try:
            TokenSelection.parse(tokens)
        except SiteError as error:
            return f"trace.tokens: {error}"
    return None


def _concepts(config: RunConfig) -> str | None:
    """Check how concepts are written; whether the data have them, the probe stage's check says."""
    for concept in config.probe.concepts or ():
        level, separator, name = concept.partition(":")
        if not separator or not name or level not in LEVELS:
            levels = ", ".join(f"{known}:…" for known in LEVELS)
            return f"probe.concepts: '{concept}' is not a concept: write {levels}{nearest(level, LEVELS)}"
    return "probe.concepts=[] asks for nothing: name concepts, or null for all" if config.probe.concepts == [] else None


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
    _bounds,
    _words,
    _places,
    _concepts,
    _steered_sites,
)
"""Each returns what is wrong and what to do, or nothing."""
