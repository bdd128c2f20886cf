"""Benchmarks of the evaluation card: scored from answer files, or asked of the model of the run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from behavior.benchmarks import BENCHMARKS, BenchmarkScore, ask, benchmark_data, score_files, write_requests
from behavior.benchmarks.asking import PROMPT
from experiments.run.context import Context
from groundscope.core.document_digest import value_digest
from groundscope.core.errors import ConfigError
from groundscope.core.paths import below
from groundscope.core.text import nearest
from mitigation.named import check_mitigation_name, named_mitigation

ASKED = "asked"
"""Folder of the run with the answers of the model, and requests for judges. It is not that of the stage, which is cleared when an
option of the card changes: answers remain, for example when verdicts are added."""
_OF_FILES = ("model", "benchmark", "label", "answers", "files", "verdicts", "variant", "format", "by_place")
_OF_ASKED = ("images", "limit", "mitigation", "prompt", "suffix", "max_new_tokens")
Entry = Mapping[str, Any]
Scores = dict[str, dict[str, BenchmarkScore]]


def is_asked(entry: Entry) -> bool:
    """Return whether the model of the run answers the questions of an entry; else its answers are in a file."""
    return bool(entry.get("images"))


def model_of(entry: Entry, context: Context) -> str:
    """Return the name of an entry's model in the card."""
    if entry.get("model"):
        return str(entry["model"])
    own = context.config.model.path
    return f"{own}, {entry['mitigation']}" if entry.get("mitigation") else own


def label_of(entry: Entry) -> str:
    """Return the name of an entry's benchmark in the card."""
    return str(entry.get("label") or entry["benchmark"])


def check_entries(context: Context) -> None:
    """Raise an error for an entry that is not valid, or files that cannot be read or scored."""
    names = set()
    for number, entry in enumerate(context.config.card.benchmarks):
        _check_entry(number, entry)
        name = model_of(entry, context), label_of(entry)
        if name in names:
            msg = f"card.benchmarks: model '{name[0]}' has two entries '{name[1]}'; give one of them a label"
            raise ConfigError(msg)
        names.add(name)
        if is_asked(entry):
            _check_asked(number, entry, context)
    scores_of_files(context)


def scores_of_files(context: Context) -> Scores:
    """Return the scores of answer files by model and benchmark; the files are scored once in a run."""
    return context.once("card: scores of answer files", lambda: _score_answer_files(context))


def _score_answer_files(context: Context) -> Scores:
    scores: Scores = {}
    for entry in context.config.card.benchmarks:
        if not is_asked(entry):
            scores.setdefault(model_of(entry, context), {})[label_of(entry)] = score_files(
                str(entry["benchmark"]),
                str(entry["answers"]),
                files=entry.get("files") or {},
                verdicts=entry.get("verdicts"),
                variant=entry.get("variant"),
                format=entry.get("format"),
                by_place=bool(entry.get("by_place")),
            )
    return scores


def questions_digest(number: int, entry: Entry, context: Context) -> str:
    """Return the digest of the questions and images that the model will be asked; they are read once in a run."""

    def read() -> str:
        return benchmark_data(
            str(entry["benchmark"]), str(entry["images"]), entry.get("files") or {}, **_wording(entry)
        ).digest

    return context.once(f"card: questions of entry {number}", read)


def ask_model(context: Context) -> tuple[Scores, list[str]]:
    """Ask the model of the run; return the scores, and a sentence for each benchmark that waits for the verdicts of a judge."""
    scores: Scores = {}
    waiting: list[str] = []
    root = below(context.folder.path, ASKED, error=ConfigError)
    for number, entry in enumerate(context.config.card.benchmarks):
        if not is_asked(entry):
            continue
        name, label, files = str(entry["benchmark"]), label_of(entry), entry.get("files") or {}
        model_name = model_of(entry, context)
        stem = re.sub(r"[^\w.-]+", "-", f"{label}-{model_name}").strip("-.")
        # Other questions or settings are other files, because a journal has the answers of one setting.
        settings = [
            questions_digest(number, entry, context),
            context.model_key(),
            entry.get("max_new_tokens"),
            str(entry.get("mitigation")),
        ]
        stem = f"{stem}-{value_digest(settings)[:8]}"
        answers = Path(str(entry.get("answers") or root / f"{stem}.jsonl"))
        if context.config.force and not entry.get("answers"):
            (root / f"{stem}.asked.jsonl").unlink(missing_ok=True)
        mitigation = named_mitigation(str(entry["mitigation"]), context.model) if entry.get("mitigation") else None
        answered = ask(
            context.model,
            name,
            answers.with_suffix("") if name == "mme" and not entry.get("answers") else answers,
            str(entry["images"]),
            files,
            mitigation=mitigation,
            max_new_tokens=entry.get("max_new_tokens"),
            batch_size=context.config.evaluate.batch_size,
            **_wording(entry),
        )
        if _waits(entry):
            requests = root / f"{stem}.requests.json"
            write_requests(name, requests, answered.path, files=answered.other_files)
            waiting.append(f"{label}, {model_name}: give a judge '{requests}', and its verdicts as verdicts=FILE")
            continue
        scores.setdefault(model_name, {})[label] = answered.score(
            verdicts=entry.get("verdicts"), variant=entry.get("variant"), by_place=bool(entry.get("by_place"))
        )
    return scores, waiting


def _wording(entry: Entry) -> dict[str, Any]:
    return {
        "limit": entry.get("limit"),
        "prompt": str(entry.get("prompt") or PROMPT),
        "suffix": str(entry.get("suffix") or ""),
    }


def _waits(entry: Entry) -> bool:
    """Return whether the answers of an entry must be judged before they can be scored."""
    benchmark = BENCHMARKS[str(entry["benchmark"])]
    chosen = benchmark.check_variant(entry.get("variant"))
    return benchmark.judge is not None and not entry.get("verdicts") and chosen not in benchmark.unjudged


def _check_entry(number: int, entry: Entry) -> None:
    where = f"card.benchmarks, entry {number + 1}"
    names = (*_OF_FILES, *_OF_ASKED)
    unknown = next((name for name in entry if name not in names), None)
    if unknown is not None:
        msg = f"{where}: unknown field '{unknown}'; choose from {', '.join(names)}{nearest(str(unknown), names)}"
        raise ConfigError(msg)
    needed = ("benchmark",) if is_asked(entry) else ("model", "benchmark", "answers")
    lacking = next((name for name in needed if not entry.get(name)), None)
    if lacking is not None:
        msg = (
            f"{where}: '{lacking}' is missing; an entry needs model, benchmark, answers, or, to ask the model of the run, "
            "benchmark, images (a folder, or the question file if it has the images inside)"
        )
        raise ConfigError(msg)
    superfluous = next((name for name in _OF_ASKED if name in entry and not is_asked(entry)), None)
    if superfluous is not None:
        msg = f"{where}: '{superfluous}' is for benchmarks that the model of the run is asked; add images=FOLDER, or remove it"
        raise ConfigError(msg)
    BENCHMARKS[str(entry["benchmark"])]  # raises for an unknown name


def _check_asked(number: int, entry: Entry, context: Context) -> None:
    if entry.get("mitigation"):
        check_mitigation_name(str(entry["mitigation"]))
    verdicts = entry.get("verdicts")
    if verdicts and not Path(str(verdicts)).is_file():
        msg = f"card.benchmarks, entry {number + 1}: verdict file '{verdicts}' does not exist"
        raise ConfigError(msg)
    _waits(entry)  # raises for an unknown variant
    questions_digest(number, entry, context)
