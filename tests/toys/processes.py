"""Programs in processes of their own that need not import torch, transformers and our packages first.

`python -c` imports for several seconds before it does any work. These processes are forked from one that has imported
everything and computed nothing (multiprocessing's fork server), so that only what a test is about takes time. Signals, exit
status, output, working directory, environment and import path are those of a process; what happens *while* Python imports is
not shown here: tests of that start Python themselves.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from tempfile import TemporaryDirectory

from groundscope.core.packages import PACKAGES

ROOT = Path(__file__).resolve().parents[2]
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.toys.preloaded"])


@dataclass(frozen=True)
class Finished:
    """What a process left: as `subprocess.CompletedProcess`."""

    returncode: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Alarm:
    """A signal that a process sends to itself once a file exists, so that a slow machine does not send it too late."""

    file: str
    signal: signal.Signals
    delay: float = 0.0
    """Seconds between the file and the signal."""


@dataclass(frozen=True)
class Program:
    """What a process runs: the command with its options, or code, with a folder, import path and environment."""

    cwd: str
    options: tuple[str, ...] | None = None
    code: str = ""
    path: tuple[str, ...] = (str(ROOT),)
    environment: tuple[tuple[str, str], ...] = ()
    reload: bool = False
    """Import our packages again, from the import path of this process."""
    alarm: Alarm | None = None
    """The signal that the process sends to itself."""


class Running:
    """A process that runs; its output is in files until it ends."""

    def __init__(self, program: Program) -> None:
        self._folder = TemporaryDirectory()
        self._process: ForkServerProcess = _SERVER.Process(target=_run, args=(program, self._folder.name))
        self._process.start()

    def wait(self, timeout: float = 1500) -> Finished:
        """Wait for the end of the process; kill it after `timeout` seconds."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
            msg = f"the process ran longer than {timeout} s"
            raise TimeoutError(msg)
        with self._folder as folder:
            texts = [Path(folder, name).read_text(encoding="utf-8") for name in ("stdout", "stderr")]
        return Finished(self._process.exitcode, *texts)


def start_command(*options: str, cwd: Path, alarm: Alarm | None = None) -> Running:
    """Start `groundscope` with these options, in a folder."""
    return Running(Program(str(cwd), options, environment=(("COLUMNS", "200"),), alarm=alarm))


def run_code(
    code: str,
    cwd: Path,
    *,
    path: Sequence[Path] = (ROOT,),
    environment: Mapping[str, str] | None = None,
    reload: bool = False,
) -> Finished:
    """Run code as `python -c` would, with `path` first on the import path; with `reload` it imports our packages from there."""
    about = tuple((environment or {}).items())
    return Running(Program(str(cwd), None, code, tuple(map(str, path)), about, reload)).wait()


def _run(program: Program, output: str) -> None:
    # Whoever starts the tests in the background may have it ignored, and that is passed on.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(f"{output}/{name}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
        os.close(file)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", line_buffering=True)  # type: ignore[union-attr]
    os.chdir(program.cwd)
    os.environ.update(program.environment)
    sys.path[:] = [*program.path, *(entry for entry in sys.path if entry not in {"", str(ROOT)})]
    if program.reload:
        for name in [name for name in sys.modules if name.partition(".")[0] in {"groundscope", *PACKAGES}]:
            del sys.modules[name]
    if program.alarm is not None:
        threading.Thread(target=_wait_and_send, args=(program.alarm,), daemon=True).start()
    if program.options is None:
        sys.argv = ["-c"]
        exec(compile(program.code, "<string>", "exec"), {"__name__": "__main__"})  # noqa: S102
        return
    from experiments.cli.main import main

    sys.argv = ["groundscope", *program.options]
    main()


def _wait_and_send(alarm: Alarm) -> None:
    while not Path(alarm.file).exists():
        time.sleep(0.001)
    time.sleep(alarm.delay)
    os.kill(os.getpid(), alarm.signal)
