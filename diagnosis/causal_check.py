"""What pushes an answer at the last token (a lean of all answers, heads and MLPs), and what undoes it.

The usual value of a part is the mean of its output at the last token over right answers to questions of the same kind, each
answer counting the same: what it puts out when nothing is known of which question this is (mean ablation towards a stated
distribution, as in `circuits.ablate`). A part that right answers need as well would undo a wrong one by breaking the question
itself; such parts are recognized by what they do to right answers, and left out.
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
from diagnosis.calibration import FEWEST
from diagnosis.claims import Claim
from diagnosis.results import Push
from lvlm.answer_keys import answer_key
from lvlm.encoding.encode import Encoding, Inputs
from lvlm.model import Lvlm
from lvlm.sites import Site

MOST = 6
"""Parts that are put to their usual values together at the most."""
HARM = 0.25
"""Share of right answers of the kind that a part may turn wrong and still be named; without the question half of yes and no
would be wrong, and some right answers are right by the very prior that makes others wrong."""
_SHOWN = 8
"""Parts that are kept in a diagnosis."""
_BATCH = 16


@dataclass(frozen=True)
class Undone:
    """What pushes one answer, and what undoes it."""

    log_odds: float
    pushes: tuple[Push, ...]
    undone_by: tuple[str, ...]
    undone: float
    """Log-odds with `undone_by` at their usual values and without `lean`; NaN where that does not undo the answer."""
    lean: float
    """What all such answers lean to the one given, where taking it away helps to undo it; NaN elsewhere."""


Usual = Mapping[str, Mapping[Site, np.ndarray]]
"""Kind of question to site to mean ``[width]``."""
Run = Callable[[Sequence[Row]], np.ndarray]
"""Margins of the truth with some rows changed, ``[P, rows]``."""


def usual_values(model: Lvlm, store: ActivationStore, claims: Sequence[Claim], kinds: Sequence[str]) -> Usual:
    """Return the mean output of every layer's heads, and MLPs where they are stored, over right answers of some kinds."""
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
        rows = np.array([r for some in members.values() for r in some])
        weight = np.concatenate([np.full(len(some), 1 / len(some) / len(members)) for some in members.values()])
        out[kind] = {site: weight @ store.read(site, "last", examples=rows).astype(np.float64) for site in sites}
    return out


def leans(claims: Sequence[Claim], kinds: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return for kinds of question with two answers by how many logits all answers lean to each of them, whatever is asked.

    The mean log-odds of one answer against the other over all questions, right or wrong, those of both truths counting the
    same: means over right answers alone are cut off at 0, and do not exist where a bias leaves no answer of one truth right. As
    a part, a lean is left out where taking it away would turn too many right answers wrong. It is the prior that contextual
    calibration takes away (Zhao et al. 2021, arXiv 2102.09690), there estimated from inputs without content.
    """
    table = {}
    for kind in kinds:
        mine = [c for c in claims if c.kind == kind]
        answers = sorted({c.truth for c in mine} | {c.said for c in mine})
        # Margins are of the truth: the sign turns those of the second answer into log-odds of the first.
        sides = [
            sign * np.array([c.margin for c in mine if c.truth == a]) for a, sign in zip(answers, (1, -1), strict=False)
        ]
        if len(answers) != 2 or min(len(x) for x in sides) < FEWEST:
            continue
        lean = float(sides[0].mean() + sides[1].mean()) / 2
        right = [side[sign * side > 0] for side, sign in zip(sides, (1, -1), strict=True)]
        broken = [(sign * (x - lean) <= 0).mean() for x, sign in zip(right, (1, -1), strict=True) if len(x)]
        if broken and np.mean(broken) <= HARM:
            table[kind] = {answers[0]: lean, answers[1]: -lean}
    return table


@torch.no_grad()
def undo(
    model: Lvlm,
    examples: Sequence[Example],
    kinds: Sequence[str],
    usual: Usual,
    right: Mapping[str, Sequence[Example]],
    leaning: Sequence[float],
) -> list[Undone | None]:
    """Find what undoes each answer: the lean of all such answers, or parts at their usual values, or both.

    The lean is tried first: a bias of the output is not the doing of any head or MLP. Each part is put to its usual value by
    itself, then the strongest together, one more at a time; with the lean as well where that takes fewer, the lean counting as
    one part. Effects are on the log-odds of the truth against the best other answer.

    Parameters
    ----------
    examples, kinds
        Wrong answers and their kinds of question.
    usual
        Of `usual_values`.
    right
        Right answers of each kind, which show what else a part does; kinds without any get no parts named.
    leaning
        For each example by how many logits all answers to such questions lean to the one given (`leans`); 0 for none.

    Returns
    -------
    list
        None for examples of a kind without right answers.
    """
    harmless = {kind: _harmless(model, some, usual[kind]) for kind, some in right.items() if kind in usual and some}
    found: list[Undone | None] = [None] * len(examples)
    for kind, usable in harmless.items():
        mine = [i for i, k in enumerate(kinds) if k == kind]
        for members, last, run in _runs(model, [examples[i] for i in mine]):
            parts = _parts(model, usual[kind], last)
            names = list(parts)
            after = run([(), *parts.values()])
            plain, effects = after[:, 0], after[:, 1:] - after[:, :1]
            order = np.argsort(-effects, axis=1, kind="stable")
            joint: list[list[tuple[str, ...]]] = []
            for p, line in enumerate(order):
                strongest = [names[i] for i in line if effects[p, i] > 0 and names[i] in usable][:MOST]
                joint.append([tuple(strongest[: n + 1]) for n in range(len(strongest))])
            wanted = list(dict.fromkeys(part for some in joint for part in some))
            both = run([tuple(item for name in some for item in parts[name]) for some in wanted]) if wanted else plain
            for p, k in enumerate(members):
                tried = [((), float(plain[p]))]
                tried += [(some, float(both[p, wanted.index(some)])) for some in joint[p]]
                enough = _fewest(tried, leaning[mine[k]])
                pushing = [i for i in order[p] if effects[p, i] > 0 and names[i] in usable][:_SHOWN]
                pushes = tuple(Push(names[i], float(effects[p, i])) for i in pushing)
                found[mine[k]] = Undone(float(plain[p]), pushes, *enough)
    return found


def _fewest(tried: Sequence[tuple[tuple[str, ...], float]], lean: float) -> tuple[tuple[str, ...], float, float]:
    """Return the fewest parts that undo an answer, its log-odds then, and the lean where that is one of them.

    Parameters
    ----------
    tried
        Parts, fewest first, with the log-odds of the truth under each set.
    lean
        To the answer given, in logits; counts as one part, and goes before a part.
    """
    nan = float("nan")
    alone = next(((parts, value) for parts, value in tried if parts and value > 0), None)
    jointly = next(((parts, value + lean) for parts, value in tried if value + lean > 0), None) if lean > 0 else None
    if jointly is not None and (alone is None or len(jointly[0]) + 1 <= len(alone[0])):
        return (*jointly, lean)
    return (*alone, nan) if alone is not None else ((), nan, nan)


def _harmless(model: Lvlm, right: Sequence[Example], usual: Mapping[Site, np.ndarray]) -> frozenset[str]:
    """Return the parts whose usual values leave right answers right, each true answer counting the same."""
    shares: dict[str, list[np.ndarray]] = {}
    names: list[str] = []
    for members, last, run in _runs(model, right):
        parts = _parts(model, usual, last)
        names = list(parts)
        for k, row in zip(members, run(list(parts.values())) <= 0, strict=True):
            shares.setdefault(right[k].answer, []).append(row)
    harm = np.mean([np.mean(rows, axis=0) for rows in shares.values()], axis=0)
    return frozenset(name for name, h in zip(names, harm, strict=True) if h <= HARM)


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
    """Yield examples that share shape and candidates: their numbers, their last position, and how to run changes of them."""
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
    asked = [(answer_key(model, e.example), e.example.answer) for e in encodings]

    def read(logits: Tensor) -> Tensor:
        rows = logits[:, :, -1].float()
        return torch.stack([key.margin(row, answer) for (key, answer), row in zip(asked, rows, strict=True)])

    return read


def _parts(model: Lvlm, usual: Mapping[Site, np.ndarray], last: int) -> dict[str, Row]:
    """Return for each head, and each MLP that is known, the change that puts it to its usual value."""
    made: dict[str, Row] = {}
    for site, mean in usual.items():
        value = torch.tensor(mean, dtype=torch.float32)
        if site.component != "z":
            made[f"L{site.layer}.mlp"] = (Intervention(site, Replace(value), (last,)),)
            continue
        for head in range(model.n_heads):
            own = value.unflatten(0, (model.n_heads, -1))[head]
            made[f"L{site.layer}.H{head}"] = (Intervention(site, Replace(own), (last,), head),)
    return made
