"""Causes of errors in data, found without a model, and joined to a model's error rates.

`audit`
    Search a data set; compare error rates of concerned and other questions.
`registry`
    `CAUSES`: the open table of causes.
`images`, `captions`, `questions`, `objects`
    How causes are found.
`caption_fit`
    How well captions fit their images by a model, for the cause "mismatched captions".
`composition_rarity`
    Rarity of compositions, and splits by it.
`senses`
    Nouns with two concrete senses.

Import from `behavior`: ``from behavior import audit``.
"""

from behavior.data_audit.audit import Audit, CauseErrors, audit
from behavior.data_audit.caption_fit import caption_fit
from behavior.data_audit.composition_rarity import Rarity, composition_rarity, hold_out_compositions, split_by_rarity
from behavior.data_audit.finding import AuditedData, Cause, CauseReport, Finding, NotMeasuredError
from behavior.data_audit.registry import CAUSES
from behavior.data_audit.senses import SENSES

__all__ = [
    "CAUSES",
    "SENSES",
    "Audit",
    "AuditedData",
    "Cause",
    "CauseErrors",
    "CauseReport",
    "Finding",
    "NotMeasuredError",
    "Rarity",
    "audit",
    "caption_fit",
    "composition_rarity",
    "hold_out_compositions",
    "split_by_rarity",
]
