"""Run the stages of a run in order, skipping those whose inputs and options have not changed."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from omegaconf import OmegaConf
from rich.console import Console

from experiments.cli.validation import check
from experiments.config import STAGES, RunConfig
from experiments.run import stage_cache
from experiments.run.context import Context
from experiments.run.folder import LAYOUT, Receipt, RunFolder, Stopped, digest, environment, write_json, write_text
from experiments.run.interrupts import load_torch
from experiments.run.live_table import Board
from experiments.stages import trace_shards
from experiments.stages.table import TABLE
from groundscope.core.errors import ConfigError


def execute(config: RunConfig, console: Console | None = None) -> Path:
    """Run the configured stages.

    Parameters
    ----------
    config
        The whole run.
    console
        Where to say what is done; by default standard output.

    Returns
    -------
    Path
        The run's folder.

    Raises
    ------
    ConfigError
        For an unknown stage, options that do not fit each other, a run folder that cannot be used, or a stage whose
        input was never made (the message gives the command that makes it).
    """
    check(config)
    folder = RunFolder(Path(config.root) / config.name)
    try:
        _work(config, folder, console)
    except KeyboardInterrupt as stop:
        raise Stopped(folder.path) from stop
    return folder.path


def _work(config: RunConfig, folder: RunFolder, console: Console | None) -> None:
    start = time.perf_counter()
    with folder.lock(shared=config.trace.shard is not None), Board(config.stages, console) as board:
        write_text(folder.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(trace_shards.whole(config))))
        write_json(folder.path / "environment.json", environment())
        context = Context(config, folder, board.console)
        board.say(f"groundscope {config.name}: {context.headline()}", bold="groundscope")
        _check_inputs(config.stages, folder)
        for name in config.stages:
            TABLE[name].check(context)
        receipts: dict[str, Receipt] = {}
        for name in STAGES:
            stage = TABLE[name]
            if any(n not in receipts for n in stage.needs) and name not in config.stages:
                continue
            asked = name in config.stages
            found = _run(name, context, board, receipts) if asked else folder.receipt(stage.folder)
            if found is not None:
                receipts[name] = found
        board.say(f"finished in {time.perf_counter() - start:.0f} s: {folder.path}")
        report = folder.path / "report.html"
        if report.exists():
            board.say(f"report: {report}")


def _run(name: str, context: Context, board: Board, receipts: dict[str, Receipt]) -> Receipt | None:
    """Have a stage: as it is, from another run, or by its work. None for a part of a trace that is not the last."""
    stage, folder, config = TABLE[name], context.folder, context.config
    inputs = {n: receipts[n].digest for n in stage.needs}
    key = digest(
        {"layout": LAYOUT, "stage": [name, stage.version], "options": stage.options(context), "inputs": inputs}
    )
    root = Path(config.root)

    def there() -> Receipt | None:
        found = folder.receipt(stage.folder)
        if found is None or found.key != key or not folder.holds(stage.folder, found):
            return None
        board.done(name, "unchanged", found.summary)
        return found

    board.begin(name)
    try:
        if not config.force and (found := there()):
            return found
        if stage.needs:
            load_torch(config.threads)
        if name == "trace" and config.trace.shard is not None:
            return trace_shards.trace_part(context, board, key)
        with stage_cache.door(
            root, name, key, lambda who: board.say(f"  {name:<9} waiting for {who}, which makes the same")
        ):
            if not config.force:
                # Somebody may have made it while this process waited: here, or in another run.
                if found := there():
                    return found
                if stage.shared and (found := stage_cache.take(root, folder, stage.folder, key)):
                    board.done(name, "shared", f"{found.summary} (made by {found.origin})")
                    return found
            done = folder.finish(name, stage.folder, key, lambda at: stage.work(context, at), anew=config.force)
    except Exception as error:
        board.failed(name)
        with suppress(OSError):  # what is wrong may be that nothing can be written
            folder.fail(stage.folder, error)
        raise
    board.done(name, f"{done.seconds:.1f} s", done.summary)
    return done


def _check_inputs(wanted: Iterable[str], folder: RunFolder) -> None:
    """Raise `ConfigError` where a stage's input was never made and is not asked for."""
    chosen = set(wanted)
    for name in (s for s in STAGES if s in chosen):
        missing = [n for n in TABLE[name].needs if n not in chosen and folder.receipt(TABLE[n].folder) is None]
        if missing:
            every = chosen | _needed(missing, folder)
            stages = ",".join(s for s in STAGES if s in every)
            msg = (
                f"stage '{name}' needs '{missing[0]}', which has not run in '{folder.path}': "
                f"make it with groundscope resume={folder.path} stages=[{stages}]"
            )
            raise ConfigError(msg)


def _needed(names: Iterable[str], folder: RunFolder) -> set[str]:
    """Return stages with all that they need and that has not run."""
    found: set[str] = set()
    for name in names:
        if folder.receipt(TABLE[name].folder) is None:
            found |= {name} | _needed(TABLE[name].needs, folder)
    return found
