"""Rules for the options of a run, checked before anything is loaded: a function and an entry of `RULES` each."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from behavior.matching import MATCHES
from behavior.parsing import PARSERS
from behavior.score_names import FIRST_TOKEN, SCORES
from concepts.concept import LEVELS, Concept
from experiments.config import STAGES, SWEEPS, RunConfig
from experiments.data import data_problem, has_own_labels, is_scenes
from groundscope.core.errors import ConfigError, DataError, SiteError
from groundscope.core.paths import name_problem
from groundscope.core.text import nearest
from lvlm.sites import LAYER_COMPONENTS
from lvlm.token_selection import TokenSelection

_LONGEST_PATH = 3900
"""Largest length of a run's path in bytes: the limit of Linux, less the names of files in it."""


def check(config: RunConfig) -> None:
    """Raise `ConfigError` for the first rule that a configuration breaks."""
    for rule in RULES:
        problem = rule(config)
        if problem:
            raise ConfigError(problem)


def _stages(config: RunConfig) -> str | None:
    unknown = [s for s in config.stages if s not in STAGES]
    if unknown:
        return f"unknown stage '{unknown[0]}'; choose from {', '.join(STAGES)}{nearest(unknown[0], STAGES)}"
    return None if config.stages else f"stages=[] runs nothing; choose from {', '.join(STAGES)}"


def _name(config: RunConfig) -> str | None:
    problem = name_problem(config.name)
    if problem is not None:
        return (
            f"name='{_shorten(config.name)}': the name of a run is a plain path below '{_shorten(config.root)}' ({problem}); "
            "root=… moves all runs"
        )
    first, *subfolders = config.name.split("/")
    if first.startswith(".") or (first == SWEEPS and len(subfolders) != 2):
        return f"name='{config.name}': '{first}' is reserved; choose another name"
    name = config.sweep.name
    if name is not None and (problem := name_problem(name) or ("/" in name and "it holds '/'") or None):
        return f"sweep.name='{_shorten(name)}': the name of a sweep is one plain name, below ROOT/{SWEEPS} ({problem})"
    try:
        length = len(os.path.abspath(os.path.join(config.root, config.name, "circuits")).encode())  # noqa: PTH100, PTH118
    except (UnicodeEncodeError, ValueError):
        return f"root='{_shorten(config.root)}': the path is not valid UTF-8; choose another folder"
    if length > _LONGEST_PATH:
        return f"root and name give a path of {length} bytes, more than {_LONGEST_PATH}; choose shorter ones"
    return None


def _shorten(text: str) -> str:
    """Return text for a message: at most 100 characters, with lone surrogates escaped."""
    plain = text.encode("utf-8", "backslashreplace").decode()
    return plain if len(plain) <= 100 else f"{plain[:97]}…"


def _scenes(config: RunConfig) -> str | None:
    data = config.data
    files = [n for n in ("questions", "images") if getattr(data, n) is not None] + [f"loader.{n}" for n in data.loader]
    if data.canvas is not None:
        from concepts.counterfactuals.photographs.canvas import parse_canvas

        if is_scenes(data):
            return "data.canvas has no effect with data=scenes, whose images have one size; remove it"
        parse_canvas(data.canvas)
    if is_scenes(data) and files:
        return f"data.{files[0]} has no effect with data=scenes; name the format of the files, such as data=pope"
    return data_problem(data)


def _shares(config: RunConfig) -> str | None:
    share = config.data.test_share
    if not 0 <= share <= 1:
        return f"data.test_share={share:g}: must be from 0 to 1, such as data.test_share=0.3"
    if is_scenes(config.data):
        return None
    if share == 1 and (stage := next((s for s in config.stages if s in _OF_DISCOVERY), None)):
        return (
            f"data.test_share=1 leaves no discovery questions, which stage '{stage}' needs: run groundscope evaluate, or "
            "choose a share below 1"
        )
    if share == 0 and "evaluate" in config.stages:
        return "data.test_share=0 leaves no test questions, which stage 'evaluate' needs: choose a share above 0"
    return None


_OF_DISCOVERY = ("trace", "probe", "patch", "steer", "diagnose")
"""Stages that use the discovery questions."""


def _answers(config: RunConfig) -> str | None:
    """Check the options of answers."""
    options = config.evaluate
    if options.parser is not None and options.parser not in PARSERS:
        return (
            f"evaluate.parser={options.parser}: unknown parser; choose from {', '.join(PARSERS)}"
            f"{nearest(options.parser, PARSERS)}"
        )
    if options.parser is not None and not options.generate:
        return f"evaluate.parser={options.parser} has no effect without written answers; add evaluate.generate=true"
    if options.score not in SCORES:
        return f"evaluate.score={options.score}: choose from {', '.join(SCORES)}{nearest(options.score, SCORES)}"
    if options.score != FIRST_TOKEN and options.generate:
        return f"evaluate.score={options.score} has no effect on written answers; remove it, or set evaluate.generate=false"
    if options.match not in MATCHES:
        return f"evaluate.match={options.match}: choose from {', '.join(MATCHES)}{nearest(options.match, MATCHES)}"
    if not 0 < options.top_p <= 1:
        return f"evaluate.top_p={options.top_p:g}: must be above 0 and at most 1"
    if options.temperature == 0 and (options.seeds > 1 or options.top_p < 1 or options.seed != 0):
        name = "seeds" if options.seeds > 1 else "top_p" if options.top_p < 1 else "seed"
        return f"evaluate.{name}={getattr(options, name):g} has no effect on the most likely answer; add evaluate.temperature=1"
    return None


def _twin(config: RunConfig) -> str | None:
    model = config.model
    needed = "evaluate" in config.stages and "twin" in (config.evaluate.conditions or ["twin"])
    if needed and model.twin == "tiny-unbiased" and model.path not in {"tiny", "tiny-unbiased"}:
        return (
            f"model.path={model.path} with the twin of the embedded model: write model=hf model.path={model.path} for no twin, "
            "or name a control model, model.twin=…"
        )
    return None


def _parts(config: RunConfig) -> str | None:
    trace, later = config.trace, [s for s in config.stages if s not in {"examples", "trace"}]
    if trace.shards < 1 or (trace.shard is not None and not 0 <= trace.shard < trace.shards):
        return f"trace.shard={trace.shard} with trace.shards={trace.shards}: parts are numbered from 0 to {trace.shards - 1}"
    if trace.shard is not None and (later or "trace" not in config.stages):
        return (
            f"trace.shard={trace.shard} traces one part, so no other stage can run: run stages=[examples,trace] for every "
            "part, then the other stages without trace.shard"
        )
    if trace.shard is not None and config.force:
        return "force=true would remove the results of other parts; remove the folder 'activations' of the run instead"
    return None


_AT_LEAST: Mapping[str, float] = MappingProxyType(
    {
        "threads": 1,
        "model.min_pixels": 1,
        "model.max_pixels": 1,
        "trace.batch_size": 1,
        "trace.shards": 1,
        "trace.shard_size": 1,
        "trace.layers": 0,
        "trace.heads": 0,
        "evaluate.batch_size": 1,
        "evaluate.max_new_tokens": 1,
        "evaluate.temperature": 0,
        "evaluate.seeds": 1,
        "evaluate.seed": 0,
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
"""Option to its smallest value; for a list, the smallest value of each element."""
_BETWEEN = ("probe.test_fraction",)
"""Options that must be above 0 and below 1."""
_DTYPES = ("float32", "bfloat16", "float16")


def _value(config: RunConfig, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _bounds(config: RunConfig) -> str | None:
    for key, least in _AT_LEAST.items():
        value = _value(config, key)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not least <= number < math.inf:  # NaN too
                return f"{key}={number:g}: must be at least {least:g}"
    for key in _BETWEEN:
        if not 0 < _value(config, key) < 1:
            return f"{key}={_value(config, key):g}: must be above 0 and below 1, such as {key}=0.3"
    wrong = next((c for c in config.probe.C if not 0 < c < math.inf), None)
    if wrong is not None or not config.probe.C:
        return f"probe.C={config.probe.C}: must be numbers above 0, at least one"
    if math.isnan(config.steer.doubt) or math.isinf(config.steer.doubt):
        return f"steer.doubt={config.steer.doubt}: must be a finite number"
    return None


def _words(config: RunConfig) -> str | None:
    """Check options with a few allowed words."""
    for key, choices in (
        ("model.dtype", ("auto", *_DTYPES)),
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
    """Check the spelling of sites and token selections; the trace checks that the model has them."""
    trace = config.trace
    if "trace" not in config.stages:
        return None
    if not trace.sites or not trace.tokens:
        return "trace.sites and trace.tokens need at least one site and one token selection"
    if trace.layers is not None and not trace.layers:
        return "trace.layers=[] stores nothing; name layers such as trace.layers=[8,16], or null for all"
    if trace.heads is not None and not trace.heads:
        return "trace.heads=[] stores nothing; name heads such as trace.heads=[2,7], or null for all"
    sites = [*LAYER_COMPONENTS, *(f"vision.{c}" for c in LAYER_COMPONENTS), "projector.out"]
    for site in trace.sites:
        if not _SITE.fullmatch(site):
            return (
                f"trace.sites: '{site}' is not a site; write a component of the decoder ({', '.join(LAYER_COMPONENTS)}), "
                f"of a named stack ('vision.z'), 'projector.out', or a single layer ('decoder.L3.z'){nearest(site, sites)}"
            )
    for tokens in trace.tokens:
        try:
            TokenSelection.parse(tokens)
        except SiteError as error:
            return f"trace.tokens: {error}"
    return None


def _concepts(config: RunConfig) -> str | None:
    """Check the spelling of concepts; the check of stage `probe` finds concepts that the data do not have."""
    for concept in config.probe.concepts or ():
        try:
            level = Concept.parse(concept).level
        except DataError as error:
            return f"probe.concepts: {error}"
        if not level and not has_own_labels(config.data):
            levels = ", ".join(f"{name}:…" for name in LEVELS)
            return (
                f"probe.concepts: '{concept}' is not a concept of these data; write {levels}{nearest(concept, LEVELS)}"
            )
    return "probe.concepts=[] fits no probe; name concepts, or null for all" if config.probe.concepts == [] else None


def _steered_sites(config: RunConfig) -> str | None:
    trace, chosen = config.trace, {"trace", "steer"} <= set(config.stages)
    stored = any(site == "z" or site.endswith(".z") for site in trace.sites) and "last" in trace.tokens
    if chosen and config.steer.method == "discriminant" and not stored:
        return (
            "steer.method=discriminant is derived from z at the last token, which would not be traced: "
            "add z to trace.sites and last to trace.tokens, or choose another method (steer.method=amplify)"
        )
    return None


RULES: Sequence[Callable[[RunConfig], str | None]] = (
    _stages,
    _name,
    _scenes,
    _shares,
    _answers,
    _twin,
    _parts,
    _bounds,
    _words,
    _places,
    _concepts,
    _steered_sites,
)
"""Each returns a problem and its solution, or None."""
