"""Preference pairs from tables of the user, from answers judged right or wrong, and from scored candidates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from behavior.result import Answer, BehaviorResult
from concepts.reading.image_folder import ImageFolder
from concepts.reading.record import Record, abbreviate
from concepts.reading.records import read_records
from concepts.reading.text_files import sha256
from concepts.schema import Example
from groundscope.core.document_digest import value_digest
from groundscope.core.errors import ConfigError, DataError
from groundscope.core.text import format_count
from mitigation.preference.data import PreferenceData
from mitigation.preference.pair import PreferencePair

_JUDGED = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}
"""Texts of the column ``correct``."""


def from_table(file: Path | str, images: Path | str | None = None) -> PreferenceData:
    r"""Read preferences from a table of the user's labels.

    The table has one of two forms:

    ``image, question, chosen, rejected``
        A pair in each row.
    ``image, question, answer, correct``
        Several answers to one question about one image in several rows, each judged ``yes`` or ``no`` (true, false, 1, 0). Every
        correct answer is preferred to every wrong one; questions with answers of one kind only are left out and counted.

    Optional columns: ``group`` (the scene, never divided between training and validation; by default the image) and ``id`` (of
    the first form).

    Parameters
    ----------
    file
        ``.csv``, ``.tsv`` or JSON lines.
    images
        Folder of the images; None for that of the file.

    Raises
    ------
    DataError
        Names the file, row and column: for columns of both forms or of none, wrong cells, an answer judged in both ways, equal
        answers, and images that are missing, unreadable or outside the folder; also if no pair is left.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import groundscope as gs
    >>> folder = Path(tempfile.mkdtemp())
    >>> gs.scenes.dataset(10)[0].image.load().save(folder / "a.png")
    >>> rows = ["image,question,answer,correct", "a.png,What is it?,a cat,yes", "a.png,What is it?,a dog,no"]
    >>> _ = (folder / "labels.csv").write_text("\n".join(rows))
    >>> data = gs.mitigation.preference.from_table(folder / "labels.csv")
    >>> data[0].chosen, data[0].rejected
    ('a cat', 'a dog')
    """
    path = Path(file)
    folder = ImageFolder(path.parent if images is None else Path(images))
    rows = list(read_records(path))
    if not rows:
        msg = f"{path}: the table has no rows"
        raise DataError(msg)
    left_out: dict[str, int] = {}
    pairs = tuple(_of_judged(rows, folder, left_out) if _is_judged(rows[0]) else _of_rows(rows, folder))
    if not pairs:
        msg = f"{path}: no question has both a correct and a wrong answer; label answers of both kinds to one question"
        raise DataError(msg)
    provenance = {"maker": "from_table", "files": {str(path): sha256(path)}, "left_out": left_out}
    data = PreferenceData(path.stem, pairs, provenance)
    folder.check()
    return data


def _is_judged(row: Record) -> bool:
    """Whether a table has judged answers; raises `DataError` if it has both forms or none."""
    paired, judged = {"chosen", "rejected"} & set(row.values), {"answer", "correct"} & set(row.values)
    if bool(paired) == bool(judged):
        problem = "columns of both forms" if paired else "columns of neither form"
        msg = (
            f"{row.where}: the table has {problem}; give 'image, question, chosen, rejected' (a pair in each row) or 'image, "
            "question, answer, correct' (several judged answers to a question)"
        )
        raise DataError(msg)
    return bool(judged)


def _of_rows(rows: Sequence[Record], folder: ImageFolder) -> Iterator[PreferencePair]:
    for number, row in enumerate(rows, 1):
        image = folder.find(row.text("image"), row.where)
        name = row.identifier("id") if row.values.get("id") is not None else str(number)
        texts = [row.text(column) for column in ("question", "chosen", "rejected")]
        yield _named(row, name, image, *texts)


def _of_judged(rows: Sequence[Record], folder: ImageFolder, left_out: dict[str, int]) -> Iterator[PreferencePair]:
    questions: dict[tuple[str, str], dict[str, tuple[bool, Record]]] = {}
    for row in rows:
        answer, correct = row.text("answer"), _judgment(row)
        judgments = questions.setdefault((row.text("image"), row.text("question")), {})
        if answer in judgments and judgments[answer][0] != correct:
            msg = f"{row.where}: the answer '{answer[:40]}' is judged both correct and wrong; keep one judgment"
            raise DataError(msg)
        judgments[answer] = correct, row
    left_out["questions with answers of one kind"] = 0
    for number, ((image, question), answers) in enumerate(questions.items(), 1):
        right = [a for a, (correct, _) in answers.items() if correct]
        wrong = [a for a, (correct, _) in answers.items() if not correct]
        left_out["questions with answers of one kind"] += not (right and wrong)
        for i, chosen in enumerate(right):
            for j, rejected in enumerate(wrong):
                row = answers[chosen][1]
                source = folder.find(image, row.where)
                yield _named(row, f"{number}:{i}:{j}", source, question, chosen, rejected)


def _judgment(row: Record) -> bool:
    value = row.field("correct")
    text = str(value).strip().lower()
    if text not in _JUDGED or isinstance(value, float):
        msg = f"{row.where}: column 'correct' must hold yes or no (true, false, 1, 0), not {abbreviate(value)}"
        raise DataError(msg)
    return _JUDGED[text]


def _named(row: Record, name: str, image: Any, question: str, chosen: str, rejected: str) -> PreferencePair:
    group = str(row.values.get("group") or "")
    try:
        return PreferencePair(name, (image,), question, chosen, rejected, "labels", group)
    except DataError as error:
        msg = f"{row.where}: {error}"
        raise DataError(msg) from error


def from_answers(data: Sequence[Example], answers: BehaviorResult, *, limit: int = 1, seed: int = 0) -> PreferenceData:
    """Return pairs from several sampled answers to each question, of which some are right and some are wrong.

    Parameters
    ----------
    data
        The questions.
    answers
        Their answers, such as those of ``behavior.answer(…, sampling=Sampling(), seeds=8)``; captions, which are neither right
        nor wrong, and questions whose answers are all right or all wrong are left out and counted.
    limit
        Largest number of pairs of a question.
    seed
        Seed of the choice among more pairs.

    Raises
    ------
    ConfigError
        For a limit below 1.
    DataError
        If an answer is to a question that is not in `data`, or no pair is left.

    Examples
    --------
    >>> import groundscope as gs
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(60).where(split="conflict", kind="what_color")
    >>> answers = gs.answer(model, data, generate=True, sampling=gs.Sampling(temperature=2.0), seeds=6, max_new_tokens=1)
    >>> pairs = gs.mitigation.preference.from_answers(data, answers)
    >>> all(pair.chosen != pair.rejected for pair in pairs)
    True
    """
    if limit < 1:
        msg = f"limit={limit}; give at least 1 pair for each question"
        raise ConfigError(msg)
    examples = {e.id: e for e in data}
    by_question: dict[str, list[Answer]] = {}
    for answer in answers.answers:
        name = answer.id if answer.id in examples else answer.id.rpartition("#")[0]
        if name not in examples:
            msg = f"the answer '{answer.id}' is to none of the {len(examples)} questions; pass the data that were answered"
            raise DataError(msg)
        by_question.setdefault(name, []).append(answer)
    pairs: list[PreferencePair] = []
    one_kind = 0
    for name, answers_to_it in by_question.items():
        texts = {correct: _texts(answers_to_it, correct=correct) for correct in (True, False)}
        choices = [(c, r) for c in texts[True] for r in texts[False] if c.strip() != r.strip()]
        one_kind += not choices
        rng = np.random.default_rng(int(value_digest([name, seed])[:16], 16))
        for number, i in enumerate(sorted(rng.permutation(len(choices))[:limit].tolist())):
            own = name if limit == 1 else f"{name}:{number}"
            pairs.append(PreferencePair.of(examples[name], *choices[i], source="labels", name=own))
    if not pairs:
        msg = (
            f"none of the {len(by_question)} questions has both a right and a wrong answer; sample more answers (seeds=8)"
            ", or at a higher temperature"
        )
        raise DataError(msg)
    provenance = {
        "maker": "from_answers", "limit": limit, "seed": seed,
        "answers": {k: answers.provenance[k] for k in ("model", "weights_hash", "data_digest") if k in answers.provenance},
        "left_out": {"questions with answers of one kind": one_kind},
    }  # fmt: skip
    return PreferenceData("sampled answers", tuple(pairs), provenance)


def _texts(answers: Sequence[Answer], *, correct: bool) -> list[str]:
    """Return the different texts of the right or the wrong answers, in order."""
    texts = (a.text if a.text is not None else a.given for a in answers if a.correct is correct)
    return list(dict.fromkeys(t for t in texts if t and t.strip()))


def scored_pair(
    example: Example,
    answers: Sequence[str],
    scores: Sequence[float],
    *,
    source: str = "self_judgment",
    provenance: Mapping[str, Any] | None = None,
) -> PreferencePair | None:
    """Return the pair of the best and the worst of several scored answers; None if they cannot be distinguished.

    Parameters
    ----------
    example
        The question; its prefix begins every answer.
    answers
        Candidate answers, such as the leaves of a tree of sentences.
    scores
        Score of each; larger is better.
    source
        Who preferred.
    provenance
        Further JSON values for the pair; its provenance also has both scores.

    Raises
    ------
    DataError
        For another number of scores than answers, no answers, or scores that are not finite.

    Examples
    --------
    >>> import groundscope as gs
    >>> example = gs.scenes.dataset(10).where(split="caption")[0]
    >>> pair = gs.mitigation.preference.scored_pair(example, ["a cat", "a dog", "a cup"], [0.2, 1.5, -1.0])
    >>> pair.chosen, pair.rejected, dict(pair.provenance)
    ('a dog', 'a cup', {'chosen_score': 1.5, 'rejected_score': -1.0, 'candidates': 3})
    """
    values = np.asarray(scores, dtype=np.float64)
    if len(values) != len(answers) or not len(answers) or not np.isfinite(values).all():
        counts = f"{format_count(len(answers), 'answer')} and {format_count(len(values), 'score')}"
        msg = f"example '{example.id}': {counts}; give one finite score for each answer"
        raise DataError(msg)
    best, worst = int(values.argmax()), int(values.argmin())
    if values[best] == values[worst] or answers[best].strip() == answers[worst].strip():
        return None
    about = {"chosen_score": float(values[best]), "rejected_score": float(values[worst]), "candidates": len(answers)}
    more = {} if provenance is None else dict(provenance)
    return PreferencePair.of(example, answers[best], answers[worst], source=source, provenance={**about, **more})
