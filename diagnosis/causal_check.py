"""Causal checks of a wrong answer: the components that favor it at the last token, and the changes that correct it.

A component is a head or an MLP. Its mean output is taken at the last token over right answers to questions of the same kind,
with equal weight for each answer; setting it to that mean is a mean ablation, as in `circuits.ablate`. A component that right
answers need would correct a wrong answer only by destroying the question; such components are excluded by their effect on
right answers. The offset is the common bias of all answers to questions of a kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from activation_store import ActivationStore
from circuits.execution.memory import batch_rows
from circuits.execution.patch_runner import PatchRunner
from circuits.execution.suffix_runner import Reader, Row
from circuits.interventions.intervention import Intervention, Replace
from concepts.schema import Example
from diagnosis.calibration import MIN_EXAMPLES
from diagnosis.claims import Claim
from diagnosis.results import Push
from lvlm.answer_keys import answer_key
from lvlm.encoding.encode import Encoding, Inputs
from lvlm.model import Lvlm
from lvlm.sites import Site

MAX_PARTS = 6
"""Largest number of components that are ablated together."""
MAX_HARM = 0.25
"""Largest share of right answers of the kind that the ablation of a component may turn wrong. Without the question, half of the
yes-no answers would be wrong; some right answers are right only because of the prior that makes others wrong."""
_MAX_PUSHES = 8
"""Largest number of components in a diagnosis."""
_BATCH = 16


@dataclass(frozen=True)
class Correction:
    """The components that favor one wrong answer, and the smallest change that corrects it."""

    log_odds: float
    pushes: tuple[Push, ...]
    corrected_by: tuple[str, ...]
    corrected_log_odds: float
    """Log-odds of the truth with `corrected_by` ablated and without `offset`; NaN if no change corrects the answer."""
    offset: float
    """Common bias of such answers to this one, in logits, if its removal is part of the correction; NaN otherwise."""


MeanOutputs = Mapping[str, Mapping[Site, np.ndarray]]
"""Kind of question to site to mean output ``[width]``."""
Run = Callable[[Sequence[Row]], np.ndarray]
"""Margins of the truth under each row of changes, ``[P, rows]``."""


def mean_outputs(model: Lvlm, store: ActivationStore, claims: Sequence[Claim], kinds: Sequence[str]) -> MeanOutputs:
    """Return the mean output of every layer's heads, and of its MLP if it is stored, over right answers of each kind."""
    components = ("z", "mlp_out") if store.has("decoder", "mlp_out", "last") else ("z",)
    sites = [
        model.head_site(layer) if component == "z" else Site("decoder", layer, component)  # pyright: ignore[reportArgumentType]
        for layer in range(model.n_layers)
        for component in components
    ]
    out: dict[str, dict[Site, np.ndarray]] = {}
    for kind in kinds:
        members: dict[str, list[int]] = {}
        for claim in claims:
            if claim.kind == kind and claim.right:
                members.setdefault(claim.truth, []).append(claim.row)
        if not members:
            continue
        rows = np.array([row for rows_of_truth in members.values() for row in rows_of_truth])
        weight = np.concatenate([np.full(len(part), 1 / len(part) / len(members)) for part in members.values()])
        out[kind] = {site: weight @ store.read(site, "last", examples=rows).astype(np.float64) for site in sites}
    return out


def answer_offsets(claims: Sequence[Claim], kinds: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the common bias to each answer, in logits, for kinds of question with two answers.

    The bias is the mean log-odds of one answer against the other over all questions, answered rightly or wrongly, with equal
    weight for both truths. A mean over right answers only would be truncated at 0, and undefined if a bias leaves no right
    answer of one truth. As for a component, an offset is excluded if its removal would turn too many right answers wrong.
    Contextual calibration removes the same prior (Zhao et al. 2021, arXiv 2102.09690), estimated there from inputs without
    content.
    """
    table = {}
    for kind in kinds:
        mine = [c for c in claims if c.kind == kind]
        answers = sorted({c.truth for c in mine} | {c.model_answer for c in mine})
        # A margin belongs to the truth; the sign converts those of the second answer to log-odds of the first.
        sides = [
            sign * np.array([c.margin for c in mine if c.truth == a]) for a, sign in zip(answers, (1, -1), strict=False)
        ]
        if len(answers) != 2 or min(len(x) for x in sides) < MIN_EXAMPLES:
            continue
        offset = float(sides[0].mean() + sides[1].mean()) / 2
        right = [side[sign * side > 0] for side, sign in zip(sides, (1, -1), strict=True)]
        broken = [(sign * (x - offset) <= 0).mean() for x, sign in zip(right, (1, -1), strict=True) if len(x)]
        if broken and np.mean(broken) <= MAX_HARM:
            table[kind] = {answers[0]: offset, answers[1]: -offset}
    return table


@torch.no_grad()
def find_corrections(
    model: Lvlm,
    examples: Sequence[Example],
    kinds: Sequence[str],
    means: MeanOutputs,
    right: Mapping[str, Sequence[Example]],
    offsets: Sequence[float],
) -> list[Correction | None]:
    """Find the smallest correction of each answer: removal of the offset, ablation of components, or both.

    The offset is tested first, because a bias of the output is not caused by a head or MLP. Every component is ablated alone,
    then the strongest together, adding one at a time; also with the offset, which counts as one component, if that needs
    fewer. Effects are measured on the log-odds of the truth against the best other answer.

    Parameters
    ----------
    examples, kinds
        Wrong answers and their kinds of question.
    means
        Result of `mean_outputs`.
    right
        Right answers of each kind, which show the other effects of a component; kinds without them get no components.
    offsets
        For each example the common bias to its answer, in logits (`answer_offsets`); 0 for no bias.

    Returns
    -------
    list
        One correction per example; None for a kind without right answers.
    """
    harmless = {kind: _harmless(model, part, means[kind]) for kind, part in right.items() if kind in means and part}
    corrections: list[Correction | None] = [None] * len(examples)
    for kind, usable in harmless.items():
        mine = [i for i, k in enumerate(kinds) if k == kind]
        for members, last, run in _runs(model, [examples[i] for i in mine]):
            parts = _parts(model, means[kind], last)
            names = list(parts)
            after = run([(), *parts.values()])
            plain, effects = after[:, 0], after[:, 1:] - after[:, :1]
            order = np.argsort(-effects, axis=1, kind="stable")
            joint: list[list[tuple[str, ...]]] = []
            for p, line in enumerate(order):
                strongest = [names[i] for i in line if effects[p, i] > 0 and names[i] in usable][:MAX_PARTS]
                joint.append([tuple(strongest[: n + 1]) for n in range(len(strongest))])
            combinations = list(dict.fromkeys(part for part_sets in joint for part in part_sets))
            joint_rows = [tuple(item for name in part_set for item in parts[name]) for part_set in combinations]
            both = run(joint_rows) if combinations else plain
            for p, k in enumerate(members):
                candidates = [((), float(plain[p]))]
                candidates += [(part_set, float(both[p, combinations.index(part_set)])) for part_set in joint[p]]
                smallest = _smallest_correction(candidates, offsets[mine[k]])
                favoring = [i for i in order[p] if effects[p, i] > 0 and names[i] in usable][:_MAX_PUSHES]
                pushes = tuple(Push(names[i], float(effects[p, i])) for i in favoring)
                corrections[mine[k]] = Correction(float(plain[p]), pushes, *smallest)
    return corrections


def _smallest_correction(
    candidates: Sequence[tuple[tuple[str, ...], float]], offset: float
) -> tuple[tuple[str, ...], float, float]:
    """Return the fewest components that correct an answer, the log-odds then, and the offset if it is removed too.

    Parameters
    ----------
    candidates
        Sets of components, smallest first, with the log-odds of the truth under the ablation of each.
    offset
        Common bias to the answer, in logits; counts as one component, and is preferred to one.
    """
    nan = float("nan")
    alone = next(((parts, value) for parts, value in candidates if parts and value > 0), None)
    jointly = (
        next(((parts, value + offset) for parts, value in candidates if value + offset > 0), None)
        if offset > 0
        else None
    )
    if jointly is not None and (alone is None or len(jointly[0]) + 1 <= len(alone[0])):
        return (*jointly, offset)
    return (*alone, nan) if alone is not None else ((), nan, nan)


def _harmless(model: Lvlm, right: Sequence[Example], means: Mapping[Site, np.ndarray]) -> frozenset[str]:
    """Return the components whose ablation leaves right answers right, with equal weight for each true answer."""
    shares: dict[str, list[np.ndarray]] = {}
    names: list[str] = []
    for members, last, run in _runs(model, right):
        parts = _parts(model, means, last)
        names = list(parts)
        for k, row in zip(members, run(list(parts.values())) <= 0, strict=True):
            shares.setdefault(right[k].answer, []).append(row)
    harm = np.mean([np.mean(rows, axis=0) for rows in shares.values()], axis=0)
    return frozenset(name for name, h in zip(names, harm, strict=True) if h <= MAX_HARM)


def _run_of(model: Lvlm, runner: PatchRunner, inputs: Inputs, last: int, read: Reader) -> Run:
    """Return a function that runs some examples with rows of changes at their last position."""
    recording = runner.record(inputs, last)

    def run(rows: Sequence[Row]) -> np.ndarray:
        plain = read(model.logits(inputs)[:, None, None])[:, 0]
        changes = [row for row in rows if row]
        results = iter(runner.run(recording, lambda: inputs, changes, read).unbind(1) if changes else ())
        return torch.stack([next(results) if row else plain for row in rows], 1).cpu().numpy()

    return run


def _runs(model: Lvlm, examples: Sequence[Example]) -> Iterator[tuple[list[int], int, Run]]:
    """Yield examples with common shape and candidates: their indices, their last position, and a function that runs changes."""
    runner = PatchRunner(model, check="every")
    for batch in model.batches(examples, batch_rows(model, examples, _BATCH, recorded=True)):
        alike: dict[tuple[str, ...], list[int]] = {}
        for k, number in enumerate(batch.index):
            alike.setdefault(examples[number].candidates, []).append(k)
        for members in alike.values():
            encodings = [batch.encodings[k] for k in members]
            inputs, last = model.collate(encodings), encodings[0].tokens.last
            yield (
                [batch.index[k] for k in members],
                last,
                _run_of(model, runner, inputs, last, _margins(model, encodings)),
            )


def _margins(model: Lvlm, encodings: Sequence[Encoding]) -> Reader:
    keys = [(answer_key(model, e.example), e.example.answer) for e in encodings]

    def read(logits: Tensor) -> Tensor:
        rows = logits[:, :, -1].float()
        return torch.stack([key.margin(row, answer) for (key, answer), row in zip(keys, rows, strict=True)])

    return read


def _parts(model: Lvlm, means: Mapping[Site, np.ndarray], last: int) -> dict[str, Row]:
    """Return the ablation of each head, and of each MLP with a mean output."""
    ablations: dict[str, Row] = {}
    for site, mean in means.items():
        value = torch.tensor(mean, dtype=torch.float32)
        if site.component != "z":
            ablations[f"L{site.layer}.mlp"] = (Intervention(site, Replace(value), (last,)),)
            continue
        for head in range(model.n_heads):
            own = value.unflatten(0, (model.n_heads, -1))[head]
            ablations[f"L{site.layer}.H{head}"] = (Intervention(site, Replace(own), (last,), head),)
    return ablations
