"""NaturalBench: two questions about two images, with opposite answers (Li et al. 2024, arXiv 2410.14669).

Rule of Baiqi-Li/NaturalBench, ``naturalbench_vqa.py``, commit 9967605. What the release does:

- the answer is the first of the words ``yes`` and ``no``, or of ``A`` and ``B``, ignoring case: the article *a* is an
  A;
- an answer with neither is -1: wrong everywhere;
- the truths are yes, no, no, yes (A, B, B, A) in the order q0 i0, q0 i1, q1 i0, q1 i1, whatever the file says; a note
  counts the questions whose truth in the file differs;
- ``Acc`` is over answers, ``Q_Acc`` over questions that are right for both images, ``I_Acc`` over images with both
  questions right, ``G_Acc`` over groups of four. Groups without all four answers are left out and counted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from behavior.benchmarks import record_files
from behavior.benchmarks.image_cells import find_image, image_name
from behavior.benchmarks.questions import AnsweredQuestion, BenchmarkQuestion, BenchmarkScore
from behavior.benchmarks.rates import grouped, incomplete_note, score_of, share
from behavior.benchmarks.specification import QUESTIONS, AnswerLayout, Benchmark, Scoring
from concepts.loaders.table import read_rows
from concepts.reading.record import Record
from groundscope.core.errors import DataError
from groundscope.core.text import format_count

if TYPE_CHECKING:
    from concepts.image_source import ImageSource

SUFFIXES = {
    "yes/no": "Please answer Yes or No.",
    "choice": "Please output the letter corresponding to the correct option.",
}
"""Kind of task to the sentence that the release appends to the question, without a space."""
_TYPES = {"yes_no": "yes/no", "multiple_choice": "choice", "mcq": "choice"}
_WORDS = {"yes/no": ("yes", "no"), "choice": ("a", "b")}
_ORDER = ((0, 0), (0, 1), (1, 0), (1, 1))
_TRUTH = (1, 0, 0, 1)


def read_choice(text: str, task: str = "yes/no") -> int:
    """Return 1 if the text says yes (or A) first, 0 if it says no (or B) first, -1 if it says neither.

    >>> from behavior.benchmarks.naturalbench import read_choice
    >>> read_choice("No, yes is wrong"), read_choice("It is a B", "choice"), read_choice("maybe")
    (0, 1, -1)
    """
    first, second = (re.search(rf"\b{word}\b", text, re.IGNORECASE) for word in _WORDS[task])
    if first is None or second is None:
        return -1 if first is second else int(first is not None)
    return int(first.start() < second.start())


def _read(files: Mapping[str, Path]) -> list[BenchmarkQuestion]:
    questions: list[BenchmarkQuestion] = []
    for number, record in enumerate(read_rows(files[QUESTIONS])):
        index = record_files.text_or_empty(record, "Index") or str(number)
        task = record_files.label_of(
            record, "Question_Type" if "Question_Type" in record.values else "Question Type", _TYPES
        )
        cells = [find_image(record, files[QUESTIONS], number, f"Image_{i}") for i in range(2)]
        names = [
            image_name(record, f"Image_{i}") or (cell.name if cell else f"{index}_{i}") for i, cell in enumerate(cells)
        ]
        for place, (q, i) in enumerate(_ORDER):
            truth = _truth(record, f"Image_{i}_Question_{q}", task)
            questions.append(
                BenchmarkQuestion(
                    f"{index}/q{q}_i{i}",
                    names[i],
                    record.text(f"Question_{q}"),
                    _label(_TRUTH[place], task),
                    task,
                    candidates=("yes", "no") if task == "yes/no" else ("A", "B"),
                    aliases=(str(4 * number + place),),
                    fields={"set": index, "place": place, "truth": truth},
                    where=record.where,
                    image_cell=cells[i],
                )
            )
    return questions


def _present(question: BenchmarkQuestion, image: ImageSource) -> tuple[ImageSource, str]:
    """Append the sentence of the release to the question."""
    return image, question.text + SUFFIXES[question.task]


def _truth(record: Record, name: str, task: str) -> int:
    value = record.text(name).strip().lower()
    if value not in _WORDS[task]:
        msg = f"{record.where}: field '{name}' is '{value[:20]}', which is not {' or '.join(_WORDS[task])}"
        raise DataError(msg)
    return 1 - _WORDS[task].index(value)


def _label(value: int, task: str) -> str:
    return {"yes/no": ("no", "yes"), "choice": ("B", "A")}[task][value]


def _score(scoring: Scoring) -> BenchmarkScore:
    sets = grouped(scoring.rows, lambda r: r.question.fields["set"])
    whole = [sorted(members, key=_place) for members in sets.values() if len(members) == 4]
    ok = [[read_choice(r.text, r.question.task) == _TRUTH[_place(r)] for r in members] for members in whole]
    names = [str(members[0].question.fields["set"]) for members in whole]
    twice = [name for name in names for _ in range(2)]
    figures = {
        "Acc": share([right for rights in ok for right in rights], [name for name in names for _ in range(4)]),
        "Q_Acc": share([hit for a, b, c, d in ok for hit in (a and b, c and d)], twice),
        "I_Acc": share([hit for a, b, c, d in ok for hit in (a and c, b and d)], twice),
        "G_Acc": share([all(rights) for rights in ok], names),
    }
    parsed = [read_choice(r.text, r.question.task) for r in scoring.rows]
    answers = [
        r.row(None if p < 0 else _label(p, r.question.task), correct=p == _TRUTH[_place(r)])
        for r, p in zip(scoring.rows, parsed, strict=True)
    ]
    notes = list(incomplete_note(len(sets) - len(whole), "group of four"))
    other = sum(q.fields["truth"] != _TRUTH[q.fields["place"]] for q in scoring.questions)
    if other:
        notes.append(f"{format_count(other, 'question')} with another truth in the file than the rule assumes")
    return score_of("naturalbench", scoring, answers, figures, unparsed=sum(p < 0 for p in parsed), notes=notes)


def _place(row: AnsweredQuestion) -> int:
    return int(row.question.fields["place"])


NATURALBENCH = Benchmark(
    "NaturalBench",
    "Li et al. 2024, arXiv 2410.14669; Baiqi-Li/NaturalBench, commit 9967605",
    ("yes/no", "choice"),
    (),
    {
        QUESTIONS: "rows with Index, Question_0, Question_1, Image_0_Question_0, …, Question_Type (Parquet, JSON or a table)"
    },
    _read,
    _score,
    AnswerLayout(("output", "response", "text"), ids=("id", "question_id", "index"), image=("image",)),
    present=_present,
)
