"""``groundscope resume=runs/x``: go on with a run, or a sweep, as it was configured."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from groundscope.core.errors import ConfigError

CONFIG = "config.yaml"


def resume(path: str, words: Sequence[str], run: Callable[[Sequence[str]], int]) -> int:
    """Go on with what lies in a folder.

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
        Where there is neither, or it was configured by a release with other options.
    """
    folder = Path(path)
    if (folder / "sweep.json").is_file():
        return run([*json.loads((folder / "sweep.json").read_text())["command"], *words])
    from experiments.pipeline import execute

    execute(configured(folder, words))
    return 0


def configured(folder: Path, words: Sequence[str] = ()) -> Any:
    """Return the configuration that a run's folder holds, changed by `words`; its root and name say where it lies now."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from experiments.cli.overrides import finished, known, read
    from experiments.config import RunConfig
    from experiments.run.stage_cache import SWEEPS

    if not (folder / CONFIG).is_file():
        msg = f"no run in '{folder}': it has no {CONFIG}; groundscope status {folder.parent} lists the runs there are"
        raise ConfigError(msg)
    try:
        options = OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.load(folder / CONFIG))
    except (OmegaConfBaseException, ValueError) as error:
        msg = (
            f"'{folder / CONFIG}' was written by groundscope {_version(folder)} and does not fit this one: "
            f"{str(error).splitlines()[0]}; use that release, or configure the run anew under another name=…"
        )
        raise ConfigError(msg) from error
    request = read(words)
    groups = known()[1]
    for override in request.overrides:
        key = override.key_or_group
        if key in groups or key.startswith("hydra") or override.is_delete():
            msg = f"resume takes options, not '{override.input_line}': write {key}.NAME=VALUE for each, or run without resume"
            raise ConfigError(msg)
        OmegaConf.update(options, key, override.value(), force_add=True)
    inside = folder.parent.parent.name == SWEEPS  # a sweep's job: its root is that of all runs
    root = folder.parent.parent.parent if inside else folder.parent
    OmegaConf.update(options, "root", str(root))
    OmegaConf.update(options, "name", folder.relative_to(root).as_posix())
    return finished(options)


def _version(folder: Path) -> str:
    try:
        return str(json.loads((folder / "environment.json").read_text())["packages"]["groundscope"])
    except (OSError, ValueError, KeyError, TypeError):
        return "of an unknown version"
