"""Who runs it: the command `groundscope`, its stages, and the report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from experiments.cli.main import main

__all__ = ["main"]


def __getattr__(name: str) -> Any:
    if name != "main":
        msg = f"module 'experiments' has no attribute '{name}'"
        raise AttributeError(msg)
    from experiments.cli.main import main

    return main
