"""The packages of the distribution and their modules: the one list that all tests about packages read."""

from __future__ import annotations

from pathlib import Path

from groundscope.core.packages import PACKAGES

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("groundscope", *PACKAGES)
"""Top-level packages, lowest first."""
LIBRARY = tuple(package for package in PACKAGES if package != "experiments")
"""Packages that are used from Python; `experiments` is the command line."""


def source_files(package: str) -> list[Path]:
    """Return the modules of a package; notebooks are scripts and have tests of their own."""
    return sorted(path for path in (ROOT / package).rglob("*.py") if "notebooks" not in path.parts)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
