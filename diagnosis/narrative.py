"""Explain a diagnosis in sentences, for readers who do not know the method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from concepts.nouns import absence_clause, be, existence_clause
from concepts.schema import Example
from lvlm.token_selection import ALL_IMAGE_TOKENS, IMAGE_MEAN

if TYPE_CHECKING:
    from diagnosis.claims import Claim
    from diagnosis.results import Diagnosis


_STAGE_NAMES = {
    "vision": "the vision tower",
    "projector": "the projector",
    "image": "the image's tokens",
    "last": "the last token",
}


def named_stages(stages: Sequence[str]) -> str:
    """Return the names of stages: ``the vision tower, the projector and the image's tokens``."""
    names = [_STAGE_NAMES[stage] for stage in stages]
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else ""


def explain(diagnosis: Diagnosis) -> str:
    """Return some sentences: what each stage shows, which components favor the answer, and the answer without the image."""
    answer = diagnosis.model_answer
    question = f"Asked '{diagnosis.example['question']}', the model says '{answer}'"
    if diagnosis.verdict is None:
        return f"{question}, which is right."
    attribute = f" ({diagnosis.attribute_clause})" if diagnosis.attribute_clause else ""
    sentences = [f"{question}; right is '{diagnosis.example['truth']}'{attribute}.", *_stage_sentences(diagnosis)]
    if diagnosis.offset > 0 and not diagnosis.corrected_by:
        sentences.append(
            f"All answers to such questions have an offset of {diagnosis.offset:.1f} logits towards '{answer}': without it, the "
            "answer would be right."
        )
    elif diagnosis.corrected_by:
        several = len(diagnosis.corrected_by) > 1
        offset = f" and without the common offset of {diagnosis.offset:.1f} logits" if diagnosis.offset > 0 else ""
        sentences.append(
            f"{_listed(diagnosis.corrected_by)} favor{'' if several else 's'} '{answer}': with "
            f"{'their mean outputs' if several else 'its mean output'}{offset}, the answer would be right."
        )
    elif diagnosis.pushes:
        sentences.append(
            f"{_listed([diagnosis.pushes[0].part])} favors '{answer}' most, but does not explain it alone."
        )
    if diagnosis.without_image:
        also = "also " if diagnosis.without_image == answer else ""
        sentences.append(f"Without the image it would {also}say '{diagnosis.without_image}'.")
    if reading := _token_sentence(diagnosis):
        sentences.append(reading)
    if diagnosis.information:
        sentences.append(diagnosis.information)
    if diagnosis.unread and not diagnosis.reason:
        sentences.append(f"Not read: {named_stages(diagnosis.unread)}; the verdict does not depend on them.")
    sentences.append(f"Verdict: {verdict_of(diagnosis)}{f'; {diagnosis.reason}' if diagnosis.reason else ''}.")
    return " ".join(sentences)


def tokens_read(diagnosis: Diagnosis) -> str:
    """Return which image tokens the verdict used in place of those in a box; empty if it used none."""
    used = {r.tokens for r in diagnosis.readings if r.used and r.stage != "last" and r.state != "unreadable"}
    if ALL_IMAGE_TOKENS in used and diagnosis.example["level"] == "attribute":
        return "the image token at which its noun is most decodable"
    return "the mean of all image tokens" if IMAGE_MEAN in used else ""


def _token_sentence(diagnosis: Diagnosis) -> str:
    tokens = tokens_read(diagnosis)
    return f"Without a box, this was read at {tokens}." if tokens else ""


def verdict_of(diagnosis: Diagnosis) -> str:
    """Return the verdict with its confidence, or without if it has a reason instead of a cause."""
    if diagnosis.reason:
        return str(diagnosis.verdict)
    return f"{diagnosis.verdict} ({100 * diagnosis.confidence:.0f} % sure)"


def _stage_sentences(diagnosis: Diagnosis) -> list[str]:
    """Return what the probes of each stage show."""
    states = dict(diagnosis.stages)
    if not states:
        return []
    truth, claim = diagnosis.true_clause, diagnosis.answer_clause
    sentences = []
    vision = {
        "truth": f"The vision tower shows that {truth}.",
        "other": f"The vision tower shows instead that {claim}.",
        "unclear": f"The vision tower does not clearly show whether {claim}.",
        "gone": f"Neither the vision tower nor any later stage shows whether {claim}.",
    }
    if states["vision"] in vision:
        sentences.append(vision[states["vision"]])
    if states["vision"] == "gone":
        return sentences
    decodable = states["vision"] == "truth"
    for stage, place in (("projector", "after the projector"), ("image", "at the image tokens of the decoder")):
        later = list(states)[list(states).index(stage) + 1 :]
        lost = states[stage] in ("other", "gone", "unclear") and not any(states[s] == "truth" for s in later)
        if decodable and lost:
            sentences.append(f"This is no longer decodable {place}.")
            decodable = False
        elif not decodable and states[stage] == "truth":
            sentences.append(f"It is decodable {place} that {truth}.")
            decodable = True
    if states["last"] == "truth":
        site = diagnosis.last_true_site
        layer = site.split(".")[1].removeprefix("L") if site else "?"
        sentences.append(f"At the last token, it is decodable up to layer {layer} that {truth}.")
    elif states["last"] != "unknown" and decodable:
        sentences.append("At the last token, it is decodable in no layer.")
    return sentences


def describe_claim(claim: Claim, example: Example, kinds: dict[str, str]) -> tuple[str, str, str]:
    """Return as clauses the truth, the claim of the answer, and the true attribute of the object.

    Parameters
    ----------
    claim, example
        The claim and the example of the question.
    kinds
        Attribute value to kind of attribute (``green`` to ``color``).
    """
    name = claim.question_concept.partition(":")[2]
    target = example.named_object()
    noun = target.noun if target is not None else claim.nouns[0].partition(":")[2] if claim.nouns else ""
    the, verb = (f"the {noun}", be(noun)) if noun else ("it", "is")
    if not name:
        return f"'{claim.truth}' is right", f"'{claim.model_answer}' is right", ""
    if not claim.yes_no:
        return f"{the} {verb} {claim.truth}", f"{the} {verb} {claim.model_answer}", ""
    if claim.level == "object":
        words = existence_clause(name), absence_clause(name)
    elif claim.level == "relation" and len(claim.nouns) == 2:
        a, b = (noun.partition(":")[2] for noun in claim.nouns)
        words = f"the {a} {be(a)} {name} the {b}", f"the {a} {be(a)} not {name} the {b}"
    else:
        words = f"{the} {verb} {name}", f"{the} {verb} not {name}"
    own = target.attributes.get(kinds.get(name, ""), "") if target is not None and claim.level == "attribute" else ""
    attribute = f"{the} {verb} {own}" if own and own != name else ""
    return (*words, attribute) if claim.holds else (words[1], words[0], attribute)


def _listed(parts: Sequence[str]) -> str:
    """Return the names of heads and MLPs: ``Heads L5.H2, L6.H0``."""
    heads = [p for p in parts if not p.endswith(".mlp")]
    layers = [p[1:].partition(".")[0] for p in parts if p.endswith(".mlp")]
    named = [f"head{'s' if len(heads) > 1 else ''} {', '.join(heads)}"] if heads else []
    if layers:
        named.append(f"the MLP of layer {layers[0]}" if len(layers) == 1 else f"the MLPs of layers {', '.join(layers)}")
    text = " and ".join(named)
    return text[:1].upper() + text[1:]
