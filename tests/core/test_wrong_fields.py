"""Every field of every result file, replaced by a value of another type: loaded, or refused in one error with the file."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from activation_store import ConceptDirection
from behavior import BehaviorResult
from behavior.result import Answer, Cost
from circuits import HeadScores
from circuits.head_screening.table import HeadTable
from circuits.input_attribution.group_summary import ABOUT
from circuits.input_attribution.results import Sources, SourceShares
from circuits.input_attribution.shapley_results import ShapleyShares, ShapleySources
from circuits.results.graph import Graph, Shape
from circuits.results.patch_scores import PatchScores
from diagnosis.results import Diagnoses, Diagnosis, Place, Push, Reading
from groundscope.core.document_digest import KEY, document_digest
from groundscope.core.errors import ConfigError, GroundscopeError, PatchError, SiteError
from groundscope.core.result_fields import building, check_fields
from groundscope.core.tensor_files import encode_tensors, read_tensors
from lvlm.sites import Head, Site, parse_heads
from lvlm.token_selection import TokenSelection
from mitigation import SteeringVector
from mitigation.steering.changes import AddChange, AmplifyChange, ProbeGate
from probes import ProbeGrid
from probes.analysis.logit_lens import keep_vocabulary, read_vocabulary
from probes.protocol.checkpoint import Checkpoint

WRONG = (None, -1, 1.5, "text", [], {}, [None], {"x": None}, True, 10**400)
EXAMPLE = dict.fromkeys(ABOUT, "a")
NAN = (
    *("accuracy", "low", "high", "slope", "threshold", "verdict", "confidence", "log_odds", "undone", "lean"),
    "sources",
)
"""Numbers of diagnoses that are null where they are not defined."""
UNKNOWN = ("seconds", "forwards", "given", "correct", "margin", "prior_answer", "text")
"""Fields of answers that may be null."""
ONES = np.ones(2, np.float32)
SHA = "c" * 64


def unit(size: int) -> np.ndarray:
    return np.eye(size, dtype=np.float32)[0]


RECORD: dict[str, Any] = {
    "ids": ("a", "b"), "groups": ("g", "h"), "levels": ("object", "object"), "kinds": ("swap", "swap"), "tokens": "last",
    "mode": "denoise", "metric": "module.metric", "min_effect": 0.5, "excluded": 0, "model": "m", "config_hash": SHA,
    "weights_hash": SHA, "pairs_digest": SHA, "provenance": {"s": 1},
}  # fmt: skip


def head_scores() -> HeadScores:
    return HeadScores(np.ones((2, 1, 2)), ONES, ONES, **RECORD)


def patch_scores() -> PatchScores:
    names = {"sites": ("L0.H0",), "positions": ("last",), "path": "whole forwards"}
    return PatchScores(np.ones((2, 1, 1)), ONES, ONES, **names, **RECORD)


def head_table() -> HeadTable:
    return HeadTable({"direct": np.ones((2, 1, 2))}, ("a", "b"), ("g", "h"), ("object", "object"), "m", SHA, SHA)


def sources() -> Sources:
    tables = (np.ones(1), np.ones((1, 2)), np.ones((1, 1)))
    shares = SourceShares(EXAMPLE, "yes", "no", "no", 1.0, *tables, 0.5, ("a", "b"), 4)
    return Sources((shares,), "true", ("blank",), ("N/A",), "m", SHA, SHA)


def shapley_sources() -> ShapleySources:
    players, masks = ("image", "prompt"), np.array([[0, 0], [1, 1]], bool)
    shares = ShapleyShares(EXAMPLE, "yes", "no", players, 1, 1.0, 0.5, ONES, ONES, ONES, 0.0, masks, ONES, 4)
    return ShapleySources((shares,), "said", ("gray",), "m", SHA, SHA)


def vector() -> SteeringVector:
    entries = {Head(0, 1): AddChange(unit(4), 0.5), 1: AddChange(unit(8), 1.5)}
    gate = ProbeGate(0, np.ones(8), 0.5, "object:cat")
    return SteeringVector(entries, "last+generated", 2.0, "m", SHA, {"method": "x"}, "kept", 0.5, gate)


def direction() -> ConceptDirection:
    return ConceptDirection(
        "decoder.L3.z", "last", "object:cat", unit(4), 1, statistics={"auc": 0.5, "low": math.nan}, train_groups=("g",)
    )


def graph() -> Graph:
    shape = Shape(1, 1, (False,))
    whole = Graph(shape.there * 0.5, shape, n_pairs=2, **RECORD)
    return whole.top(1, prune=False)


def diagnoses() -> Diagnoses:
    reading = Reading("vision", "vision.L0.resid_post", "image:all", 0, math.nan, "truth")
    place = Place("object x", "vision", "s", "last", 0, 9, 0.9, 0.8, 1.0, 1.0, 0.5, readable=True, chosen=True)
    diagnosis = Diagnosis(
        EXAMPLE, "no", "object:cat", "other", 0.0, stages={"vision": "truth"}, readings=(reading,),
        pushes=(Push("L0.H0", 0.5),), corrected_by=("L0.H0",), sources={"lean": 0.5},
    )  # fmt: skip
    return Diagnoses((diagnosis,), (place,), "m", SHA, SHA, {"s": 1})


def answers() -> BehaviorResult:
    values = {f.name: "a" for f in fields(Answer)} | {"candidates": ("a", "b"), "given": "a", "correct": True}
    values |= {"margin": 1.0, "probabilities": (0.7, 0.3), "prior_answer": None, "text": None}
    return BehaviorResult((Answer(**values),), Cost(1.0, 2, 1), {"s": 1})  # type: ignore[arg-type]


def grid() -> ProbeGrid:
    shapes = {
        "weights": (1, 2, 1, 3), "majority": (1,), "n_train": (1,), "n_test": (1,), "n_dropped": (1,),
        "held_out_labels": (1, 2), "held_out_margins": (1, 2, 1, 2),
    }  # fmt: skip
    plain: dict[str, Any] = {
        "concepts": ("object:cat",), "stack": "decoder", "component": "resid_post", "tokens": "last", "layers": (0, 1),
        "n_heads": None, "heads": (), "held_out": ("a", "b"), "held_out_groups": ("g", "h"), "train_groups": ("i",),
        "provenance": {"split": {"seed": 0}},
    }  # fmt: skip
    return ProbeGrid(**{f.name: plain.get(f.name, np.ones(shapes.get(f.name, (1, 2, 1)))) for f in fields(ProbeGrid)})


OPTIONS = {"store": SHA, "seed": 0, "concepts": ["a"], "options": {"penalty": 1.0}}


@dataclass(frozen=True)
class Kind:
    """One kind of file: how it is written and read, and where its document is."""

    write: Callable[[Path], object]
    read: Callable[[Path], Any]
    card: str | None = None
    """Name of the metadata entry with the document; None for a JSON file."""
    digest: bool = True
    nullable: tuple[str, ...] = ()
    """Fields that may be null, or whose elements may be null."""
    ignored: tuple[str, ...] = ()
    """Fields that are not read, so that any value is accepted."""


def saved(make: Callable[[], Any]) -> Callable[[Path], object]:
    return lambda path: make().save(path)


KINDS = {
    "head scores": Kind(saved(head_scores), HeadScores.load, "head_scores"),
    "patch scores": Kind(saved(patch_scores), PatchScores.load, "patch_scores"),
    "head table": Kind(saved(head_table), HeadTable.load, "head_table"),
    "source shares": Kind(saved(sources), Sources.load, "source_shares", nullable=("no_image",)),
    "sources": Kind(saved(shapley_sources), ShapleySources.load, "sources"),
    "vector": Kind(saved(vector), SteeringVector.load, "steering_vector", ignored=("rule", "site")),
    "direction": Kind(saved(direction), ConceptDirection.load, "direction", nullable=("head", "statistics")),
    "graph": Kind(lambda path: graph().save(path, every=False), Graph.load, ignored=("nodes",)),
    "diagnoses": Kind(saved(diagnoses), Diagnoses.load, nullable=NAN),
    "answers": Kind(saved(answers), BehaviorResult.load, nullable=UNKNOWN),
    "grid.json": Kind(lambda path: grid().save(path.parent), lambda path: ProbeGrid.load(path.parent)),
    "checkpoint.json": Kind(
        lambda path: Checkpoint.at(path.parent, OPTIONS), lambda path: Checkpoint.at(path.parent, OPTIONS), digest=False
    ),
    "x.vocabulary.json": Kind(
        lambda path: keep_vocabulary(path.parent / "x", {"a": 0, "b": 1}),
        lambda path: read_vocabulary(path.parent / "x"),
        digest=False,
    ),
}


def places(document: Any, depth: int = 3) -> Iterator[tuple[str | int, ...]]:
    """Yield the path of every field to a depth; of a list, the first element."""
    for key, value in document.items() if isinstance(document, dict) else enumerate(document[:1]):
        yield (key,)
        if depth > 1 and isinstance(value, dict | list):
            yield from ((key, *tail) for tail in places(value, depth - 1))


@pytest.mark.parametrize("name", KINDS)
def test_every_field_may_have_a_wrong_type(name: str, tmp_path: Path) -> None:
    kind, path = KINDS[name], tmp_path / name
    kind.write(path)
    kind.read(path)
    tensors, header = ({}, {}) if kind.card is None else read_tensors(path)
    document = json.loads(path.read_text() if kind.card is None else header[kind.card])
    document.pop(KEY, None)
    refused: list[str] = []
    loaded = []
    for where in places(document):
        for wrong in WRONG:
            changed = copy.deepcopy(document)
            *outer, last = where
            inner = changed
            for key in outer:
                inner = inner[key]
            if type(inner[last]) is type(wrong) and inner[last] == wrong:
                continue
            inner[last] = wrong
            if kind.card is not None:
                path.write_bytes(encode_tensors(tensors, {kind.card: json.dumps(changed)}))
            else:
                path.write_text(json.dumps(changed | ({KEY: document_digest(changed)} if kind.digest else {})))
            try:
                kind.read(path)
            except GroundscopeError as error:
                refused.append(str(error))
            else:
                loaded.append((where, wrong))
    assert refused
    assert [text for text in refused if str(tmp_path) not in text or "\n" in text] == []
    # A text may be another text, and so on; provenance is free. No other value is accepted.
    types = {str: str, float: (int, float), int: int, bool: bool, type(None): (str, int, float)}
    for where, wrong in loaded:
        value = document
        for key in where:
            value = value[key]
        same = isinstance(value, list | dict) and isinstance(wrong, list | dict)
        nullable = wrong is None and bool(set(kind.nullable) & set(where))
        fits = same or nullable or isinstance(wrong, types.get(type(value), ()))
        assert fits or {"provenance", *kind.ignored} & set(where), (where, value, wrong)


def test_a_field_is_named_with_what_it_must_be(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    head_scores().save(path)
    _, header = read_tensors(path)
    card = json.loads(header["head_scores"])
    for name, wrong, text in (
        ("model", 1.5, "'model' must be text, not a number"),
        ("excluded", "1", "'excluded' must be an integer, not text"),
        ("ids", ["a", 1], "'ids' must be a list, each element text"),
        ("min_effect", None, "'min_effect' must be a number, not null"),
    ):
        path.write_bytes(encode_tensors(load_file(path), {"head_scores": json.dumps(card | {name: wrong})}))
        with pytest.raises(GroundscopeError, match=text) as caught:
            HeadScores.load(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "reason", [KeyError("x"), IndexError("x"), OverflowError("x"), RecursionError("x"), MemoryError()]
)
def test_an_error_while_building_a_result_names_the_file(reason: Exception) -> None:
    with (
        pytest.raises(PatchError, match=r"f\.json is damaged: .+; fit it again"),
        building("f.json is damaged", PatchError, "; fit it again"),
    ):
        raise reason


def test_fields_are_checked_by_type_hints() -> None:
    good = {"n_layers": 1, "n_heads": 2, "parallel": [True], "other": object}
    assert check_fields(good, Shape) == good
    for name, wrong in (("n_layers", True), ("n_layers", 1.0), ("parallel", [1]), ("parallel", "ab")):
        with pytest.raises(TypeError, match=name):
            check_fields(good | {name: wrong}, Shape)
    with pytest.raises(TypeError, match="'s' must be an object, not a list"):
        check_fields([], Shape, "s")


@pytest.mark.parametrize("parse", [Site.parse, TokenSelection.parse, Head.parse])
@pytest.mark.parametrize("wrong", [None, 1, 1.5, b"last", [], {}, object, np.zeros(2)])
def test_names_of_places_are_text(parse: Callable[[Any], object], wrong: object) -> None:
    with pytest.raises(SiteError, match=r"is not a|unknown token selection"):
        parse(wrong)


@pytest.mark.parametrize("wrong", [None, 1, 1.5, object, [None], [1], b"L1.H1", [["L1.H1"]], {1: 2}])
def test_heads_are_heads_or_text(wrong: Any) -> None:
    with pytest.raises(SiteError, match="is not a head"):
        parse_heads(wrong)
    assert parse_heads("L1.H2") == parse_heads(Head(1, 2)) == parse_heads(["L1.H2"]) == (Head(1, 2),)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"strength": "1"}, PatchError),
        ({"strength": None}, PatchError),
        ({"strength": [1]}, PatchError),
        ({"strength": math.inf}, ConfigError),
        ({"decay": "1"}, PatchError),
        ({"decay": None}, PatchError),
        ({"changes": None}, PatchError),
        ({"changes": [1]}, PatchError),
        ({"changes": {1: unit(4)}}, PatchError),
        ({"changes": {1.5: AddChange(unit(4))}}, SiteError),
        ({"changes": {None: AddChange(unit(4))}}, SiteError),
        ({"changes": {True: AddChange(unit(4))}}, SiteError),
        ({"positions": None}, SiteError),
        ({"changes": {1: AddChange(unit(4)), 2: AmplifyChange(unit(4))}}, PatchError),
        ({"norm": {}}, ConfigError),
        ({"model": 1}, PatchError),
        ({"config_hash": None}, PatchError),
        ({"provenance": "text"}, PatchError),
        ({"gate": "object:cat"}, PatchError),
    ],
)
def test_a_vector_has_fields_of_the_right_types(options: dict[str, Any], error: type[GroundscopeError]) -> None:
    right = {"changes": {1: AddChange(unit(4))}, "positions": "last+generated", "strength": 1.0}
    right |= {"model": "m", "config_hash": SHA}
    with pytest.raises(error):
        SteeringVector(**(right | options))  # type: ignore[arg-type]


def test_entries_and_gates_need_numbers() -> None:
    for wrong in ("1", None, [1, 2], b"1", 10**400):
        with pytest.raises(PatchError, match="sigma"):
            AddChange(unit(4), wrong)  # type: ignore[arg-type]
        with pytest.raises(PatchError, match="bias"):
            ProbeGate(0, np.ones(4), wrong)  # type: ignore[arg-type]
    with pytest.raises(PatchError, match="weights"):
        ProbeGate(0, "text")  # type: ignore[arg-type]
    assert list(SteeringVector({np.int64(2): AddChange(unit(4))}, "last+generated", 1, "m", SHA).changes) == [2]
