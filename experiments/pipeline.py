"""Run the stages of a run in order, skipping those whose inputs and options have not changed."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from omegaconf import OmegaConf
from rich.console import Console

from experiments.config import STAGES, RunConfig
from experiments.run import stage_cache
from experiments.run.context import Context
from experiments.run.folder import (
    LAYOUT,
    Receipt,
    RunFolder,
    Stopped,
    computing,
    digest,
    environment,
    write_json,
    write_text,
)
from experiments.run.interrupts import load_torch
from experiments.run.live_table import Board
from experiments.stages import trace_shards
from experiments.stages.table import TABLE
from experiments.validation import check
from groundscope.core.errors import ConfigError, DataError
from groundscope.core.paths import is_file


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
    root = Path(config.root)
    folder = RunFolder(root / config.name, root)
    try:
        _work(config, folder, console)
    except KeyboardInterrupt as stop:
        raise Stopped(folder.path) from stop
    return folder.path


def _work(config: RunConfig, folder: RunFolder, console: Console | None) -> None:
    start = time.perf_counter()
    with folder.lock(shared=config.trace.shard is not None), Board(config.stages, console) as board:
        context = Context(config, folder, board.console)
        board.say(f"groundscope {config.name}: {context.headline()}", bold="groundscope")
        _check_inputs(config.stages, folder)
        for name in config.stages:
            TABLE[name].check(context)
        needed = _inputs(config.stages)
        receipts: dict[str, Receipt] = {}
        for name in STAGES:  # what no stage of this call can change is checked before any of them works
            if name in needed and not _inputs([name], itself=True) & set(config.stages):
                receipts[name] = _input(name, context, receipts)
        for name in STAGES:
            stage = TABLE[name]
            if name in config.stages:
                found = _run(name, context, board, {n: receipts[n] for n in stage.needs})
                if found is not None:
                    receipts[name] = found
            elif name in needed and name not in receipts:
                receipts[name] = _input(name, context, receipts)
        board.say(f"finished in {time.perf_counter() - start:.0f} s: {folder.path}")
        report = folder.path / "report.html"
        if is_file(report):
            board.say(f"report: {report}")


def _basis(name: str, context: Context, receipts: Mapping[str, Receipt]) -> tuple[str, dict[str, str]]:
    """Return the digest of what a stage is made from, packages aside, and the digests of its inputs."""
    stage = TABLE[name]
    inputs = {n: receipts[n].digest for n in stage.needs}
    made_from = {"layout": LAYOUT, "stage": [name, stage.version], "options": stage.options(context), "inputs": inputs}
    return digest(made_from), inputs


def _record(context: Context) -> None:
    """Write the configuration and the environment of a call that makes something."""
    config = context.config
    path = context.folder.path
    write_text(path / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(trace_shards.whole(config))))
    write_json(path / "environment.json", environment(_threads(config)))


def _threads(config: RunConfig) -> int | None:
    """Return how many threads compute; None where torch decides and is not loaded."""
    torch = sys.modules.get("torch")
    return config.threads or (torch.get_num_threads() if torch is not None else None)


def _run(name: str, context: Context, board: Board, receipts: Mapping[str, Receipt]) -> Receipt | None:
    """Return a stage's receipt: unchanged, taken from another run, or of work done now. None for a part that is not the last."""
    stage, folder, config = TABLE[name], context.folder, context.config
    basis, inputs = _basis(name, context, receipts)
    key = digest({"basis": basis, "computing": computing()})
    root = Path(config.root)

    def unchanged() -> Receipt | None:
        found = folder.receipt(stage.folder)
        if found is None or found.key != key or not folder.holds(stage.folder, found):
            return None
        board.done(name, "unchanged", found.summary)
        return found

    def work(at: Path) -> str:
        _record(context)  # once the folder can be used: a call that is refused writes nothing
        return stage.work(context, at)

    board.begin(name)
    try:
        if not config.force and (found := unchanged()):
            return found
        if stage.needs:
            load_torch(config.threads)
        about = {"basis": basis, "inputs": inputs, "environment": environment(_threads(config))}
        if name == "trace" and config.trace.shard is not None:
            _record(context)
            return trace_shards.trace_part(context, board, key, about)
        with stage_cache.door(
            root, name, key, lambda who: board.say(f"  {name:<9} waiting for {who}, which makes the same")
        ):
            if not config.force:
                # Another process may have made it meanwhile: here, or in another run.
                if found := unchanged():
                    return found
                if stage.shared and (found := stage_cache.take(root, folder, stage.folder, key)):
                    _record(context)
                    board.done(name, "shared", f"{found.summary} (made by {found.origin})")
                    return found
            done = folder.finish(
                name,
                stage.folder,
                key,
                work,
                anew=config.force,
                about=about,
                outside=stage.outside,
            )
    except Exception as error:
        board.failed(name)
        with suppress(OSError, ConfigError):  # the cause may be that nothing can be written
            folder.fail(stage.folder, error)
        raise
    board.done(name, f"{done.seconds:.1f} s", done.summary)
    return done


def _input(name: str, context: Context, receipts: Mapping[str, Receipt]) -> Receipt:
    """Return the receipt of a stage that others need and that this call does not make.

    Raises
    ------
    ConfigError
        Where it was made from other inputs, with other options or by a release that computed other numbers, or its files changed.
    """
    folder, stage = context.folder, TABLE[name]
    found = folder.receipt(stage.folder)
    if found is None:
        raise ConfigError(_advice(name, "has not run", context))
    changed = next((n for n in stage.needs if found.inputs.get(n) != receipts[n].digest), None)
    if not found.basis:
        raise ConfigError(_advice(name, "was made by an older release, which computed other numbers", context))
    if changed is not None:
        raise ConfigError(_advice(name, f"was made from other results of '{changed}'", context))
    try:
        basis = _basis(name, context, receipts)[0]
    except (DataError, OSError):  # the data or the model are not on this machine; the inputs were compared
        basis = found.basis
    if basis != found.basis and context.model_here():
        raise ConfigError(_advice(name, "was made with other options, files or another release", context))
    if broken := found.broken(folder.path / stage.folder):
        raise ConfigError(_advice(name, f"has changed since it was made ('{broken[0]}')", context))
    return found


def _advice(name: str, problem: str, context: Context) -> str:
    """Return the message for an input that cannot be used, with the command that makes it again and what follows from it."""
    wanted = context.config.stages
    again = {name} | {n for n in _inputs(wanted) | set(wanted) if name in _inputs([n])} | set(wanted)
    stages = ",".join(s for s in STAGES if s in again)
    first = next((s for s in STAGES if s in wanted and name in _inputs([s])), wanted[0])
    return (
        f"stage '{first}' needs '{name}', which {problem} in '{context.folder.path}': "
        f"make it again in the same command, with stages=[{stages}]"
    )


def _inputs(names: Iterable[str], *, itself: bool = False) -> set[str]:
    """Return the stages that some stages are made from, directly or not; with `itself`, these too."""
    names = list(names)
    direct = {n for name in names for n in TABLE[name].needs}
    return (set(names) if itself else set()) | direct | (_inputs(direct) if direct else set())


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
