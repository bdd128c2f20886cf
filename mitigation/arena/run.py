"""Run an arena: every row answers the same questions, and is compared with the model alone and with the controls."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from behavior import amber, answer_each, mme
from behavior.repeated_sampling import divide_seeds, repeat_sampled
from behavior.result import BehaviorResult
from groundscope.core.errors import ConfigError, DataError
from groundscope.core.files import canonical_json
from groundscope.core.progress import step_bar
from groundscope.core.statistics import Estimate
from lvlm.sampling import Sampling
from mitigation.arena.caption_controls import cut_to_length, cut_to_recall
from mitigation.arena.measures import (
    CAPTION_INVENTED,
    CAPTION_RECALL,
    CAPTION_WORDS,
    Counted,
    Measure,
    change,
    count_answers,
    improves,
)
from mitigation.arena.price import Price, measure_price
from mitigation.arena.result import ArenaResult, RowResult
from mitigation.arena.rows import PLAIN, ArenaRow
from mitigation.strength import PRIOR_ERRORS

if TYPE_CHECKING:
    from concepts.schema import ConceptDataset, Example
    from lvlm.model import Lvlm

_LOG = logging.getLogger(__name__)
REGIMES = ("greedy", "sampling")


@dataclass(frozen=True)
class ArenaOptions:
    """How the rows of an arena answer.

    Examples
    --------
    >>> from mitigation.arena.run import ArenaOptions
    >>> ArenaOptions(seeds=3).regimes
    ('greedy',)
    """

    regimes: tuple[str, ...] = ("greedy",)
    """``greedy`` for every row, and ``sampling`` for the model alone, the controls and the methods whose release samples."""
    seeds: int = 5
    """Number of sampled answers to each question under ``sampling``."""
    sampling: Sampling = field(default_factory=Sampling)
    generate: bool = False
    """Whether questions with candidates are answered by generation under ``greedy`` too; sampled answers always are."""
    parser: str | None = None
    max_new_tokens: int = 40
    batch_size: int = 32
    price_questions: int = 2
    """Number of questions, captions first, on which the price is measured; 0 leaves it out."""
    price_tokens: int = 64
    price_repetitions: int = 3

    def __post_init__(self) -> None:
        unknown = next((r for r in self.regimes if r not in REGIMES), None)
        if unknown is not None or not self.regimes:
            msg = f"unknown regime '{unknown}'; choose from {', '.join(REGIMES)}" if self.regimes else "choose a regime"
            raise ConfigError(msg)
        for name in ("seeds", "max_new_tokens", "batch_size", "price_tokens", "price_repetitions"):
            if getattr(self, name) < 1:
                msg = f"{name}={getattr(self, name)}: must be at least 1"
                raise ConfigError(msg)


@dataclass(frozen=True, eq=False)
class _Measured:
    row: ArenaRow
    regime: str
    answers: BehaviorResult | None
    counted: Counted | None
    price: Price | None
    problem: str | None
    chosen: bool = False


def run_arena(
    model: Lvlm,
    rows: Sequence[ArenaRow],
    data: ConceptDataset,
    options: ArenaOptions | None = None,
    *,
    folder: Path | str | None = None,
    chosen: Sequence[ArenaRow] = (),
    progress: bool | None = None,
) -> ArenaResult:
    """Answer the same questions with every row; return measures, paired changes, prices and comparisons with controls.

    Parameters
    ----------
    model
        The model.
    rows
        Methods and controls with published parameters (`mitigation.arena.rows.make_row`); the model alone is added.
    data
        Test questions and captions.
    options
        How answers are written; `ArenaOptions` by default.
    folder
        Folder in which the answers of each row are stored; a row whose answers are there is not run again.
    chosen
        Rows with parameters that were chosen on other images (`mitigation.arena.search.choose_parameters`).
    progress
        Whether to show progress; None shows it on a terminal.

    Returns
    -------
    ArenaResult
        One row per method and regime. A method that fails has a `RowResult.problem`, and does not stop the others.

    Raises
    ------
    DataError
        If there is no question, two rows have the same name, or the answers of a row (`ArenaRow.answers`) are to other questions.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.arena.rows import make_row
    >>> from mitigation.arena.run import ArenaOptions, run_arena
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["conflict"])
    >>> row = make_row("vcd", gs.DerivationData(model, None, data))
    >>> arena = run_arena(model, [row], data, ArenaOptions(price_questions=0))
    >>> [r.name for r in arena.rows]
    ['unmodified', 'VCD']
    """
    options = options or ArenaOptions()
    if not len(data):
        msg = f"dataset '{data.name}' has no questions for an arena"
        raise DataError(msg)
    plain = ArenaRow(PLAIN, None)
    entries = [(plain, False), *((row, False) for row in rows), *((row, True) for row in chosen)]
    names = [(row.name, flag) for row, flag in entries]
    twice = next((name for name, flag in names if names.count((name, flag)) > 1), None)
    if twice is not None:
        msg = f"two rows of the arena are named '{twice}'; leave one out, or give them different parameters"
        raise DataError(msg)
    _check_answers([*rows, *chosen], data)
    cells = None if folder is None else Path(folder)
    tasks = [(row, flag, regime) for regime in options.regimes for row, flag in entries if _runs(row, regime)]
    measured: list[_Measured] = []
    with step_bar("arena", len(tasks), show=progress) as advance:
        for row, flag, regime in tasks:
            measured.append(_measure(model, row, data, regime, options, cells, chosen=flag))
            advance(1)
    results: list[RowResult] = []
    for regime in options.regimes:
        own = [m for m in measured if m.regime == regime]
        results += _compare(own, data, options)
    provenance = {
        "model": model.name, "config_hash": model.config_hash, "weights_hash": model.weights_hash, "data": data.name,
        "data_digest": data.digest, "questions": len(data), "images": len({e.group for e in data}),
        "device": str(model.device), "dtype": str(model.dtype).removeprefix("torch."), "attention": model.attention,
        "options": {**asdict(options), "regimes": list(options.regimes), "sampling": asdict(options.sampling)},
    }  # fmt: skip
    return ArenaResult(tuple(results), _objective(measured[0].counted), provenance)


def _check_answers(rows: Sequence[ArenaRow], data: ConceptDataset) -> None:
    """Raise `DataError` if answers that were made elsewhere are not those to the questions."""
    ids = {e.id: e.question for e in data}
    for row in rows:
        answered = {} if row.answers is None else {a.id: a.question for a in row.answers.answers}
        if row.answers is not None and answered != ids:
            other = sorted(set(answered.items()) ^ set(ids.items()))[0][0]
            msg = f"the answers of row '{row.name}' are to other questions than those of the arena: see '{other}'"
            raise DataError(msg)


def _runs(row: ArenaRow, regime: str) -> bool:
    if row.answers is not None:
        return regime == "greedy"
    return regime == "greedy" or row.name == PLAIN or row.control or row.regime == "sampling"


def _measure(
    model: Lvlm,
    row: ArenaRow,
    data: ConceptDataset,
    regime: str,
    options: ArenaOptions,
    cells: Path | None,
    *,
    chosen: bool,
) -> _Measured:
    """Answer the questions with one row; an error becomes its problem."""
    if row.problem is not None:
        return _Measured(row, regime, None, None, None, row.problem, chosen)
    try:
        problem = _first_problem(model, row, data)
        if problem is not None:
            return _Measured(row, regime, None, None, None, problem, chosen)
        answers = row.answers or _answers(model, row, data, regime, options, cells)
        seeds = int(answers.provenance.get("seeds", 1))
        questions = repeat_sampled(data, seeds, generate=bool(answers.provenance.get("generate")))
        counted = count_answers(answers, questions)
        price = None
        if options.price_questions and regime == options.regimes[0] and row.answers is None:
            price = measure_price(
                model, row.mitigation, _priced(data, options.price_questions), new_tokens=options.price_tokens,
                repetitions=options.price_repetitions,
            )  # fmt: skip
    except Exception as error:
        if row.name == PLAIN:
            raise
        _LOG.warning("row '%s' of the arena failed: %s", row.name, error, exc_info=not isinstance(error, ValueError))
        return _Measured(row, regime, None, None, None, f"{type(error).__name__}: {error}", chosen)
    return _Measured(row, regime, answers, counted, price, None, chosen)


def _first_problem(model: Lvlm, row: ArenaRow, data: ConceptDataset) -> str | None:
    """Return why a method cannot answer one of the questions; None if it can answer all, or does not say."""
    check: Callable[[Any, Any], str | None] | None = getattr(row.mitigation, "problem", None)
    if check is None:
        return None
    distinct = {(e.question, e.suffix, e.system): e for e in data}
    return next((p for e in distinct.values() if (p := check(model, e)) is not None), None)


def _priced(data: ConceptDataset, count: int) -> list[Example]:
    captions = [e for e in data if e.kind == "caption"]
    others = [e for e in data if e.kind != "caption"]
    return [*captions, *others][:count]


def _answers(
    model: Lvlm, row: ArenaRow, data: ConceptDataset, regime: str, options: ArenaOptions, cells: Path | None
) -> BehaviorResult:
    sampled = regime == "sampling"
    settings: dict[str, Any] = {
        "generate": options.generate or sampled, "parser": options.parser, "max_new_tokens": options.max_new_tokens,
        "sampling": options.sampling if sampled else None, "seeds": options.seeds if sampled else 1,
        "batch_size": options.batch_size,
    }  # fmt: skip
    path = None if cells is None else cells / f"{_key(model, row, data, settings)}.json"
    if path is not None and path.is_file():
        return BehaviorResult.load(path)
    mitigation = row.mitigation
    context: Any = nullcontext if mitigation is None else lambda: mitigation.applied(model)
    answers = answer_each(model, data, {row.name: context}, **settings, progress=False)[row.name]
    if path is not None:
        answers.save(path)
    return answers


def _key(model: Lvlm, row: ArenaRow, data: ConceptDataset, settings: Mapping[str, Any]) -> str:
    """Return what the answers of a row depend on, as a digest."""
    method = None if row.mitigation is None else [row.mitigation.name, _texts(row.mitigation.parameters)]
    sampling = settings["sampling"]
    content = [
        method, data.digest, model.config_hash, model.weights_hash, model.attention, str(model.dtype),
        {**settings, "sampling": None if sampling is None else asdict(sampling)},
    ]  # fmt: skip
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()[:32]


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {key: repr(value) for key, value in sorted(values.items())}


# ---- comparison


def _objective(counted: Counted | None) -> str:
    names = _objectives(counted)
    return names[0] if len(names) == 1 else "the mean of " + " and ".join(names)


def _objectives(counted: Counted | None) -> list[str]:
    """Return the measures in which methods are compared with controls: errors by prior, or all answers."""
    if counted is None:
        return ["all: right"]
    names = [name for name in PRIOR_ERRORS if name in counted.counts]
    return names or [n for n in ("all: right", CAPTION_INVENTED) if n in counted.counts][:1] or list(counted.counts)[:1]


def _compare(measured: Sequence[_Measured], data: ConceptDataset, options: ArenaOptions) -> list[RowResult]:
    """Return the results of the rows of one regime."""
    plain = measured[0]
    others = [m for m in measured[1:] if m.counted is not None]
    methods = [m for m in others if not m.row.control]
    controls = [m for m in others if m.row.control]
    results = []
    for m in measured:
        about: dict[str, Any] = {
            "category": m.row.category, "source": m.row.source, "control": m.row.control, "chosen": m.chosen,
            "parameters": {} if m.row.mitigation is None else dict(m.row.mitigation.parameters),
        }  # fmt: skip
        if m.counted is None or m.answers is None or plain.counted is None or plain.answers is None:
            results.append(RowResult(m.row.name, m.regime, **about, problem=m.problem))
            continue
        measures = []
        for name in m.counted.counts:
            paired = None if m is plain else change(plain.counted, m.counted, name, comparisons=max(len(others), 1))
            measures.append(Measure(name, m.counted.estimate(name), paired, _spread(m.answers, data, name)))
        measures += _benchmark_scores(m.answers, data)
        cuts: dict[str, Any] = {}
        if m is not plain and CAPTION_WORDS in m.counted.counts and CAPTION_RECALL in m.counted.counts:
            own = _captions(plain.answers, data)
            words = m.counted.estimate(CAPTION_WORDS).value
            cuts = {
                "cut_to_length": cut_to_length(*own, words),
                "cut_to_recall": cut_to_recall(*own, m.counted.estimate(CAPTION_RECALL).value),
            }
        beaten = _not_beaten(m, [plain, *controls], len(methods)) if m in methods else ()
        more: dict[str, Any] = {"measures": tuple(measures), "price": m.price, "not_beaten": beaten, **cuts}
        results.append(RowResult(m.row.name, m.regime, **about, **more))
    return results


def _captions(answers: BehaviorResult, data: ConceptDataset) -> tuple[BehaviorResult, ConceptDataset]:
    """Return the captions of the first seed with their examples."""
    first = divide_seeds(answers)[0]
    captions = replace(first, answers=tuple(a for a in first.answers if a.kind == "caption"))
    return captions, type(data)(data.name, tuple(e for e in data if e.kind == "caption"), data.provenance)


def _not_beaten(m: _Measured, controls: Sequence[_Measured], comparisons: int) -> tuple[str, ...]:
    """Return the controls against which a method shows no improvement beyond the interval in any objective."""
    names = []
    for control in controls:
        if control.counted is None or m.counted is None:
            continue
        changes = {
            name: change(control.counted, m.counted, name, comparisons=max(comparisons, 1))
            for name in _objectives(control.counted)
        }
        outcomes = [improves(name, amount) for name, amount in changes.items() if amount is not None]
        if True not in outcomes or False in outcomes:
            names.append(control.row.name)
    return tuple(names)


def _spread(answers: BehaviorResult, data: ConceptDataset, name: str) -> float | None:
    parts = divide_seeds(answers)
    if len(parts) == 1:
        return None
    values = []
    for number, part in enumerate(parts, 1):
        repeated = [e if number == 1 else replace(e, id=f"{e.id}#{number}") for e in data]
        ids = {a.id for a in part.answers}
        own = type(data)(
            data.name, tuple(e if e.id in ids else f for e, f in zip(repeated, data, strict=True)), data.provenance
        )
        values.append(count_answers(part, own).estimate(name).value)
    return float(np.std(values, ddof=1))


def _benchmark_scores(answers: BehaviorResult, data: ConceptDataset) -> list[Measure]:
    """Return the scores that only a whole benchmark has: MME's, AMBER's."""
    loader = data.provenance.get("loader")
    nan = float("nan")
    if loader == "mme":
        scores = mme.score(answers)
        pairs = {"MME perception": float(scores.perception), "MME cognition": float(scores.cognition)}
        return [Measure(n, Estimate(v, nan, nan, len(answers))) for n, v in pairs.items()]
    if loader == "amber":
        return [Measure("AMBER F1", amber.score(answers).parts["all"].f1)]
    return []
