"""Read finished runs and compare them."""

from __future__ import annotations

from pathlib import Path

from behavior import BehaviorResult
from circuits import HeadScores
from diagnosis import Diagnoses, ModelComparison, ModelProfile, compare_profiles
from experiments.run.folder import file_digest
from groundscope.core.errors import ConfigError
from probes import ProbeGrid

DIAGNOSES = "diagnosis/diagnoses.json"


def compare_runs(
    first: str | Path, second: str | Path, *, conditions: tuple[str, str] = ("before", "before")
) -> ModelComparison:
    """Compare two finished run folders, or one run with itself under another condition.

    Parameters
    ----------
    first, second
        Folders of runs on the same test questions.
    conditions
        Conditions of the answers: ``before``, ``after`` (steered), a control such as ``random direction``, or ``twin``.
        Probes, heads and diagnoses are always those of the unsteered model.

    Raises
    ------
    ConfigError
        If a folder has no answers under a condition.
    DataError
        If the two answered different questions.
    """
    return compare_profiles(read_run(first, conditions[0]), read_run(second, conditions[1]))


def read_run(path: str | Path, condition: str = "before") -> ModelProfile:
    """Return the profile of a finished run; raises `ConfigError` if it has no answers under the condition."""
    root = Path(path)
    answers = root / "behavior" / f"{condition.replace(' ', '-')}.json"
    if not answers.is_file():
        stems = sorted(p.stem.replace("-", " ") for p in (root / "behavior").glob("*.json"))
        conditions = [name for name in stems if name not in {"rates", "changes", "stage"}]
        exists = (
            f"there are answers {', '.join(conditions)}; choose one of them, or add it to evaluate.conditions"
            if conditions
            else "it has no answers: finish the run first"
        )
        msg = f"no answers '{condition}' in the run folder '{root}': {exists}"
        raise ConfigError(msg)
    cards = sorted((root / "probes").glob("*/grid.json"))
    scores = sorted((root / "circuits").glob("*.safetensors"))
    diagnoses = root / DIAGNOSES
    used = [answers, *cards, *scores, *([diagnoses] if diagnoses.is_file() else [])]
    name = root.name if condition == "before" else f"{root.name} ({condition})"
    return ModelProfile(
        name,
        BehaviorResult.load(answers),
        {card.parent.name: ProbeGrid.load(card.parent) for card in cards},
        {file.stem: HeadScores.load(file) for file in scores},
        Diagnoses.load(diagnoses) if diagnoses.is_file() else None,
        {"folder": str(root), "files": {str(p.relative_to(root)): file_digest(p) for p in used}},
    )
