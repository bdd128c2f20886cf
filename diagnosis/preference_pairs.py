"""Preference pairs from diagnoses: the true answer is chosen, the answer that overrode it is rejected."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from concepts.schema import Example
from diagnosis.results import OVERRIDDEN, OVERRIDDEN_LATE, VERDICTS, Diagnoses, Diagnosis
from groundscope.core.document_digest import value_digest
from groundscope.core.errors import ConfigError, DataError
from groundscope.core.text import nearest
from mitigation import PreferenceData, PreferencePair

OVERRIDES = (OVERRIDDEN, OVERRIDDEN_LATE)
"""Verdicts of answers whose truth is decodable at the last token: tuning need not teach the model to see anything."""
SOURCE = "diagnosis"


def preference_pairs(
    diagnoses: Diagnoses,
    data: Sequence[Example],
    *,
    verdicts: Sequence[str] | None = OVERRIDES,
    anchors: float = 0.0,
    seed: int = 0,
) -> PreferenceData:
    """Return a pair for each wrong answer with one of the verdicts: its truth is chosen, the model's answer rejected.

    Parameters
    ----------
    diagnoses
        Verdicts.
    data
        The diagnosed questions; others are ignored.
    verdicts
        Verdicts of the answers that are used; None for all wrong answers, also those whose truth the model does not see.
    anchors
        Pairs of right answers for each of these pairs: the model's right answer is chosen, and another candidate rejected (the
        prior's answer where the question has one). Without them, tuning can learn to avoid an answer wherever it occurs, because
        wrong answers are mostly of one kind, such as a false "yes". Fewer if there are not as many right answers.
    seed
        Seed of the choice of right answers and of their other candidates.

    Raises
    ------
    ConfigError
        For an unknown verdict, or a negative number of anchors.
    DataError
        If a diagnosed question is not in `data`, or no answer has one of the verdicts.

    Examples
    --------
    >>> import groundscope as gs
    >>> example = gs.scenes.dataset(10).where(split="conflict", kind="what_color")[0]
    >>> about = {name: getattr(example, name) for name in ("id", "group", "level", "split", "kind", "question")}
    >>> about["truth"] = example.answer
    >>> diagnosis = gs.Diagnosis(about, example.prior_answer, "", "overridden by the prior", 0.9)
    >>> data = gs.preference_pairs(gs.Diagnoses((diagnosis,), (), "m", "c", "w"), [example])
    >>> data[0].chosen == example.answer, data[0].rejected == example.prior_answer, data[0].provenance["verdict"]
    (True, True, 'overridden by the prior')
    """
    chosen_verdicts = VERDICTS if verdicts is None else tuple(verdicts)
    unknown = next((v for v in chosen_verdicts if v not in VERDICTS), None)
    if unknown is not None:
        msg = f"unknown verdict '{unknown}'; choose from {', '.join(VERDICTS)}{nearest(unknown, VERDICTS)}"
        raise ConfigError(msg)
    if not anchors >= 0:
        msg = f"anchors={anchors}; give a number of at least 0"
        raise ConfigError(msg)
    examples = {e.id: e for e in data}
    wrong = [d for d in diagnoses.wrong if d.verdict in chosen_verdicts]
    if not wrong:
        counts = ", ".join(f"{v} {n}" for v, n in Counter(str(d.verdict) for d in diagnoses.wrong).most_common())
        msg = (
            f"no wrong answer has the verdict {' or '.join(chosen_verdicts)}; there are: {counts or 'no wrong answers'}"
        )
        raise DataError(msg)
    pairs = [_pair(d, _example(d, examples), d.example["truth"], d.model_answer) for d in wrong]
    right = [d for d in diagnoses.examples if d.verdict is None and len(_example(d, examples).candidates) > 1]
    right.sort(key=lambda d: value_digest([d.example["id"], "anchor", seed]))
    used = right[: round(anchors * len(wrong))]
    for diagnosis in used:
        example = _example(diagnosis, examples)
        pairs.append(_pair(diagnosis, example, example.answer, _other_answer(example, seed)))
    provenance = {
        "maker": "preference_pairs",
        "model": diagnoses.model,
        "weights_hash": diagnoses.weights_hash,
        "verdicts": dict(Counter(str(d.verdict) for d in wrong)),
        "anchors": len(used),
        "seed": seed,
        "left_out": {"wrong answers with other verdicts": len(diagnoses.wrong) - len(wrong)},
    }
    return PreferenceData("diagnosed answers", tuple(pairs), provenance)


def _example(diagnosis: Diagnosis, examples: dict[str, Example]) -> Example:
    name = diagnosis.example["id"]
    example = examples.get(name)
    if example is None or example.question != diagnosis.example["question"]:
        problem = "is not among the data" if example is None else "is another question in the data"
        msg = f"the diagnosed question '{name}' {problem}; pass the data that were diagnosed"
        raise DataError(msg)
    return example


def _pair(diagnosis: Diagnosis, example: Example, chosen: str, rejected: str) -> PreferencePair:
    confidence = {} if diagnosis.verdict is None else {"confidence": round(diagnosis.confidence, 6)}
    about = {"verdict": diagnosis.verdict or "right", **confidence, "split": example.split, "kind": example.kind}
    return PreferencePair.of(example, chosen, rejected, source=SOURCE, provenance=about)


def _other_answer(example: Example, seed: int) -> str:
    """Return the prior's answer if it is wrong, otherwise a random wrong candidate."""
    if example.prior_answer in example.candidates and example.prior_answer != example.answer:
        return str(example.prior_answer)
    others = [c for c in example.candidates if c != example.answer]
    return others[int(value_digest([example.id, "other", seed])[:8], 16) % len(others)]
