"""``groundscope resume=runs/x``: continue a run, or a sweep, as it was configured.

The folder may come from somewhere else, so its files configure the run and decide on nothing more: consent to remote code,
options of Hydra and its flags count on the command line of this call only, and interpolations such as ``${oc.env:…}`` are
refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.records import ANY, SWEEP_RECORD, TEXT, read_record
from groundscope.core.errors import ConfigError
from groundscope.core.paths import below, is_file, is_link
from groundscope.core.user_files import read_text

CONFIG = "config.yaml"
RECORD = "sweep.json"
_LIMIT = 1 << 17
"""Bytes of a configuration."""
_DEPTH = 16
"""Levels of nesting in one."""
TRUST = "model.trust_remote_code"
_ONLY_HERE = ("${", "_target_", "trust_remote_code")
"""What a stored command line may not hold anywhere."""


def resume(path: str, words: Sequence[str], run: Callable[[Sequence[str]], int]) -> int:
    """Continue the run or the sweep in a folder.

    Parameters
    ----------
    path
        Folder of a run or a sweep.
    words
        Further options, which come after its own.
    run
        Runs a command line, for sweeps.

    Raises
    ------
    ConfigError
        Where there is neither, it was configured by a release with other options, or its files hold what only this call's
        command line may say.
    """
    folder = _folder(path)
    if is_file(folder / RECORD):
        stored = read_record(folder / RECORD, SWEEP_RECORD)["command"]
        place = _place_of_sweep(folder)
        return run([*_allowed(stored, words, folder / RECORD), *place, *words])
    from experiments.pipeline import execute

    execute(configured(folder, words))
    return 0


def _folder(path: str) -> Path:
    folder = Path(path)
    if not folder.name or ".." in folder.parts:  # ``.``, say: its name is needed
        folder = folder.resolve()
    if is_link(folder):
        msg = f"'{folder}' is a symbolic link, which is not followed: name the folder itself, resume={folder.resolve()}"
        raise ConfigError(msg)
    return folder


def _place_of_sweep(folder: Path) -> list[str]:
    """Return the options that keep a sweep in its folder, wherever that was moved to."""
    from experiments.cli.overrides import quoted
    from experiments.config import SWEEPS

    if folder.absolute().parent.name != SWEEPS:
        msg = f"'{folder}' is no folder of a sweep: sweeps are in ROOT/{SWEEPS}"
        raise ConfigError(msg)
    return [f"root={quoted(str(folder.parent.parent))}", f"sweep.name={quoted(folder.name)}"]


def _allowed(stored: Sequence[str], words: Sequence[str], source: Path) -> list[str]:
    """Return the stored command line without what this call says itself; raises `ConfigError` for what only a call may say."""
    here = {_key(word) for word in words}
    kept = []
    for word in stored:
        key = _key(word)
        if word in {"-m", "--multirun"}:
            kept.append(word)
        elif key in here or key in {"root", "sweep.name"}:
            continue
        elif only_here(word):
            msg = (
                f"{source} holds {word!r}: options and flags of Hydra, interpolations and consent to remote code are not taken "
                f"from a file; write {word} on this command line where you mean it"
            )
            raise ConfigError(msg)
        else:
            kept.append(word)
    return kept


def only_here(word: str) -> bool:
    """Say whether a word of a command line counts in the call alone in which it is written, and not where a file holds it."""
    if word in {"-m", "--multirun"}:
        return False
    return word.startswith("-") or _key(word).startswith("hydra") or any(part in word for part in _ONLY_HERE)


def _key(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


def configured(folder: Path, words: Sequence[str] = ()) -> Any:
    """Return the configuration in a run's folder, changed by `words`; its root and name say where the folder is now."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from experiments.cli.overrides import finished, known, read
    from experiments.config import SWEEPS, RunConfig

    folder = _folder(str(folder))
    stored = _stored(folder)
    try:
        options = OmegaConf.merge(OmegaConf.structured(RunConfig), stored)
    except (OmegaConfBaseException, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(_unfit(folder, error)) from error
    request = read(words)
    groups = known()[1]
    for override in request.overrides:
        key = override.key_or_group
        if key in groups or key.startswith("hydra") or override.is_delete():
            msg = f"resume takes options, not '{override.input_line}': write {key}.NAME=VALUE for each, or run without resume"
            raise ConfigError(msg)
        OmegaConf.update(options, key, override.value(), force_add=True)
    model = stored.get("model")
    if isinstance(model, dict) and model.get("trust_remote_code") and TRUST not in {_key(w) for w in words}:
        msg = (
            f"{folder / CONFIG} says {TRUST}=true, which is not taken from a file: add {TRUST}=true to this command line where "
            f"you trust the model's code, or {TRUST}=false to continue without it"
        )
        raise ConfigError(msg)
    inside = folder.absolute().parent.parent.name == SWEEPS  # a sweep's job: its root is that of all runs
    root = folder.parent.parent.parent if inside else folder.parent
    name = folder.absolute().relative_to(root.absolute()).as_posix()
    OmegaConf.update(options, "root", str(root))
    OmegaConf.update(options, "name", name)
    return finished(options)


def _stored(folder: Path) -> dict[str, Any]:
    """Return what a run's configuration holds, as plain values."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

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
                msg = f"{path}: aliases (*name) and more than {_DEPTH} levels are not allowed in a configuration"
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
        raise ConfigError(_unfit(folder, "it is no table of options"))
    for key, value in _leaves(values):
        if key == "hydra" or key.startswith(("hydra.", "hydra/")) or "_target_" in key.split("."):
            msg = f"{path} holds '{key}': options of Hydra are not taken from a file; remove it"
            raise ConfigError(msg)
        if isinstance(value, str) and "${" in value:
            msg = f"{path}: {key} holds an interpolation, {value[:60]!r}, which is not resolved; write the value itself"
            raise ConfigError(msg)
    return values


def _leaves(value: Any, key: str = "") -> list[tuple[str, Any]]:
    """Return every key of nested values, with the value where it is a plain one."""
    if isinstance(value, dict):
        found: list[tuple[str, Any]] = [(key, None)] if key else []
        for name, inner in value.items():
            found += [(str(name), str(name)) if "${" in str(name) else (key, None)]
            found += _leaves(inner, f"{key}.{name}" if key else str(name))
        return found
    if isinstance(value, list):
        return [pair for inner in value for pair in _leaves(inner, key)]
    return [(key, value)]


def _unfit(folder: Path, error: object) -> str:
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    return (
        f"'{folder / CONFIG}' was written by groundscope {_version(folder)} and does not fit this one: "
        f"{reason}; use that release, or configure the run again under another name=…"
    )


def _version(folder: Path) -> str:
    try:
        found = read_record(folder / "environment.json", {"packages": {"groundscope": TEXT, "*": ANY}}, limit=_LIMIT)
        return str(found["packages"]["groundscope"])
    except ConfigError:
        return "of an unknown version"
