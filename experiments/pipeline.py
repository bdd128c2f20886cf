"""Run the stages of a run in order, skipping those whose inputs and options have not changed."""

from __future__ import annotations

import time
from pathlib import Path

from omegaconf import OmegaConf
from rich.console import Console
from rich.markup import escape

from concepts.errors import ConfigError
from experiments.config import STAGES, RunConfig
from experiments.context import Context
from experiments.run import LAYOUT, Receipt, RunFolder, digest, environment, write_json
from experiments.stages import TABLE


def execute(config: RunConfig) -> Path:
    """Run the configured stages.

    Parameters
    ----------
    config
        The whole run.

    Returns
    -------
    Path
        The run's folder.

    Raises
    ------
    ConfigError
        For an unknown stage, or a stage whose input was never made (the message gives the command that makes it).
    """
    unknown = [s for s in config.stages if s not in STAGES]
    if unknown:
        msg = f"no stage '{unknown[0]}': there are {', '.join(STAGES)}"
        raise ConfigError(msg)
    console = Console(highlight=False)
    folder = RunFolder(Path(config.root) / config.name)
    start = time.perf_counter()
    with folder.lock():
        (folder.path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
        write_json(folder.path / "environment.json", environment())
        context = Context(config, folder, console)
        console.print(f"[bold]groundscope[/] {escape(config.name)}: {context.headline()}")
        for name in config.stages:
            TABLE[name].check(context)
        receipts: dict[str, Receipt] = {}
        for name in STAGES:
            stage = TABLE[name]
            missing = [n for n in stage.needs if n not in receipts]
            if missing:
                # A stage left out of `stages` and never run: those that need it cannot run.
                if name not in config.stages:
                    continue
                wanted = ",".join(s for s in STAGES if s in {*missing, *config.stages})
                msg = (
                    f"stage '{name}' needs '{missing[0]}', which has not run in '{folder.path}': run stages=[{wanted}]"
                )
                raise ConfigError(msg)
            found = folder.receipt(stage.folder)
            if name not in config.stages:
                if found is not None:
                    receipts[name] = found
                continue
            key = digest(
                {
                    "layout": LAYOUT,
                    "stage": [name, stage.version],
                    "options": stage.options(context),
                    "inputs": {n: receipts[n].digest for n in stage.needs},
                }
            )
            if found is not None and found.key == key and not config.force and folder.holds(stage.folder, found):
                console.print(f"  {name:<9} [dim]unchanged[/]  {escape(found.summary)}")
                receipts[name] = found
                continue
            receipts[name] = folder.finish(name, stage.folder, key, lambda root, work=stage.work: work(context, root))
            done = receipts[name]
            console.print(f"  {name:<9} [green]{done.seconds:7.1f} s[/]  {escape(done.summary)}")
        console.print(f"finished in {time.perf_counter() - start:.0f} s: {folder.path}")
        report = folder.path / "report.html"
        if report.exists():
            console.print(f"report: {report}")
    return folder.path
