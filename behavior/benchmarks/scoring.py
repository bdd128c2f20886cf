"""Score answer files by the released rules, and exchange files with judges."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from behavior.benchmarks.answer_formats import read_answer_file
from behavior.benchmarks.joining import check_unique, join_answers
from behavior.benchmarks.questions import AnsweredQuestion, BenchmarkQuestion, BenchmarkScore
from behavior.benchmarks.registry import BENCHMARKS
from behavior.benchmarks.specification import QUESTIONS, Benchmark, Scoring
from groundscope.core.errors import ConfigError, DataError
from groundscope.core.text import format_count


def questions(name: str, **files: Path | str) -> tuple[BenchmarkQuestion, ...]:
    """Read the questions of a benchmark.

    Parameters
    ----------
    name
        An entry of `BENCHMARKS`.
    files
        Its files by name, as ``BENCHMARKS[name].files`` lists them.

    Raises
    ------
    ConfigError
        For an unknown benchmark or file name.
    DataError
        Names the file and record: for a missing file, other content, or two questions with the same id.

    Examples
    --------
    >>> import json, tempfile
    >>> from pathlib import Path
    >>> import groundscope as gs
    >>> path = Path(tempfile.mkdtemp()) / "image-level_filterd.json"
    >>> row = {"question_id": 0, "image": "a.jpg", "text": "Is the man on the horse?", "label": "yes"}
    >>> _ = path.write_text(json.dumps([row]))
    >>> gs.behavior.benchmarks.questions("r_bench", questions=path)[0].level
    'relation'
    """
    benchmark = BENCHMARKS[name]
    return check_unique(tuple(benchmark.read(benchmark.check_files(files))))


def score_files(
    name: str,
    answers: Path | str,
    *,
    files: Mapping[str, Path | str | None] | None = None,
    verdicts: Path | str | None = None,
    variant: str | None = None,
    functions: Mapping[str, Callable[..., Any] | None] | None = None,
    format: str | None = None,
    answer_field: str | None = None,
    id_field: str | None = None,
    by_place: bool = False,
) -> BenchmarkScore:
    r"""Score an answer file from any source by the benchmark's released rule; neither model nor images are needed.

    Parameters
    ----------
    name
        An entry of `BENCHMARKS`.
    answers
        The answer file, in a format of `ANSWER_FORMATS`. Answers without ids must record image and question, which must agree
        with the questions line by line. Questions without an answer are counted in ``missing`` and are in no figure.
    files
        The benchmark's files by name (``BENCHMARKS[name].files``): its questions, annotations, lists.
    verdicts
        Verdict file of a judge, for a benchmark that needs one.
    variant
        One of ``BENCHMARKS[name].variants``; by default the released rule.
    functions
        Functions that the rule needs, by name (``BENCHMARKS[name].functions``).
    format
        Name of the answer format; None for the only one that fits.
    answer_field, id_field
        Fields with the answer and the id, if they have other names.
    by_place
        Whether to match verdicts without ids by their place, in the order of the answers.

    Raises
    ------
    ConfigError
        For an unknown benchmark, file, variant, function or format, or a function that the rule needs and does not get.
    DataError
        Names the file and record: for a missing file or verdict, content that cannot be read, a file that fits two formats,
        answers to other questions, or two answers to one question.

    Examples
    --------
    >>> import json, tempfile
    >>> from pathlib import Path
    >>> import groundscope as gs
    >>> folder = Path(tempfile.mkdtemp())
    >>> rows = [{"question_id": i, "image": "a.jpg", "text": f"Is it {i}?", "label": "no"} for i in range(4)]
    >>> _ = (folder / "questions.json").write_text(json.dumps(rows))
    >>> texts = [{"question_id": i, "text": "No." if i else "Yes."} for i in range(3)]
    >>> _ = (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    >>> score = gs.behavior.benchmarks.score_files(
    ...     "r_bench", folder / "answers.jsonl", files={"questions": folder / "questions.json"}
    ... )
    >>> round(score.figures["accuracy"].value, 3), score.missing
    (0.667, 1)
    """
    benchmark = BENCHMARKS[name]
    chosen = benchmark.check_variant(variant)
    given = benchmark.check_functions(functions or {})
    all_questions, rows, paths = _answered(
        benchmark, answers, files or {}, chosen, format=format, answer_field=answer_field, id_field=id_field
    )
    rows = _judged(benchmark, rows, verdicts, chosen, by_place=by_place)
    return benchmark.score(Scoring(all_questions, rows, paths, chosen, given))


def write_requests(
    name: str,
    path: Path | str,
    answers: Path | str,
    *,
    files: Mapping[str, Path | str | None] | None = None,
    format: str | None = None,
    answer_field: str | None = None,
    id_field: str | None = None,
) -> int:
    """Write answers in the layout that the benchmark's released judge reads; return their number.

    Parameters
    ----------
    name
        An entry of `BENCHMARKS` with a judge.
    path
        The file to write.
    answers, files, format, answer_field, id_field
        As for `score_files`.

    Raises
    ------
    ConfigError, DataError
        As `score_files` does; also for a benchmark without a judge.

    Examples
    --------
    >>> import json, tempfile
    >>> from pathlib import Path
    >>> import groundscope as gs
    >>> folder = Path(tempfile.mkdtemp())
    >>> row = {"image": "a.jpg", "reference caption": ["A cat."], "output": "A cat on a mat."}
    >>> _ = (folder / "captions.jsonl").write_text(json.dumps(row))
    >>> gs.behavior.benchmarks.write_requests("haelm", folder / "requests.jsonl", folder / "captions.jsonl")
    1
    """
    benchmark = BENCHMARKS[name]
    if benchmark.judge is None:
        judged = ", ".join(n for n, b in BENCHMARKS.usable().items() if b.judge is not None)
        msg = f"{benchmark.title} has no judge; benchmarks with a judge are {judged}"
        raise ConfigError(msg)
    _, rows, _ = _answered(
        benchmark,
        answers,
        files or {},
        benchmark.default_variant,
        format=format,
        answer_field=answer_field,
        id_field=id_field,
    )
    return benchmark.judge.write(rows, Path(path))


def _answered(
    benchmark: Benchmark,
    answers: Path | str,
    files: Mapping[str, Path | str | None],
    variant: str,
    *,
    format: str | None,
    answer_field: str | None,
    id_field: str | None,
) -> tuple[tuple[BenchmarkQuestion, ...], tuple[AnsweredQuestion, ...], dict[str, Path]]:
    """Return the questions, the answered ones in the order of the answer file, and the files."""
    path = Path(answers)
    paths = benchmark.check_files(files, answers=True)
    if not path.exists():
        msg = f"{benchmark.title}: answer file '{path}' does not exist"
        raise DataError(msg)
    if benchmark.read_answers is not None and (not benchmark.answers_hold_questions or QUESTIONS not in paths):
        rows = tuple(benchmark.read_answers(path, paths))
        return check_unique([r.question for r in rows]), rows, paths
    all_questions = check_unique(tuple(benchmark.read(paths)))
    readings = read_answer_file(
        path,
        benchmark.answers,
        name=format,
        answer_field=answer_field,
        id_field=id_field,
        last=variant in benchmark.repeated,
    )
    return all_questions, join_answers(all_questions, readings, path, text_alone=benchmark.answers.text_alone), paths


def _judged(
    benchmark: Benchmark,
    rows: tuple[AnsweredQuestion, ...],
    verdicts: Path | str | None,
    variant: str,
    *,
    by_place: bool,
) -> tuple[AnsweredQuestion, ...]:
    """Return the rows with their verdicts."""
    judge = benchmark.judge
    if verdicts is None:
        if judge is not None and variant not in benchmark.unjudged:
            without = f", or variant='{benchmark.unjudged[0]}', which needs none" if benchmark.unjudged else ""
            msg = f"{benchmark.title}: variant '{variant}' needs a verdict file; write requests with write_requests{without}"
            raise DataError(msg)
        return rows
    if judge is None:
        msg = f"{benchmark.title} has no judge; leave out verdicts"
        raise ConfigError(msg)
    path = Path(verdicts)
    if not path.is_file():
        msg = f"{benchmark.title}: verdict file '{path}' does not exist"
        raise DataError(msg)
    read = list(judge.read(path))
    if all(number is None for number, _, _ in read):
        if not by_place:
            msg = (
                f"{path}: the verdicts have no ids; pass by_place=True if they are in the order of the answers, or write "
                "the id of the question to each"
            )
            raise DataError(msg)
        if len(read) != len(rows):
            msg = f"{path}: {format_count(len(read), 'verdict')} without ids for {format_count(len(rows), 'answer')}"
            raise DataError(msg)
        return tuple(replace(row, verdict=value) for row, (_, value, _) in zip(rows, read, strict=True))
    names = {alias: row.question.id for row in rows for alias in row.question.aliases}
    names |= {row.question.id: row.question.id for row in rows}
    values: dict[str, Any] = {}
    for number, value, where in read:
        identity = names.get(str(number))
        if identity is None or identity in values:
            what = "was already judged" if identity is not None else "matches no answer"
            msg = f"{where}: verdict on '{number}' {what}"
            raise DataError(msg)
        values[identity] = value
    needed = [row for row in rows if row.question.task == "judged" or not _mixed(benchmark)]
    lacking = [row.question.id for row in needed if row.question.id not in values]
    if lacking:
        msg = (
            f"{path}: no verdict on '{lacking[0]}' ({len(lacking)} of {format_count(len(needed), 'answer')} have none); write "
            "null for an unreadable verdict"
        )
        raise DataError(msg)
    return tuple(replace(row, verdict=values.get(row.question.id)) for row in rows)


def _mixed(benchmark: Benchmark) -> bool:
    """Whether only some of a benchmark's questions are judged."""
    return "judged" in benchmark.tasks and len(benchmark.tasks) > 1
