"""What changes across training: answers, probes, heads, verdicts and alignment of several checkpoints on the same questions.

The survey of Shu et al. (arXiv 2501.01346, section 3.2.2) names knowledge that is forgotten between pretraining and fine-tuning
as a cause of misalignment. So questions that a checkpoint answered, and a later one does not, are listed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from activation_store import trace
from concepts.image_captions import caption_images
from concepts.schema import ConceptDataset
from diagnosis.compare_models import KINDS, profile_model
from diagnosis.comparison import ModelComparison, ModelProfile, compare_profiles
from groundscope.core.errors import DataError, GroundscopeError
from groundscope.core.text import format_count
from lvlm import Lvlm, load_lvlm
from probes.alignment import measure_layers

if TYPE_CHECKING:
    import pandas as pd

MEASURES = ("cosine", "cka", "mutual_knn")
"""Measures of alignment of images with their captions."""
COLUMNS = ("checkpoint", "part", "measure", "value", "n")


@dataclass(frozen=True, eq=False)
class TrainingCourse:
    """Several checkpoints on the same questions; returned by `compare_checkpoints` and `course_of_profiles`.

    Examples
    --------
    >>> from behavior import Answer, BehaviorResult, Cost
    >>> from diagnosis import ModelProfile, course_of_profiles
    >>> def profile(name: str, said: str) -> ModelProfile:
    ...     about = ("image", "neutral", "object", "existence", "Is there an apple?", "yes", ("yes", "no"))
    ...     return ModelProfile(name, BehaviorResult((Answer("q", *about, said, said == "yes"),), Cost(None, None, 1)))
    >>> course = course_of_profiles([profile("a", "yes"), profile("b", "yes"), profile("c", "no")])
    >>> course.forgotten()[["id", "course", "last_right"]].values.tolist()
    [['q', 'right right wrong', 'b']]
    """

    names: tuple[str, ...]
    """Checkpoints, in the order of training."""
    values: pd.DataFrame
    """One row per checkpoint and value: ``checkpoint``, ``part`` (answers, probes, heads, verdicts, alignment), ``measure``,
    ``value``, ``n``."""
    questions: pd.DataFrame
    """One row per question: ``id``, ``group``, ``level``, ``kind``, ``split``, ``question``, and ``course``, a word for each
    checkpoint: right or wrong."""
    comparisons: tuple[ModelComparison, ...]
    """Each checkpoint against the one before, with intervals."""
    notes: tuple[str, ...] = ()
    """What could not be measured, with the reason."""

    def frame(self) -> pd.DataFrame:
        """Return one row per part and measure, and one column per checkpoint."""
        table: Any = self.values.pivot_table(
            index=["part", "measure"], columns="checkpoint", values="value", sort=False
        )
        return table.reindex(columns=list(self.names)).reset_index().rename_axis(columns=None)

    def forgotten(self) -> pd.DataFrame:
        """Return the questions that the last checkpoint answers wrongly and an earlier one rightly, with ``last_right``."""
        words = self.questions["course"].str.split(" ")
        rows: Any = self.questions[[w[-1] == "wrong" and "right" in w for w in words]].copy()
        rows["last_right"] = [self.names[len(w) - 1 - w[::-1].index("right")] for w in rows["course"].str.split(" ")]
        return rows.reset_index(drop=True)

    def text(self) -> str:
        """Return the course of accuracy, and how many questions were learned and forgotten, in a few lines."""
        rows: Any = self.values[(self.values["part"] == "answers") & (self.values["measure"] == "all: right")]
        line = " -> ".join(f"{r['checkpoint']} {100 * r['value']:.1f} %" for r in rows.to_dict("records"))
        forgotten = self.forgotten()
        counts = ", ".join(f"{level} {count}" for level, count in forgotten["level"].value_counts().items())
        lines = [
            f"right answers: {line}",
            f"once right and now wrong: {format_count(len(forgotten), 'question')} ({counts or 'none'})",
        ]
        return "\n".join(
            [*lines, *(c.text() for c in self.comparisons), *(f"not measured: {note}" for note in self.notes)]
        )


def compare_checkpoints(
    checkpoints: Mapping[str, Lvlm | str | Path],
    data: ConceptDataset,
    *,
    kinds: Sequence[str] = KINDS,
    pairs: int = 60,
    seed: int = 0,
    progress: bool | None = None,
) -> TrainingCourse:
    """Ask the checkpoints of a training the same questions, and compare each with the one before.

    Models that are given by name or folder are loaded one after the other, so that one is in memory at a time.

    Parameters
    ----------
    checkpoints
        Name to model, or to what `lvlm.load_lvlm` loads, in the order of training; at least two.
    data
        Questions with candidate answers, and images whose captions are known (`concepts.caption_images`) for alignment.
    kinds, pairs, seed, progress
        As for `compare_models`.

    Raises
    ------
    DataError
        If there are fewer than two checkpoints, or no question has candidate answers.

    Examples
    --------
    The last two stages of the embedded model's training:

    >>> import groundscope as gs
    >>> data = gs.scenes.dataset(20, splits=("neutral",)).where(level="object")
    >>> course = gs.compare_checkpoints({"tune": "tiny-unbiased", "prior": "tiny"}, data, kinds=(), progress=False)
    >>> course.names, course.frame().columns.tolist()
    (('tune', 'prior'), ['part', 'measure', 'tune', 'prior'])
    """
    _check(list(checkpoints))
    profiles: list[ModelProfile] = []
    aligned: dict[str, dict[str, tuple[float, int]]] = {}
    notes: list[str] = []
    for name, source in checkpoints.items():
        model = source if isinstance(source, Lvlm) else load_lvlm(str(source))
        profile = profile_model(model, data, kinds=kinds, pairs=pairs, seed=seed, progress=progress)
        profiles.append(
            ModelProfile(name, profile.answers, profile.grids, profile.heads, profile.diagnoses, profile.provenance)
        )
        try:
            aligned[name] = _alignment(model, data, progress)
        except GroundscopeError as error:
            notes.append(f"alignment of {name}: {error}")
    return course_of_profiles(profiles, alignment=aligned, notes=notes, seed=seed)


def course_of_profiles(
    profiles: Sequence[ModelProfile],
    *,
    alignment: Mapping[str, Mapping[str, tuple[float, int]]] | None = None,
    notes: Sequence[str] = (),
    seed: int = 0,
) -> TrainingCourse:
    """Return the course of profiles of the same questions, in the order of training.

    Parameters
    ----------
    profiles
        At least two, of different names (`profile_model`).
    alignment
        By checkpoint: measure to its value at the best layer, and the number of images.
    notes
        What could not be measured.
    seed
        Of the bootstrap of head scores.

    Raises
    ------
    DataError
        If there are fewer than two profiles, names repeat, or they answered different questions.

    Examples
    --------
    >>> from behavior import BehaviorResult, Cost
    >>> from diagnosis import ModelProfile, course_of_profiles
    >>> empty = BehaviorResult((), Cost(None, None, 0))
    >>> course_of_profiles([ModelProfile("a", empty)])
    Traceback (most recent call last):
    groundscope.core.errors.DataError: a course needs at least 2 checkpoints, got 1: a
    """
    import pandas as pd

    names = [p.name for p in profiles]
    _check(names)
    comparisons = tuple(compare_profiles(a, b, seed=seed) for a, b in pairwise(profiles))
    rows = [row for p in profiles for row in _values(p, (alignment or {}).get(p.name, {}))]
    for comparison in comparisons:
        for row in comparison.ranking.to_dict("records"):
            value = row["rank_correlation"]
            measure = f"{row['kind']}: rank correlation with the checkpoint before"
            rows.append((comparison.second, "heads", measure, value, row["shared_groups"]))
    right = [{a.id: bool(a.correct) for a in p.answers.answers if a.correct is not None} for p in profiles]
    questions = [
        {
            "id": a.id, "group": a.group, "level": a.level, "kind": a.kind, "split": a.split, "question": a.question,
            "course": " ".join("right" if of[a.id] else "wrong" for of in right),
        }
        for a in profiles[0].answers.answers
        if all(a.id in of for of in right)
    ]  # fmt: skip
    columns = ["id", "group", "level", "kind", "split", "question", "course"]
    return TrainingCourse(
        tuple(names),
        pd.DataFrame(rows, columns=list(COLUMNS)),
        pd.DataFrame(questions, columns=columns).astype({"course": str}),
        comparisons,
        tuple(notes),
    )


def _check(names: Sequence[str]) -> None:
    repeated = next((n for n in names if list(names).count(n) > 1), None)
    if len(names) < 2 or repeated is not None:
        problem = (
            f"'{repeated}' is named twice"
            if repeated is not None
            else f"got {len(names)}: {', '.join(names) or 'none'}"
        )
        msg = f"a course needs at least 2 checkpoints, {problem}"
        raise DataError(msg)


def _values(
    profile: ModelProfile, aligned: Mapping[str, tuple[float, int]]
) -> Iterator[tuple[str, str, str, float, int]]:
    """Yield checkpoint, part, measure, value and n."""
    answers = [a for a in profile.answers.answers if a.correct is not None]
    for name, of in [
        ("all", answers),
        *((v, [a for a in answers if a.level == v]) for v in dict.fromkeys(a.level for a in answers)),
    ]:
        if of:
            yield profile.name, "answers", f"{name}: right", float(np.mean([bool(a.correct) for a in of])), len(of)
    for grid_name, grid in profile.grids.items():
        best = [grid.best(concept) for concept in grid.concepts if concept not in grid.numbers]
        if best:
            value = float(np.mean([cell.balanced_accuracy for cell in best]))
            yield (
                profile.name,
                "probes",
                f"{grid_name}: balanced accuracy, best cell, mean of concepts",
                value,
                len(best),
            )
    for kind, scores in profile.heads.items():
        head = scores.top(1)[0]
        yield (
            profile.name,
            "heads",
            f"{kind}: effect of the strongest head",
            float(scores.mean[head.layer, head.head]),
            len(scores.mean),
        )
    if profile.diagnoses is not None and len(profile.diagnoses.wrong):
        wrong = profile.diagnoses.wrong
        for verdict in dict.fromkeys(str(d.verdict) for d in wrong):
            share = float(np.mean([d.verdict == verdict for d in wrong]))
            yield profile.name, "verdicts", f"{verdict}: share of wrong answers", share, len(wrong)
    for measure, (value, n) in aligned.items():
        yield profile.name, "alignment", f"{measure}: best layer", value, n


def _alignment(model: Lvlm, data: ConceptDataset, progress: bool | None) -> dict[str, tuple[float, int]]:
    """Return each measure of images alone with captions alone at its best layer, and the number of images."""
    captions = caption_images(data)
    firsts = {e.group: e for e in reversed(captions.examples)}
    first = ConceptDataset(captions.name, tuple(e for e in captions if firsts[e.group] is e))
    options: dict[str, Any] = {"unembedding": False, "progress": progress}
    with tempfile.TemporaryDirectory() as folder:
        images = trace(model, first, ["resid_post"], ["image:mean"], Path(folder) / "images", input="image", **options)
        texts = trace(model, first, ["resid_post"], ["answer:mean"], Path(folder) / "texts", input="text", **options)
        k = min(10, max(1, len(first) // 4))
        scores = measure_layers(
            images, texts, text="answer:mean", measures=MEASURES, k=k, permutations=0, resamples=0, progress=False
        )
    table = scores.table()
    columns = zip(table["measure"].tolist(), table["value"].tolist(), strict=True)
    values: dict[str, list[float]] = {}
    for measure, value in columns:
        values.setdefault(str(measure), []).append(float(value))
    return {measure: (max(of_layers), len(first)) for measure, of_layers in values.items()}
