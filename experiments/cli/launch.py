"""Start the jobs of a sweep with Hydra's sweeper and launcher.

Hydra composes the configuration of every job before the first starts, so that a wrong value is an error before work, and
its launchers compose it again. `_ComposedOnce` keeps the first result: with launchers that run in this process (the default)
each job is composed once. A launcher that starts other processes composes each job in its process.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from groundscope.core.errors import ConfigError
from groundscope.core.packages import PACKAGES


def launch_jobs(overrides: Sequence[str]) -> None:
    """Run one job for each combination of the values in `overrides`, and return when all have ended.

    Raises
    ------
    ConfigError
        If the configuration of a job cannot be composed.
    """
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    from experiments.cli.overrides import register

    register()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises errors instead of printing them
    try:
        with initialize_config_module("experiments.conf", job_name="groundscope", version_base="1.3"):
            hydra: Any = GlobalHydra.instance().hydra
            hydra.config_loader = _ComposedOnce(hydra.config_loader)
            hydra.multirun(
                "config", run_task, overrides=[*overrides, *launcher_options(overrides), "hydra.mode=MULTIRUN"]
            )
    except HydraException as error:
        raise ConfigError(str(error).splitlines()[0]) from error


def launcher_options(overrides: Sequence[str]) -> list[str]:
    """Return further overrides for the chosen launcher.

    Ray puts the current folder first on the import path of its workers, after `import_packages` has run there: a folder of
    the user with the name of one of our packages then hides nothing. (Workers of joblib and submitit have ``PYTHONSAFEPATH``.)
    """
    keys = {word.lstrip("+").partition("=")[0] for word in overrides}
    ray = any(word.lstrip("+") == "hydra/launcher=ray" for word in overrides)
    if not ray or any(key.startswith("hydra.launcher.ray.init.runtime_env") for key in keys):
        return []
    return [f"+hydra.launcher.ray.init.runtime_env.worker_process_setup_hook={__name__}.{import_packages.__name__}"]


def import_packages() -> None:
    """Import all packages of this distribution, so that later changes of the import path do not hide them."""
    for package in PACKAGES:
        import_module(package)


def run_task(options: Any) -> None:
    """Run one configuration that Hydra composed: a job of a sweep, or a single run."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from experiments.cli.overrides import to_config
    from experiments.cli.sweep import job
    from experiments.pipeline import execute

    if HydraConfig.get().mode == RunMode.MULTIRUN:
        job(options, HydraConfig.get())
    else:
        execute(to_config(options))


class _ComposedOnce:
    """A configuration loader of Hydra that composes each job of a sweep once."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self._composed: dict[tuple[str, ...], Any] = {}

    def load_sweep_config(self, master_config: Any, sweep_overrides: list[str]) -> Any:
        """Return the configuration of a job; the launcher may change the copy that it receives."""
        key = tuple(sweep_overrides)
        if key not in self._composed:
            self._composed[key] = self._loader.load_sweep_config(master_config, sweep_overrides)
        return copy.deepcopy(self._composed[key])

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __getstate__(self) -> dict[str, Any]:
        # Each job of another process receives this object: the configurations of all other jobs stay here.
        return {"_loader": self._loader, "_composed": {}}
