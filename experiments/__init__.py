"""The command ``groundscope``: it runs the stages of a run, in order, and writes the report.

In Python use the other packages; nothing here is meant to be imported by users, except `experiments.report.Section` in packages
that add a section to the report.

- `cli`: the command line. `main` dispatches commands; `overrides`, `launch` and `sweep` read options and start jobs; `resume`,
  `status`, `compare`, `plan` and `help` are commands
- `planning`: estimates of a trace before it runs: sizes, times and operations
- `pipeline`: run the stages of a configuration, skipping unchanged ones
- `stages`: one module for each stage (`examples`, `trace`, `probe`, `patch`, `steer`, `evaluate`, `diagnose`, `export`,
  `report`), their `table`, parts of a trace (`trace_shards`), and what they write for the report (`illustrate`)
- `report`: the HTML report of a run folder, with one module for each section; the page of a sweep
- `results`: readers of run folders: all files (`run_files`), main results (`headlines`), two runs (`comparison`), examples for
  the report (`selection`, `illustrations`)
- `run`: the folder of a run with its receipts (`folder`, `stored_config`), stages that runs share (`stage_cache`), what stages
  share (`context`), progress (`live_table`), interrupts
- `data`: load the data of a run and divide them
- `config`, `validation`: all options, and the rules between them; `conf` has the named choices as YAML
- `records`, `text`: shapes of JSON files, text for a terminal
- `notebooks`: the notebooks as text, and `render`, which runs them
"""

from __future__ import annotations

from groundscope.core.packages import check_packages

__all__ = ["main"]

check_packages()


def main() -> None:
    """Run the command line; see `experiments.cli.main`."""
    from experiments.cli.main import main as run

    run()
