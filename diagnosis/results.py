"""What went wrong in each wrong answer, with the evidence: results of `diagnosis.diagnose`, as tables, words and files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

from diagnosis import narrative
from groundscope.core import artifacts
from groundscope.core.document_digest import KEY, document_digest
from groundscope.core.errors import ConfigError, StoreError
from groundscope.core.result_fields import building, check_fields
from groundscope.core.short_repr import short_repr
from groundscope.core.statistics import estimate

if TYPE_CHECKING:
    import pandas as pd

FORMAT, VERSION = "groundscope.diagnoses", 4
"""Versions 1 and 2 have no digest, version 1 no lean; versions 1 to 3 have neither ``overridden late`` nor ``not readable``, and
their ``overridden by the prior`` needs no evidence of a prior."""
_LAST_WITHOUT_DIGEST = 2
NOT_SEEN, LOST, NOT_INTEGRATED = "not seen", "lost at the projector", "not integrated"
OVERRIDDEN, OVERRIDDEN_LATE = "overridden by the prior", "overridden late"
NOT_READABLE, OTHER, RIGHT = "not readable", "other", "right"
VERDICTS = (NOT_SEEN, LOST, NOT_INTEGRATED, OVERRIDDEN, OVERRIDDEN_LATE, NOT_READABLE, OTHER)
"""In the order in which an image passes through the model."""
UNEXPLAINED = (NOT_READABLE, OTHER)
"""Verdicts that name no cause: they have a reason and no confidence."""
STAGES = ("vision", "projector", "image", "last")
"""Vision tower; projector; the decoder at the image's tokens; the decoder at the last token, where the answer is read."""
ABOUT = ("id", "group", "level", "split", "kind", "question", "truth")
BY = ("level", "split", "kind", "concept")


@dataclass(frozen=True)
class Reading:
    """What a probe reads of one example at one place."""

    stage: str
    """One of `STAGES`."""
    site: str
    tokens: str
    layer: int
    log_odds: float
    """Of the truth against the answer given, calibrated on held-out examples; NaN where it cannot be read there."""
    state: str
    """``truth``, ``other``, ``unclear`` (between the thresholds), or ``unreadable`` (chance on held-out examples)."""


@dataclass(frozen=True)
class Push:
    """A part of the decoder whose output at the last token speaks for or against the truth."""

    part: str
    """A head (``L5.H2``) or the MLP of a layer (``L5.mlp``)."""
    effect: float
    """What the log-odds of the truth against the answer given gain when its output is put to its usual value."""


@dataclass(frozen=True)
class Place:
    """How well a place is read on held-out examples of one kind of question, and where its thresholds lie."""

    kind: str
    """Level and kind of the questions, ``attribute what_color``."""
    stage: str
    site: str
    tokens: str
    layer: int
    n: int
    """Held-out examples."""
    accuracy: float
    """Share of them, each answer counting the same, in which truth is read rather than another answer."""
    low: float
    """Lower end of its interval over images; the place is readable where this is above chance, 0.5."""
    high: float
    """Upper end; a place that is not readable shows that the concept is absent only where this is below
    `diagnosis.verdicts.ABSENT`."""
    slope: float
    """What makes log-odds of the probes' margins."""
    threshold: float
    """Log-odds within this distance of 0 are called unclear: 1 in 20 right answers is read as wrong beyond it."""
    readable: bool
    chosen: bool
    """Whether the verdict rests on it: the layer of its stage that reads best on the probes' training folds."""


@dataclass(frozen=True)
class Diagnosis:
    """One answer: what is wrong with it and how that is known."""

    example: Mapping[str, str]
    """``id``, ``group``, ``level``, ``split``, ``kind``, ``question`` and ``truth``."""
    said: str
    concept: str
    """What the question is about, ``attribute:green``; empty where no label says so."""
    verdict: str | None
    """One of `VERDICTS`; None for a right answer."""
    confidence: float
    """Probability of the verdict by its evidence, 0 to 1; 0 for `UNEXPLAINED` verdicts, NaN for a right answer."""
    shows: str = ""
    """What is true of the image of what is asked, as a clause: ``the apple is not red``."""
    says: str = ""
    """What the answer claims instead: ``the apple is red``."""
    fact: str = ""
    """The attribute the object has where another is asked for: ``the apple is green``."""
    stages: Mapping[str, str] = field(default_factory=dict)
    """What each of `STAGES` reads: ``truth``, ``other``, ``unclear``, ``gone`` or ``unknown``; see
    `diagnosis.verdicts`."""
    reason: str = ""
    """Why it is ``other`` or ``not readable``, in words."""
    readings: tuple[Reading, ...] = ()
    """Every place that was read, in the order of the forward."""
    flip: str = ""
    """Last site at which the last token still reads the truth; empty where it never does."""
    pushes: tuple[Push, ...] = ()
    """Parts that push towards the answer given, strongest first."""
    undone_by: tuple[str, ...] = ()
    """Fewest of them, strongest first, that together undo the answer when put to their usual values."""
    log_odds: float = math.nan
    """Of the truth against the answer given, as the model has it; below 0."""
    undone: float = math.nan
    """The same with `undone_by` put to their usual values, and without `lean` where that is a number."""
    lean: float = math.nan
    """By how many logits all answers to such questions lean to the one given, where the answer is right without that lean:
    alone (`undone_by` is empty) or together with `undone_by`; NaN elsewhere. See `diagnosis.causal_check.leans`."""
    without_image: str = ""
    """What it says when shown a blank picture."""
    sources: Mapping[str, float] = field(default_factory=dict)
    """``image``, ``prompt``, ``prior`` and ``log_odds`` of the answer given; see `circuits.input_attribution.attribute`. Of right
    answers, where they were to be compared."""

    __repr__ = short_repr

    def __post_init__(self) -> None:
        object.__setattr__(self, "example", MappingProxyType({name: self.example[name] for name in ABOUT}))
        for name in ("sources", "stages"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    @property
    def unread(self) -> tuple[str, ...]:
        """Stages that no probe reads for this concept, or only probes that show neither its presence nor its absence."""
        return tuple(stage for stage in STAGES if self.stages.get(stage) == "unknown")

    def margins(self, stage: str) -> dict[str, float]:
        """Return the calibrated log-odds at every place of a stage, by site."""
        return {r.site: r.log_odds for r in self.readings if r.stage == stage}

    def __str__(self) -> str:
        return narrative.explain(self)


@dataclass(frozen=True, eq=False)
class Diagnoses:
    """A verdict for every answer; made by `diagnosis.diagnose`."""

    examples: tuple[Diagnosis, ...]
    places: tuple[Place, ...]
    """How far each place can be believed, by kind of question."""
    model: str
    config_hash: str
    weights_hash: str
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Digests of the store and of the directions, and every option."""

    __repr__ = short_repr

    def __post_init__(self) -> None:
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Diagnosis:
        return self.examples[index]

    @property
    def wrong(self) -> tuple[Diagnosis, ...]:
        """Those of wrong answers."""
        return tuple(one for one in self.examples if one.verdict is not None)

    def text(self, index: int) -> str:
        """Say in plain words what happened to an answer."""
        return narrative.explain(self.examples[index])

    def frame(self) -> pd.DataFrame:
        """Return one row an answer: the example's columns, verdict, confidence, best reading of each stage, causes, words."""
        import pandas as pd

        rows = []
        for one in self.examples:
            row: dict[str, Any] = {**one.example, "said": one.said, "concept": one.concept}
            row |= {"verdict": one.verdict, "confidence": one.confidence}
            row |= {f"{stage}_log_odds": self.strongest(one, stage) for stage in STAGES}
            row |= {
                "flip": one.flip,
                "undone_by": " ".join(one.undone_by),
                "lean": one.lean,
                "unread": " ".join(one.unread),
                "without_image": one.without_image,
            }
            row |= {part: one.sources.get(part, math.nan) for part in ("image", "prompt", "prior")}
            rows.append({**row, "text": narrative.explain(one)})
        return pd.DataFrame(rows)

    def strongest(self, one: Diagnosis, stage: str) -> float:
        """Return the log-odds at the place that a stage is judged by; of the last token the largest of all layers."""
        read = [r for r in one.readings if r.stage == stage and r.state != "unreadable"]
        if stage == "last":
            return max((r.log_odds for r in read), default=math.nan)
        judged = {(p.site, p.tokens) for p in self.places if p.stage == stage and p.chosen and p.kind == kind_of(one)}
        return next((r.log_odds for r in read if (r.site, r.tokens) in judged), math.nan)

    def table(self, by: str | Sequence[str] = ("level", "split")) -> pd.DataFrame:
        """Return how many wrong answers got each verdict, and their share with an interval over images.

        Parameters
        ----------
        by
            Of ``level``, ``split``, ``kind``, ``concept``; an empty sequence for one table over all.

        Returns
        -------
        DataFrame
            One row for each combination and verdict: ``n`` (with this verdict), ``of`` (wrong answers), ``share``, ``low``,
            ``high``, and mean ``confidence``.

        Raises
        ------
        ConfigError
            For another column.
        """
        import pandas as pd

        columns = [by] if isinstance(by, str) else list(by)
        unknown = [name for name in columns if name not in BY]
        if unknown:
            msg = f"by='{unknown[0]}': choose of {', '.join(BY)}"
            raise ConfigError(msg)
        members: dict[tuple[str, ...], list[Diagnosis]] = {}
        for one in self.wrong:
            about = {**one.example, "concept": one.concept}
            members.setdefault(tuple(about[name] for name in columns), []).append(one)
        rows = []
        for key, ones in sorted(members.items()):
            groups = [one.example["group"] for one in ones]
            for verdict in VERDICTS:
                mine = [one for one in ones if one.verdict == verdict]
                found = estimate([one.verdict == verdict for one in ones], groups)
                sure = sum(one.confidence for one in mine) / len(mine) if mine else math.nan
                counts = {"n": len(mine), "of": len(ones), "share": found.value, "low": found.low, "high": found.high}
                rows.append({**dict(zip(columns, key, strict=True)), "verdict": verdict, **counts, "confidence": sure})
        names = [*columns, "verdict", "n", "of", "share", "low", "high", "confidence"]
        return pd.DataFrame(rows, columns=names)

    def calibration(self) -> pd.DataFrame:
        """Return one row a place and kind of question: held-out accuracy, thresholds, whether it counts (`Place`)."""
        import pandas as pd

        return pd.DataFrame([asdict(place) for place in self.places], columns=[f.name for f in fields(Place)])

    def save(self, path: str | Path) -> Path:
        """Write one JSON file, an answer a line; raises `StoreError` where that cannot be done."""
        card = {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in {"examples", "places", "provenance"}
        }
        head = {"format": FORMAT, "version": VERSION, **card, "provenance": dict(self.provenance)}
        head["places"] = [_plain(asdict(place)) for place in self.places]
        records = [_plain(_record(one)) for one in self.examples]
        head[KEY] = document_digest({**head, "diagnoses": records})
        lines = ",\n".join(json.dumps(record, allow_nan=False) for record in records)
        text = f'{json.dumps(head, allow_nan=False)[:-1]}, "diagnoses": [\n{lines}\n]}}\n'
        path = Path(path)
        artifacts.write_bytes(path, text.encode(), "diagnoses")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote; raises `StoreError` where it is missing, damaged, something else or newer."""
        path = Path(path)
        content = artifacts.read_document(
            path, FORMAT, "diagnosis", VERSION, last_without_digest=_LAST_WITHOUT_DIGEST, advice="diagnose again"
        )
        with building(f"diagnoses '{path}' are damaged", StoreError):
            places = tuple(Place(**_numbers(place, Place, "places")) for place in content.pop("places"))
            made = tuple(_diagnosis(one) for one in content.pop("diagnoses"))
            loaded = cls(made, places, **check_fields(content, cls))
        unknown = next((o.verdict for o in loaded.wrong if o.verdict not in VERDICTS), None)
        if unknown is not None:
            msg = f"diagnoses '{path}' are damaged: unknown verdict '{unknown}'; choose from {', '.join(VERDICTS)}"
            raise StoreError(msg)
        return loaded


def kind_of(one: Diagnosis) -> str:
    """Return level and kind of a question, as `Place.kind` has them."""
    return f"{one.example['level']} {one.example['kind']}"


def _record(one: Diagnosis) -> dict[str, Any]:
    record = {f.name: getattr(one, f.name) for f in fields(one)}
    parts = {name: [asdict(item) for item in record[name]] for name in ("readings", "pushes")}
    return record | parts | {name: dict(record[name]) for name in ("example", "sources", "stages")}


def _diagnosis(held: dict[str, Any]) -> Diagnosis:
    values = _numbers(held, Diagnosis, "diagnoses")
    values["readings"] = tuple(Reading(**_numbers(r, Reading, "diagnoses.readings")) for r in held["readings"])
    values["pushes"] = tuple(Push(**check_fields(p, Push, "diagnoses.pushes")) for p in held["pushes"])
    values["undone_by"] = tuple(held["undone_by"])
    return Diagnosis(**values)


def _plain(value: Any) -> Any:
    """Return plain values as JSON has them: it has no NaN, so that becomes null."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(held: Any, kind: type, at: str) -> dict[str, Any]:
    """Return a record with null numbers as NaN again, after a check of its types."""
    numbers = {f.name for f in fields(kind) if f.type == "float"}
    values = check_fields(held, object, at)
    plain = {k: math.nan if v is None and k in numbers else v for k, v in values.items()}
    shares: Any = plain.get("sources")
    if kind is Diagnosis and isinstance(shares, dict):
        plain["sources"] = {k: math.nan if v is None else v for k, v in shares.items()}
    return check_fields(plain, kind, at)
