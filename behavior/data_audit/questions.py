"""Causes in questions: contradictions, absent objects under another name, polysemous nouns, imbalance, co-occurrence."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import combinations

from behavior.data_audit.captions import objects_of_captions
from behavior.data_audit.finding import AuditedData, Finding, NotMeasuredError
from behavior.data_audit.senses import SENSES
from behavior.free_text.annotations import asked_relation
from concepts.nouns import PresentNouns, asked_noun, canonical_noun, singular
from concepts.reading.annotation_questions import OPPOSITES, SPELLINGS
from concepts.schema import Example
from groundscope.core.statistics import wilson

BALANCED = 20
"""Smallest number of questions of a kind whose balance is judged."""
_EXCLUSIVE_KINDS = frozenset({"color"})
COOCCURRENCE = 0.5
"""Smallest share of the images with one object that have another one, which makes the other probable."""
_FREQUENT = 5


def find_contradictions(audited: AuditedData) -> tuple[list[Finding], dict[str, float]]:
    """Find statements about one image that cannot all be true.

    Equal questions with different answers; a relation and its opposite, or two colors of an object, both affirmed; an object
    that is annotated although a question with the same noun says no; and an object that a caption names although a question
    says no.
    """
    findings = []
    for rows in audited.by_image.values():
        findings += _different_answers(audited, rows)
        findings += _opposites(audited, rows)
        findings += _colors(audited, rows)
        findings += _denied_but_annotated(audited, rows)
    if audited.captions:
        findings += _denied_but_named(audited)
    return findings, {"images": len(audited.by_image)}


def _normal(question: str) -> str:
    return " ".join(question.lower().split()).rstrip("?. ")


def _different_answers(audited: AuditedData, rows: list[Example]) -> list[Finding]:
    by_question: dict[tuple[str, str], list[Example]] = defaultdict(list)
    for row in rows:
        if row.kind != "caption" and row.answer:
            by_question[_normal(row.question), row.prefix].append(row)
    result = []
    for same in by_question.values():
        answers = dict.fromkeys(row.answer.strip().lower() for row in same)
        accepted = set.intersection(*({row.answer.strip().lower(), *(a.lower() for a in row.aliases)} for row in same))
        if len(answers) > 1 and not accepted and all(row.candidates == same[0].candidates for row in same):
            result.append(audited.finding(same, f"'{same[0].question}' has the answers {' and '.join(answers)}"))
    return result


def _opposites(audited: AuditedData, rows: list[Example]) -> list[Finding]:
    affirmed: dict[tuple[str, str, str], Example] = {}
    for row in rows:
        relation = asked_relation(row.question) if row.answer == "yes" else None
        if relation is not None:
            affirmed[relation] = row
    result = []
    for (a, name, b), row in affirmed.items():
        for other in ((a, OPPOSITES.get(name, ""), b), (b, name, a) if name in OPPOSITES else ("", "", "")):
            second = affirmed.get(other)
            if second is not None and row.id < second.id:
                result.append(
                    audited.finding([row, second], f"'{row.question}' and '{second.question}' both have the answer yes")
                )
    return result


def _colors(audited: AuditedData, rows: list[Example]) -> list[Finding]:
    by_object: dict[tuple[str, str], list[tuple[str, Example]]] = defaultdict(list)
    for row in rows:
        if row.kind in _EXCLUSIVE_KINDS and row.subject is not None and row.answer == "yes":
            word = row.question.rstrip("? ").split()[-1].lower()
            if word in SPELLINGS:
                by_object[row.subject, row.kind].append((SPELLINGS[word], row))
    return [
        audited.finding([a, b], f"'{a.question}' and '{b.question}' both have the answer yes")
        for values in by_object.values()
        for (first, a), (second, b) in combinations(values, 2)
        if first != second
    ]


def _denied(rows: list[Example]) -> list[tuple[str, Example]]:
    return [(noun, row) for row in rows if row.answer == "no" and (noun := asked_noun(row.question)) is not None]


def _denied_but_annotated(audited: AuditedData, rows: list[Example]) -> list[Finding]:
    present = {o.noun.lower() for row in rows for o in row.objects}
    return [
        audited.finding([row], f"'{row.question}' has the answer no, but '{noun}' is annotated")
        for noun, row in _denied(rows)
        if noun.lower() in present
    ]


def _denied_but_named(audited: AuditedData) -> list[Finding]:
    named: dict[str, list[tuple[Example, str, set[str]]]] = defaultdict(list)
    for example, caption, nouns in objects_of_captions(audited):
        named[audited.image_of[example.id]].append((example, caption, {singular(noun) for noun in nouns}))
    return [
        audited.finding([row, example], f"'{row.question}' has the answer no, but the caption says '{caption}'")
        for image, rows in audited.by_image.items()
        for noun, row in _denied(rows)
        for example, caption, nouns in named.get(image, ())
        if singular(noun.lower()) in nouns
    ]


def find_other_names(audited: AuditedData) -> tuple[list[Finding], dict[str, float]]:
    """Find objects that a question calls absent, but that are in the image under a synonym, number or broader term."""
    denied = [(noun, row) for rows in audited.by_image.values() for noun, row in _denied(rows)]
    if not denied:
        msg = 'the data have no questions about absent objects ("Is there a dog in the image?" with the answer no)'
        raise NotMeasuredError(msg)
    findings = []
    for noun, row in denied:
        rows = audited.by_image[audited.image_of[row.id]]
        nouns = {o.noun for r in rows for o in r.objects}
        nouns |= {other for r in rows if r.answer == "yes" and (other := asked_noun(r.question)) is not None}
        name = next((n for n in sorted(nouns) if n.lower() != noun.lower() and PresentNouns([n]).includes(noun)), None)
        if name is not None:
            findings.append(audited.finding([row], f"'{row.question}' has the answer no, but '{name}' is in the image"))
    return findings, {"questions about absent objects": len(denied)}


def find_polysemous(audited: AuditedData) -> tuple[list[Finding], dict[str, float]]:
    """Find questions about nouns with two concrete senses (`SENSES`)."""
    by_noun: dict[str, list[Example]] = defaultdict(list)
    count = 0
    for example in audited.data:
        nouns = question_nouns(example)
        count += bool(nouns)
        for noun in nouns:
            if noun in SENSES:
                by_noun[noun].append(example)
    if not count:
        msg = "no question names an object that is known (an existence question, or an annotated subject)"
        raise NotMeasuredError(msg)
    findings = [
        audited.finding(rows, f"'{noun}' can be {' or '.join(SENSES[noun])} ({len(rows)} questions)", len(rows))
        for noun, rows in sorted(by_noun.items(), key=lambda item: -len(item[1]))
    ]
    return findings, {"share of questions": len({e.id for rows in by_noun.values() for e in rows}) / count}


def question_nouns(example: Example) -> set[str]:
    """Return the nouns that a question is about, in the singular: the asked noun, the subject, and the objects of a relation."""
    nouns = {noun for noun in (asked_noun(example.question),) if noun is not None}
    subject = example.named_object()
    if subject is not None:
        nouns.add(subject.noun)
    relation = asked_relation(example.question)
    if relation is not None:
        nouns |= {relation[0], relation[2]}
    return {singular(noun.lower()) for noun in nouns}


def find_imbalance(audited: AuditedData) -> tuple[list[Finding], dict[str, float]]:
    """Find kinds of questions, and nouns, whose answers are not balanced."""
    by_kind: dict[str, list[Example]] = defaultdict(list)
    by_noun: dict[str, list[Example]] = defaultdict(list)
    for example in audited.data:
        if set(example.candidates) == {"yes", "no"}:
            by_kind[f"{example.level or 'no level'}/{example.kind}/{example.split}"].append(example)
            noun = asked_noun(example.question)
            if noun is not None:
                by_noun[canonical_noun(noun)].append(example)
    if not by_kind:
        msg = "the data have no yes-no questions"
        raise NotMeasuredError(msg)
    findings, values = [], {}
    for kind, rows in by_kind.items():
        yes = sum(e.answer == "yes" for e in rows)
        values[f"share of yes, {kind}"] = yes / len(rows)
        low, high = wilson(yes, len(rows))
        if len(rows) >= BALANCED and not low <= 0.5 <= high:
            findings.append(
                audited.finding(rows, f"{yes} of {len(rows)} questions {kind} have the answer yes", yes / len(rows))
            )
    one_sided = {
        noun: rows for noun, rows in by_noun.items() if len(rows) >= _FREQUENT and len({e.answer for e in rows}) == 1
    }
    for noun, rows in one_sided.items():
        findings.append(
            audited.finding(rows, f"all {len(rows)} questions about '{noun}' have the answer {rows[0].answer}")
        )
    return findings, values


def find_cooccurrence(audited: AuditedData) -> tuple[list[Finding], dict[str, float]]:
    """Find questions about absent objects that objects of the image make probable."""
    present = {
        name: frozenset(canonical_noun(o.noun) for o in image.objects)
        for name, image in audited.annotations.items()
        if image.objects
    }
    if not present:
        msg = "the data have no annotated objects"
        raise NotMeasuredError(msg)
    single: Counter[str] = Counter(noun for nouns in present.values() for noun in nouns)
    pairs: Counter[tuple[str, str]] = Counter(p for nouns in present.values() for p in combinations(sorted(nouns), 2))
    findings, count = [], 0
    for image, nouns in present.items():
        for noun, row in _denied(audited.by_image[image]):
            count += 1
            absent = canonical_noun(noun)
            shares = {
                other: pairs[min(absent, other), max(absent, other)] / single[other]
                for other in nouns
                if single[other] >= _FREQUENT
            }
            best = max(shares, key=lambda n: shares[n], default=None)
            if best is not None and shares[best] >= COOCCURRENCE:
                message = (
                    f"'{row.question}': absent, but in {shares[best]:.0%} of the images with '{best}', which is here"
                )
                findings.append(audited.finding([row], message, shares[best]))
    return findings, {"questions about absent objects": count}
