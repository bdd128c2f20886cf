"""MME, perception and cognition: an adapter to `behavior.mme` (Fu et al. 2023, arXiv 2306.13394).

Answer files are those of the benchmark's own evaluation: ``<subtask>.txt`` with lines ``image, question, true answer,
response`` between tabs, one file or a folder with up to fourteen; they hold the questions. ``perception`` (at most
2,000) and ``cognition`` (at most 800) are sums of subtask scores, 100 (accuracy + accuracy of images with both
right). Cognition has no level.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from behavior import mme
from behavior.benchmarks.questions import AnsweredQuestion, BenchmarkQuestion, BenchmarkScore
from behavior.benchmarks.rates import grouped, score_of, summed
from behavior.benchmarks.specification import QUESTIONS, AnswerLayout, Benchmark, Scoring
from behavior.parsing import PARSERS
from concepts.loaders.mme import COGNITION, LEVEL_OF, answer_of, subtask_files
from concepts.loaders.mme import mme as load_mme
from concepts.question import YES_NO
from concepts.reading.tables import read_tab_separated
from groundscope.core.errors import DataError
from groundscope.core.files import write_text
from groundscope.core.statistics import Estimate

_PARSERS = {"release": "mme", "yes_no": "yes_no", "vlmevalkit": "vlmevalkit"}
_COLUMNS = ("image", "question", "answer", "response")


def _read_answers(path: Path, _: Mapping[str, Path]) -> list[AnsweredQuestion]:
    rows = []
    for subtask, file in subtask_files(path).items():
        for number, record in enumerate(read_tab_separated(file, _COLUMNS), 1):
            question = BenchmarkQuestion(
                f"{subtask}/{number}",
                record.text("image"),
                record.text("question"),
                answer_of(record),
                "yes/no",
                level=LEVEL_OF.get(subtask, ""),
                kind=subtask,
                candidates=("yes", "no"),
                fields={"path": path},
                where=record.where,
            )
            rows.append(AnsweredQuestion(question, str(record.values["response"]), record.where))
    return rows


def _no_questions(_: Mapping[str, Path]) -> list[BenchmarkQuestion]:
    msg = "MME's answer files hold its questions; give them as answers, without a file of questions"
    raise DataError(msg)


def _to_ask(files: Mapping[str, Path], images: Path) -> list[BenchmarkQuestion]:
    return [
        BenchmarkQuestion(
            e.id, e.group, e.question, e.answer, "yes/no", level=e.level or "", kind=e.kind, candidates=YES_NO
        )
        for e in load_mme(files[QUESTIONS], images, cognition=True)
    ]


def _one_line(text: str) -> str:
    """Return a text with a space for each tab and line break; leading blanks count in the released rule, so they stay."""
    return re.sub(r"[\t\r\n\v\f\x1c-\x1e\x85\u2028\u2029]", " ", text)


def _write(rows: Sequence[AnsweredQuestion], path: Path) -> None:
    """Write a folder with a file for each subtask."""
    path.mkdir(parents=True, exist_ok=True)
    for subtask, members in grouped(rows, lambda r: r.question.kind).items():
        lines = [
            "\t".join((Path(r.question.image).name, r.question.text, r.question.answer.capitalize(), _one_line(r.text)))
            for r in members
        ]
        write_text(path / f"{subtask}.txt", "".join(f"{line}\n" for line in lines))


def _score(scoring: Scoring) -> BenchmarkScore:
    parser = _PARSERS[scoring.variant]
    scores = mme.score_files(scoring.rows[0].question.fields["path"], parser=parser)
    figures: dict[str, Estimate] = {}
    for name, members in (("perception", set(LEVEL_OF)), ("cognition", set(COGNITION))):
        parts = [s.score for task, s in scores.subtasks.items() if task in members]
        if parts:
            figures[name] = summed(parts)
    tables = {
        task: {"accuracy": s.accuracy, "accuracy_plus": s.accuracy_plus, "score": s.score}
        for task, s in scores.subtasks.items()
    }
    parsed = [PARSERS[parser](r.text) for r in scoring.rows]
    answers = [r.row(p, correct=p == r.question.answer) for r, p in zip(scoring.rows, parsed, strict=True)]
    return score_of("mme", scoring, answers, figures, parts=tables, unparsed=sum(p is None for p in parsed))


MME = Benchmark(
    "MME",
    "Fu et al. 2023, arXiv 2306.13394; BradyFU/Awesome-Multimodal-Large-Language-Models, eval_tool",
    ("yes/no",),
    ("object", "attribute", "relation"),
    {
        QUESTIONS: "the folder of the release, or of <subtask>.txt files, for asking a model; answer files hold the questions"
    },
    _no_questions,
    _score,
    AnswerLayout(("response",)),
    variants={
        "release": "the first four characters",
        "yes_no": "POPE's rule with an explicit yes",
        "vlmevalkit": "VLMEvalKit's words",
    },
    read_answers=_read_answers,
    answers_hold_questions=True,
    optional=(QUESTIONS,),
    to_ask=_to_ask,
    write=_write,
)
