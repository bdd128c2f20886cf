"""Which claims about the default run hold for more than one seed.

The default run is made once for each seed (its scenes, test scenes, splits and the choice of answers are all drawn with that
seed), and each claim that the README and the guides make about it is checked on the files that the run writes. A claim repeats
where it holds for every seed. The controls of a correction are drawn once in a run, so that a sentence about one of them may
hold for one seed only.

``--part steering`` makes the stages that the claims about the correction need (examples, trace, patch, steer, evaluate) and
leaves out the claims about wrong answers. Runs that are finished are used again (``--folder``).

    python benchmarks/seeds.py [--quick] [--seeds 5] [--part all|steering] [--device cpu] [--folder PATH] [--save]
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.console import Console
from rich.table import Table

from circuits import HeadScores
from diagnosis import Diagnoses
from diagnosis.results import OVERRIDDEN, OVERRIDDEN_LATE, UNEXPLAINED
from experiments.cli.overrides import compose
from experiments.pipeline import execute

RESULTS = Path(__file__).parent / "results" / "seeds.json"
STEERING = ("examples", "trace", "patch", "steer", "evaluate")
PRIOR, FALSE_YES = "conflict: wrong by prior", "adversarial absent: says yes"
NEUTRAL, INVENTED = "neutral: right", "caption: invented of named (CHAIR_i)"
QUICK = ("data.n_images=60", "data.test_images=30", "patch.pairs=8", "steer.compare=false", "model.twin=null")


@dataclass(frozen=True)
class Outcome:
    """What one run found."""

    rates: Mapping[str, Mapping[str, Mapping[str, float]]]
    """Condition to measure to value, low and high."""
    changes: Mapping[str, Mapping[str, Mapping[str, float]]]
    """The same of paired differences to the answers before."""
    strongest: Mapping[str, tuple[str, float]]
    """Kind of pair to the head with the largest effect, and the effect."""
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
    """A sentence about the default run."""

    text: str
    holds: Callable[[Outcome], bool]
    figure: Callable[[Outcome], str]
    diagnosed: bool = False
    """Whether it is about wrong answers that were diagnosed."""


def _pair(measure: str, *conditions: str) -> Callable[[Outcome], str]:
    return lambda outcome: ", ".join(f"{outcome.rate(c, measure):.1f}" for c in conditions)


CLAIMS = {
    "fewer_by_prior": Claim(
        "the correction makes fewer errors by prior (interval of the paired change below 0)",
        lambda outcome: _lowered(outcome, PRIOR),
        _pair(PRIOR, "before", "after"),
    ),
    "fewer_false_yes": Claim(
        "it makes fewer false yes to absent companions",
        lambda outcome: _lowered(outcome, FALSE_YES),
        _pair(FALSE_YES, "before", "after"),
    ),
    "neutral_kept": Claim(
        "neutral questions lose at most 1.5 points",
        lambda outcome: outcome.rate("before", NEUTRAL) - outcome.rate("after", NEUTRAL) <= 1.5,
        _pair(NEUTRAL, "before", "after"),
    ),
    "captions_kept": Claim(
        "captions stay as they were (within the interval before)",
        lambda outcome: outcome.rates["after"][INVENTED]["value"] <= outcome.rates["before"][INVENTED]["high"],
        _pair(INVENTED, "before", "after"),
    ),
    "random_direction_does_less": Claim(
        "a random direction cuts less than half of what the correction cuts",
        lambda outcome: 2 * _cut(outcome, "random direction") < _cut(outcome, "after"),
        _pair(PRIOR, "before", "after", "random direction"),
    ),
    "other_heads_do_as_much": Claim(
        "the rule derived at other heads cuts at least as many errors by prior as at the selected heads",
        lambda outcome: _cut(outcome, "derived at other heads") >= _cut(outcome, "after"),
        _pair(PRIOR, "before", "after", "derived at other heads"),
    ),
    "heads_of_their_own": Claim(
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
        diagnosed=True,
    ),
    "few_unexplained": Claim(
        "fewer than a fifth of them are not readable or not explained",
        lambda outcome: _share(outcome, UNEXPLAINED) < 0.2,
        lambda outcome: f"{100 * _share(outcome, UNEXPLAINED):.0f} %",
        diagnosed=True,
    ),
}


def _cut(outcome: Outcome, condition: str) -> float:
    return outcome.rate("before", PRIOR) - outcome.rate(condition, PRIOR)


def run(seed: int, options: argparse.Namespace, root: Path) -> Outcome:
    """Make the run of a seed, and read what it wrote."""
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


def checked(outcomes: Mapping[int, Outcome]) -> dict[str, dict[str, Any]]:
    """Return for each claim the seeds for which it holds, and the figures of each."""
    figures: dict[str, dict[str, Any]] = {}
    for name, claim in CLAIMS.items():
        each = {}
        for seed, outcome in outcomes.items():
            if claim.diagnosed and outcome.diagnoses is None:
                continue
            try:
                each[seed] = (claim.holds(outcome), claim.figure(outcome))
            except KeyError as missing:  # a control or a kind of question that this run does not have
                each[seed] = (False, f"not measured: {missing}")
        if each:
            share = sum(holds for holds, _ in each.values()) / len(each)
            figures[name] = {
                "claim": claim.text, "value": share, "goal": "1 (every seed)", "holds": share == 1, "n": len(each),
                "by_seed": {str(seed): f"{'holds' if holds else 'fails'}: {text}" for seed, (holds, text) in each.items()},
            }  # fmt: skip
    return figures


def main() -> None:
    """Make the runs, print which claims repeat, and as the last line one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed and few scenes: whether it works, no figures")
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0")
    parser.add_argument("--part", choices=("all", "steering"), default="all", help="which stages to make")
    parser.add_argument("--device", default="cpu", help="where the model runs")
    parser.add_argument("--folder", type=Path, help="keep the runs there, and use finished ones again")
    parser.add_argument("--save", action="store_true", help="write the figures to benchmarks/results")
    options = parser.parse_args()
    if options.save and options.quick:
        parser.error("figures of few scenes are not saved: leave out --quick")
    console = Console()
    console.print("Compares what the README and the guides say of the default run with runs of other seeds.")
    outcomes: dict[int, Outcome] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for seed in range(1 if options.quick else options.seeds):
            outcomes[seed] = run(seed, options, options.folder or Path(temporary))
            console.print(f"seed {seed}: errors by prior {CLAIMS['fewer_by_prior'].figure(outcomes[seed])} %")
    figures = checked(outcomes)
    table = Table("claim", "holds for", *(f"seed {seed}" for seed in outcomes))
    for figure in figures.values():
        count = f"{round(figure['value'] * figure['n'])} of {figure['n']}"
        table.add_row(figure["claim"], count, *(figure["by_seed"].get(str(seed), "") for seed in outcomes))
    console.print(table)
    device = f"{options.device}, {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    outcome = {"benchmark": "seeds", "device": device, "figures": figures}
    if options.save:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(outcome, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
