"""Audit a data set for causes of errors (Shu et al., arXiv 2501.01346, section 3.2.1 and Appendix E), and compare error rates."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from behavior.data_audit.finding import AuditedData, CauseReport, Finding, NotMeasuredError
from behavior.data_audit.registry import CAUSES
from behavior.result import BehaviorResult
from concepts.schema import ConceptDataset
from groundscope.core import artifacts
from groundscope.core.document_digest import KEY, document_digest
from groundscope.core.errors import DataError
from groundscope.core.files import write_whole
from groundscope.core.short_repr import short_repr
from groundscope.core.statistics import Estimate, cluster_bootstrap, estimate
from groundscope.core.text import format_count

if TYPE_CHECKING:
    import pandas as pd

FORMAT, VERSION = "groundscope.audit", 1


@dataclass(frozen=True)
class CauseErrors:
    """Error rates of the questions that a cause concerns, and of all others.

    Examples
    --------
    >>> import groundscope as gs
    >>> data = gs.scenes.dataset(20).filter(lambda e: bool(e.candidates))
    >>> about = lambda e, right: gs.Answer(
    ...     e.id, e.group, e.split, e.level, e.kind, e.question, e.answer, e.candidates, e.answer if right else None, right
    ... )
    >>> wrong_if_small = [about(e, "small" not in e.question) for e in data]
    >>> answers = gs.BehaviorResult(tuple(wrong_if_small), gs.Cost(None, None, len(data)))
    >>> gs.audit(data, answers, causes=["rare compositions"]).errors[0].cause
    'rare compositions'
    """

    cause: str
    concerned: Estimate
    """Error rate of the questions that the cause concerns, with a 95 % interval over images."""
    others: Estimate
    """Error rate of all other questions."""
    difference: Estimate
    """First minus second, with a bootstrap interval over images; n is the number of concerned questions."""


@dataclass(frozen=True)
class Audit:
    """Causes of errors in a data set, and error rates by cause if answers were given.

    Examples
    --------
    >>> import groundscope as gs
    >>> audit = gs.audit(gs.scenes.dataset(10), causes=["small objects", "poor captions"])
    >>> [report.name for report in audit.causes]
    ['poor captions', 'small objects']
    """

    data: str
    """Name of the data set."""
    examples: int
    images: int
    causes: tuple[CauseReport, ...]
    errors: tuple[CauseErrors, ...] = ()
    """Empty without answers."""
    answered: int = 0
    """Number of answered questions with a true answer."""

    __repr__ = short_repr

    def cause(self, name: str) -> CauseReport:
        """Return the report of one cause; raises `ConfigError` for an unknown name."""
        CAUSES[name]
        report = next((report for report in self.causes if report.name == name), None)
        if report is None:
            msg = f"cause '{name}' was not part of the audit; add it to causes"
            raise DataError(msg)
        return report

    def frame(self) -> pd.DataFrame:
        """Return one row per cause: findings, images and questions concerned, or why it was not measured; and error rates."""
        import pandas as pd

        errors = {row.cause: row for row in self.errors}
        rows = []
        for report in self.causes:
            row: dict[str, object] = {
                "cause": report.name, "findings": len(report.findings), "images": len(report.images),
                "questions": len(report.examples), "not_measured": report.reason,
            }  # fmt: skip
            if self.errors:
                cause_errors = errors.get(report.name)
                for name in ("concerned", "others", "difference"):
                    figure: Estimate | None = None if cause_errors is None else getattr(cause_errors, name)
                    value = (math.nan,) * 3 if figure is None else (figure.value, figure.low, figure.high)
                    row |= dict(zip((f"error_{name}", f"error_{name}_low", f"error_{name}_high"), value, strict=True))
            rows.append(row)
        return pd.DataFrame(rows)

    def findings_frame(self) -> pd.DataFrame:
        """Return one row per finding: cause, message, value, images and examples."""
        import pandas as pd

        rows = [
            {
                "cause": report.name, "message": f.message, "value": math.nan if f.value is None else f.value,
                "images": " ".join(f.images), "examples": " ".join(f.examples),
            }
            for report in self.causes
            for f in report.findings
        ]  # fmt: skip
        return pd.DataFrame(rows, columns=["cause", "message", "value", "images", "examples"])

    def save(self, path: Path | str) -> None:
        """Write the audit atomically as one JSON file."""
        document = {"format": FORMAT, "version": VERSION, **_without_nan(asdict(self))}
        document[KEY] = document_digest(document)
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())

    @classmethod
    def load(cls, path: Path | str) -> Audit:
        """Read a file that `save` wrote.

        Raises
        ------
        DataError
            Names the file: if it is missing, damaged, of another kind, or of an unsupported version.
        """
        document = artifacts.read_document(Path(path), FORMAT, "audit", VERSION, error=DataError, advice="audit again")
        try:
            causes = tuple(
                CauseReport(
                    str(c["name"]),
                    tuple(
                        Finding(tuple(f["examples"]), tuple(f["images"]), f["message"], f["value"])
                        for f in c["findings"]
                    ),
                    {name: math.nan if value is None else value for name, value in c["values"].items()},
                    str(c["reason"]),
                )
                for c in document["causes"]
            )
            errors = tuple(
                CauseErrors(e["cause"], *(_estimate(e[name]) for name in ("concerned", "others", "difference")))
                for e in document["errors"]
            )
            return cls(
                document["data"], document["examples"], document["images"], causes, errors, document["answered"]
            )  # fmt: skip
        except (KeyError, TypeError, AttributeError) as error:
            msg = f"audit '{path}' is damaged: {error!r}"
            raise DataError(msg) from error


def audit(
    data: ConceptDataset,
    answers: BehaviorResult | None = None,
    *,
    causes: Iterable[str] | None = None,
    pixels: bool = True,
    caption_scores: Mapping[str, float] | None = None,
) -> Audit:
    """Search a data set for causes of errors; needs no model.

    Parameters
    ----------
    data
        Data of any loader. What a data set lacks is stated (`CauseReport.reason`), not guessed.
    answers
        A model's answers to (some of) its questions: error rates of concerned and other questions are compared, with intervals
        over images. A difference is an association: concerned questions can differ in other ways too.
    causes
        Names of `behavior.data_audit.CAUSES`; all by default.
    pixels
        Whether to decode every image, for the causes that need it. Those are left out if false.
    caption_scores
        Id of a caption's example to its log-probability given its image minus the mean given other images, in nats
        (`behavior.data_audit.caption_fit` computes them by a model).

    Raises
    ------
    ConfigError
        For an unknown cause.
    DataError
        If the data have no examples, a named cause needs what they lack, or no answer belongs to a question of the data.

    Examples
    --------
    >>> import groundscope as gs
    >>> found = gs.audit(gs.scenes.dataset(20), pixels=False)
    >>> found.cause("contradictions").findings, found.cause("mismatched captions").measured
    ((), False)
    """
    names = None if causes is None else tuple(causes)
    chosen = [name for name in CAUSES if names is None or name in names]
    for name in names or ():
        CAUSES[name]  # raises for an unknown name
    audited = AuditedData(data, caption_scores)
    concerned = _answered(data, answers)
    reports = []
    for name in chosen:
        cause = CAUSES[name]
        if cause.needs_pixels and not pixels and names is None:
            reports.append(CauseReport(name, reason="images were not decoded (pixels=False)"))
            continue
        try:
            findings, values = cause.find(audited)
        except NotMeasuredError as error:
            if names is not None:
                msg = f"cause '{name}': {error}"
                raise DataError(msg) from error
            reports.append(CauseReport(name, reason=str(error)))
        else:
            reports.append(CauseReport(name, tuple(findings), values))
    errors = tuple(row for report in reports if (row := _compare(report, concerned)) is not None) if concerned else ()
    return Audit(data.name, len(data), len(audited.by_image), tuple(reports), errors, len(concerned))


def _answered(data: ConceptDataset, answers: BehaviorResult | None) -> dict[str, tuple[str, bool]]:
    """Return the answered questions: id to image and whether the answer is wrong."""
    if answers is None:
        return {}
    groups = {example.id: example.group for example in data}
    rows = {a.id: (groups[a.id], not a.correct) for a in answers.answers if a.correct is not None and a.id in groups}
    if not rows:
        msg = (
            f"none of the {format_count(len(answers), 'answer')} belongs to a question of the data that has a true answer: ids "
            "must be those of the data"
        )
        raise DataError(msg)
    return rows


def _compare(report: CauseReport, answered: Mapping[str, tuple[str, bool]]) -> CauseErrors | None:
    examples = report.examples
    flags = np.array([name in examples for name in answered])
    if not flags.any() or flags.all():
        return None
    groups = [group for group, _ in answered.values()]
    wrong = np.array([is_wrong for _, is_wrong in answered.values()])
    table = np.column_stack([wrong & flags, flags, wrong & ~flags, ~flags]).astype(np.float64)
    value = table[flags, 0].mean() - table[~flags, 2].mean()
    low, high = cluster_bootstrap(table, groups, _rate_difference)
    concerned, others = (
        estimate(wrong[part], [g for g, p in zip(groups, part, strict=True) if p]) for part in (flags, ~flags)
    )
    few = concerned.few_groups or others.few_groups
    return CauseErrors(report.name, concerned, others, Estimate(float(value), low, high, int(flags.sum()), few))


def _rate_difference(totals: np.ndarray, counts: np.ndarray) -> np.ndarray:
    del counts  # a difference of ratios of totals does not depend on the number of rows
    with np.errstate(divide="ignore", invalid="ignore"):
        return totals[:, 0] / totals[:, 1] - totals[:, 2] / totals[:, 3]


def _without_nan(value: Any) -> Any:
    """Return a value whose numbers that are not finite are None, and whose tuples are lists."""
    if isinstance(value, Mapping):
        return {str(name): _without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _estimate(record: Mapping[str, Any]) -> Estimate:
    value, low, high = (math.nan if record[name] is None else float(record[name]) for name in ("value", "low", "high"))
    return Estimate(value, low, high, int(record["n"]), bool(record["few_groups"]))
