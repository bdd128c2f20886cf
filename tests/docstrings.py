"""Docstrings of the packages: which examples they contain, and which public names have none."""

from __future__ import annotations

import ast
import doctest
import inspect
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

from tests.packages import LIBRARY, module_name

OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
"""As in `doctest_optionflags` of pyproject.toml, so that `pytest --doctest-modules FILE` gives the same result."""


def examples(path: Path) -> list[doctest.DocTest]:
    """Return the examples of every docstring of a module, decorated functions included.

    They are read from the source: doctest's own finder passes over a function whose decorator comes from another module
    (`functools.cache`, the shape checks of these tests). An example starts without any name: it imports what it uses.
    """
    source = path.read_text(encoding="utf-8")
    if ">>>" not in source:
        return []
    parser, name = doctest.DocTestParser(), module_name(path)
    tests = []
    for node in ast.walk(ast.parse(source)):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                text = child.value.value
                if isinstance(text, str) and ">>>" in text:
                    title = f"{name}.{getattr(node, 'name', '')}".rstrip(".")
                    test = parser.get_doctest(inspect.cleandoc(text), {}, title, str(path), child.lineno)
                    tests.append(test)
    return tests


def public_objects() -> Iterator[tuple[str, object]]:
    """Yield every public class and function with its name; the public names of a public module count too."""
    for package in LIBRARY:
        if package != "groundscope":  # repeats names of the others
            yield from _members(import_module(package), package)


def _members(module: ModuleType, title: str) -> Iterator[tuple[str, object]]:
    names = getattr(module, "__all__", None)
    for name in sorted(names if names is not None else vars(module)):
        value = getattr(module, name)
        if inspect.ismodule(value):
            if names is not None:
                yield from _members(value, f"{title}.{name}")
            continue
        function = inspect.unwrap(value) if callable(value) else value
        if name.startswith("_") or not (inspect.isclass(function) or inspect.isroutine(function)):
            continue  # constants and type aliases
        if names is not None or getattr(function, "__module__", None) == module.__name__:
            yield f"{title}.{name}", value


def without_examples() -> list[str]:
    """Return the public names whose docstring contains no example."""
    return [name for name, value in public_objects() if ">>>" not in (getattr(value, "__doc__", None) or "")]
