"""Read and check the command line before anything is loaded: names, choices, values, launchers.

Hydra checks them too, with longer messages. Here a mistake gives one line: the problem, the allowed values, the solution.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from importlib.util import find_spec
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from experiments.cli.help import choices
from experiments.config import RENAMED, SYNONYMS, RunConfig
from groundscope.core.errors import ConfigError
from groundscope.core.text import nearest

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

LAUNCHERS = MappingProxyType(
    {
        "basic": (None, ""),
        "joblib": ("hydra_joblib_launcher", "pip install 'groundscope[cluster]'"),
        "submitit_local": ("hydra_submitit_launcher", "pip install 'groundscope[cluster]'"),
        "submitit_slurm": ("hydra_submitit_launcher", "pip install 'groundscope[cluster]'"),
        "ray": (
            "hydra_ray_launcher",
            "pip install 'groundscope[ray]' in a separate environment (see CONTRIBUTING.md)",
        ),
    }
)
"""Launcher of a sweep's jobs to the module of its plug-in and the command that installs it."""
_VALUED = {"--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--package", "-p", "--cfg", "-c"}


@dataclass(frozen=True)
class Request:
    """A parsed command line."""

    overrides: tuple[Override, ...]
    flags: tuple[str, ...]

    @property
    def several(self) -> bool:
        """Whether the command line has ``-m``."""
        return bool({"-m", "--multirun"} & set(self.flags))

    @property
    def plain(self) -> bool:
        """Whether the command line has no flag of Hydra except ``-m``."""
        return set(self.flags) <= {"-m", "--multirun"}

    @property
    def swept(self) -> tuple[str, ...]:
        """Options with several values."""
        return tuple(o.key_or_group for o in self.overrides if o.is_sweep_override())

    def first(self) -> list[str]:
        """Return the overrides of the first job."""
        return [_first(o) for o in self.overrides]


def read(arguments: Sequence[str]) -> Request:
    """Read and check a command line.

    Raises
    ------
    ConfigError
        For an unknown option or choice (with near matches), a launcher that is not installed, or several values without
        ``-m``.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    flags, words, skip = [], [], False
    for argument in arguments:
        if skip or (argument.startswith("-") and argument != "-"):
            flags.append(argument)
            skip = not skip and argument in _VALUED
        elif "=" not in argument and not argument.startswith("~"):
            msg = f"'{argument}' is neither a command nor option=value{nearest(argument, COMMANDS)}; groundscope help lists both"
            raise ConfigError(msg)
        else:
            words.append(as_sources(_named(argument)))
    try:
        overrides = tuple(OverridesParser.create().parse_overrides(words))
    except OverrideParseException as error:
        if not (error.override or "").isprintable():
            msg = f"{error.override!r}: cannot be parsed: write it without control characters"
            raise ConfigError(msg) from error
        msg = (
            f"{error.override}: cannot be parsed: {str(error).splitlines()[0]}; "
            f"use two pairs of quotes: {_quote_twice(error.override)}"
        )
        raise ConfigError(msg) from error
    request = Request(overrides, tuple(flags))
    own = not {"--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn"} & set(flags)
    for override in overrides:
        _check(override, own=own)
    if request.swept and not request.several:
        key = request.swept[0]
        msg = f"{key} has several values: add -m to run each, write {key}=[…] for a list, or \"{key}='…'\" for a text"
        raise ConfigError(msg)
    return request


def _named(word: str) -> str:
    """Return an override with the name of its option in place of a synonym."""
    key, separator, value = word.partition("=")
    return f"{SYNONYMS.get(key, key)}{separator}{value}"


def as_sources(word: str) -> str:
    """Replace ``data=[pope,gqa]`` by ``data.source=[pope,gqa]``, the format of each file; return other words unchanged."""
    key, _, value = word.partition("=")
    return f"data.source={value}" if key == "data" and value.startswith("[") else word


def _quote_twice(word: str | None) -> str:
    key, _, value = (word or "key=…").partition("=")
    return f'"{key}={quoted(value.strip(chr(39) + chr(34)))}"'


COMMANDS = ("evaluate", "status", "compare", "plan", "report", "help", "resume")


def _check(override: Override, *, own: bool) -> None:
    key = override.key_or_group
    if key == "hydra/launcher":
        _check_launcher(str(override.value()))
    if key.startswith("hydra"):
        return
    leaves, groups, free = known_options()
    if key in groups:
        names = [name for name, _ in choices(key)]
        for value in _values(override):
            if own and isinstance(value, str) and value not in names:
                allowed = (
                    f"unknown choice; choose from {', '.join(names)}"
                    if names
                    else f"this group has no named choices; write {key}.OPTION=VALUE"
                )
                msg = f"{key}={value}: {allowed}{nearest(value, names)}"
                raise ConfigError(msg)
        return
    if key in leaves:
        return
    if key in RENAMED:
        msg = f"option '{key}' is now called '{RENAMED[key]}': write {RENAMED[key]}=…"
        raise ConfigError(msg)
    inside = next((name for name in free if key.startswith(f"{name}.")), None)
    if inside is None:
        msg = f"unknown option '{key}'{nearest(key, [*leaves, *groups])}; groundscope help lists all"
        raise ConfigError(msg)
    if not override.is_add() and not override.is_force_add() and not override.is_delete():
        msg = f"{key}: options under {inside} have no fixed names; write +{override.input_line}"
        raise ConfigError(msg)


def _check_launcher(name: str) -> None:
    if name not in LAUNCHERS:
        msg = f"hydra/launcher={name}: unknown launcher; choose from {', '.join(LAUNCHERS)}{nearest(name, LAUNCHERS)}"
        raise ConfigError(msg)
    module, advice = LAUNCHERS[name]
    if module is not None and (find_spec("hydra_plugins") is None or find_spec(f"hydra_plugins.{module}") is None):
        msg = f"hydra/launcher={name} is not installed: {advice}"
        raise ConfigError(msg)


def known_options() -> tuple[list[str], list[str], list[str]]:
    """Return the keys of all options, the names of all groups, and the keys of options that are dictionaries."""
    leaves, groups, free = [], [], []
    hints = get_type_hints(RunConfig)
    for name, kind in hints.items():
        if not hasattr(kind, "__dataclass_fields__"):
            leaves.append(name)
            continue
        groups.append(name)
        inner = get_type_hints(kind)
        leaves += [f"{name}.{f.name}" for f in fields(kind)]
        defaults = ((f.name, f.default_factory()) for f in fields(kind) if f.default_factory is not MISSING)
        leaves += [f"{name}.{key}.{inside}" for key, value in defaults if isinstance(value, dict) for inside in value]
        free += [
            f"{name}.{key}" for key, of in inner.items() if dict in {of, get_origin(of), *map(get_origin, get_args(of))}
        ]
    return leaves, groups, free


def _values(override: Override) -> list[Any]:
    if override.is_discrete_sweep():
        return list(override.sweep_iterator())
    return [] if override.is_sweep_override() else [override.value()]


def _first(override: Override) -> str:
    from hydra.core.override_parser.types import Transformer

    if not override.is_discrete_sweep():
        return override.input_line or ""
    first = next(iter(override.sweep_iterator(transformer=Transformer.encode)))
    prefix = "++" if override.is_force_add() else "+" if override.is_add() else ""
    return f"{prefix}{override.get_key_element()}={first}"


def compose(overrides: Sequence[str]) -> tuple[RunConfig, Any]:
    """Compose the configuration from overrides; also return Hydra's part of it.

    Raises
    ------
    ConfigError
        If a value has the wrong type, or a required one is missing.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf import open_dict
    from omegaconf.errors import OmegaConfBaseException

    register()
    try:
        with hydra.initialize_config_module("experiments.conf", version_base="1.3"):
            whole = hydra.compose("config", overrides=list(overrides), return_hydra_config=True)
        own = whole.hydra
        with open_dict(whole):
            del whole["hydra"]
        return to_config(whole), own
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ if error.__cause__ is not None else error
        lines = [line.strip() for line in str(error).splitlines()[:1] + str(cause).splitlines()[:1]]
        msg = ": ".join(dict.fromkeys(lines)) + "; groundscope help=GROUP lists types and defaults"
        raise ConfigError(msg) from error


def to_config(options: Any) -> RunConfig:
    """Convert options to the dataclass; raise `ConfigError` if one has no value or a wrong one."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        missing = sorted(OmegaConf.missing_keys(options))
        if missing:
            msg = f"option {missing[0]} has no value: write {missing[0]}=…"
            raise ConfigError(msg)
        config: Any = OmegaConf.to_object(options)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from error
    return config


def register() -> None:
    """Register the dataclasses of the options with Hydra."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="run", node=RunConfig)


def quoted(text: str) -> str:
    """Quote text so that Hydra reads it unchanged."""
    # Hydra halves backslashes only before a quote.
    return "'" + re.sub(r"(\\*)('|\Z)", lambda m: m[1] * 2 + m[2].replace("'", "\\'"), text) + "'"
