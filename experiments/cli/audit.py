"""``groundscope audit``: causes of errors in data; joined to error rates if answers are given, to caption scores by a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.terminal_text import plain_console
from groundscope.core.errors import ConfigError
from groundscope.core.files import write_whole
from groundscope.core.text import format_count, nearest

if TYPE_CHECKING:
    from behavior import Audit, BehaviorResult
    from concepts.schema import ConceptDataset

_OPTIONS = {"answers": "", "causes": "", "out": "", "pixels": "true", "parser": "", "model": "", "others": "4"}
"""Options of the command with their defaults; all others are options of the data."""


def run(arguments: Sequence[str]) -> int:
    """Audit the data of a run, or data given by options, write the findings and print a table.

    Parameters
    ----------
    arguments
        A run folder, or options of data (``data=coco data.questions=FILE data.images=FOLDER``); ``answers=FILE`` (of `gs.answer`,
        or of any tool that `gs.load_answers` reads; by default those of the run), ``parser=`` for it, ``causes=[A,B]``,
        ``pixels=false``, ``out=FOLDER``; ``model=FOLDER_OR_ID`` scores how well captions fit their images, against ``others=4``.

    Raises
    ------
    ConfigError, DataError
        For wrong options, data that cannot be loaded, and a named cause that needs what the data lack.
    """
    options, words, runs = _read(arguments)
    from behavior import audit
    from experiments.report.audit import audit_page

    data, answers, out = _run_data(runs[0], options) if runs else _data(words, options)
    names = [name.strip() for name in options["causes"].strip("[]").split(",") if name.strip()] or None
    scores = _caption_scores(data, options)
    audited = audit(data, answers, causes=names, pixels=options["pixels"] == "true", caption_scores=scores)
    out.mkdir(parents=True, exist_ok=True)
    audited.save(out / "audit.json")
    write_whole(out / "findings.csv", audited.findings_frame().to_csv(index=False).encode())
    write_whole(out / "audit.html", audit_page(audited).encode())
    _print(audited, out)
    if runs:
        from experiments.report import write_report

        write_report(runs[0])
    return 0


def _read(arguments: Sequence[str]) -> tuple[dict[str, str], list[str], list[Path]]:
    options, words, runs = dict(_OPTIONS), [], []
    for argument in arguments:
        name, separator, value = argument.partition("=")
        if not separator:
            runs.append(Path(argument))
        elif name in options:
            options[name] = value
        elif name == "data" or name.lstrip("+").startswith("data."):
            words.append(argument)
        else:
            names = [*_OPTIONS, "data"]
            msg = f"groundscope audit has no option '{name}'; choose from {', '.join(names)} and data.…{nearest(name, names)}"
            raise ConfigError(msg)
    if options["pixels"] not in {"true", "false"}:
        msg = f"pixels={options['pixels']}; give true (decode every image) or false"
        raise ConfigError(msg)
    if not options["others"].isdecimal() or int(options["others"]) < 1:
        msg = f"others={options['others']}: give the number of other images, at least 1"
        raise ConfigError(msg)
    if len(runs) > 1 or (runs and words):
        msg = "groundscope audit takes one run folder, or data=… data.questions=FILE data.images=FOLDER, not both"
        raise ConfigError(msg)
    return options, words, runs


def _data(words: Sequence[str], options: dict[str, str]) -> tuple[ConceptDataset, BehaviorResult | None, Path]:
    from experiments.cli.overrides import as_sources, compose, read
    from experiments.data import data_problem, is_scenes, load_files, load_parts

    config, _ = compose(read([as_sources(word) for word in words]).first())
    problem = data_problem(config.data)
    if problem is not None:
        raise ConfigError(problem)
    data = load_parts(config.data)[0] if is_scenes(config.data) else load_files(config.data)
    return data, _answers(data, options), Path(options["out"] or "audit")


def _run_data(folder: Path, options: dict[str, str]) -> tuple[ConceptDataset, BehaviorResult | None, Path]:
    from behavior import BehaviorResult
    from concepts.schema import ConceptDataset
    from experiments.cli.resume import configured
    from experiments.data import load_parts

    config: Any = configured(folder)
    first, second = load_parts(config.data)
    data = ConceptDataset(second.name, (*first.examples, *second.examples), second.provenance)
    answers = _answers(data, options)
    own = folder / "behavior" / "before.json"
    if answers is None and own.is_file():
        answers = BehaviorResult.load(own)
    return data, answers, Path(options["out"] or folder / "audit")


def _answers(data: ConceptDataset, options: dict[str, str]) -> BehaviorResult | None:
    if not options["answers"]:
        return None
    from behavior import BehaviorResult, load_answers
    from behavior.result import FORMAT

    path = Path(options["answers"])
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            is_own = f'"{FORMAT}"' in file.read(400)
        if is_own:
            return BehaviorResult.load(path)
    return load_answers(data, path, parser=options["parser"] or None)


def _caption_scores(data: ConceptDataset, options: dict[str, str]) -> dict[str, float] | None:
    """Return how well captions fit their images by the chosen model; None without a model."""
    if not options["model"]:
        return None
    from behavior.data_audit import caption_fit
    from lvlm import load_lvlm

    return caption_fit(load_lvlm(options["model"]), data, others=int(options["others"]))


def _print(audited: Audit, out: Path) -> None:
    from rich.table import Table
    from rich.text import Text

    console = plain_console()
    console.print(
        f"{audited.data}: {format_count(audited.examples, 'question')}, {format_count(audited.images, 'image')}",
        markup=False,
    )
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("cause")
    for name in ("findings", "images", "questions"):
        table.add_column(name, justify="right")
    errors = {row.cause: row for row in audited.errors}
    if errors:
        table.add_column("wrong: concerned, others, difference [95 %], in points")
    for report in audited.causes:
        if not report.measured:
            continue
        cells = [report.name, str(len(report.findings)), str(len(report.images)), str(len(report.examples))]
        row = errors.get(report.name)
        if row is not None:
            d = row.difference
            rates = f"{100 * row.concerned.value:.1f}, {100 * row.others.value:.1f}, {100 * d.value:+.1f}"
            cells.append(f"{rates} [{100 * d.low:+.1f}, {100 * d.high:+.1f}]")
        table.add_row(*map(Text, cells))
    console.print(table)
    for report in audited.causes:
        if not report.measured:
            console.print(f"not measured: {report.name}: {report.reason}", markup=False)
    console.print(f"written: {out / 'audit.html'}, {out / 'findings.csv'}, {out / 'audit.json'}", markup=False)
