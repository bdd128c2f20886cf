"""Ask a local model the questions of a released benchmark: images and questions in, an answer file in the released layout out.

The answers are the texts that the model writes, because released rules read texts. They are recorded batch by batch next
to the answer file (``<answers>.asked.jsonl``): an interrupted call resumes, and a finished one is not repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, cast

from behavior.benchmarks.answer_journal import AnswerJournal
from behavior.benchmarks.image_cells import check_image_folder, read_images
from behavior.benchmarks.joining import check_unique
from behavior.benchmarks.questions import AnsweredQuestion, BenchmarkQuestion, BenchmarkScore
from behavior.benchmarks.record_files import write_lines
from behavior.benchmarks.registry import BENCHMARKS
from behavior.benchmarks.scoring import score_files
from behavior.benchmarks.specification import QUESTIONS, Benchmark
from behavior.result import Cost
from concepts.image_source import ImageSource, NoImage
from concepts.reading.image_folder import ImageFolder
from concepts.schema import ConceptDataset, Example
from groundscope.core.errors import ConfigError, DataError
from groundscope.core.locks import lock
from groundscope.core.progress import display
from groundscope.core.short_repr import short_repr

if TYPE_CHECKING:
    from concepts.concept import Level
    from lvlm.model import Lvlm
    from lvlm.sampling import Sampling

PROMPT = "Describe this image in detail."
"""Request for a description where a benchmark has no question text (CHAIR, CCEval, HaELM)."""
NEW_TOKENS: Mapping[str, int] = MappingProxyType(
    {"yes/no": 40, "choice": 40, "short answer": 40, "caption": 256, "judged": 256}
)
"""Largest number of generated tokens by kind of task."""
_BATCHES = 8
"""Batches between two entries of the journal."""
_ENDINGS = ("", ".jpg", ".png", ".jpeg")


class Correction(Protocol):
    """What a model may answer under: any `mitigation.Mitigation`."""

    @property
    def name(self) -> str:
        """Name for the provenance."""
        ...

    @property
    def parameters(self) -> Mapping[str, Any]:
        """JSON values that identify it."""
        ...

    def applied(self, model: Lvlm) -> AbstractContextManager[None]:
        """Return a context in which the model is corrected."""
        ...


@dataclass(frozen=True)
class AskedBenchmark:
    """The answers of a local model to a benchmark, in an answer file; returned by `ask`.

    Examples
    --------
    >>> from pathlib import Path
    >>> import groundscope as gs
    >>> from behavior.benchmarks import AskedBenchmark
    >>> AskedBenchmark("mme", Path("answers"), {}, (), gs.Cost(0.0, 0, 0), reused=0).reused
    0
    """

    benchmark: str
    path: Path
    """The answer file, or folder of answer files, in the benchmark's released layout."""
    files: Mapping[str, Path]
    answers: tuple[AnsweredQuestion, ...]
    cost: Cost
    """Of all answers, also those of earlier calls."""
    reused: int
    """Answers of earlier calls, which were not asked again."""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    __repr__ = short_repr

    @property
    def other_files(self) -> Mapping[str, Path]:
        """The files of the benchmark, without questions that the answer file repeats."""
        repeated = BENCHMARKS[self.benchmark].answers_hold_questions
        return {name: path for name, path in self.files.items() if not (repeated and name == QUESTIONS)}

    def score(
        self,
        *,
        verdicts: Path | str | None = None,
        variant: str | None = None,
        functions: Mapping[str, Callable[..., Any] | None] | None = None,
        by_place: bool = False,
    ) -> BenchmarkScore:
        """Score the answer file by the released rule (`score_files`), with the cost of the answers.

        Raises
        ------
        ConfigError, DataError
            As `score_files`.
        """
        score = score_files(
            self.benchmark,
            self.path,
            files=self.other_files,
            verdicts=verdicts,
            variant=variant,
            functions=functions,
            by_place=by_place,
        )
        answers = replace(score.answers, cost=self.cost, provenance={**score.answers.provenance, **self.provenance})
        return replace(score, answers=answers)


def benchmark_data(
    name: str,
    images: Path | str,
    files: Mapping[str, Path | str | None] | None = None,
    *,
    limit: int | None = None,
    prompt: str = PROMPT,
    suffix: str = "",
) -> ConceptDataset:
    r"""Load the questions and images of a benchmark as a dataset, for `ask`, probes or any other use.

    Parameters
    ----------
    name
        An entry of `BENCHMARKS`.
    images
        Folder of its images. The names of the question file are looked for with and without their folders, with the endings
        .jpg, .png and .jpeg, and COCO's numbers by COCO's file names. A question file that has its images inside (Parquet as on
        Hugging Face, or base64 in a table) is given here instead of a folder; its images are read into memory.
    files
        The benchmark's files by name (``BENCHMARKS[name].files``); for MME, ``questions`` is the folder of the release.
    limit
        Largest number of questions of each kind, extended to all questions about the last image; the first ones are used.
    prompt
        Request for a description where the benchmark has no question text.
    suffix
        Text after each question (`Example.suffix`); empty: the released question alone.

    Returns
    -------
    ConceptDataset
        One example for each question, with the benchmark's id; its level is None where the benchmark has no level, and its image
        `NoImage` where the question has no image. Questions whose true answer is not one of their candidates are open.

    Raises
    ------
    ConfigError
        For an unknown benchmark or file name, or a limit below 1.
    DataError
        Names the file and record: for a missing file, other content, or an image that is missing or unreadable.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import groundscope as gs
    >>> folder = Path(tempfile.mkdtemp())
    >>> gs.scenes.dataset(10)[0].image.load().save(folder / "a.png")
    >>> lines = ["a.png\tIs the sum 3?\tYes", "a.png\tIs the sum 4?\tNo"]
    >>> _ = (folder / "numerical_calculation.txt").write_text("\n".join(lines))
    >>> data = gs.behavior.benchmarks.benchmark_data("mme", folder, {"questions": folder})
    >>> data[0].level is None, data[0].kind
    (True, 'numerical_calculation')
    """
    benchmark = BENCHMARKS[name]
    paths = benchmark.check_files(files or {})
    return _dataset(name, _questions(benchmark, paths, Path(images), limit), Path(images), prompt=prompt, suffix=suffix)


def ask(
    model: Lvlm,
    name: str,
    answers: Path | str,
    images: Path | str,
    files: Mapping[str, Path | str | None] | None = None,
    *,
    mitigation: Correction | None = None,
    limit: int | None = None,
    prompt: str = PROMPT,
    suffix: str = "",
    max_new_tokens: int | None = None,
    sampling: Sampling | None = None,
    batch_size: int = 32,
    progress: bool | None = None,
) -> AskedBenchmark:
    r"""Ask a local model the questions of a released benchmark, and write its answers in the released layout.

    Parameters
    ----------
    model
        The model; it generates every answer.
    name
        An entry of `BENCHMARKS`.
    answers
        The answer file to write; for MME a folder. Next to it, ``<name>.asked.jsonl`` records each answer when it is written:
        a call with the same model, questions and settings asks only what is missing there.
    images, files, limit, prompt, suffix
        As for `benchmark_data`.
    mitigation
        A `mitigation.Mitigation` under which the model answers; None for the model alone.
    max_new_tokens
        Largest number of generated tokens; None for `NEW_TOKENS` of the kind of task.
    sampling
        How tokens are drawn; None takes the most likely token.
    batch_size
        Number of questions per forward pass.
    progress
        Whether to show a progress bar; None shows it on a terminal.

    Raises
    ------
    ConfigError, DataError
        As `benchmark_data`; also if the journal has answers of another model, other questions or other settings, or another
        process is writing it.
    ModelError
        If the mitigation cannot be applied, or the logits are not finite.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import groundscope as gs
    >>> folder = Path(tempfile.mkdtemp())
    >>> gs.scenes.dataset(10)[0].image.load().save(folder / "a.png")
    >>> lines = ["a.png\tIs there a dog in the image?\tYes", "a.png\tIs there a cat in the image?\tNo"]
    >>> _ = (folder / "existence.txt").write_text("\n".join(lines))
    >>> asked = gs.behavior.benchmarks.ask(
    ...     gs.load_lvlm("tiny"), "mme", folder / "answers", folder, {"questions": folder / "existence.txt"}
    ... )
    >>> asked.score().figures["perception"].n, asked.reused
    (1, 0)
    """
    from lvlm.active_interventions import intervention_record

    benchmark = BENCHMARKS[name]
    if batch_size < 1 or (max_new_tokens is not None and max_new_tokens < 1):
        msg = f"batch_size={batch_size}, max_new_tokens={max_new_tokens}: both must be at least 1"
        raise ConfigError(msg)
    paths, path = benchmark.check_files(files or {}), Path(answers)
    questions = _questions(benchmark, paths, Path(images), limit)
    data = _dataset(name, questions, Path(images), prompt=prompt, suffix=suffix)
    tokens = {q.id: max_new_tokens or NEW_TOKENS[q.task] for q in questions}
    identity = {
        "model": [model.config_hash, model.weights_hash],
        "data": data.digest,
        "mitigation": None if mitigation is None else [mitigation.name, dict(mitigation.parameters)],
        "interventions": intervention_record(model.hf),
        "max_new_tokens": max_new_tokens or dict(NEW_TOKENS),
        "sampling": None if sampling is None else vars(sampling),
    }
    stem = path.stem if path.suffix in {".json", ".jsonl"} else path.name
    journal_path = path.with_name(f"{stem}.asked.jsonl")
    refuse = f"'{journal_path}' is being written by another process; wait until it ends, or choose another answer file"
    with lock(path.with_name(f".{stem}.asked.lock"), refuse=lambda _: refuse, transient=True):
        journal = AnswerJournal.resume(journal_path, identity)
        reused = len(journal.texts)
        context = nullcontext() if mitigation is None else mitigation.applied(model)
        with context:
            _ask_missing(model, data, tokens, journal, batch_size, sampling, progress)
        rows = tuple(AnsweredQuestion(q, journal.texts[q.id], q.where) for q in questions)
        path.parent.mkdir(parents=True, exist_ok=True)
        (benchmark.write or _writer(benchmark))(rows, path)
    provenance = {
        "model": model.name,
        "config_hash": model.config_hash,
        "weights_hash": model.weights_hash,
        "data_digest": data.digest,
        "mitigation": identity["mitigation"],
        **({"limit": limit} if limit is not None else {}),
    }
    cost = Cost(journal.seconds, journal.forwards, len(rows))
    return AskedBenchmark(name, path, paths, rows, cost, reused, provenance)


def _questions(
    benchmark: Benchmark, files: Mapping[str, Path], images: Path, limit: int | None
) -> tuple[BenchmarkQuestion, ...]:
    if limit is not None and limit < 1:
        msg = f"limit={limit}: must be at least 1"
        raise ConfigError(msg)
    check_image_folder(images, files)
    if QUESTIONS in benchmark.files and QUESTIONS not in files:
        msg = f"{benchmark.title}: to ask a model, give the file '{QUESTIONS}': {benchmark.files[QUESTIONS]}"
        raise DataError(msg)
    read = benchmark.read(files) if benchmark.to_ask is None else benchmark.to_ask(files, images)
    questions = check_unique(tuple(read))
    if limit is None:
        return questions
    counts: dict[tuple[str, str], int] = {}
    last: dict[tuple[str, str], str] = {}
    chosen = []
    for question in questions:
        key = question.kind, question.split
        if counts.get(key, 0) < limit or last.get(key) == question.group:
            counts[key] = counts.get(key, 0) + 1
            last[key] = question.group
            chosen.append(question)
    return tuple(chosen)


def _dataset(
    name: str, questions: Sequence[BenchmarkQuestion], images: Path, *, prompt: str, suffix: str
) -> ConceptDataset:
    find, check = _image_finder(questions, images)
    present = BENCHMARKS[name].present
    examples = []
    for q in questions:
        image = find(q)
        text = q.text
        if present is not None and not isinstance(image, NoImage):
            image, text = present(q, image)
        examples.append(
            Example(
                id=q.id,
                image=image,
                question=text.strip() or prompt,
                answer=q.answer,
                candidates=q.candidates if q.answer in q.candidates else (),
                level=cast("Level | None", q.level or None),
                kind=q.kind or q.task,
                split=q.split,
                group=q.group,
                suffix=suffix,
            )
        )
    check()
    return ConceptDataset(name, tuple(examples), {"loader": "benchmark", "benchmark": name, "kept": len(examples)})


def _image_finder(
    questions: Sequence[BenchmarkQuestion], images: Path
) -> tuple[Callable[[BenchmarkQuestion], ImageSource], Callable[[], None]]:
    """Return the function that finds the image of a question, and the one that checks all images that were found."""
    if images.is_dir():
        folder = ImageFolder(images)

        def in_folder(question: BenchmarkQuestion) -> ImageSource:
            name = _image_name(folder, question.image)
            if question.image_cell is not None and not folder.has(name):
                file = question.image_cell.file
                msg = f"{question.where}: '{file}' has the images inside; give images={file} instead of the folder '{images}'"
                raise DataError(msg)
            return folder.find(name, question.where) if question.image else NoImage()

        return in_folder, folder.check
    contents = read_images(q.image_cell for q in questions if q.image_cell is not None)

    def in_file(question: BenchmarkQuestion) -> ImageSource:
        if question.image_cell is not None:
            return contents[question.image_cell]
        if question.image:
            msg = (
                f"{question.where}: the image '{question.image}' is not inside the file; give the folder of the images"
            )
            raise DataError(msg)
        return NoImage()

    return in_file, lambda: None


def _image_name(folder: ImageFolder, name: str) -> str:
    """Return the name under which a folder has an image; the name itself if it does not have it."""
    stems = [name, Path(name).name]
    if name.isdecimal():
        stems += [f"{int(name):012d}", f"COCO_val2014_{int(name):012d}"]
    names = (f"{stem}{ending}" for stem in stems for ending in _ENDINGS)
    return next((n for n in names if folder.has(n)), name)


def _ask_missing(
    model: Lvlm,
    data: ConceptDataset,
    tokens: Mapping[str, int],
    journal: AnswerJournal,
    batch_size: int,
    sampling: Sampling | None,
    progress: bool | None,
) -> None:
    """Generate the answers that the journal does not have, and add them to it."""
    from behavior.answering import answer

    with display(show=progress) as bar:
        task = bar.add_task(f"asking {data.name}", total=len(data), completed=len(journal.texts))
        for limit in dict.fromkeys(tokens.values()):
            missing = [e for e in data if tokens[e.id] == limit and e.id not in journal.texts]
            for start in range(0, len(missing), batch_size * _BATCHES):
                part = ConceptDataset(data.name, tuple(missing[start : start + batch_size * _BATCHES]))
                result = answer(
                    model,
                    part,
                    generate=True,
                    max_new_tokens=limit,
                    sampling=sampling,
                    batch_size=batch_size,
                    progress=False,
                )
                journal.add(result.texts, seconds=result.cost.seconds or 0.0, forwards=result.cost.forwards or 0)
                bar.advance(task, len(part))


def _writer(benchmark: Benchmark) -> Callable[[Sequence[AnsweredQuestion], Path], int]:
    layout = benchmark.answers

    def record(row: AnsweredQuestion) -> dict[str, Any]:
        q = row.question
        if benchmark.answers_hold_questions:
            return {**q.record, layout.text[0]: row.text}
        fields = {
            layout.ids[:1]: q.id,
            layout.question[:1]: q.text,
            layout.image[:1]: q.image,
            layout.text[:1]: row.text,
        }
        return {names[0]: value for names, value in fields.items() if names}

    return lambda rows, path: write_lines(path, map(record, rows))
