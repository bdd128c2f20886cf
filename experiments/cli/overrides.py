"""What was written on the command line, checked before anything is loaded: names, choices, values, launchers.

Hydra checks too, but after its own fashion: here a mistake is one line that says what was asked, what exists, what to do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from experiments.cli.help import choices
from experiments.config import RENAMED, RunConfig
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
            "pip install 'groundscope[ray]' into an environment of its own (see CONTRIBUTING.md)",
        ),
    }
)
"""How jobs of a sweep are started: the plugin's module and how to get it."""
_VALUED = {"--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--package", "-p", "--cfg", "-c"}


@dataclass(frozen=True)
class Request:
    """A command line, read."""

    overrides: tuple[Override, ...]
    flags: tuple[str, ...]

    @property
    def several(self) -> bool:
        """Whether ``-m`` was given."""
        return bool({"-m", "--multirun"} & set(self.flags))

    @property
    def plain(self) -> bool:
        """Whether nothing was asked of Hydra itself but several runs."""
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
        For what is no option (with the nearest that are), no choice of a group, a launcher that is not installed, or
        several values without ``-m``.
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
            words.append(argument)
    try:
        overrides = tuple(OverridesParser.create().parse_overrides(words))
    except OverrideParseException as error:
        if not (error.override or "").isprintable():
            msg = f"{error.override!r}: cannot be read: write it without control characters"
            raise ConfigError(msg) from error
        msg = (
            f"{error.override}: cannot be read: {str(error).splitlines()[0]}; "
            f"quote such a value twice: {_advised(error.override)}"
        )
        raise ConfigError(msg) from error
    request = Request(overrides, tuple(flags))
    own = not {"--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn"} & set(flags)
    for override in overrides:
        _check(override, own=own)
    if request.swept and not request.several:
        key = request.swept[0]
        msg = f"{key} has several values: add -m for a run of each, write {key}=[…] for one list, \"{key}='…'\" for one text"
        raise ConfigError(msg)
    return request


def _advised(word: str | None) -> str:
    key, _, value = (word or "key=…").partition("=")
    return f'"{key}={quoted(value.strip(chr(39) + chr(34)))}"'


COMMANDS = ("status", "compare", "plan", "report", "help", "resume")


def _check(override: Override, *, own: bool) -> None:
    key = override.key_or_group
    if key == "hydra/launcher":
        _check_launcher(str(override.value()))
    if key.startswith("hydra"):
        return
    leaves, groups, free = known()
    if key in groups:
        names = [name for name, _ in choices(key)]
        for value in _values(override):
            if own and isinstance(value, str) and value not in names:
                there = (
                    f"there are {', '.join(names)}" if names else f"it has no named choices, write {key}.OPTION=VALUE"
                )
                msg = f"{key}={value}: {there}{nearest(value, names)}"
                raise ConfigError(msg)
        return
    if key in leaves:
        return
    if key in RENAMED:
        msg = f"option '{key}' is now called '{RENAMED[key]}': write {RENAMED[key]}=…"
        raise ConfigError(msg)
    inside = next((name for name in free if key.startswith(f"{name}.")), None)
    if inside is None:
        msg = f"no option '{key}'{nearest(key, [*leaves, *groups])}; groundscope help lists them all"
        raise ConfigError(msg)
    if not override.is_add() and not override.is_force_add() and not override.is_delete():
        msg = f"{key}: names under {inside} are the loader's own, so write +{override.input_line}"
        raise ConfigError(msg)


def _check_launcher(name: str) -> None:
    if name not in LAUNCHERS:
        msg = f"hydra/launcher={name}: there are {', '.join(LAUNCHERS)}{nearest(name, LAUNCHERS)}"
        raise ConfigError(msg)
    module, advice = LAUNCHERS[name]
    if module is not None and (find_spec("hydra_plugins") is None or find_spec(f"hydra_plugins.{module}") is None):
        msg = f"hydra/launcher={name} is not installed: {advice}"
        raise ConfigError(msg)


def known() -> tuple[list[str], list[str], list[str]]:
    """Return the keys of all options, of all groups, and of those whose names are free (dicts)."""
    leaves, groups, free = [], [], []
    hints = get_type_hints(RunConfig)
    for name, kind in hints.items():
        if not hasattr(kind, "__dataclass_fields__"):
            leaves.append(name)
            continue
        groups.append(name)
        inner = get_type_hints(kind)
        leaves += [f"{name}.{f.name}" for f in fields(kind)]
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


def composed(overrides: Sequence[str]) -> tuple[RunConfig, Any]:
    """Return the configuration that overrides make, and Hydra's own part of it.

    Raises
    ------
    ConfigError
        Where a value has the wrong type, or one that must be given is missing.
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
        return finished(whole), own
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ if error.__cause__ is not None else error
        lines = [line.strip() for line in str(error).splitlines()[:1] + str(cause).splitlines()[:1]]
        msg = ": ".join(dict.fromkeys(lines)) + "; groundscope help=GROUP tells types and defaults"
        raise ConfigError(msg) from error


def finished(options: Any) -> RunConfig:
    """Return options as the dataclass they are; raises `ConfigError` where one has no value or a wrong one."""
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
    """Tell Hydra the dataclasses that the yaml files fill."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="run", node=RunConfig)


def quoted(text: str) -> str:
    """Return text as a value that Hydra reads as that text, whatever characters it holds."""
    # Hydra halves backslashes only where they stand before a quote.
    return "'" + re.sub(r"(\\*)('|\Z)", lambda m: m[1] * 2 + m[2].replace("'", "\\'"), text) + "'"
