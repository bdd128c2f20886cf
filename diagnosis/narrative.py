"""A diagnosis in plain words, for people who have not read how it was made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from concepts.nouns import absence_clause, be, existence_clause
from concepts.schema import Example

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
    """Name stages in words: ``the vision tower, the projector and the image's tokens``."""
    names = [_STAGE_NAMES[stage] for stage in stages]
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else ""


def explain(one: Diagnosis) -> str:
    """Return some sentences: what each part of the model shows, what pushed the answer, what it would say without the image."""
    asked = f"Asked '{one.example['question']}', the model says '{one.said}'"
    if one.verdict is None:
        return f"{asked}, which is right."
    true = f" ({one.fact})" if one.fact else ""
    parts = [f"{asked}; right is '{one.example['truth']}'{true}.", *_way(one)]
    if one.lean > 0 and not one.undone_by:
        parts.append(
            f"Right or not, answers to such questions lean to '{one.said}' by {one.lean:.1f} logits: without that, the answer "
            "would be right."
        )
    elif one.undone_by:
        many = len(one.undone_by) > 1
        lean = f" and without the {one.lean:.1f} logits by which all such answers lean to it" if one.lean > 0 else ""
        parts.append(
            f"{_listed(one.undone_by)} push{'' if many else 'es'} towards '{one.said}': as {'they' if many else 'it'} usually "
            f"{'are' if many else 'is'}{lean}, the answer would be right."
        )
    elif one.pushes:
        parts.append(
            f"{_listed([one.pushes[0].part])} pushes most towards '{one.said}', but does not explain it alone."
        )
    if one.without_image:
        also = "also " if one.without_image == one.said else ""
        parts.append(f"Without the image it would {also}say '{one.without_image}'.")
    if one.unread and not one.reason:
        parts.append(f"Not read: {named_stages(one.unread)}; what they know of this is not part of the verdict.")
    parts.append(f"Verdict: {verdict_of(one)}{f'; {one.reason}' if one.reason else ''}.")
    return " ".join(parts)


def verdict_of(one: Diagnosis) -> str:
    """Return the verdict and how sure it is; of a verdict with a reason, which names no cause, the verdict alone."""
    return str(one.verdict) if one.reason else f"{one.verdict} ({100 * one.confidence:.0f} % sure)"


def _way(one: Diagnosis) -> list[str]:
    """Say what is known along the way, as far as anything reads it."""
    states = dict(one.stages)
    if not states:
        return []
    said = []
    vision = {
        "truth": f"The vision tower shows that {one.shows}.",
        "other": f"In the vision tower it looks as if {one.says}.",
        "unclear": f"The vision tower does not clearly show whether {one.says}.",
        "gone": f"Nothing in the vision tower, or after it, tells whether {one.says}.",
    }
    if states["vision"] in vision:
        said.append(vision[states["vision"]])
    if states["vision"] == "gone":
        return said
    known = states["vision"] == "truth"
    for stage, place in (("projector", "After the projector"), ("image", "At the decoder's image tokens")):
        later = list(states)[list(states).index(stage) + 1 :]
        if known and states[stage] in ("other", "gone", "unclear") and not any(states[s] == "truth" for s in later):
            said.append(f"{place} it is no longer known.")
            known = False
        elif not known and states[stage] == "truth":
            said.append(f"{place} it is known that {one.shows}.")
            known = True
    if states["last"] == "truth":
        layer = one.flip.split(".")[1].removeprefix("L") if one.flip else "?"
        said.append(f"Where the answer is read, layer {layer} still knows that {one.shows}.")
    elif states["last"] != "unknown" and known:
        said.append("Where the answer is read, no layer ever knows it.")
    return said


def in_words(claim: Claim, example: Example, kinds: dict[str, str]) -> tuple[str, str, str]:
    """Return as clauses what is true of the image, what the answer claims, and the attribute that the object has.

    Parameters
    ----------
    claim, example
        The question.
    kinds
        Attribute value to kind of attribute (``green`` to ``color``).
    """
    name = claim.asked.partition(":")[2]
    thing = example.named_object()
    noun = thing.noun if thing is not None else "it"
    the, verb = ("it", "is") if thing is None else (f"the {noun}", be(noun))
    if not name:
        return f"'{claim.truth}' is right", f"'{claim.said}' is right", ""
    if not claim.yes_no:
        return f"{the} {verb} {claim.truth}", f"{the} {verb} {claim.said}", ""
    if claim.level == "object":
        words = existence_clause(name), absence_clause(name)
    elif claim.level == "relation" and len(claim.nouns) == 2:
        a, b = (noun.partition(":")[2] for noun in claim.nouns)
        words = f"the {a} {be(a)} {name} the {b}", f"the {a} {be(a)} not {name} the {b}"
    else:
        words = f"{the} {verb} {name}", f"{the} {verb} not {name}"
    own = thing.attributes.get(kinds.get(name, ""), "") if thing is not None and claim.level == "attribute" else ""
    fact = f"{the} {verb} {own}" if own and own != name else ""
    return (*words, fact) if claim.holds else (words[1], words[0], fact)


def _listed(parts: Sequence[str]) -> str:
    """Name heads and MLPs: ``Heads L5.H2, L6.H0``."""
    heads = [p for p in parts if not p.endswith(".mlp")]
    layers = [p[1:].partition(".")[0] for p in parts if p.endswith(".mlp")]
    named = [f"head{'s' if len(heads) > 1 else ''} {', '.join(heads)}"] if heads else []
    if layers:
        named.append(f"the MLP of layer {layers[0]}" if len(layers) == 1 else f"the MLPs of layers {', '.join(layers)}")
    text = " and ".join(named)
    return text[:1].upper() + text[1:]
