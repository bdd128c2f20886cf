"""Why an answer is wrong: where on its way through the model the truth is still known, and what turned the answer.

The image passes through four stages: the vision tower, the projector, the decoder's image tokens, and the last token, where
the answer is read. At each, probes say how strongly the truth is read against the answer given. The verdict is where that
ends; causal checks say what ended it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from activation_store import ActivationStore, ConceptDirection
from circuits import input_attribution
from circuits.execution.memory import batch_rows
from circuits.patching.activation import check_evaluating
from concepts.counterfactuals import EditedImage
from concepts.schema import Example
from diagnosis.calibration import Calibration, calibrate
from diagnosis.causal_check import Undone, leans, undo, usual_values
from diagnosis.checks import check_known, check_sites, check_store
from diagnosis.claims import Claim, claims_of, opposites_of, values_seen
from diagnosis.narrative import in_words
from diagnosis.probe_sets import EVERY, ProbeSet, check_origin, probe_sets
from diagnosis.readings import Margins, read_live, read_stored, read_tokens
from diagnosis.results import OTHER, STAGES, Diagnoses, Diagnosis, Place, Reading
from diagnosis.verdicts import (
    OwnExamples,
    belief,
    judge,
    own_examples,
    place_of_concept,
    stage_state,
    state_of,
    suggests,
)
from groundscope.core.errors import DataError
from groundscope.core.progress import progress_bar
from lvlm.answer_keys import answer_key
from lvlm.finite_logits import check_finite
from lvlm.model import Lvlm

CALIBRATE = 150
"""Held-out examples of a kind whose image tokens are read from the model; a store keeps one vector an example."""
PARTS = ("image", "prompt", "prior", "log_odds")
"""What is kept of an answer's sources."""
CHECKED = 32
"""Right answers of a kind on which it is seen what a part does beside."""


def diagnose(
    model: Lvlm,
    store: ActivationStore,
    directions: Sequence[ConceptDirection],
    answers: Sequence[Example],
    *,
    with_sources: bool = True,
    compared: Collection[str] = (),
    seed: int = 0,
    progress: bool | None = None,
) -> Diagnoses:
    """Say of each wrong answer whether the truth was not seen, lost, not integrated or overridden, with the evidence.

    ``not seen``
        the vision tower's probe of this concept reads another answer, or is at chance with so narrow an interval that the
        tower does not carry the concept, and no probe after it reads the truth;
    ``lost at the projector``
        the tower reads it, the projector and all after it do not;
    ``not integrated``
        it is read at the image's tokens, at the last token never;
    ``overridden by the prior``
        the last token reads it at some layer, the model answers otherwise, and taking away what all answers to such questions
        lean to, or putting a few named heads or MLPs to their usual values at the last token, undoes that (parts that right
        answers need as well do not count); and there is evidence of a prior: the answer about a blank picture is the same,
        and where sources are split, prior and prompt speak for it more than the image does;
    ``overridden late``
        the same without evidence of a prior;
    ``not readable``
        the stage that decides has no probe of this concept, or only one whose interval says nothing;
    ``other``
        anything else, with the reason.

    A place is read where its held-out accuracy is above chance; its log-odds are calibrated on the held-out examples of
    the same kind of question, and its threshold is such that 1 in 20 right answers falls beyond it on the wrong side. What is
    read at a later stage was there at every one before it, so a stage that no probe reads although a later one does is a
    blind spot of its probes and says nothing. Probes that are shown to be at chance at a stage, where none after it reads the
    concept, say that it is not there: the probes are fitted on the model that is diagnosed. Stages that no probe reads are
    named in every verdict (`Diagnosis.unread`).

    Parameters
    ----------
    model
        In evaluation mode.
    store
        Of this model, with the sites of the directions and ``decoder.z`` at ``last`` (and ``mlp_out``, where MLPs are to be
        named). What the model answered is read from it.
    directions
        Probes, with the groups they were fitted to: attributes at ``object:mean``, nouns at ``image:mean`` or, read at each
        of the image's tokens, at ``image:all``; at ``last`` ``<level>:named`` for yes-no questions and the answers' concepts
        for others. Relations are read from where the two objects' nouns are found.
    answers
        Examples of the store. Right ones get no verdict and help to calibrate.
    with_sources
        Also split each wrong answer's log-odds into image, prompt and prior (`circuits.input_attribution.attribute`).
    compared
        Ids of right answers whose log-odds are split too, to compare those of wrong ones with.
    seed
        Decides which neutral questions are asked, and which right answers calibrate where there are many.
    progress
        Show progress; by default where standard error is a terminal.

    Raises
    ------
    StoreError
        For a store of another model.
    SiteError
        For sites that the store lacks: it names them and the command that traces them.
    ProbeError
        For no directions, directions of another model, or two for the same.
    DataError
        For answers that are not in the store, or right ones to compare with that are no answers.
    PatchError
        For a model in training mode.
    """
    check_evaluating(model)
    check_store(model, store)
    check_origin(model, store, directions)
    sets = probe_sets(directions)
    check_sites(store, sets)
    claims = {c.id: c for c in claims_of(store, opposites_of(answers, store.labels)) if c is not None}
    check_known(answers, claims)
    asked = {e.id: e for e in answers}
    if unknown := next((name for name in compared if name not in asked), None):
        msg = f"'{unknown}' is to be compared, but is none of the answers"
        raise DataError(msg)
    wrong = [e for e in answers if not claims[e.id].right]
    kinds = list(dict.fromkeys(claims[e.id].kind for e in wrong))
    steps = 4 + int(with_sources)
    with progress_bar(progress) as bar:
        task = bar.add_task("diagnosing", total=steps)
        live = _pictures(sets, claims, asked, wrong, seed)
        tokens = read_tokens(model, sets, live)
        bar.advance(task)
        margins = {
            id(s): read_live(tokens, s, [claims[e.id] for e in live], asked)
            if s.tokens == EVERY
            else read_stored(store, s, [c for c in claims.values() if c.kind in kinds])
            for s in sets
        }
        by_row = {c.row: c for c in claims.values()}
        found = {kind: _stages(kind, sets, margins, by_row) for kind in kinds}
        bar.advance(task)
        usual = usual_values(model, store, list(claims.values()), kinds)
        by_kind = leans(list(claims.values()), kinds)
        leaning = [by_kind.get(claims[e.id].kind, {}).get(claims[e.id].said, 0.0) for e in wrong]
        right = _right(answers, claims, kinds, seed)
        undone = undo(model, wrong, [claims[e.id].kind for e in wrong], usual, right, leaning)
        bar.advance(task)
        blind = _without_image(model, wrong)
        bar.advance(task)
        split = [*wrong, *(asked[name] for name in compared if claims[name].right)]
        shares = _sources(model, store, claims, split, seed) if with_sources else {}
    made, seen = [], values_seen(answers)
    each = dict(zip([e.id for e in wrong], zip(undone, blind, leaning, strict=True), strict=True))
    for example in answers:
        claim = claims[example.id]
        about = Diagnosis(_about(example), claim.said, claim.asked, None, math.nan)
        if example.id in each:
            change, said, lean = each[example.id]
            if change is None and claim.margin + lean > 0:  # no right answer shows what a part does; a lean needs none
                change = Undone(claim.margin, (), (), claim.margin + lean, lean)
            shows, says, fact = in_words(claim, example, seen)
            about = replace(about, shows=shows, says=says, fact=fact)
            about = replace(about, without_image=said, sources=shares.get(example.id, {}))
            about = _judged(about, claim, found[claim.kind], change)
        made.append(replace(about, sources=shares.get(example.id, {})))
    places = tuple(place for stages in found.values() for place in stages.places)
    digest = hashlib.sha256(
        b"".join(d.vector.tobytes() + f"{d.site}|{d.tokens}|{d.concept}".encode() for d in directions)
    )
    about = {"store": store.digest, "directions": digest.hexdigest(), "seed": seed, "sources": with_sources}
    return Diagnoses(tuple(made), places, model.name, model.config_hash, model.weights_hash, about)


@dataclass(frozen=True, eq=False)
class _Stages:
    """All places for one kind of question: how each is calibrated, and what it says of each row."""

    sets: tuple[ProbeSet, ...]
    places: tuple[Place, ...]
    odds: tuple[Mapping[int, float], ...]
    """Of each place, row of the store to log-odds of the truth; rows of concepts without a probe there are missing."""
    own: tuple[Mapping[str, OwnExamples], ...]
    """Of each place, how well it reads the held-out examples of a concept."""
    trained: frozenset[str]
    """Groups that a probe was fitted to."""


def _stages(
    kind: str, sets: Sequence[ProbeSet], margins: Mapping[int, Margins], claims: Mapping[int, Claim]
) -> _Stages:
    places, odds, own, trained = [], [], [], set()
    mine = [s for s in sets if any(claims[r].kind == kind for r in margins[id(s)].rows)]
    # Probes fitted to just this kind of question leave out those fitted to any at the same place.
    special = {(s.site, s.tokens) for s in mine if s.kind}
    mine = [s for s in mine if s.kind or (s.site, s.tokens) not in special]
    for s in mine:
        read = margins[id(s)]
        at = [i for i, row in enumerate(read.rows) if claims[row].kind == kind]
        held = [i for i in at if claims[read.rows[i]].group not in s.train_groups]
        some = [claims[read.rows[i]] for i in held]
        fitted = calibrate(
            [read.values[i] for i in held],
            read.classes[held],
            [c.group for c in some],
            np.array([c.right for c in some], bool),
            sum(other.stage == s.stage for other in mine),
        )
        trained |= s.train_groups
        places.append((s, fitted))
        own.append(_by_concept(s, fitted, [read.values[i] for i in held], read.classes[held], some))
        odds.append({read.rows[i]: fitted.log_odds(float(read.values[i].mean()), read.classes[i]) for i in at})
    named = {c for claim in claims.values() if claim.kind == kind for c in (claim.concept, claim.named, *claim.rivals)}
    best = {}
    for stage in STAGES:
        there = [(s, f) for s, f in places if s.stage == stage]
        if there:
            nouns = tuple(named | {n for claim in claims.values() if claim.kind == kind for n in claim.nouns})
            best[stage] = max(there, key=lambda p: (p[1].readable, p[0].validation(nouns)))[0]
    return _Stages(
        tuple(s for s, _ in places),
        tuple(_place(kind, s, f, chosen=s.stage == "last" or best[s.stage] is s) for s, f in places),
        tuple(odds),
        tuple(own),
        frozenset(trained),
    )


def _by_concept(
    s: ProbeSet, fitted: Calibration, values: Sequence[np.ndarray], sides: np.ndarray, claims: Sequence[Claim]
) -> dict[str, OwnExamples]:
    """Count the held-out examples of each concept that is read at a place."""
    members: dict[str, list[int]] = {}
    for i, claim in enumerate(claims):
        members.setdefault(_read_as(s, claim), []).append(i)
    read = np.array([fitted.reads(v, side) for v, side in zip(values, sides, strict=True)])
    two = len(set(sides.tolist())) == 2
    return {
        concept: own_examples(read[at], sides[at], [claims[i].group for i in at], two=two)
        for concept, at in members.items()
    }


def _read_as(s: ProbeSet, claim: Claim) -> str:
    """Name what a claim is read by at a place; relations, which are read by pairs of nouns, are one."""
    concepts = s.concepts_for(claim)
    return "" if concepts == claim.nouns or not concepts else concepts[0]


def _place(kind: str, s: ProbeSet, f: Calibration, *, chosen: bool) -> Place:
    return Place(
        kind,
        s.stage,
        s.site,
        s.tokens,
        s.layer,
        f.n,
        f.accuracy,
        f.low,
        f.high,
        f.slope,
        f.threshold,
        f.readable,
        chosen,
    )


def _judged(about: Diagnosis, claim: Claim, stages: _Stages, change: Undone | None) -> Diagnosis:
    """Put the evidence together."""
    readings, read_by = [], []
    for s, place, odds, own in zip(stages.sets, stages.places, stages.odds, stages.own, strict=True):
        if claim.row not in odds:
            continue  # no probe of this concept
        here = place_of_concept(place, own.get(_read_as(s, claim), OwnExamples(0, math.nan, 0.0)))
        state = state_of(here or place, odds[claim.row])
        readings.append(Reading(place.stage, place.site, place.tokens, place.layer, *state))
        read_by += [here] if here is not None else []
    chosen = {(p.site, p.tokens) for p in stages.places if p.chosen}
    judged = [r for r in readings if (r.site, r.tokens) in chosen]
    states = {stage: stage_state([r.state for r in judged if r.stage == stage], read_by, stage) for stage in STAGES}
    sure = {stage: belief([r for r in judged if r.stage == stage], states[stage], read_by, stage) for stage in STAGES}
    flip = next((r.site for r in reversed(judged) if r.stage == "last" and r.state == "truth"), "")
    undone = change is not None and change.undone > 0
    prior = suggests(about.said, about.without_image, about.sources)
    verdict, confidence, reason = judge(states, sure, undone=undone, prior=prior)
    if claim.group in stages.trained:
        verdict, confidence = OTHER, 0.0
        reason = "probes were fitted to questions about this very image: fit them on other images"
    return replace(
        about,
        verdict=verdict,
        confidence=confidence,
        stages=states,
        reason=reason,
        readings=tuple(readings),
        flip=flip,
        pushes=change.pushes if change else (),
        undone_by=change.undone_by if change else (),
        log_odds=change.log_odds if change else math.nan,
        undone=change.undone if change else math.nan,
        lean=change.lean if change else math.nan,
    )


def _pictures(
    sets: Sequence[ProbeSet],
    claims: Mapping[str, Claim],
    asked: Mapping[str, Example],
    wrong: Sequence[Example],
    seed: int,
) -> list[Example]:
    """Return the examples whose image tokens are read: wrong ones, and of each kind as many others as calibrate."""
    sets = [s for s in sets if s.tokens == EVERY]
    if not sets:
        return []
    kinds = {claims[e.id].kind for e in wrong}
    trained = frozenset(g for s in sets for g in s.train_groups)
    chosen = [e for e in wrong if any(s.concepts_for(claims[e.id]) for s in sets)]
    for kind in sorted(kinds):
        free = [
            e
            for e in asked.values()
            if claims[e.id].kind == kind
            and claims[e.id].right
            and claims[e.id].group not in trained
            and any(s.concepts_for(claims[e.id]) for s in sets)
        ]
        order = np.random.default_rng(seed).permutation(len(free))[:CALIBRATE]
        chosen += [free[int(i)] for i in sorted(order)]
    return chosen


def _right(
    answers: Sequence[Example], claims: Mapping[str, Claim], kinds: Sequence[str], seed: int
) -> dict[str, list[Example]]:
    """Return some right answers of each kind, as many of each true answer as there are."""
    rng = np.random.default_rng(seed)
    out: dict[str, list[Example]] = {}
    for kind in kinds:
        by_truth: dict[str, list[Example]] = {}
        for example in answers:
            if claims[example.id].kind == kind and claims[example.id].right:
                by_truth.setdefault(example.answer, []).append(example)
        each = max(1, CHECKED // max(1, len(by_truth)))
        out[kind] = [some[int(i)] for some in by_truth.values() for i in rng.permutation(len(some))[:each]]
    return out


@torch.no_grad()
def _without_image(model: Lvlm, examples: Sequence[Example]) -> list[str]:
    """Return what the model says to each question about a blank picture."""
    out = [""] * len(examples)
    blank = [replace(e, image=EditedImage(e.image, "blank")) for e in examples]
    for batch in model.batches(blank, batch_rows(model, blank, 32)):
        for number, encoding, row in zip(batch.index, batch.encodings, model.logits(batch.inputs), strict=True):
            key = answer_key(model, encoding.example)
            check_finite(
                row.float().logsumexp(-1)[None], [f"example '{encoding.example.id}' without its image"], model.name
            )
            out[number] = key.candidates[int(key.scores(row.float()).argmax())]
    return out


def _sources(
    model: Lvlm, store: ActivationStore, claims: Mapping[str, Claim], examples: Sequence[Example], seed: int
) -> dict[str, dict[str, float]]:
    """Split answers by source; neutral questions are others of the same kind and length in the store."""
    questions, length = store.columns["question"], store.columns["n_tokens"]
    pools: dict[tuple[str, float], list[str]] = {}
    for claim in claims.values():
        pool = pools.setdefault((claim.kind, float(length[claim.row])), [])
        if questions[claim.row] not in pool:
            pool.append(str(questions[claim.row]))
    neutral: dict[str, list[str]] = {}
    for i, example in enumerate(examples):
        claim = claims[example.id]
        others = [q for q in pools[claim.kind, float(length[claim.row])] if q != example.question]
        order = np.random.Generator(np.random.PCG64([seed, i])).permutation(len(others))
        neutral[example.id] = [others[k] for k in order[: input_attribution.NEUTRAL_QUESTIONS]]
    possible = [e for e in examples if neutral[e.id]]
    if not possible or model.encoder_decoder:
        return {}
    size = batch_rows(model, possible, 64)
    found = input_attribution.split(model, possible, neutral_questions=neutral, batch_size=size, progress=False)
    return {one.example["id"]: {name: getattr(one, name) for name in PARTS} for one in found.examples}


def _about(example: Example) -> dict[str, str]:
    named = {name: str(getattr(example, name)) for name in ("id", "group", "level", "split", "kind", "question")}
    return named | {"truth": example.answer}
