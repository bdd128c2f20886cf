"""Repeatability over seeds of the claims about the default run.

    python benchmarks/seeds.py [--quick] [--seeds 5] [--part all|steering] [--device cpu] [--folder PATH] [--save]

The default run is executed once for each seed, which determines its scenes, test scenes, splits and sampled answers. Each
claim that the README and the guides make about it is then checked in the files that the run writes. A figure is the share of
seeds for which a claim holds; the goal is 1. ``by_seed`` has the measured values. A run draws each control of a correction
only once, so a claim about a control may hold for a single seed by chance.

``--part steering`` runs only the stages that the claims about the correction need (examples, trace, patch, steer, evaluate)
and omits the claims about wrong answers. With ``--folder`` runs are saved, and finished ones are reused.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.table import Table

from benchmarks._harness import Figure, describe_device, finish, option_parser, progress, wide_console
from circuits import HeadScores
from diagnosis import Diagnoses
from diagnosis.results import OVERRIDDEN, OVERRIDDEN_LATE, UNEXPLAINED
from experiments.cli.overrides import compose
from experiments.pipeline import execute

STEERING = ("examples", "trace", "patch", "steer", "evaluate")
PRIOR, FALSE_YES = "conflict: wrong by prior", "adversarial absent: says yes"
NEUTRAL, INVENTED = "neutral: right", "caption: invented of named (CHAIR_i)"
QUICK = ("data.n_images=60", "data.test_images=30", "patch.pairs=8", "steer.compare=false", "model.twin=null")


@dataclass(frozen=True)
class Outcome:
    """Results of one run."""

    rates: Mapping[str, Mapping[str, Mapping[str, float]]]
    """Condition to metric to value, low and high."""
    changes: Mapping[str, Mapping[str, Mapping[str, float]]]
    """The same for paired differences from the answers without correction."""
    strongest: Mapping[str, tuple[str, float]]
    """Kind of pair to the head with the largest effect, and its effect."""
    diagnoses: Diagnoses | None

    def rate(self, condition: str, measure: str) -> float:
        """Return a rate, in percent."""
        return 100 * self.rates[condition][measure]["value"]


def _lowered(outcome: Outcome, measure: str) -> bool:
    return outcome.changes["after"][measure]["high"] < 0


def _share(outcome: Outcome, verdicts: tuple[str, ...]) -> float:
    wrong = outcome.diagnoses.wrong if outcome.diagnoses is not None else ()
    return sum(o.verdict in verdicts for o in wrong) / max(1, len(wrong))


@dataclass(frozen=True)
class Claim:
    """A claim about the default run, how it is checked, and the values it is about as text."""

    text: str
    holds: Callable[[Outcome], bool]
    values: Callable[[Outcome], str]
    needs_diagnoses: bool = False
    """Whether the claim is about diagnoses of wrong answers."""


def _pair(measure: str, *conditions: str) -> Callable[[Outcome], str]:
    return lambda outcome: ", ".join(f"{outcome.rate(c, measure):.1f}" for c in conditions)


CLAIMS = {
    "fewer_by_prior": Claim(
        "the correction makes fewer errors by prior (interval of the paired change below 0)",
        lambda outcome: _lowered(outcome, PRIOR),
        _pair(PRIOR, "before", "after"),
    ),
    "fewer_false_yes": Claim(
        "the correction makes fewer false yes to absent companions (interval below 0)",
        lambda outcome: _lowered(outcome, FALSE_YES),
        _pair(FALSE_YES, "before", "after"),
    ),
    "neutral_kept": Claim(
        "neutral questions lose at most 1.5 points",
        lambda outcome: outcome.rate("before", NEUTRAL) - outcome.rate("after", NEUTRAL) <= 1.5,
        _pair(NEUTRAL, "before", "after"),
    ),
    "captions_kept": Claim(
        "captions invent no more objects (within the interval without correction)",
        lambda outcome: outcome.rates["after"][INVENTED]["value"] <= outcome.rates["before"][INVENTED]["high"],
        _pair(INVENTED, "before", "after"),
    ),
    "random_direction_does_less": Claim(
        "a random direction removes less than half of the errors by prior that the correction removes",
        lambda outcome: 2 * _cut(outcome, "random direction") < _cut(outcome, "after"),
        _pair(PRIOR, "before", "after", "random direction"),
    ),
    "other_heads_do_as_much": Claim(
        "the method derived at other heads removes at least as many errors by prior as at the selected heads",
        lambda outcome: _cut(outcome, "derived at other heads") >= _cut(outcome, "after"),
        _pair(PRIOR, "before", "after", "derived at other heads"),
    ),
    "different_heads": Claim(
        "object, color and relation have different strongest heads",
        lambda outcome: len({head for head, _ in outcome.strongest.values()}) == len(outcome.strongest) >= 3,
        lambda outcome: ", ".join(
            f"{kind} {head} {100 * effect:.0f} %" for kind, (head, effect) in outcome.strongest.items()
        ),
    ),
    "mostly_overridden": Claim(
        "most wrong answers are overridden at the last token, by the prior or late",
        lambda outcome: _share(outcome, (OVERRIDDEN, OVERRIDDEN_LATE)) > 0.5,
        lambda outcome: (
            f"{100 * _share(outcome, (OVERRIDDEN,)):.0f} % by the prior, {100 * _share(outcome, (OVERRIDDEN_LATE,)):.0f} % late"
        ),
        needs_diagnoses=True,
    ),
    "few_unexplained": Claim(
        "fewer than a fifth of the wrong answers are not readable or not explained",
        lambda outcome: _share(outcome, UNEXPLAINED) < 0.2,
        lambda outcome: f"{100 * _share(outcome, UNEXPLAINED):.0f} %",
        needs_diagnoses=True,
    ),
}


def _cut(outcome: Outcome, condition: str) -> float:
    return outcome.rate("before", PRIOR) - outcome.rate(condition, PRIOR)


def run_seed(seed: int, options: argparse.Namespace, root: Path) -> Outcome:
    """Execute the run of a seed, or reuse it, and read its results."""
    stages = list(STEERING) if options.part == "steering" else [*STEERING, "probe", "diagnose"]
    about = [f"root={root}", f"name=seed-{seed}", f"stages=[{','.join(stages)}]", f"model.device={options.device}"]
    seeds = [f"data.seed={seed}", f"data.test_seed={seed + 1000}", f"probe.seed={seed}", f"diagnose.seed={seed}"]
    config, _ = compose([*about, *seeds, *(QUICK if options.quick else ())])
    folder = execute(config, Console(file=io.StringIO()))
    behavior = folder / "behavior"
    kinds = json.loads((folder / "circuits" / "top.json").read_text(encoding="utf-8"))["kinds"]
    strongest = {}
    for kind in kinds:
        scores = HeadScores.load(folder / "circuits" / f"{kind}.safetensors")
        head = scores.top(1)[0]
        strongest[kind] = (str(head), float(scores.mean[head.layer, head.head]))
    diagnoses_path = folder / "diagnosis" / "diagnoses.json"
    return Outcome(
        json.loads((behavior / "rates.json").read_text(encoding="utf-8")),
        json.loads((behavior / "changes.json").read_text(encoding="utf-8")),
        strongest,
        Diagnoses.load(diagnoses_path) if diagnoses_path.is_file() else None,
    )


def check_claims(outcomes: Mapping[int, Outcome]) -> dict[str, Figure]:
    """Return for each claim the share of seeds for which it holds, and its values for each seed."""
    figures: dict[str, Figure] = {}
    for name, claim in CLAIMS.items():
        each = {}
        for seed, outcome in outcomes.items():
            if claim.needs_diagnoses and outcome.diagnoses is None:
                continue
            try:
                each[seed] = (claim.holds(outcome), claim.values(outcome))
            except KeyError as missing:  # the run has no such control or kind of question
                each[seed] = (False, f"not measured: {missing}")
        if each:
            share = sum(holds for holds, _ in each.values()) / len(each)
            figures[name] = {
                "claim": claim.text, "value": share, "goal": "1 (every seed)", "holds": share == 1, "n": len(each),
                "by_seed": {str(seed): f"{'holds' if holds else 'fails'}: {text}" for seed, (holds, text) in each.items()},
            }  # fmt: skip
    return figures


def main() -> None:
    """Execute the runs, print for how many seeds each claim holds, and as the last line one JSON object."""
    parser = option_parser(__doc__, quick="one seed and few scenes: a test, not a measurement", save=True)
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, starting with 0")
    parser.add_argument("--part", choices=("all", "steering"), default="all", help="stages to run")
    parser.add_argument("--device", default="cpu", help="device of the model")
    parser.add_argument("--folder", type=Path, help="folder in which runs are saved, and finished runs are reused")
    options = parser.parse_args()
    if options.save and options.quick:
        parser.error("--save needs figures of a full run: leave out --quick")
    console = wide_console()
    console.print("Compares claims of the README and the guides about the default run with runs of several seeds.")
    outcomes: dict[int, Outcome] = {}
    count = 1 if options.quick else options.seeds
    with tempfile.TemporaryDirectory() as temporary, progress("seeds", count) as advance:
        for seed in range(count):
            outcomes[seed] = run_seed(seed, options, options.folder or Path(temporary))
            advance()
            console.print(f"seed {seed}: errors by prior {CLAIMS['fewer_by_prior'].values(outcomes[seed])} %")
    figures = check_claims(outcomes)
    table = Table("claim", "holds for", *(f"seed {seed}" for seed in outcomes))
    for entry in figures.values():
        seeds = f"{round(entry['value'] * entry['n'])} of {entry['n']}"
        table.add_row(entry["claim"], seeds, *(entry["by_seed"].get(str(seed), "") for seed in outcomes))
    console.print(table)
    finish("seeds", describe_device("torch", device=options.device), figures, save=options.save)


if __name__ == "__main__":
    main()
