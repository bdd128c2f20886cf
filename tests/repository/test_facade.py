"""`import groundscope as gs`: every public name once, nothing heavy before it is used, and no folder that hides a room."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest

import groundscope as gs
from groundscope.core.packages import PACKAGES

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = [room for room in PACKAGES if room != "experiments"]
SEVERAL = {"amber", "mme", "pope"}
"""Functions of one room that are also loaders of `concepts`: reached through their room."""


def names_of(room: str) -> list[str]:
    """Read the public names of a room from its stub, without importing it."""
    body = ast.parse((ROOT / room / "__init__.pyi").read_text(encoding="utf-8")).body
    return [alias.name for node in body if isinstance(node, ast.ImportFrom) for alias in node.names]


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_the_facade_has_every_room_and_every_name_that_one_room_has() -> None:
    count = Counter(name for room in LIBRARY for name in names_of(room))
    unique = {name for name, n in count.items() if n == 1} - SEVERAL
    assert set(gs.__all__) == unique | set(PACKAGES) | {"GroundscopeError", "__version__"}
    assert [name for name in gs.__all__ if not hasattr(gs, name)] == []
    assert not hasattr(gs, "no_such_name")


@pytest.mark.parametrize("room", LIBRARY)
def test_names_of_the_facade_are_those_of_the_rooms(room: str) -> None:
    module = import_module(room)
    assert sorted(module.__all__) == sorted(names_of(room))
    for name in names_of(room):
        assert getattr(gs, name, None) in (None, getattr(module, name)) or name in gs.__all__
        if name in gs.__all__:
            assert getattr(gs, name) is getattr(module, name)


def test_a_function_is_not_replaced_by_the_module_of_its_name() -> None:
    import_module("behavior.pope")
    import_module("behavior.chair")
    assert callable(gs.behavior.pope)
    assert callable(gs.chair)


def test_a_folder_that_hides_a_room_is_an_error_that_names_it(tmp_path: Path) -> None:
    for room in PACKAGES:
        (tmp_path / room / room).mkdir(parents=True)
        (tmp_path / room / room / "__init__.py").write_text("x = 1\n")
    (tmp_path / "module").mkdir()
    (tmp_path / "module" / "probes.py").write_text("x = 1\n")
    code = f"""
import sys
for folder in [*{PACKAGES!r}, "module"]:
    for first in ("groundscope", "concepts", "lvlm"):
        if first == folder:
            continue
        sys.path.insert(0, folder)
        try:
            __import__(first)
        except ImportError as error:
            print(folder, error)
        sys.path.pop(0)
        for name in [n for n in sys.modules if n.partition(".")[0] in ("groundscope", "concepts", "lvlm")]:
            del sys.modules[name]
"""
    result = python(code, tmp_path)
    lines = [line.split(" ", 1) for line in result.stdout.splitlines()]
    assert [folder for folder, _ in lines] == [r for r in PACKAGES for f in ("", "concepts", "lvlm") if f != r] + [
        "module"
    ] * 3
    for folder, message in lines:
        room = "probes" if folder == "module" else folder
        place = f"{folder}/probes.py" if folder == "module" else f"{folder}/{room}"
        assert f"{place} hides the package '{room}' of groundscope at {ROOT / room}: rename it" in message


def test_a_folder_without_init_hides_nothing(tmp_path: Path) -> None:
    (tmp_path / "probes").mkdir()
    result = python(
        "import sys; sys.path.insert(0, ''); import groundscope as gs; print(gs.fit_grid.__module__)", tmp_path
    )
    assert (result.returncode, result.stdout) == (0, "probes.fit\n"), result.stderr
