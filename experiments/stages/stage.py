"""A stage of a run: its folder, its inputs, its options and its function."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from experiments.run.context import Context


@dataclass(frozen=True)
class Stage:
    """What a stage is made from and how."""

    folder: str
    needs: tuple[str, ...]
    options: Callable[[Context], object]
    """What of the configuration it depends on."""
    work: Callable[[Context, Path], str]
    version: int = 1
    """Raised where the same options would now make something else."""
    spared: Callable[[Context], Collection[str]] = lambda _: ()
    """Stages of `needs` that it does not use with these options."""
    check: Callable[[Context], None] = lambda _: None
    """Raises `ConfigError` where its options cannot work; called before any stage works."""
    shared: bool = True
    """Whether runs with the same key may share its files: not where it writes outside its folder, or of the run itself."""
    illustrated: bool = False
    """Whether it uses the illustrations of other stages, not only their results."""
    outside: tuple[str, ...] = ()
    """Files that it writes into the run's own folder."""
