"""Open tables: near matches, registration, and entries of installed packages, broken ones included."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from groundscope.core.errors import ConfigError, DataError
from groundscope.core.registry import Registry


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Install a distribution with three entry points: a good one, one that raises, one of a name that is in use."""
    (tmp_path / "plugin_of_test.py").write_text("def good():\n    return 'good'\n\n\nwrong = 3\n")
    info = tmp_path / "plugin_of_test-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin-of-test\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(
        "[groundscope.test]\ngood = plugin_of_test:good\nbroken = plugin_of_test:missing\nwrong = plugin_of_test:wrong\n"
        "built_in = plugin_of_test:good\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("plugin_of_test", None)


def make(**options: Any) -> Registry[Any]:
    return Registry("gadget", {"built_in": print}, group="groundscope.test", **options)


def test_an_installed_package_adds_an_entry(plugins: Path) -> None:
    table = make()
    assert list(table) == ["built_in", "good", "broken", "wrong"]
    assert len(table) == 4
    assert "good" in table
    assert table["good"]() == "good"
    assert table.origins == {"good": "plugin-of-test 1.2"}
    assert table["built_in"] is print


def test_an_entry_that_cannot_be_loaded_is_named_and_stops_nothing_else(
    plugins: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = make(check=lambda entry: None if callable(entry) else "it cannot be called", error=DataError)
    with pytest.raises(
        DataError, match=r"'broken' cannot be used: plugin-of-test 1\.2 \(plugin_of_test:missing\): Attr"
    ):
        table["broken"]
    with pytest.raises(DataError, match=r"'wrong' cannot be used: plugin-of-test 1\.2 .*it cannot be called"):
        table["wrong"]
    assert table["good"]() == "good"
    assert set(table.failures) == {"broken", "wrong"}
    assert list(make(check=lambda entry: None if callable(entry) else "it cannot be called").usable()) == [
        "built_in",
        "good",
    ]
    assert any("the gadget 'built_in' is ignored" in r.getMessage() for r in caplog.records)


def test_a_name_is_registered_once_unless_it_is_to_be_replaced(plugins: Path) -> None:
    table = make()
    for name in ("built_in", "good"):
        with pytest.raises(ConfigError, match=f"a gadget named '{name}' is already registered"):
            table.register(name, repr)
        table.register(name, repr, replace=True)
        assert table[name] is repr
    assert list(table) == ["built_in", "good", "broken", "wrong"]
    table.unregister("good")
    assert "good" not in table
    with pytest.raises(ConfigError, match="unknown gadget 'good'"):
        table.unregister("good")


def test_an_unknown_name_is_answered_with_near_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown gadget 'bilt_in'; choose from built_in; did you mean built_in\?"):
        make()["bilt_in"]
    assert "other" not in make()
    assert make().get("other") is None
