"""``groundscope resume=runs/x``: continue a run, or a sweep, as it was configured.

The folder may come from somewhere else, so its files configure the run and decide on nothing more: consent to remote code,
options of Hydra and its flags count on the command line of this call only, and interpolations such as ``${oc.env:…}`` are
refused.
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
            kept.append(_rename(word))
    return kept


def _rename(word: str) -> str:
    """Return a stored option=value with the present name and value of an option that an earlier version named otherwise."""
    before, separator, value = word.partition("=")
    key = _key(word)
    name = RENAMED.get(key, key)
    value = RENAMED_VALUES.get(name, {}).get(value, value)
    return f"{before.removesuffix(key)}{name}{separator}{value}"


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

    from experiments.cli.overrides import finished, known, read
    from experiments.config import SWEEPS
    from experiments.run.stored_config import CONFIG, read_options, structured_options

    folder = _folder(str(folder))
    stored = read_options(folder)
    options = structured_options(folder, stored)
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
