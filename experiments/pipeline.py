"""Run the stages of a run in order; skip those whose inputs and options have not changed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType

from omegaconf import OmegaConf
from rich.console import Console

from experiments.config import STAGES, RunConfig
from experiments.results.score_tables import (
    describe_answers,
    describe_arena,
    describe_card,
    describe_representation,
)
from experiments.run import stage_cache
from experiments.run.context import Context
from experiments.run.folder import (
    LAYOUT,
    Receipt,
    RunFolder,
    Stopped,
    computing,
    environment,
    write_json,
)
from experiments.run.interrupts import load_torch
from experiments.run.live_table import LiveTable
from experiments.run.stored_config import CONFIG
from experiments.stages import trace_shards
from experiments.stages.registry import TABLE, needed_stages
from experiments.validation import check
from groundscope.core.document_digest import value_digest
from groundscope.core.errors import ConfigError, DataError
from groundscope.core.files import write_text
from groundscope.core.paths import is_file

_DESCRIBED: Mapping[str, Callable[[Path], list[str]]] = MappingProxyType(
    {
        "evaluate": describe_answers,
        "representation": describe_representation,
        "arena": describe_arena,
        "card": describe_card,
    }
)
"""Stage to the function that returns its results as lines for the terminal."""


def execute(config: RunConfig, console: Console | None = None) -> Path:
    """Run the stages of a configuration.

    Parameters
    ----------
    config
        The configuration of the run.
    console
        Receives progress and results; by default standard output.

    Returns
    -------
    Path
        The folder of the run.

    Raises
    ------
    ConfigError
        For an unknown stage, options that exclude each other, a run folder that cannot be used, or a stage whose inputs are
        missing (the message contains the command that makes them).
    """
    check(config)
    root = Path(config.root)
    folder = RunFolder(root / config.name, root)
    try:
        _run_stages(config, folder, console)
    except KeyboardInterrupt as stop:
        raise Stopped(folder.path) from stop
    return folder.path


def _run_stages(config: RunConfig, folder: RunFolder, console: Console | None) -> None:
    start = time.perf_counter()
    with folder.lock(shared=config.trace.shard is not None), LiveTable(config.stages, console, folder.path) as table:
        context = Context(config, folder, table.console)
        table.print(f"groundscope {config.name}: {context.headline()}", bold="groundscope")
        _check_inputs(context)
        for name in config.stages:
            TABLE[name].check(context)
        needed = _inputs(config.stages, context)
        receipts: dict[str, Receipt] = {}
        for name in STAGES:  # inputs that no stage of this call changes are checked before any stage runs
            if name in needed and not _inputs([name], context, itself=True) & set(config.stages):
                receipts[name] = _input(name, context, receipts)
        for name in STAGES:
            if name in config.stages:
                receipt = _run(name, context, table, {n: receipts[n] for n in needed_stages(name, context)})
                if receipt is not None:
                    receipts[name] = receipt
            elif name in needed and name not in receipts:
                receipts[name] = _input(name, context, receipts)
        table.print(f"finished in {time.perf_counter() - start:.0f} s: {folder.path}")
        for name, describe in _DESCRIBED.items():
            if name in config.stages:
                for line in describe(folder.path):
                    table.print(line)
        report = folder.path / "report.html"
        if is_file(report):
            table.print(f"report: {report}")


def _basis(name: str, context: Context, receipts: Mapping[str, Receipt]) -> tuple[str, dict[str, str]]:
    """Return the digest of everything that a stage depends on except packages, and the digests of its inputs."""
    stage = TABLE[name]
    inputs = {n: _digest(name, receipts[n]) for n in needed_stages(name, context)}
    basis = {"layout": LAYOUT, "stage": [name, stage.version], "options": stage.options(context), "inputs": inputs}
    return value_digest(basis), inputs


def _digest(name: str, receipt: Receipt) -> str:
    """Return the digest of the files of another stage on which a stage depends."""
    return receipt.full_digest if TABLE[name].illustrated else receipt.digest


def _record(context: Context) -> None:
    """Write configuration and environment of a call, unless it finds all stages unchanged."""
    config = context.config
    path = context.folder.path
    write_text(path / CONFIG, OmegaConf.to_yaml(OmegaConf.structured(trace_shards.whole(config))))
    write_json(path / "environment.json", environment(_threads(config)))


def _threads(config: RunConfig) -> int | None:
    """Return the number of threads that compute; None if torch decides and is not imported."""
    torch = sys.modules.get("torch")
    return config.threads or (torch.get_num_threads() if torch is not None else None)


def _run(name: str, context: Context, table: LiveTable, receipts: Mapping[str, Receipt]) -> Receipt | None:
    """Return the receipt of a stage: unchanged, taken from another run, or made now; None for a part that is not the last."""
    stage, folder, config = TABLE[name], context.folder, context.config
    basis, inputs = _basis(name, context, receipts)
    key = value_digest({"basis": basis, "computing": computing()})
    root = Path(config.root)

    def unchanged() -> Receipt | None:
        receipt = folder.receipt(stage.folder)
        if receipt is None or receipt.key != key or not folder.holds(stage.folder, receipt):
            return None
        table.finish(name, "unchanged", receipt.summary)
        return receipt

    def work(stage_folder: Path) -> str:
        _record(context)  # only after the folder was accepted: a refused call writes nothing
        return stage.work(context, stage_folder)

    table.start(name)
    try:
        if not config.force and (receipt := unchanged()):
            return receipt
        if stage.needs:
            load_torch(config.threads)
        about = {"basis": basis, "inputs": inputs, "environment": environment(_threads(config))}
        if name == "trace" and config.trace.shard is not None:
            _record(context)
            return trace_shards.trace_part(context, table, key, about)
        with stage_cache.stage_lock(
            root, name, key, lambda holder: table.print(f"  {name:<9} waiting for {holder}, which makes the same stage")
        ):
            if not config.force:
                # Another process may have made it in the meantime, in this run or another.
                if receipt := unchanged():
                    return receipt
                if stage.shared and (receipt := stage_cache.take(root, folder, stage.folder, key)):
                    _record(context)
                    table.finish(name, "shared", f"{receipt.summary} (made by {receipt.origin})")
                    return receipt
            receipt = folder.finish(
                name,
                stage.folder,
                key,
                work,
                clear=config.force,
                about=about,
                outside=stage.outside,
            )
    except Exception as error:
        table.fail(name)
        with suppress(OSError, ConfigError):  # perhaps nothing can be written
            folder.fail(stage.folder, error)
        raise
    table.finish(name, f"{receipt.seconds:.1f} s", receipt.summary)
    return receipt


def _input(name: str, context: Context, receipts: Mapping[str, Receipt]) -> Receipt:
    """Return the receipt of a stage that other stages need and that this call does not run.

    Raises
    ------
    ConfigError
        If it has not run, was made from other inputs, with other options or by a version that computed other numbers, or if
        its files have changed.
    """
    folder, stage = context.folder, TABLE[name]
    receipt = folder.receipt(stage.folder)
    if receipt is None:
        raise ConfigError(_advice(name, "has not run", context))
    changed = next(
        (n for n in needed_stages(name, context) if receipt.inputs.get(n) != _digest(name, receipts[n])), None
    )
    if not receipt.basis:
        raise ConfigError(_advice(name, "was made by an older release, which computed other numbers", context))
    if changed is not None:
        raise ConfigError(_advice(name, f"was made from other results of '{changed}'", context))
    try:
        basis = _basis(name, context, receipts)[0]
    except (DataError, OSError):  # data or model are not on this machine; the inputs are compared above
        basis = receipt.basis
    if basis != receipt.basis and context.has_model_files():
        raise ConfigError(_advice(name, "was made with other options, files or another release", context))
    if broken := receipt.broken(folder.path / stage.folder):
        raise ConfigError(_advice(name, f"has changed since it was made ('{broken[0]}')", context))
    return receipt


def _advice(name: str, problem: str, context: Context) -> str:
    """Return the message for an input that cannot be used, with the stages to run together."""
    requested = context.config.stages
    rerun = (
        {name}
        | {n for n in _inputs(requested, context) | set(requested) if name in _inputs([n], context)}
        | set(requested)
    )
    stages = ",".join(s for s in STAGES if s in rerun)
    first = next((s for s in STAGES if s in requested and name in _inputs([s], context)), requested[0])
    return (
        f"stage '{first}' needs '{name}', which {problem} in '{context.folder.path}': "
        f"run both in one command, with stages=[{stages}]"
    )


def _inputs(names: Iterable[str], context: Context, *, itself: bool = False) -> set[str]:
    """Return the stages that some stages depend on, directly or not; with `itself`, also the stages themselves."""
    names = list(names)
    direct = {n for name in names for n in needed_stages(name, context)}
    return (set(names) if itself else set()) | direct | (_inputs(direct, context) if direct else set())


def _check_inputs(context: Context) -> None:
    """Raise `ConfigError` if an input of a stage has not run and is not requested."""
    chosen, folder = set(context.config.stages), context.folder
    for name in (s for s in STAGES if s in chosen):
        needs = needed_stages(name, context)
        missing = [n for n in needs if n not in chosen and folder.receipt(TABLE[n].folder) is None]
        if missing:
            every = chosen | _missing_stages(missing, context)
            stages = ",".join(s for s in STAGES if s in every)
            msg = (
                f"stage '{name}' needs '{missing[0]}', which has not run in '{folder.path}': "
                f"run it with groundscope resume={folder.path} stages=[{stages}]"
            )
            raise ConfigError(msg)


def _missing_stages(names: Iterable[str], context: Context) -> set[str]:
    """Return the stages among `names` that have not run, with those that they need in turn."""
    missing: set[str] = set()
    for name in names:
        if context.folder.receipt(TABLE[name].folder) is None:
            missing |= {name} | _missing_stages(needed_stages(name, context), context)
    return missing
