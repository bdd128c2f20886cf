"""Causes in captions: short and generic ones, captions of other images, and captions that are true of several images."""

from __future__ import annotations

from collections import Counter

import numpy as np

from behavior.data_audit.finding import AuditedData, Finding, NotMeasuredError
from behavior.free_text.annotations import ImageAnnotation
from behavior.free_text.parser import parse_description
from behavior.free_text.scoring import judge_description
from concepts.nouns import canonical_noun
from concepts.schema import Example

SHORT = 4
"""Captions with fewer words are short."""
GENERIC = 0.8
"""Smallest share of generic words of a generic caption."""
_GENERIC_WORDS = frozenset(
    """a an the this that these there is are was it its of in on at to and or with for some something someone thing things
    image images picture pictures photo photos photograph scene view shot showing shows show object objects item items stuff
    here nice good beautiful great interesting very various several many different other""".split()
)
SWAPPED = 0.5
"""Largest share of a caption's known objects that are in the image, and of the image's objects that it names, of a caption that
may belong to another image."""
MISMATCH = 0.0
"""A caption whose log-probability given its image, minus the mean given other images, is lower does not fit."""


def objects_of_captions(audited: AuditedData) -> list[tuple[Example, str, tuple[str, ...]]]:
    """Return each caption with the objects that it names."""
    return audited.once("objects of captions", lambda: _parse_captions(audited))


def _parse_captions(audited: AuditedData) -> list[tuple[Example, str, tuple[str, ...]]]:
    nouns = {o.noun for image in audited.annotations.values() for o in image.objects}
    rows = []
    for example, caption in audited.require_captions():
        row = parse_description(caption, nouns=nouns)
        rows.append((example, caption, tuple(dict.fromkeys(s.words(caption).lower() for s in row.of_level("object")))))
    return rows


def find_poor_captions(audited: AuditedData) -> tuple[list[Finding], dict[str, float]]:
    """Find captions that are short or consist mostly of generic words."""
    findings, lengths, shares = [], [], []
    for example, caption in audited.require_captions():
        words = caption.lower().replace(".", " ").replace(",", " ").split()
        share = sum(word in _GENERIC_WORDS for word in words) / max(len(words), 1)
        lengths.append(len(words))
        shares.append(share)
        if len(words) < SHORT:
            findings.append(audited.finding([example], f"caption of {len(words)} words: '{caption}'", len(words)))
        elif share >= GENERIC:
            findings.append(audited.finding([example], f"{share:.0%} generic words: '{caption}'", share))
    return findings, {"mean words": float(np.mean(lengths)), "mean share of generic words": float(np.mean(shares))}


def find_swapped_captions(audited: AuditedData) -> tuple[list[Finding], dict[str, float]]:
    """Find captions whose objects are not in their image, but all in another."""
    object_names = {canonical_noun(o.noun) for image in audited.annotations.values() for o in image.objects}
    if not object_names:
        msg = "the data have no annotated objects to compare captions with"
        raise NotMeasuredError(msg)
    rows = objects_of_captions(audited)
    images = {name: image for name, image in audited.annotations.items() if image.objects}
    present = {name: {canonical_noun(o.noun) for o in image.objects} for name, image in images.items()}
    findings, shares = [], []
    for example, caption, nouns in rows:
        image = audited.image_of[example.id]
        named = {name for noun in nouns if (name := _known_name(noun, object_names)) is not None}
        if not named or image not in images:
            continue
        own = _included(named, images[image])
        recalled = len(named & present[image]) / len(present[image])
        shares.append(own)
        if own > SWAPPED or recalled > SWAPPED:
            continue
        if SWAPPED in (own, recalled) and not _has_wrong(caption, nouns, images[image]):
            continue
        fitting = [name for name, nouns_there in present.items() if named <= nouns_there and name != image]
        if not fitting and own > 0:
            continue
        advice = f"; its objects are all in '{fitting[0]}'" if fitting else ""
        names = ", ".join(sorted(named))
        message = f"caption of '{image}' names {names}, of which {own:.0%} are annotated there{advice}: '{caption}'"
        findings.append(audited.finding([example], message, own))
    return findings, {"mean share of named objects in the image": float(np.mean(shares)) if shares else float("nan")}


def _has_wrong(caption: str, nouns: tuple[str, ...], image: ImageAnnotation) -> bool:
    """Whether the annotation of an image excludes something that a caption states."""
    judged = judge_description(parse_description(caption, nouns=nouns), image)
    return any(span.verdict == "wrong" for span in judged.spans)


def _known_name(noun: str, object_names: set[str]) -> str | None:
    """Return the name of an object in the vocabulary of the data that a noun of a caption has; None if it has none."""
    names = (canonical_noun(noun), canonical_noun(noun.split()[-1]))
    return next((name for name in names if name in object_names), None)


def _included(named: set[str], image: ImageAnnotation) -> float:
    return sum(image.states_presence(noun) is True for noun in named) / len(named)


def find_shared_captions(audited: AuditedData) -> tuple[list[Finding], dict[str, float]]:
    """Find captions that are true of several images: as negatives of those they are false negatives."""
    object_names = {canonical_noun(o.noun) for image in audited.annotations.values() for o in image.objects}
    if not object_names:
        msg = "the data have no annotated objects to compare captions with"
        raise NotMeasuredError(msg)
    present = {
        name: frozenset(canonical_noun(o.noun) for o in image.objects) for name, image in audited.annotations.items()
    }
    texts: Counter[str] = Counter(caption.lower().rstrip(".") for _, caption in audited.require_captions())
    findings, counts = [], []
    for example, caption, nouns in objects_of_captions(audited):
        named = {name for noun in nouns if (name := _known_name(noun, object_names)) is not None}
        others = [
            name for name, there in present.items() if named and named <= there and name != audited.image_of[example.id]
        ]
        counts.append(len(others) / max(len(present) - 1, 1))
        equal = texts[caption.lower().rstrip(".")] - 1
        if equal:
            findings.append(audited.finding([example], f"{equal} other captions are equal: '{caption}'", equal))
    return findings, {"mean share of other images with all objects of a caption": float(np.mean(counts))}


def find_mismatches(audited: AuditedData) -> tuple[list[Finding], dict[str, float]]:
    """Find captions that a model finds no more probable for their image than for others (`caption_fit`, or the user's scores)."""
    scores = audited.caption_scores
    if scores is None:
        msg = "no scores of captions by a model; give model=FOLDER to the command, or caption_scores= in Python"
        raise NotMeasuredError(msg)
    rows = {e.id: (e, caption) for e, caption in audited.require_captions()}
    findings = [
        audited.finding([rows[name][0]], f"{value:+.2f} nats against other images: '{rows[name][1]}'", value)
        for name, value in scores.items()
        if name in rows and value < MISMATCH
    ]
    return findings, {"mean": float(np.mean(list(scores.values()))) if scores else float("nan")}
