"""The command line: ``groundscope`` runs the stages of a run in order and skips finished ones.

groundscope                                            the embedded model on icon scenes
groundscope model=hf model.path=FOLDER                 another model
groundscope data=pope data.questions=F data.images=D   other data
groundscope stages=[probe,report] probe.folds=5        some stages, with other options
groundscope -m probe.folds=3,4                         several runs, which share equal stages
groundscope evaluate data=pope data.questions=F data.images=D   answers only: no trace, patching or steering
groundscope arena "arena.methods=[vcd,pai]"            training-free methods and controls on the same questions
groundscope card                                       frequency and severity of errors by level and task, of several models
groundscope representation                             alignment, information and ceilings of the run; continues a finished one
groundscope help | resume=RUN | status | compare | plan | report | preferences | tune | audit

Each command imports what it needs when it starts, so that help is fast.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from groundscope.core.errors import ConfigError, GroundscopeError
from groundscope.core.text import format_count

if TYPE_CHECKING:
    from rich.console import Console


def main() -> None:
    """Run the command line; an error of the user gives one line and exit status 2."""
    # No library may send telemetry.
    for variable in ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS", "DO_NOT_TRACK"):
        os.environ.setdefault(variable, "1")
    # Workers started as `python -m …` (submitit) must not import a folder of the user with the name of one of our packages.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # characters that the terminal cannot show are escaped
            stream.reconfigure(errors="backslashreplace")
    status = _run_guarded(lambda console: _dispatch(sys.argv[1:], console))
    if status:
        sys.exit(status)


def _dispatch(arguments: Sequence[str], console: Console) -> int:
    first = arguments[0] if arguments else ""
    if first in {"--help", "-h", "help"} or first.startswith("help="):
        from rich.console import Console

        from experiments.cli.help import show

        about = first.partition("=")[2] or (arguments[1] if first == "help" and len(arguments) > 1 else "")
        show(Console(highlight=False), about)
        return 0
    if first == "--version":
        from importlib.metadata import version

        sys.stdout.write(f"groundscope {version('groundscope')}\n")
        return 0
    if {"--help", "-h"}.intersection(arguments[1:]) and first in {*COMMANDS, *SHORT_RUNS}:
        from rich.console import Console

        from experiments.cli.help import show_command

        show_command(Console(highlight=False), first)
        return 0
    for name, options in SHORT_RUNS.items():
        if name in arguments[:2] and first not in COMMANDS:  # also after -m
            return _run(short_run_words(options, [word for word in arguments if word != name]), console)
    if first in COMMANDS:
        return COMMANDS[first](arguments[1:])
    if first.startswith("resume="):
        from experiments.cli.resume import resume

        return resume(first.partition("=")[2], arguments[1:], lambda words: _run(words, console))
    return _run(arguments, console)


def _run(arguments: Sequence[str], console: Console) -> int:
    """Run one configuration, or several."""
    from experiments.cli.overrides import as_sources, compose, read
    from experiments.validation import check

    arguments = [as_sources(argument) for argument in arguments]
    request = read(arguments)
    # Command lines with flags of Hydra (--cfg job, --config-dir) go to Hydra.
    if not request.plain:
        _hydra(arguments)
        return 0
    config, own = compose(request.first())
    from hydra.types import RunMode

    if request.several or own.mode == RunMode.MULTIRUN:
        from experiments.cli.launch import launch_jobs
        from experiments.cli.sweep import start

        check(config)
        params = list(own.sweeper.get("params") or {})
        words = [argument for argument in arguments if argument not in request.flags]
        return start(request, config, params, lambda more: launch_jobs([*words, *more]), console)
    from experiments.pipeline import execute

    execute(config)
    return 0


_EVALUATION = {
    "name": "evaluation",
    "stages": "[examples,evaluate,report]",
    "evaluate.conditions": "[before]",
    "data.test_share": "1",
}
"""Options of `groundscope evaluate`: ask every question, without any stage before."""
_ARENA = {"name": "arena", "stages": "[examples,arena,report]"}
"""Options of `groundscope arena`: compare methods that need no activations and no heads."""
_CARD = {
    "name": "card",
    "stages": "[examples,evaluate,card,report]",
    "evaluate.conditions": "[before]",
    "data.test_share": "1",
}
"""Options of `groundscope card`: ask every question, and make the evaluation card."""
_REPRESENTATION = {"stages": "[examples,trace,representation,report]"}
"""Options of `groundscope representation`: continue the run of that name; its unchanged stages do not run again."""
SHORT_RUNS = {"evaluate": _EVALUATION, "arena": _ARENA, "card": _CARD, "representation": _REPRESENTATION}
"""Command to the options of its run."""


def short_run_words(options: Mapping[str, str], arguments: Sequence[str]) -> list[str]:
    """Return the command line of a run with options that the arguments may replace."""
    chosen = {word.lstrip("+").partition("=")[0] for word in arguments}
    return [*(f"{key}={value}" for key, value in options.items() if key not in chosen), *arguments]


def _hydra(arguments: Sequence[str]) -> None:
    """Pass a command line with Hydra's own flags to Hydra."""
    import hydra
    from hydra.errors import HydraException

    from experiments.cli.launch import run_task
    from experiments.cli.overrides import register

    register()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises errors instead of printing them
    sys.argv = [sys.argv[0], *arguments]
    try:
        hydra.main(version_base="1.3", config_path="pkg://experiments.conf", config_name="config")(run_task)()
    except HydraException as error:
        raise ConfigError(str(error).splitlines()[0]) from error


def _run_guarded(work: Callable[[Console], int]) -> int:
    from rich.console import Console

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        return work(console)
    except GroundscopeError as error:
        _print_error(console, str(error))
        return 2
    except OSError as error:
        if error.errno is None or error.filename is None or isinstance(error, BrokenPipeError):
            raise
        what = "disk full" if error.errno == errno.ENOSPC else str(error.strerror).lower()
        _print_error(
            console, f"{what} at '{error.filename}'; finished stages are kept: solve the problem, then run again"
        )
        return 2
    except KeyboardInterrupt as stop:
        folder = next(iter(stop.args), None)
        command = f"groundscope resume={folder}" if folder else "the same command"
        console.print(f"[bold]stopped[/]; finished work is kept: continue with {_escape(command)}")
        return 130


def _print_error(console: Console, text: str) -> None:
    from experiments.terminal_text import printable

    console.print(f"[bold red]error:[/] {_escape(printable(text))}")


def _escape(text: str) -> str:
    """Escape square brackets, which the console would read as markup."""
    from rich.markup import escape

    return escape(text)


def _status(arguments: Sequence[str]) -> int:
    from experiments.cli.status import show

    return show(arguments)


def _compare(arguments: Sequence[str]) -> int:
    from experiments.cli.compare import show

    return show(arguments)


def _plan(arguments: Sequence[str]) -> int:
    from experiments.cli.plan import show

    return show(arguments)


def _report(arguments: Sequence[str]) -> int:
    from pathlib import Path

    from experiments.report import write_report
    from experiments.report.page import REPORT
    from experiments.run.folder import check_layout

    if len(arguments) != 1:
        msg = (
            "groundscope report takes one run folder, such as runs/default; it received "
            f"{format_count(len(arguments), 'argument')}"
        )
        raise ConfigError(msg)
    folder = Path(arguments[0])
    check_layout(folder)
    write_report(folder)
    sys.stdout.write(f"report: {folder / REPORT}\n")
    return 0


def _preferences(arguments: Sequence[str]) -> int:
    from experiments.cli.preferences import write

    return write(arguments)


def _tune(arguments: Sequence[str]) -> int:
    from experiments.cli.preferences import tune

    return tune(arguments)


def _audit(arguments: Sequence[str]) -> int:
    from experiments.cli.audit import run

    return run(arguments)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "status": _status,
    "compare": _compare,
    "plan": _plan,
    "report": _report,
    "preferences": _preferences,
    "tune": _tune,
    "audit": _audit,
}
"""Commands by name; all other arguments are options of a run."""
