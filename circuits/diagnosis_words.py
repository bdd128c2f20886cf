"""A diagnosis in plain words, for people who have not read how it was made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from concepts.schema import Example

if TYPE_CHECKING:
    from circuits.claims import Claim
    from circuits.diagnoses import Diagnosis


def explain(one: Diagnosis) -> str:
    """Return some sentences: what each part of the model shows, what pushed the answer, what it would say without the image."""
    asked = f"Asked '{one.example['question']}', the model says '{one.said}'"
    if one.verdict is None:
        return f"{asked}, which is right."
    parts = [f"{asked}; right is '{one.example['truth']}'.", *_way(one)]
    if one.undone_by:
        many = len(one.undone_by) > 1
        parts.append(
            f"{_listed(one.undone_by)} push{'' if many else 'es'} towards {one.says}: as {'they' if many else 'it'} usually "
            f"{'are' if many else 'is'}, the answer would be right."
        )
    elif one.pushes:
        parts.append(
            f"{_listed([one.pushes[0].part])} pushes most towards {one.says}, but is not enough to explain it."
        )
    if one.without_image:
        also = "also " if one.without_image == one.said else ""
        parts.append(f"Without the image it would {also}say '{one.without_image}'.")
    sure = f" ({100 * one.confidence:.0f} % sure)" if one.confidence > 0 else ""
    parts.append(f"Verdict: {one.verdict}{sure}{f'; {one.reason}' if one.reason else ''}.")
    return " ".join(parts)


def _way(one: Diagnosis) -> list[str]:
    """Say what is known along the way, as far as anything reads it."""
    states = dict(one.stages)
    if not states:
        return []
    said = []
    vision = {
        "truth": f"The vision tower shows {one.shows}.",
        "other": f"The vision tower shows {one.says} rather than {one.shows}.",
        "unclear": f"The vision tower does not clearly tell {one.shows} from {one.says}.",
        "gone": f"Nothing in the vision tower, or after it, tells {one.shows} from {one.says}.",
    }
    if states["vision"] in vision:
        said.append(vision[states["vision"]])
    if states["vision"] == "gone":
        return said
    known = states["vision"] == "truth"
    for stage, place in (("projector", "After the projector"), ("image", "At the decoder's image tokens")):
        if known and states[stage] in ("other", "gone", "unclear"):
            said.append(f"{place} it is no longer known.")
            known = False
        elif not known and states[stage] == "truth":
            said.append(f"{place} {one.shows} is known.")
            known = True
    if states["last"] == "truth":
        layer = one.flip.split(".")[1].removeprefix("L") if one.flip else "?"
        said.append(f"Where the answer is read, layer {layer} still knows {one.shows}.")
    elif states["last"] != "unknown" and known:
        said.append("Where the answer is read, no layer ever knows it.")
    return said


def shown_and_said(claim: Claim, example: Example, kinds: dict[str, str]) -> tuple[str, str]:
    """Return in a few words what the image shows of what is asked, and what the answer claims.

    Parameters
    ----------
    claim, example
        The question.
    kinds
        Attribute value to kind of attribute (``green`` to ``color``): of what kind the value asked for is.
    """
    name = claim.concept.partition(":")[2]
    if not claim.yes_no or not name:
        return f"'{claim.truth}'", f"'{claim.said}'"
    if claim.level == "object":
        words = f"{'an' if name[0] in 'aeiou' else 'a'} {name}", f"no {name}"
    elif claim.level == "relation" and len(claim.nouns) == 2:
        a, b = (noun.partition(":")[2] for noun in claim.nouns)
        words = f"the {a} {name} the {b}", f"the {a} not {name} the {b}"
    else:
        thing = example.named_object()
        own = thing.attributes.get(kinds.get(name, ""), "") if thing is not None else ""
        words = name, own if own and own != name else f"not {name}"
    return (words[0], words[1]) if claim.holds else (words[1], words[0])


def _listed(parts: Sequence[str]) -> str:
    """Name heads and MLPs: ``Heads L5.H2, L6.H0``."""
    heads = [p for p in parts if not p.endswith(".mlp")]
    layers = [p[1:].partition(".")[0] for p in parts if p.endswith(".mlp")]
    named = [f"head{'s' if len(heads) > 1 else ''} {', '.join(heads)}"] if heads else []
    if layers:
        named.append(f"the MLP of layer {layers[0]}" if len(layers) == 1 else f"the MLPs of layers {', '.join(layers)}")
    text = " and ".join(named)
    return text[:1].upper() + text[1:]
