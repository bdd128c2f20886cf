"""Shares that add up: complete the input step by step, and credit each step with the change of the log-odds.

With LO = log p(a) - log p(b) of two answers a and b:

    lean      = LO(blank image, neutral question)
    form      = LO(blank image, question about other nouns) - lean
    knowledge = LO(blank image, question) - LO(blank image, question about other nouns)
    image     = LO(image, question) - LO(blank image, question)

Each LO is a mean of log-odds (never of probabilities) over blank images, neutral questions and other nouns, so the sum is
LO(image, question) exactly. Neutral questions have no content, as in contextual calibration (Zhao et al. 2021, arXiv
2102.09690).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from circuits.input_attribution.results import SourceShares
from circuits.patching.sweep import side_by_side
from concepts.counterfactuals import EditedImage
from concepts.image_source import ImageSource, NoImage
from concepts.schema import Example
from groundscope.core.progress import progress_bar
from lvlm.answer_keys import AnswerKey, answer_key
from lvlm.encoding.encode import runs_without_image
from lvlm.finite_logits import check_finite
from lvlm.model import Lvlm

BLANKS = ("blank", "white")
"""Default blank images: the mean color of the image, and white."""
NEUTRAL_QUESTIONS = ("N/A", "Please answer.")
"""Default neutral questions."""
_CHUNK = 16
"""Number of examples whose runs are listed together."""


@dataclass(frozen=True, eq=False)
class _Run:
    """One input, and the candidate answers whose scores it gives."""

    id: Hashable
    example: Example
    key: AnswerKey


@dataclass(eq=False)
class _Scores:
    """Scores of the candidates ``[candidates]`` by run; equal inputs run once."""

    model: Lvlm
    batch_size: int
    values: dict[Hashable, np.ndarray] = field(default_factory=dict)
    pictures: dict[str, str] = field(default_factory=dict)
    """Digest of the pixels of a blank image by its identity: blank images of different images are often equal."""

    def identity(self, example: Example, key: AnswerKey) -> Hashable:
        """Return what decides the scores of an input."""
        picture = ""
        if example.images:
            source = example.image
            picture = source.identity
            if isinstance(source, EditedImage):
                if picture not in self.pictures:
                    image = source.load()
                    self.pictures[picture] = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
                picture = self.pictures[picture]
        return picture, example.request, example.question, example.prefix, example.system, key.tokens

    @torch.no_grad()
    def add(self, runs: Sequence[_Run]) -> None:
        """Run the inputs that have no scores yet."""
        new = list({run.id: run for run in runs if run.id not in self.values}.values())
        step = 4 * self.batch_size  # bounds the number of encoded images in memory
        for start in range(0, len(new), step):
            part = new[start : start + step]
            encodings = [self.model.encode(run.example) for run in part]
            for batch in side_by_side([e.shape for e in encodings], lambda _: self.batch_size):
                logits = self.model.logits(self.model.collate([encodings[i] for i in batch])).double().cpu()
                names = [f"example '{part[i].example.id}'" for i in batch]
                check_finite(logits.logsumexp(-1), names, self.model.name)
                for i, row in zip(batch, logits, strict=True):
                    self.values[part[i].id] = part[i].key.scores(row).numpy()


def split_by_completion(
    model: Lvlm,
    examples: Sequence[Example],
    matched: Mapping[str, Sequence[str]],
    *,
    of: str,
    of_prefix: bool,
    blanks: Sequence[str | ImageSource],
    neutral_questions: Sequence[str],
    batch_size: int,
    progress: bool | None,
) -> list[SourceShares]:
    """Return the shares of every example; `matched` has the questions, or prefixes, about other things by example id."""
    scores = _Scores(model, batch_size)
    without_image = runs_without_image(model)
    results: list[SourceShares] = []
    with progress_bar(progress) as bar:
        task = bar.add_task("splitting answers by source", total=len(examples))
        for start in range(0, len(examples), _CHUNK):
            chunk = examples[start : start + _CHUNK]
            tables = []
            for example in chunk:
                key = answer_key(model, example)
                inputs = _inputs(example, matched[example.id], of_prefix, blanks, neutral_questions)
                if without_image:
                    inputs["no image"] = [[replace(example, image=NoImage(), objects=(), subject=None, mentions=())]]
                tables.append(
                    {
                        name: [[_Run(scores.identity(e, key), e, key) for e in row] for row in rows]
                        for name, rows in inputs.items()
                    }
                )
            identities = set(scores.values)
            own_runs = []
            for table in tables:
                needed = {run.id: run for rows in table.values() for row in rows for run in row}
                own_runs.append([run for identity, run in needed.items() if identity not in identities])
                identities.update(needed)
            scores.add([run for runs in own_runs for run in runs])
            for example, table, runs in zip(chunk, tables, own_runs, strict=True):
                results.append(_shares(example, table, scores, of, matched[example.id], len(runs)))
            bar.advance(task, len(chunk))
    return results


def _inputs(
    example: Example,
    texts: Sequence[str],
    of_prefix: bool,
    blanks: Sequence[str | ImageSource],
    neutral_questions: Sequence[str],
) -> dict[str, list[list[Example]]]:
    """Return the inputs of one example; of `matched` and `neutral` one row for each blank image."""
    field_name = "prefix" if of_prefix else "question"
    plain = replace(example, mentions=(), objects=(), subject=None)
    empty = [replace(plain, image=EditedImage(example.image, b) if isinstance(b, str) else b) for b in blanks]
    changed = [[replace(e, **{field_name: text}) for text in texts] for e in empty]
    # After a prefix the neutral question is asked with the other prefixes, so that only the question differs from `matched`.
    neutral = [
        [replace(e, question=question) for question in neutral_questions for e in (row if of_prefix else row[:1])]
        for row in changed
    ]
    return {"own": [[plain]], "blank": [[e] for e in empty], "matched": changed, "neutral": neutral}


def _shares(
    example: Example,
    table: Mapping[str, list[list[_Run]]],
    scores: _Scores,
    of: str,
    texts: Sequence[str],
    forwards: int,
) -> SourceShares:
    key = table["own"][0][0].key
    own = scores.values[table["own"][0][0].id]
    said = key.candidates[int(own.argmax())]
    answer, rival = answers_of(key.candidates, own, example.answer, of)
    a, b = key.candidates.index(answer), key.candidates.index(rival)

    def odds(name: str) -> np.ndarray:
        return np.array([[scores.values[run.id][a] - scores.values[run.id][b] for run in row] for row in table[name]])

    about = {name: getattr(example, name) for name in ("id", "group", "level", "split", "kind", "question")}
    return SourceShares(
        example={**about, "truth": example.answer},
        answer=answer,
        rival=rival,
        said=said,
        log_odds=float(own[a] - own[b]),
        blank=odds("blank")[:, 0],
        matched=odds("matched"),
        neutral=odds("neutral"),
        no_image=float(odds("no image")[0, 0]) if "no image" in table else math.nan,
        matched_texts=tuple(texts),
        forwards=forwards,
    )


def answers_of(candidates: Sequence[str], scores: np.ndarray, truth: str, of: str) -> tuple[str, str]:
    """Return the answer whose log-odds are split, and its rival.

    Of a wrong answer, these are the true answer and the model's (in this order for ``of="true"``); of a right answer, that
    answer and the other candidate with the highest score.
    """
    order = [candidates[int(i)] for i in np.argsort(-scores, kind="stable")]
    said = order[0]
    if said == truth:
        return truth, order[1]
    return (truth, said) if of == "true" else (said, truth)
