"""The table of causes of errors in data.

`CAUSES` is an open registry: a package adds a cause by an entry point of group ``groundscope.data_causes``, a `Cause`.
"""

from __future__ import annotations

from behavior.data_audit.captions import (
    find_mismatches,
    find_poor_captions,
    find_shared_captions,
    find_swapped_captions,
)
from behavior.data_audit.finding import Cause
from behavior.data_audit.images import find_blur, find_compression, find_duplicates, find_small_images
from behavior.data_audit.objects import find_cut_objects, find_rare_compositions, find_small_objects
from behavior.data_audit.questions import (
    find_contradictions,
    find_cooccurrence,
    find_imbalance,
    find_other_names,
    find_polysemous,
)
from groundscope.core.registry import Registry


def _problem(cause: object) -> str | None:
    return None if isinstance(cause, Cause) else "it must be a behavior.data_audit.Cause"


CAUSES: Registry[Cause] = Registry(
    "cause of errors in data",
    {
        "duplicate images": Cause("Images that are equal or nearly equal", find_duplicates, needs_pixels=True),
        "blurred images": Cause("Blurred images", find_blur, needs_pixels=True),
        "compression": Cause("Images with visible blocks of compression", find_compression, needs_pixels=True),
        "small images": Cause("Images with few pixels", find_small_images),
        "poor captions": Cause("Short or generic captions", find_poor_captions),
        "swapped captions": Cause("Captions whose objects are not in their image", find_swapped_captions),
        "mismatched captions": Cause("Captions that do not fit their image, by scores of a model", find_mismatches),
        "shared captions": Cause(
            "Equal captions, and captions true of several images (false negatives)", find_shared_captions
        ),
        "contradictions": Cause("Statements about an image that cannot all be true", find_contradictions),
        "present under another name": Cause(
            "Objects called absent that are present under another name", find_other_names
        ),
        "polysemous nouns": Cause("Questions about nouns with two concrete senses", find_polysemous),
        "small objects": Cause("Questions about objects whose box is small", find_small_objects),
        "cut-off objects": Cause("Questions about objects cut off by the border", find_cut_objects),
        "rare compositions": Cause("Questions about rare or unseen compositions", find_rare_compositions),
        "answer imbalance": Cause("Kinds of questions and nouns with one-sided answers", find_imbalance),
        "co-occurrence": Cause("Absent objects that objects of the image make probable", find_cooccurrence),
    },
    group="groundscope.data_causes",
    check=_problem,
)
"""Cause to how it is found, in the order of tables."""
