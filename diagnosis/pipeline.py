"""Diagnose wrong answers: the stage at which the truth is no longer decodable, and the components that override it.

The image passes the vision tower, the projector, the image tokens of the decoder, and the last token, at which the answer is
computed. At each stage, probes measure how strongly the truth is decodable relative to the model's answer. Causal checks find
the components that turn the answer at the last token.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from activation_store import ActivationStore, ConceptDirection
from circuits import input_attribution
from circuits.execution.memory import batch_rows
from circuits.patching.activation import check_evaluating
from concepts.counterfactuals import EditedImage
from concepts.schema import Example, require_one_image
from diagnosis.calibration import Calibration, calibrate
from diagnosis.causal_check import Correction, answer_offsets, find_corrections, mean_outputs
from diagnosis.checks import check_known, check_sites, check_store
from diagnosis.claims import Claim, attribute_kinds, claims_of, opposites_of
from diagnosis.fit import DirectionSet
from diagnosis.narrative import describe_claim
from diagnosis.probe_sets import ProbeSet, check_origin, probe_sets
from diagnosis.readings import Margins, read_live, read_stored, read_tokens
from diagnosis.results import OTHER, SOURCES, STAGES, Diagnoses, Diagnosis, Place, Reading
from diagnosis.verdicts import (
    ConceptAccuracy,
    belief,
    concept_accuracy,
    judge,
    place_of_concept,
    prior_suggests,
    stage_state,
    state_of,
)
from groundscope.core.errors import DataError
from groundscope.core.progress import progress_bar
from groundscope.core.text import nearest
from lvlm.answer_keys import answer_key
from lvlm.finite_logits import check_finite
from lvlm.model import Lvlm
from lvlm.token_selection import ALL_IMAGE_TOKENS, IMAGE_MEAN

MAX_CALIBRATION = 150
"""Largest number of right answers, and of further wrong ones, per kind whose image tokens are read from the model for
calibration, because a store has one vector per example."""
_NUMBERS = (*SOURCES, "log_odds", "no_image", "noun_spread")
"""Fields of an answer's sources in a diagnosis, next to ``blank_spread``."""
MAX_CHECKED = 32
"""Largest number of right answers per kind on which other effects of a component are measured."""


def diagnose(
    model: Lvlm,
    store: ActivationStore,
    directions: Sequence[ConceptDirection],
    answers: Sequence[Example],
    *,
    with_sources: bool = True,
    compare_ids: Collection[str] = (),
    calibrate_on: Sequence[Example] = (),
    seed: int = 0,
    progress: bool | None = None,
) -> Diagnoses:
    """Diagnose each wrong answer: not seen, lost at the projector, not integrated, or overridden, with the evidence.

    ``not seen``
        The probe of the concept at the vision tower decodes another answer, or has chance accuracy with an interval so narrow
        that the tower does not encode the concept; and no later probe decodes the truth.
    ``lost at the projector``
        The truth is decodable in the vision tower, but not at the projector or any later stage.
    ``not integrated``
        The truth is decodable at the image tokens, but in no layer of the last token.
    ``overridden by the prior``
        The truth is decodable in some layer of the last token, and the model answers otherwise; removing the common offset of
        all answers to such questions, or setting a few named heads or MLPs to their mean output at the last token, corrects
        the answer (components that right answers need are excluded). The words alone are on the wrong side: the log-odds of the
        true answer against the model's, about blank images, are negative (``lean + form + knowledge``, the mean over the blank
        images of `circuits.input_attribution.split`; without sources, about the image's mean color), and more so than the image.
    ``overridden late``
        The same, but the words alone favor the true answer, or oppose it less than the image does.
    ``not readable``
        The deciding stage has no probe of the concept, or only one that shows neither its presence nor its absence. This is not
        "not seen": nothing is known about what the model encodes there.
    ``other``
        All other cases, with the reason.

    A place is readable if its held-out accuracy is above chance. Its log-odds are calibrated on held-out examples of the same
    kind of question; 1 in 20 right answers is beyond its threshold on the wrong side. What is decodable at a stage must have
    passed all earlier stages, so a stage without decodable truth before a stage with it is no evidence. Chance accuracy at a
    stage, with no later readable stage, is evidence of absence, because the probes are fitted on this model. Every verdict
    lists the stages without a readable probe (`Diagnosis.unread`).

    Parameters
    ----------
    model
        Model in evaluation mode.
    store
        Store of this model with the sites of the directions and ``decoder.z`` at ``last``, and with ``mlp_out`` if MLPs should
        be named. The model's answers are read from it.
    directions
        Directions with their training groups, such as those of `fit_directions`: attributes at ``object:mean``; nouns at
        ``image:mean``, or at ``image:all`` to read every image token; at ``last`` ``<level>:named`` for yes-no questions and
        the concepts of the answers for others. Relations are decoded from the image tokens of the two nouns. Without boxes,
        attributes and relations at ``image:all`` are read where the nouns of the question are. Directions may be fitted to
        another store of this model; answers about images that it has too (`DirectionSet.train_images`) get no verdict.
    answers
        Examples of the store. Right answers get no verdict and are used for calibration. Examples without candidate answers
        are left out; the provenance has their number.
    with_sources
        Whether to split the log-odds of the true answer against each wrong answer into lean, form, knowledge and image
        (`circuits.input_attribution.split`).
    compare_ids
        Ids of right answers whose log-odds are split too, against the strongest other answer.
    calibrate_on
        Further examples of the store on which readings at image tokens are calibrated: wrong answers that are not diagnosed. They
        get no verdict; with more of them, intervals are narrower and fewer verdicts are "not readable".
    seed
        Seed of the choice of other nouns in questions, and of right answers for calibration.
    progress
        Whether to show progress; by default on a terminal only.

    Raises
    ------
    StoreError
        For a store of another model.
    SiteError
        For sites that the store lacks; the message has the command that traces them.
    ProbeError
        For no directions, directions of another model, or two directions for the same concept and place.
    DataError
        For examples that are not in the store, or `compare_ids` that are not among the answers.
    PatchError
        For a model in training mode.

    Examples
    --------
    Trace, fit probes, and diagnose the answers about all other images:

    >>> import tempfile
    >>> from pathlib import Path
    >>> import groundscope as gs
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(60, splits=("neutral",)).where(level="object")
    >>> sites = ("vision.resid_post", "projector.out", "resid_post", "z")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = gs.trace(model, data, sites=sites, tokens=("last", "image:mean"), out=Path(folder) / "store")
    ...     directions = gs.fit_directions(store)
    ...     examples = [e for e in data if e.group not in directions.train_groups]
    ...     diagnoses = gs.diagnose(model, store, directions, examples, with_sources=False)
    >>> len(diagnoses) == len(examples)
    True
    >>> all(diagnosis.model_answer != diagnosis.example["truth"] for diagnosis in diagnoses.wrong)
    True
    """
    require_one_image([*answers, *calibrate_on], "the diagnosis")
    check_evaluating(model)
    check_store(model, store)
    check_origin(model, store, directions)
    sets = probe_sets(directions)
    check_sites(store, sets)
    open_ended = [e for e in answers if len(e.candidates) < 2]
    answers = [e for e in answers if len(e.candidates) > 1]
    concepts = dict.fromkeys(d.concept for d in directions)
    claims = {c.id: c for c in claims_of(store, opposites_of(answers, store.labels), concepts) if c is not None}
    calibrate_on = [e for e in calibrate_on if len(e.candidates) > 1]
    check_known([*answers, *calibrate_on], claims)
    example_of = {e.id: e for e in answers}
    if unknown := next((name for name in compare_ids if name not in example_of), None):
        msg = f"compare_ids: '{unknown}' is not among the answers{nearest(unknown, example_of)}"
        raise DataError(msg)
    wrong = [e for e in answers if not claims[e.id].right]
    kinds = list(dict.fromkeys(claims[e.id].kind for e in wrong))
    with progress_bar(progress) as bar:
        task = bar.add_task("diagnosing", total=4 + int(with_sources))
        live_of = {e.id: e for e in calibrate_on} | example_of
        live = _live_examples(sets, claims, live_of, wrong, seed)
        tokens = read_tokens(model, sets, live)
        bar.advance(task)
        margins = {
            id(s): read_live(tokens, s, [claims[e.id] for e in live], live_of)
            if s.tokens == ALL_IMAGE_TOKENS
            else read_stored(store, s, [c for c in claims.values() if c.kind in kinds])
            for s in sets
        }
        by_row = {c.row: c for c in claims.values()}
        trained = _trained_rows(store, directions)
        stages_of = {kind: _stages(kind, sets, margins, by_row, trained) for kind in kinds}
        bar.advance(task)
        means = mean_outputs(model, store, list(claims.values()), kinds)
        table = answer_offsets(list(claims.values()), kinds)
        offsets = [table.get(claims[e.id].kind, {}).get(claims[e.id].model_answer, 0.0) for e in wrong]
        right = _right_answers(answers, claims, kinds, seed)
        corrections = find_corrections(model, wrong, [claims[e.id].kind for e in wrong], means, right, offsets)
        bar.advance(task)
        blank_answers = _without_image(model, wrong, [claims[e.id].model_answer for e in wrong])
        bar.advance(task)
        attributed = [*wrong, *(example_of[name] for name in compare_ids if claims[name].right)]
        sources = _sources(model, attributed, answers, seed) if with_sources else {}
    kind_of_attribute = attribute_kinds(answers)
    evidence = dict(zip([e.id for e in wrong], zip(corrections, blank_answers, offsets, strict=True), strict=True))
    diagnoses = []
    for example in answers:
        claim = claims[example.id]
        diagnosis = Diagnosis(_about(example), claim.model_answer, claim.question_concept, None, math.nan)
        if example.id in evidence:
            correction, (blank_answer, blank_odds), offset = evidence[example.id]
            # An offset needs no right answers, which show the other effects of a component.
            if correction is None and claim.margin + offset > 0:
                correction = Correction(claim.margin, (), (), claim.margin + offset, offset)
            true_clause, answer_clause, attribute_clause = describe_claim(claim, example, kind_of_attribute)
            diagnosis = replace(
                diagnosis,
                true_clause=true_clause,
                answer_clause=answer_clause,
                attribute_clause=attribute_clause,
                without_image=blank_answer,
                sources=sources.get(example.id, {}),
            )
            diagnosis = _judge_answer(diagnosis, claim, stages_of[claim.kind], correction, blank_odds, store.digest)
        diagnoses.append(replace(diagnosis, sources=sources.get(example.id, {})))
    places = tuple(place for stages in stages_of.values() for place in stages.places)
    digest = hashlib.sha256(
        b"".join(d.vector.tobytes() + f"{d.site}|{d.tokens}|{d.concept}".encode() for d in directions)
    )
    provenance = {"store": store.digest, "directions": digest.hexdigest(), "seed": seed, "sources": with_sources}
    if open_ended:
        provenance["without_answer"] = len(open_ended)
    return Diagnoses(tuple(diagnoses), places, model.name, model.config_hash, model.weights_hash, provenance)


@dataclass(frozen=True, eq=False)
class _Stages:
    """The places for one kind of question, with their calibration and their log-odds for each row."""

    sets: tuple[ProbeSet, ...]
    places: tuple[Place, ...]
    odds: tuple[Mapping[int, float], ...]
    """For each place, row of the store to log-odds of the truth; rows without a probe of their concept are missing."""
    by_concept: tuple[Mapping[str, ConceptAccuracy], ...]
    """For each place, the accuracy on the held-out examples of each concept."""
    train_groups: frozenset[str]
    """Groups that a probe was fitted to."""
    ranks: tuple[int, ...] = ()
    """For each place, its rank within its stage: the readable one with the best validation accuracy is 0."""
    trained: frozenset[int] = frozenset()
    """Rows about images that probes of another store were fitted to."""


def _trained_rows(store: ActivationStore, directions: Sequence[ConceptDirection]) -> frozenset[int]:
    """Return the rows whose image is among those that probes of another store were fitted to, whatever its group is called."""
    images = directions.train_images if isinstance(directions, DirectionSet) else frozenset()
    other = any(d.provenance.get("store", store.digest) != store.digest for d in directions)
    if not other or not images or "image" not in store.columns:
        return frozenset()
    return frozenset(i for i, digest in enumerate(store.columns["image"]) if str(digest) in images)


def _stages(
    kind: str,
    sets: Sequence[ProbeSet],
    margins: Mapping[int, Margins],
    claims: Mapping[int, Claim],
    trained: frozenset[int] = frozenset(),
) -> _Stages:
    """Calibrate every place for one kind of question, and choose one place per stage except at the last token."""
    places, odds, by_concept, train_groups = [], [], [], set()
    sets_of_kind = [s for s in sets if any(claims[r].kind == kind for r in margins[id(s)].rows)]
    # Probes fitted to this kind of question take precedence over those fitted to all questions at the same place.
    special = {(s.site, s.tokens) for s in sets_of_kind if s.kind}
    sets_of_kind = [s for s in sets_of_kind if s.kind or (s.site, s.tokens) not in special]
    for s in sets_of_kind:
        here = margins[id(s)]
        indices = [i for i, row in enumerate(here.rows) if claims[row].kind == kind]
        held_out = [
            i for i in indices if claims[here.rows[i]].group not in s.train_groups and here.rows[i] not in trained
        ]
        held_out_claims = [claims[here.rows[i]] for i in held_out]
        calibration = calibrate(
            [here.values[i] for i in held_out],
            here.classes[held_out],
            [c.group for c in held_out_claims],
            np.array([c.right for c in held_out_claims], bool),
            sum(other.stage == s.stage for other in sets_of_kind),
        )
        train_groups |= s.train_groups
        places.append((s, calibration))
        values = [here.values[i] for i in held_out]
        by_concept.append(_accuracy_by_concept(s, calibration, values, here.classes[held_out], held_out_claims))
        odds.append(
            {here.rows[i]: calibration.log_odds(float(here.values[i].mean()), here.classes[i]) for i in indices}
        )
    concepts = {
        c for claim in claims.values() if claim.kind == kind for c in (claim.concept, claim.named, *claim.rivals)
    }
    concepts |= {noun for claim in claims.values() if claim.kind == kind for noun in claim.nouns}
    ranks = [0] * len(places)
    for stage in STAGES:
        candidates = [i for i, (s, _) in enumerate(places) if s.stage == stage]
        quality = {
            # Among places at chance those come first that can show absence.
            i: (c.readable, c.readable or s.tokens != IMAGE_MEAN, s.validation(tuple(concepts)))
            for i, (s, c) in ((i, places[i]) for i in candidates)
        }
        for rank, i in enumerate(sorted(candidates, key=quality.__getitem__, reverse=True)):
            ranks[i] = rank
    return _Stages(
        tuple(s for s, _ in places),
        tuple(
            _place(kind, s, c, chosen=s.stage == "last" or not rank) for (s, c), rank in zip(places, ranks, strict=True)
        ),
        tuple(odds),
        tuple(by_concept),
        frozenset(train_groups),
        tuple(ranks),
        trained,
    )


def _accuracy_by_concept(
    s: ProbeSet, calibration: Calibration, values: Sequence[np.ndarray], classes: np.ndarray, claims: Sequence[Claim]
) -> dict[str, ConceptAccuracy]:
    """Return the accuracy on the held-out examples of each concept that is decoded at a place."""
    members: dict[str, list[int]] = {}
    for i, claim in enumerate(claims):
        members.setdefault(_decoded_concept(s, claim), []).append(i)
    shares = np.array([calibration.reads(v, c) for v, c in zip(values, classes, strict=True)])
    two = len(set(classes.tolist())) == 2
    return {
        concept: concept_accuracy(shares[at], classes[at], [claims[i].group for i in at], two=two)
        for concept, at in members.items()
    }


def _decoded_concept(s: ProbeSet, claim: Claim) -> str:
    """Return the concept that decides a claim at a place; relations, which are decided by two nouns, share one name."""
    concepts = s.concepts_for(claim)
    return "" if concepts == claim.nouns or not concepts else concepts[0]


def _place(kind: str, s: ProbeSet, c: Calibration, *, chosen: bool) -> Place:
    quality = (c.n, c.accuracy, c.low, c.high, c.slope, c.threshold, c.readable)
    return Place(kind, s.stage, s.site, s.tokens, s.layer, *quality, chosen)


def _judge_answer(
    diagnosis: Diagnosis,
    claim: Claim,
    stages: _Stages,
    correction: Correction | None,
    blank_odds: float = math.nan,
    store: str = "",
) -> Diagnosis:
    """Return a diagnosis with its verdict and the evidence.

    `blank_odds` are the log-odds of the truth against the model's answer about a blank image; `store` is the digest of the store.
    """
    places: dict[int, tuple[Place, Place | None]] = {}
    for i, (s, place, odds, by_concept) in enumerate(
        zip(stages.sets, stages.places, stages.odds, stages.by_concept, strict=True)
    ):
        if claim.row not in odds:
            continue  # no probe of this concept
        accuracy = by_concept.get(_decoded_concept(s, claim), ConceptAccuracy(0, math.nan, 0.0))
        here = place_of_concept(place, accuracy)
        if here is not None and not here.readable and not s.shows_absence(claim, store, readable=place.readable):
            here = None
        if here is not None and not here.readable:
            # Where only a share of the places is right, a concept that is always known is read in that share.
            here = replace(here, high=min(1.0, 0.5 + max(0.0, here.high - 0.5) / s.placed_share(claim)))
        places[i] = (place, here)
    # A place without a probe of this concept is replaced by the next best of its stage.
    ranks = stages.ranks or (0,) * len(stages.sets)
    used = {i for i, (place, _) in places.items() if place.stage == "last"}
    for stage in STAGES[:-1]:
        of_stage = [i for i, (place, _) in places.items() if place.stage == stage]
        used |= set(sorted(of_stage, key=ranks.__getitem__)[:1])
    readings = {}
    for i, (place, here) in places.items():
        state = state_of(here or replace(place, readable=False), stages.odds[i][claim.row])
        readings[i] = Reading(place.stage, place.site, place.tokens, place.layer, *state, used=i in used)
    evidence = [replace(here, chosen=i in used) for i, (_, here) in places.items() if here is not None]
    readings_of = {stage: [r for r in readings.values() if r.stage == stage and r.used] for stage in STAGES}
    states = {stage: stage_state([r.state for r in readings_of[stage]], evidence, stage) for stage in STAGES}
    beliefs = {stage: belief(readings_of[stage], states[stage], evidence, stage) for stage in STAGES}
    last_true_site = next((r.site for r in reversed(readings_of["last"]) if r.state == "truth"), "")
    corrected = correction is not None and correction.corrected_log_odds > 0
    words, log_odds = blank_odds, claim.margin
    if diagnosis.sources:
        words = sum(diagnosis.sources[name] for name in SOURCES if name != "image")
        log_odds = diagnosis.sources["log_odds"]
    prior = prior_suggests(words, log_odds)
    verdict, confidence, reason = judge(states, beliefs, corrected=corrected, prior=prior)
    if claim.group in stages.train_groups or claim.row in stages.trained:
        verdict, confidence = OTHER, 0.0
        reason = "probes were fitted to questions about this image; fit them on other images"
    diagnosis = replace(
        diagnosis,
        verdict=verdict,
        confidence=confidence,
        stages=states,
        reason=reason,
        readings=tuple(readings.values()),
        last_true_site=last_true_site,
    )
    if correction is None:
        return diagnosis
    return replace(
        diagnosis,
        pushes=correction.pushes,
        corrected_by=correction.corrected_by,
        log_odds=correction.log_odds,
        corrected_log_odds=correction.corrected_log_odds,
        offset=correction.offset,
    )


def _live_examples(
    sets: Sequence[ProbeSet],
    claims: Mapping[str, Claim],
    example_of: Mapping[str, Example],
    wrong: Sequence[Example],
    seed: int,
) -> list[Example]:
    """Return the examples whose image tokens are read: wrong answers, and others of each kind for calibration."""
    sets = [s for s in sets if s.tokens == ALL_IMAGE_TOKENS]
    if not sets:
        return []
    kinds = {claims[e.id].kind for e in wrong}
    train_groups = frozenset(g for s in sets for g in s.train_groups)
    chosen = [e for e in wrong if any(s.concepts_for(claims[e.id]) for s in sets)]
    diagnosed = {e.id for e in wrong}
    for kind in sorted(kinds):
        for right in (True, False):
            candidates = [
                e
                for e in example_of.values()
                if claims[e.id].kind == kind
                and claims[e.id].right == right
                and e.id not in diagnosed
                and claims[e.id].group not in train_groups
                and any(s.concepts_for(claims[e.id]) for s in sets)
            ]
            order = np.random.default_rng(seed).permutation(len(candidates))[:MAX_CALIBRATION]
            chosen += [candidates[int(i)] for i in sorted(order)]
    return chosen


def _right_answers(
    answers: Sequence[Example], claims: Mapping[str, Claim], kinds: Sequence[str], seed: int
) -> dict[str, list[Example]]:
    """Return a sample of right answers of each kind, balanced over the true answers."""
    rng = np.random.default_rng(seed)
    sample: dict[str, list[Example]] = {}
    for kind in kinds:
        by_truth: dict[str, list[Example]] = {}
        for example in answers:
            if claims[example.id].kind == kind and claims[example.id].right:
                by_truth.setdefault(example.answer, []).append(example)
        each = max(1, MAX_CHECKED // max(1, len(by_truth)))
        sample[kind] = [part[int(i)] for part in by_truth.values() for i in rng.permutation(len(part))[:each]]
    return sample


@torch.no_grad()
def _without_image(
    model: Lvlm, examples: Sequence[Example], model_answers: Sequence[str] | None = None
) -> list[tuple[str, float]]:
    """Return for each question about a blank image the model's answer, and the log-odds of the truth against `model_answers`."""
    answers = [("", math.nan)] * len(examples)
    blank = [replace(e, image=EditedImage(e.image, "blank")) for e in examples]
    for batch in model.batches(blank, batch_rows(model, blank, 32)):
        for number, encoding, row in zip(batch.index, batch.encodings, model.logits(batch.inputs), strict=True):
            key = answer_key(model, encoding.example)
            check_finite(
                row.float().logsumexp(-1)[None], [f"example '{encoding.example.id}' without its image"], model.name
            )
            scores = dict(zip(key.candidates, key.scores(row.double()).tolist(), strict=True))
            answer = max(scores, key=scores.__getitem__)
            rival = answer if model_answers is None else model_answers[number]
            answers[number] = answer, scores[encoding.example.answer] - scores[rival]
    return answers


def _sources(
    model: Lvlm, examples: Sequence[Example], among: Sequence[Example], seed: int
) -> dict[str, dict[str, float]]:
    """Split the log-odds of the true answers; answers without matched questions and prefixes are missing.

    The nouns of a question are replaced by those of the data. An answer after a prefix to a question that no other can replace,
    such as a word of a caption, is split with other prefixes of the same kind.
    """
    examples = [e for e in examples if len(e.candidates) > 1]
    questions = input_attribution.matched_questions(model, examples, among=among, seed=seed)
    after_prefix = [e for e in examples if e.id not in questions]
    prefixes = input_attribution.matched_prefixes(model, after_prefix, among=among, seed=seed)
    sources: dict[str, dict[str, float]] = {}
    for matched, texts in (("question", questions), ("prefix", prefixes)):
        possible = [e for e in examples if e.id in texts]
        if not possible:
            continue
        size = batch_rows(model, possible, 64)
        options: dict[str, Any] = {"matched": matched, "matched_texts": texts, "batch_size": size}
        for shares in input_attribution.split(model, possible, progress=False, **options).examples:
            values = {name: float(getattr(shares, name)) for name in _NUMBERS}
            spreads = {"blank_spread": float(shares.blank_spread["image"])}
            # A number that does not exist, such as the spread of one, is left out: files have no NaN there.
            sources[shares.example["id"]] = {k: v for k, v in (values | spreads).items() if math.isfinite(v)}
    return sources


def _about(example: Example) -> dict[str, str]:
    about = {name: str(getattr(example, name)) for name in ("id", "group", "level", "split", "kind", "question")}
    return about | {"truth": example.answer}
