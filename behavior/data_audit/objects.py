"""Causes in annotated objects: small boxes, boxes at the border, rare compositions."""

from __future__ import annotations

import numpy as np

from behavior.data_audit.composition_rarity import composition_rarity
from behavior.data_audit.finding import AuditedData, Finding, NotMeasuredError
from concepts.annotated_object import AnnotatedObject
from concepts.schema import Example
from groundscope.core.text import format_count

SMALL_SHARE = 0.01
"""Largest share of the image that the box of a small object covers."""
BORDER = 1.0
"""Largest distance in pixels from a box to the border of the image that cuts the object off."""


def _subjects(audited: AuditedData) -> list[tuple[Example, AnnotatedObject]]:
    rows = [(e, o) for e in audited.data if (o := e.named_object()) is not None and o.box is not None and e.images]
    if not rows:
        msg = "no question has a subject with a box"
        raise NotMeasuredError(msg)
    return rows


def find_small_objects(audited: AuditedData) -> tuple[list[Finding], dict[str, float]]:
    """Find questions about objects that cover at most `SMALL_SHARE` of their image."""
    shares, findings = [], []
    for example, item in _subjects(audited):
        width, height = audited.sizes[audited.image_of[example.id]]
        share = item.require_box().area / (width * height)
        shares.append(share)
        if share <= SMALL_SHARE:
            message = f"'{example.question}': the {item.noun} covers {100 * share:.2g} % of the image"
            findings.append(audited.finding([example], message, share))
    return findings, {"median share of the image": float(np.median(shares))}


def find_cut_objects(audited: AuditedData) -> tuple[list[Finding], dict[str, float]]:
    """Find questions about objects whose box ends at the border of the image."""
    rows, findings = _subjects(audited), []
    for example, item in rows:
        width, height = audited.sizes[audited.image_of[example.id]]
        box = item.require_box()
        if min(box.x0, box.y0, width - box.x1, height - box.y1) <= BORDER:
            findings.append(
                audited.finding([example], f"'{example.question}': the box of the {item.noun} ends at the border")
            )
    return findings, {"share of questions": len(findings) / len(rows)}


def find_rare_compositions(audited: AuditedData) -> tuple[list[Finding], dict[str, float]]:
    """Find questions about an object with a rare attribute or relation (`composition_rarity`)."""
    rarity = composition_rarity(audited.data)
    if not rarity:
        msg = "no question is about an attribute or relation of an annotated object"
        raise NotMeasuredError(msg)
    by_id = {e.id: e for e in audited.data}
    findings = [
        audited.finding(
            [by_id[name]],
            f"'{by_id[name].question}': {' + '.join(row.composition)} is {row.bin}"
            + (f" (PMI {row.pmi:+.2f} nats, {format_count(row.count, 'mention')})" if row.count else ""),
            row.pmi if row.bin != "unseen" else None,
        )
        for name, row in rarity.items()
        if row.bin in {"unseen", "rare"}
    ]
    return findings, {"share of questions": len(findings) / len(rarity)}
