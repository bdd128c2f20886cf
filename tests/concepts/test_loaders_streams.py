"""Large JSON read a record at a time: the same values as `json.load`, wherever the window ends, and places of errors."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from concepts.reading import json_stream
from concepts.reading.json_stream import stream, stream_list
from groundscope.core.errors import DataError

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
)
pieces = st.text(max_size=4)
values = st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(pieces, v, max_size=3), max_leaves=6)
files = st.lists(values, max_size=5) | st.dictionaries(st.text(max_size=5), values, max_size=5)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files, st.integers(1, 7), st.sampled_from([None, 1]), st.booleans())
def test_the_same_as_json_load_wherever_the_window_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, document: Any, window: int, indent: int | None, ascii_only: bool
) -> None:
    monkeypatch.setattr(json_stream, "_WINDOW", window)
    path = tmp_path / "x.json"
    path.write_text(json.dumps(document, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    whole = json.loads(path.read_text(encoding="utf-8"))
    parts = {None: whole} if isinstance(whole, list) else whole
    expected = [(key, v) for key, value in parts.items() for v in (value if isinstance(value, list) else [value])]
    assert [(entry.key, entry.value) for entry in stream(path)] == expected


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 60), st.integers(1, 9))
def test_a_file_cut_anywhere_is_an_error_that_names_a_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int, window: int
) -> None:
    monkeypatch.setattr(json_stream, "_WINDOW", window)
    whole = json.dumps({"images": [{"id": 1.5e3}, {"id": "ü"}], "annotations": [{"x": [1, 2]}], "n": 12}).encode()
    path = tmp_path / "cut.json"
    path.write_bytes(whole[: min(length, len(whole) - 1)])
    with pytest.raises(DataError, match=r"cut\.json: .*(at byte|near byte) \d+"):
        list(stream(path))


BROKEN: dict[str, tuple[bytes, str]] = {
    "a value": (b'[{"a":1},{"b":}]', "record 2: .* at byte 15: Expecting value"),
    "in a list": (b'{"images": [{"a":1},{"b":}]}', "images, record 2: .* at byte 26: Expecting value"),
    "no comma": (b'[{"a":1}{"b":2}]', "after record 1: .* at byte 9: expected ',' or ']'"),
    "no colon": (b'{"a" 1}', "record 'a': .* at byte 6: expected ':'"),
    "key": (b'{"a":1,2:3}', "key 2: .* expected a key in quotes"),
    "twice": (b'{"a":1,"a":2}', "record 'a': .*already used"),
    "more": (b"[] x", "unexpected data after the end"),
    "scalar": (b"17", "expected a JSON list or object"),
    "not UTF-8": (b'[1, "\xff"]', "record 1: not UTF-8 near byte 6"),
    "NaN": (b'[1, {"a": NaN}]', "record 2: .*NaN is not a number in JSON"),
    "digits": (b"[" + b"9" * 5000 + b"]", "record 1: .*5000 digits"),
    "brackets": (b"[" * 200_000, "record 1: .*recursion"),
    "cut text": (b'[{"a": "xy', "record 1: .* at byte 8: the file ends inside this entry; it is truncated"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_invalid_json_is_named_with_its_place(tmp_path: Path, case: str) -> None:
    content, words = BROKEN[case]
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=words):
        list(stream(path))


def test_lists_that_are_not_there(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"info": {}, "images": [{"id": 1}]}')
    with pytest.raises(DataError, match=r"the list 'annotations' is missing or empty; it has 'info', 'images'"):
        list(stream_list(path, "annotations"))
    assert [r.values for r in stream_list(path, "images")] == [{"id": 1}]
    path.write_text('{"images": [1]}')
    with pytest.raises(DataError, match=r"images, record 1: expected a JSON object with fields, found 1"):
        list(stream_list(path, "images"))
    with pytest.raises(DataError, match="cannot be read"):
        list(stream(tmp_path / "none.json"))


def test_memory_holds_a_record_not_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"rows": [{"n": i, "text": "x" * 2000} for i in range(4000)]}))
    tracemalloc.start()
    total = sum(1 for _ in stream_list(path, "rows"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == 4000
    assert peak < 6_000_000 < path.stat().st_size


def test_a_record_of_any_size_is_refused_before_memory_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_stream, "LARGEST_RECORD", 1000)
    monkeypatch.setattr(json_stream, "_WINDOW", 100)
    path = tmp_path / "x.json"
    path.write_text(json.dumps([{"a": "x" * 100}, {"a": "y" * 100_000}]))
    with pytest.raises(DataError, match=r"record 2: .*more than 1000 characters in one record"):
        list(stream(path))
