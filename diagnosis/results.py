"""Results of `diagnosis.diagnose`: one verdict with its evidence per answer, as tables, text and files."""

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
from groundscope.core.text import nearest

if TYPE_CHECKING:
    import pandas as pd

FORMAT, VERSION = "groundscope.diagnoses", 6
"""Versions 1 and 2 have no digest, version 1 no offset; versions 1 to 3 have neither ``overridden late`` nor ``not readable``,
and their ``overridden by the prior`` needs no evidence of a prior. Versions 1 to 4 do not say which readings a verdict uses.
The sources of versions 1 to 5 are Shapley shares of the model's answer (``image``, ``prompt`` or ``prefix``, ``prior``), and a
prior needed the same answer about a blank image; `load` leaves these sources out."""
_LAST_WITHOUT_DIGEST = 2
NOT_SEEN, LOST, NOT_INTEGRATED = "not seen", "lost at the projector", "not integrated"
OVERRIDDEN, OVERRIDDEN_LATE = "overridden by the prior", "overridden late"
NOT_READABLE, OTHER, RIGHT = "not readable", "other", "right"
VERDICTS = (NOT_SEEN, LOST, NOT_INTEGRATED, OVERRIDDEN, OVERRIDDEN_LATE, NOT_READABLE, OTHER)
"""Verdicts in the order of the stages of the model."""
UNEXPLAINED = (NOT_READABLE, OTHER)
"""Verdicts without a cause: they have a reason and no confidence."""
STAGES = ("vision", "projector", "image", "last")
"""Vision tower; projector; image tokens of the decoder; last token of the decoder, at which the answer is computed."""
ABOUT = ("id", "group", "level", "split", "kind", "question", "truth")
BY = ("level", "split", "kind", "concept")
SOURCES = ("lean", "form", "knowledge", "image")
"""Shares of the log-odds of the true answer (`Diagnosis.sources`)."""


@dataclass(frozen=True)
class Reading:
    """Decision of the probes of one place about one example."""

    stage: str
    """One of `STAGES`."""
    site: str
    tokens: str
    layer: int
    log_odds: float
    """Log-odds of the truth against the model's answer, calibrated on held-out examples; NaN if the place is not readable."""
    state: str
    """``truth``, ``other``, ``unclear`` (between the thresholds), or ``unreadable`` (chance accuracy on held-out examples)."""
    used: bool = False
    """Whether the verdict uses it: of each stage the chosen place, or the best one with a probe of the concept; all layers at the
    last token. False in files of versions up to 4."""


@dataclass(frozen=True)
class Push:
    """Effect of a component of the decoder on an answer at the last token."""

    part: str
    """A head (``L5.H2``) or the MLP of a layer (``L5.mlp``)."""
    effect: float
    """Increase of the log-odds of the truth against the model's answer if the component is set to its mean output."""


@dataclass(frozen=True)
class Place:
    """Calibration of the probes at one place (site, tokens, layer) on held-out examples of one kind of question."""

    kind: str
    """Level and kind of the questions, ``attribute what_color``."""
    stage: str
    site: str
    tokens: str
    layer: int
    n: int
    """Held-out examples."""
    accuracy: float
    """Share of them in which the truth is decoded rather than another answer, with equal weight for each class."""
    low: float
    """Lower end of the interval, clustered by image and widened by the number of places of the stage; the place is readable only
    if it is above chance, 0.5."""
    high: float
    """Upper end of the 95 % interval; a place that is not readable shows the absence of the concept only if it is below
    `diagnosis.verdicts.ABSENCE_ACCURACY`."""
    slope: float
    """Factor from the probes' margins to log-odds."""
    threshold: float
    """Log-odds of at most this size are ``unclear``; 1 in 20 right answers has wrong log-odds of a larger size."""
    readable: bool
    chosen: bool
    """Whether the verdict uses it: the layer of its stage with the best validation accuracy on the training folds; all layers at
    the last token."""


@dataclass(frozen=True)
class Diagnosis:
    """The verdict about one answer, with the evidence.

    Examples
    --------
    >>> from diagnosis import Diagnosis
    >>> about = {"id": "q1", "group": "image 1", "level": "attribute", "split": "conflict", "kind": "is_color"}
    >>> about |= {"question": "Is the apple red?", "truth": "no"}
    >>> diagnosis = Diagnosis(about, "yes", "attribute:red", "overridden late", 0.9, attribute_clause="the apple is green")
    >>> print(diagnosis)
    Asked 'Is the apple red?', the model says 'yes'; right is 'no' (the apple is green). Verdict: overridden late (90 % sure).
    """

    example: Mapping[str, str]
    """``id``, ``group``, ``level``, ``split``, ``kind``, ``question`` and ``truth``."""
    model_answer: str
    concept: str
    """Concept of the question, ``attribute:green``; empty if no label matches."""
    verdict: str | None
    """One of `VERDICTS`; None for a right answer."""
    confidence: float
    """Probability of the verdict given its evidence, 0 to 1; 0 for `UNEXPLAINED` verdicts, NaN for a right answer."""
    true_clause: str = ""
    """The truth about the question as a clause: ``the apple is not red``."""
    answer_clause: str = ""
    """The claim of the model's answer: ``the apple is red``."""
    attribute_clause: str = ""
    """The true attribute of the object if the question has another: ``the apple is green``."""
    stages: Mapping[str, str] = field(default_factory=dict)
    """State of each of `STAGES`: ``truth``, ``other``, ``unclear``, ``gone`` or ``unknown``
    (`diagnosis.verdicts.stage_state`)."""
    reason: str = ""
    """Reason of the verdict ``other`` or ``not readable``."""
    readings: tuple[Reading, ...] = ()
    """Decisions of all places, in the order of the forward pass."""
    last_true_site: str = ""
    """Last site at which the truth is decoded at the last token; empty if it is decoded nowhere."""
    pushes: tuple[Push, ...] = ()
    """Components that favor the model's answer, strongest first."""
    corrected_by: tuple[str, ...] = ()
    """Fewest of them, strongest first, whose joint ablation corrects the answer."""
    log_odds: float = math.nan
    """The model's log-odds of the truth against its answer; negative."""
    corrected_log_odds: float = math.nan
    """The same with `corrected_by` ablated, and without `offset` if that is a number."""
    offset: float = math.nan
    """Common bias of answers to such questions to this answer, in logits, if its removal corrects the answer: alone
    (`corrected_by` is empty) or together with `corrected_by`; NaN otherwise. See `diagnosis.causal_check.answer_offsets`."""
    without_image: str = ""
    """The model's answer about a blank image."""
    sources: Mapping[str, float] = field(default_factory=dict)
    """Shares of the log-odds of the true answer against the model's: ``lean``, ``form``, ``knowledge``, ``image``, their sum
    ``log_odds``, and where they exist ``no_image`` (log-odds without any image), ``noun_spread`` and ``blank_spread`` (standard
    deviations over nouns, and of the image's share over blank images); see `circuits.input_attribution.split`. Also for right
    answers that were selected for comparison, against the strongest other answer. Empty if the question has no nouns that others
    can replace, and the answer no prefix that another can replace."""
    information: str = ""
    """For a concept that is lost: a sentence with its nats at the vision tower and the later stage
    (`diagnosis.measure_losses`)."""

    __repr__ = short_repr

    def __post_init__(self) -> None:
        object.__setattr__(self, "example", MappingProxyType({name: self.example[name] for name in ABOUT}))
        for name in ("sources", "stages"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    @property
    def unread(self) -> tuple[str, ...]:
        """Stages without a probe of this concept, or with probes that show neither its presence nor its absence."""
        return tuple(stage for stage in STAGES if self.stages.get(stage) == "unknown")

    def margins(self, stage: str) -> dict[str, float]:
        """Return the calibrated log-odds at every place of a stage, by site."""
        return {r.site: r.log_odds for r in self.readings if r.stage == stage}

    def __str__(self) -> str:
        return narrative.explain(self)


@dataclass(frozen=True, eq=False)
class Diagnoses:
    """A verdict for every answer; returned by `diagnosis.diagnose`.

    Examples
    --------
    >>> from diagnosis import Diagnoses, Diagnosis
    >>> about = {"id": "q1", "group": "image 1", "level": "object", "split": "neutral", "kind": "existence"}
    >>> about |= {"question": "Is there a cat?", "truth": "no"}
    >>> diagnoses = Diagnoses((Diagnosis(about, "yes", "object:cat", "not seen", 0.8),), (), "m", "c", "w")
    >>> diagnoses.table("level").query("n > 0")[["verdict", "n", "of"]].to_dict("records")
    [{'verdict': 'not seen', 'n': 1, 'of': 1}]
    """

    examples: tuple[Diagnosis, ...]
    places: tuple[Place, ...]
    """Calibration of each place, by kind of question."""
    model: str
    config_hash: str
    weights_hash: str
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Digests of the store and the directions, and all options."""

    __repr__ = short_repr

    def __post_init__(self) -> None:
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Diagnosis:
        return self.examples[index]

    @property
    def wrong(self) -> tuple[Diagnosis, ...]:
        """Diagnoses of wrong answers."""
        return tuple(diagnosis for diagnosis in self.examples if diagnosis.verdict is not None)

    def text(self, index: int) -> str:
        """Return the explanation of an answer as text."""
        return narrative.explain(self.examples[index])

    def frame(self) -> pd.DataFrame:
        """Return one row per answer: columns of the example, verdict, confidence, log-odds of each stage, causes and text."""
        import pandas as pd

        rows = []
        for diagnosis in self.examples:
            row: dict[str, Any] = {
                **diagnosis.example,
                "model_answer": diagnosis.model_answer,
                "concept": diagnosis.concept,
            }
            row |= {"verdict": diagnosis.verdict, "confidence": diagnosis.confidence}
            row |= {f"{stage}_log_odds": self.strongest(diagnosis, stage) for stage in STAGES}
            row |= {
                "last_true_site": diagnosis.last_true_site,
                "corrected_by": " ".join(diagnosis.corrected_by),
                "offset": diagnosis.offset,
                "unread": " ".join(diagnosis.unread),
                "without_image": diagnosis.without_image,
            }
            row["no_image"] = diagnosis.sources.get("no_image", math.nan)
            row |= {part: diagnosis.sources.get(part, math.nan) for part in SOURCES}
            rows.append({**row, "text": narrative.explain(diagnosis)})
        return pd.DataFrame(rows)

    def strongest(self, diagnosis: Diagnosis, stage: str) -> float:
        """Return the log-odds at the chosen place of a stage; at the last token the largest of all layers."""
        readings = [r for r in diagnosis.readings if r.stage == stage and r.state != "unreadable"]
        if stage == "last":
            return max((r.log_odds for r in readings), default=math.nan)
        if any(r.used for r in diagnosis.readings):
            return next((r.log_odds for r in readings if r.used), math.nan)
        judged = {
            (p.site, p.tokens) for p in self.places if p.stage == stage and p.chosen and p.kind == kind_of(diagnosis)
        }
        return next((r.log_odds for r in readings if (r.site, r.tokens) in judged), math.nan)

    def table(self, by: str | Sequence[str] = ("level", "split")) -> pd.DataFrame:
        """Return the number and share of each verdict among wrong answers, with an interval clustered by image.

        Parameters
        ----------
        by
            Columns to group by: ``level``, ``split``, ``kind``, ``concept``; an empty sequence for one table over all.

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
            msg = f"unknown column by='{unknown[0]}'; choose from {', '.join(BY)}{nearest(unknown[0], BY)}"
            raise ConfigError(msg)
        members: dict[tuple[str, ...], list[Diagnosis]] = {}
        for diagnosis in self.wrong:
            about = {**diagnosis.example, "concept": diagnosis.concept}
            members.setdefault(tuple(about[name] for name in columns), []).append(diagnosis)
        rows = []
        for key, wrong in sorted(members.items()):
            groups = [diagnosis.example["group"] for diagnosis in wrong]
            for verdict in VERDICTS:
                mine = [diagnosis for diagnosis in wrong if diagnosis.verdict == verdict]
                share = estimate([diagnosis.verdict == verdict for diagnosis in wrong], groups)
                confidence = sum(diagnosis.confidence for diagnosis in mine) / len(mine) if mine else math.nan
                counts = {"n": len(mine), "of": len(wrong), "share": share.value, "low": share.low, "high": share.high}
                row = {**dict(zip(columns, key, strict=True)), "verdict": verdict, **counts, "confidence": confidence}
                rows.append(row)
        names = [*columns, "verdict", "n", "of", "share", "low", "high", "confidence"]
        return pd.DataFrame(rows, columns=names)

    def calibration(self) -> pd.DataFrame:
        """Return one row per place and kind of question, with the fields of `Place`."""
        import pandas as pd

        return pd.DataFrame([asdict(place) for place in self.places], columns=[f.name for f in fields(Place)])

    def save(self, path: str | Path) -> Path:
        """Write one JSON file with one line per answer; raises `StoreError` if it cannot be written."""
        card = {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in {"examples", "places", "provenance"}
        }
        head = {"format": FORMAT, "version": VERSION, **card, "provenance": dict(self.provenance)}
        head["places"] = [_plain(asdict(place)) for place in self.places]
        records = [_plain(_record(diagnosis)) for diagnosis in self.examples]
        head[KEY] = document_digest({**head, "diagnoses": records})
        lines = ",\n".join(json.dumps(record, allow_nan=False) for record in records)
        text = f'{json.dumps(head, allow_nan=False)[:-1]}, "diagnoses": [\n{lines}\n]}}\n'
        path = Path(path)
        artifacts.write_bytes(path, text.encode(), "diagnoses")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file of `save`; raises `StoreError` if it is missing, damaged, of another kind or newer."""
        path = Path(path)
        content = artifacts.read_document(
            path, FORMAT, "diagnosis", VERSION, last_without_digest=_LAST_WITHOUT_DIGEST, advice="diagnose again"
        )
        with building(f"diagnoses '{path}' are damaged", StoreError):
            places = tuple(Place(**_numbers(place, Place, "places")) for place in content.pop("places"))
            examples = tuple(_diagnosis(diagnosis) for diagnosis in content.pop("diagnoses"))
            loaded = cls(examples, places, **check_fields(content, cls))
        unknown = next((o.verdict for o in loaded.wrong if o.verdict not in VERDICTS), None)
        if unknown is not None:
            msg = f"diagnoses '{path}' are damaged: unknown verdict '{unknown}'; choose from {', '.join(VERDICTS)}"
            raise StoreError(msg)
        return loaded


def kind_of(diagnosis: Diagnosis) -> str:
    """Return level and kind of a question, as in `Place.kind`."""
    return f"{diagnosis.example['level']} {diagnosis.example['kind']}"


_STORED_NAMES: Mapping[str, str] = {
    "model_answer": "said",
    "true_clause": "shows",
    "answer_clause": "says",
    "attribute_clause": "fact",
    "last_true_site": "flip",
    "corrected_by": "undone_by",
    "corrected_log_odds": "undone",
    "offset": "lean",
}
"""Names of fields in files, where they differ."""


def _record(diagnosis: Diagnosis) -> dict[str, Any]:
    """Return a diagnosis as plain values with the names of the file."""
    record = {f.name: getattr(diagnosis, f.name) for f in fields(diagnosis)}
    record |= {name: [asdict(item) for item in record[name]] for name in ("readings", "pushes")}
    record |= {name: dict(record[name]) for name in ("example", "sources", "stages")}
    return {_STORED_NAMES.get(name, name): value for name, value in record.items()}


def _diagnosis(stored: Any) -> Diagnosis:
    """Return the diagnosis of a record of `_record`; raises what a damaged file causes."""
    names = {old: new for new, old in _STORED_NAMES.items()}
    record = {names.get(name, name): value for name, value in check_fields(stored, object, "diagnoses").items()}
    values = _numbers(record, Diagnosis, "diagnoses")
    values["readings"] = tuple(Reading(**_numbers(r, Reading, "diagnoses.readings")) for r in record["readings"])
    values["pushes"] = tuple(Push(**check_fields(p, Push, "diagnoses.pushes")) for p in record["pushes"])
    values["corrected_by"] = tuple(record["corrected_by"])
    if "lean" not in values["sources"]:
        values["sources"] = {}  # Shapley shares of an earlier version
    return Diagnosis(**values)


def _plain(value: Any) -> Any:
    """Return plain values for JSON, with null for NaN."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(record: Any, kind: type, at: str) -> dict[str, Any]:
    """Return a record with NaN for null numbers, after a check of its types."""
    numbers = {f.name for f in fields(kind) if f.type == "float"}
    values = check_fields(record, object, at)
    plain = {k: math.nan if v is None and k in numbers else v for k, v in values.items()}
    shares: Any = plain.get("sources")
    if kind is Diagnosis and isinstance(shares, dict):
        plain["sources"] = {k: math.nan if v is None else v for k, v in shares.items()}
    return check_fields(plain, kind, at)
