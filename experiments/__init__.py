"""Who runs it: the command `groundscope`, its stages, and the report. In Python use the other rooms."""

from __future__ import annotations

from groundscope.core.rooms import check_rooms

__all__ = ["main"]

check_rooms()


def main() -> None:
    """Run the command line; see `experiments.cli.main`."""
    from experiments.cli.main import main as run

    run()
