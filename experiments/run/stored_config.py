"""Read the configuration in the folder of a run.

The folder may come from another person, so its configuration is data: plain values of known options, without interpolations
or options of Hydra. Options that an earlier version named otherwise are read under their present names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.config import RunConfig, rename_options
from experiments.records import ANY, TEXT, read_record
from groundscope.core.errors import ConfigError
from groundscope.core.paths import below, is_file
from groundscope.core.user_files import read_text

CONFIG = "config.yaml"
"""Name of the file."""
_LIMIT = 1 << 17
"""Largest size in bytes."""
_DEPTH = 16
"""Largest depth of nesting."""


def read_config(folder: Path) -> RunConfig:
    """Return the configuration of a run.

    Raises
    ------
    ConfigError
        If the folder has none, or it is not a configuration of this version.
    """
    try:
        config: Any = OmegaConf.to_object(structured_options(folder, read_options(folder)))
    except OmegaConfBaseException as error:
        raise ConfigError(_unfit(folder, error)) from error
    return config


def structured_options(folder: Path, options: dict[str, Any]) -> Any:
    """Return the options of a run as a typed OmegaConf object; raise `ConfigError` if one is unknown or has another type."""
    try:
        return OmegaConf.merge(OmegaConf.structured(RunConfig), options)
    except (OmegaConfBaseException, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(_unfit(folder, error)) from error


def read_options(folder: Path) -> dict[str, Any]:
    """Return the stored options of a run as plain values, under the present names of the options."""
    path = below(folder, CONFIG, error=ConfigError)
    if not is_file(path):
        msg = f"no run in '{folder}': it has no {CONFIG}; groundscope status {folder.parent} lists the runs"
        raise ConfigError(msg)
    try:
        text = read_text(path, limit=_LIMIT, error=ConfigError)
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > _DEPTH:
                msg = f"{path}: aliases (*name) and more than {_DEPTH} levels of nesting are not allowed"
                raise ConfigError(msg)
        loaded = OmegaConf.create(text)  # refuses keys that occur twice
        values: Any = OmegaConf.to_container(loaded, resolve=False)
    except OSError as error:
        msg = f"{path}: cannot be read: {error.strerror}"
        raise ConfigError(msg) from error
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError, RecursionError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(_unfit(folder, error)) from error
    if not isinstance(values, dict):
        raise ConfigError(_unfit(folder, "it is not a table of options"))
    for key, value in _leaves(values):
        if key == "hydra" or key.startswith(("hydra.", "hydra/")) or "_target_" in key.split("."):
            msg = f"{path} contains '{key}': options of Hydra are not taken from a file; remove it"
            raise ConfigError(msg)
        if isinstance(value, str) and "${" in value:
            msg = f"{path}: {key} contains an interpolation, {value[:60]!r}, which is not resolved; write the value itself"
            raise ConfigError(msg)
    return rename_options(values)


def _leaves(value: Any, key: str = "") -> list[tuple[str, Any]]:
    """Return every key of nested values, with its value if that is a plain one."""
    if isinstance(value, dict):
        leaves: list[tuple[str, Any]] = [(key, None)] if key else []
        for name, inner in value.items():
            leaves += [(str(name), str(name)) if "${" in str(name) else (key, None)]
            leaves += _leaves(inner, f"{key}.{name}" if key else str(name))
        return leaves
    if isinstance(value, list):
        return [pair for inner in value for pair in _leaves(inner, key)]
    return [(key, value)]


def _unfit(folder: Path, error: object) -> str:
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    return (
        f"'{folder / CONFIG}' was written by groundscope {_version(folder)} and does not fit this version: "
        f"{reason}; use that release, or configure another run, name=…"
    )


def _version(folder: Path) -> str:
    try:
        record = read_record(folder / "environment.json", {"packages": {"groundscope": TEXT, "*": ANY}}, limit=_LIMIT)
        return str(record["packages"]["groundscope"])
    except ConfigError:
        return "of an unknown version"
