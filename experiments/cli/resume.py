"""``groundscope resume=runs/x``: continue a run or a sweep with its stored configuration.

The folder may come from another person, so its files set options of the run and nothing else: permission to run remote code and
options and flags of Hydra are accepted on the command line only, and interpolations such as ``${oc.env:…}`` are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.config import RENAMED, RENAMED_VALUES
from experiments.records import SWEEP_RECORD, read_record
from groundscope.core.errors import ConfigError
from groundscope.core.paths import is_file, is_link

RECORD = "sweep.json"
TRUST = "model.trust_remote_code"
SOURCE = "data.source"
_COMMAND_LINE_ONLY = ("${", "_target_", "trust_remote_code")
"""Texts that a stored command line must not contain."""


def resume(path: str, words: Sequence[str], run: Callable[[Sequence[str]], int]) -> int:
    """Continue the run or the sweep in a folder.

    Parameters
    ----------
    path
        Folder of a run or a sweep.
    words
        Further options, which override the stored ones.
    run
        Runs a command line, for sweeps.

    Raises
    ------
    ConfigError
        If the folder holds neither a run nor a sweep, was configured by a release with other options, or has a file with
        settings that are accepted on the command line only.
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
        msg = f"'{folder}' is a symbolic link, which is not followed: use the folder itself, resume={folder.resolve()}"
        raise ConfigError(msg)
    return folder


def _place_of_sweep(folder: Path) -> list[str]:
    """Return the options that keep a sweep in its present folder."""
    from experiments.cli.overrides import quoted
    from experiments.config import SWEEPS

    if folder.absolute().parent.name != SWEEPS:
        msg = f"'{folder}' is not the folder of a sweep: sweeps are in ROOT/{SWEEPS}"
        raise ConfigError(msg)
    return [f"root={quoted(str(folder.parent.parent))}", f"sweep.name={quoted(folder.name)}"]


def _allowed(stored: Sequence[str], words: Sequence[str], source: Path) -> list[str]:
    """Return the stored command line without options that `words` override; raise `ConfigError` for a forbidden word."""
    overridden = {_key(word) for word in words}
    allowed = []
    for word in stored:
        key = _key(word)
        if word in {"-m", "--multirun"}:
            allowed.append(word)
        elif key in overridden or key in {"root", "sweep.name"}:
            continue
        elif command_line_only(word):
            msg = (
                f"{source} contains {word!r}: options and flags of Hydra, interpolations and permission for remote code are not "
                f"taken from a file; add {word} to this command line if you intend it"
            )
            raise ConfigError(msg)
        else:
            allowed.append(_rename(word))
    return allowed


def _rename(word: str) -> str:
    """Return a stored option=value with the present name and value of an option that an earlier version named otherwise."""
    before, separator, value = word.partition("=")
    key = _key(word)
    name = RENAMED.get(key, key)
    value = RENAMED_VALUES.get(name, {}).get(value, value)
    return f"{before.removesuffix(key)}{name}{separator}{value}"


def command_line_only(word: str) -> bool:
    """Return whether a word is accepted on the command line only, not from a file."""
    if word in {"-m", "--multirun"}:
        return False
    if _key(word) == SOURCE and ":" in word.partition("=")[2]:  # a function of the user, which would run
        return True
    return word.startswith("-") or _key(word).startswith("hydra") or any(part in word for part in _COMMAND_LINE_ONLY)


def _key(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


def configured(folder: Path, words: Sequence[str] = ()) -> Any:
    """Return the configuration of a run folder, changed by `words`; root and name are those of the present folder."""
    from omegaconf import OmegaConf

    from experiments.cli.overrides import known_options, read, to_config
    from experiments.config import SWEEPS
    from experiments.run.stored_config import CONFIG, read_options, structured_options

    folder = _folder(str(folder))
    stored = read_options(folder)
    options = structured_options(folder, stored)
    request = read(words)
    groups = known_options()[1]
    for override in request.overrides:
        key = override.key_or_group
        if key in groups or key.startswith("hydra") or override.is_delete():
            msg = f"resume takes single options, not '{override.input_line}': write {key}.NAME=VALUE, or run without resume"
            raise ConfigError(msg)
        OmegaConf.update(options, key, override.value(), force_add=True)
    model = stored.get("model")
    if isinstance(model, dict) and model.get("trust_remote_code") and TRUST not in {_key(w) for w in words}:
        msg = (
            f"{folder / CONFIG} contains {TRUST}=true, which is not taken from a file: add {TRUST}=true to this command line if "
            f"you trust the code of the model, or {TRUST}=false to continue without it"
        )
        raise ConfigError(msg)
    data = stored.get("data")
    sources = data.get("source") if isinstance(data, dict) else None
    function = next((s for s in (sources if isinstance(sources, list) else [sources]) if ":" in str(s)), None)
    if function is not None and SOURCE not in {_key(w) for w in words}:
        msg = (
            f"{folder / CONFIG} contains {SOURCE}={function}, code that is not run from a file: add {SOURCE}={function} to this "
            "command line if you trust it"
        )
        raise ConfigError(msg)
    inside = folder.absolute().parent.parent.name == SWEEPS  # a job of a sweep: its root is that of all runs
    root = folder.parent.parent.parent if inside else folder.parent
    name = folder.absolute().relative_to(root.absolute()).as_posix()
    OmegaConf.update(options, "root", str(root))
    OmegaConf.update(options, "name", name)
    return to_config(options)
