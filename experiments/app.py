"""The command line: ``groundscope`` runs the stages of one run, in order, skipping what is done.

groundscope                                        the embedded model on icon scenes
groundscope model=hf model.path=FOLDER             another model
groundscope data=pope data.questions=F data.images=D   another data set
groundscope stages=[probe,report] probe.folds=5    some stages, other options
groundscope -m data.seed=0,1,2 name='s${data.seed}'    several runs
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

from concepts.errors import GroundscopeError


def main() -> None:
    """Read the options with Hydra and run."""
    # Nothing this tool runs may report home or ask a hub what it can find on disk.
    for variable in ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS", "DO_NOT_TRACK"):
        os.environ.setdefault(variable, "1")
    import hydra
    from hydra.core.config_store import ConfigStore

    from experiments.config import RunConfig

    ConfigStore.instance().store(name="run", node=RunConfig)
    hydra.main(version_base="1.3", config_path="conf", config_name="config")(_task)()


def _task(options: Any) -> None:
    """Run one configuration; a user's mistake ends in one line and exit status 2."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from rich.console import Console

    several = HydraConfig.get().mode == RunMode.MULTIRUN
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        missing = sorted(OmegaConf.missing_keys(options))
        if missing:
            message = f"option {missing[0]} has no value: write {missing[0]}=…"
            raise GroundscopeError(message)
        try:
            config: Any = OmegaConf.to_object(options)
        except OmegaConfBaseException as error:
            raise GroundscopeError(str(error).splitlines()[0]) from error
        from experiments.pipeline import execute

        execute(config)
    except GroundscopeError as error:
        if several:
            raise
        console.print(f"[bold red]error:[/] {_plain(str(error))}")
        sys.exit(2)
    except OSError as error:
        if several or error.errno != errno.ENOSPC:
            raise
        console.print(
            f"[bold red]error:[/] disk full at '{error.filename}': finished stages are kept; free room, run again"
        )
        sys.exit(2)
    except KeyboardInterrupt:
        console.print("[bold]stopped[/]; finished work is kept: run the same command again to go on")
        sys.exit(130)


def _plain(text: str) -> str:
    """Keep square brackets in messages from being read as markup."""
    from rich.markup import escape

    return escape(text)
