"""Descriptions in free text at three levels: objects, attributes and relations, with the places of their words.

`parser`
    Parse a description to spans, by rules: words (`tokens`, `word_lists`), phrases (`phrases`), then each sentence from left to
    right (`sentence_state`, `noun_phrases`, `predicates`).
`spans`
    Spans and descriptions, and their files, which people or a judge complete.
`annotations`
    What the annotations of a data set say of an image.
`scoring`
    Judge spans by annotations, and rates of wrong spans at each level.
`agreement`
    Compare two markings of the same descriptions.
`markup`
    A description as HTML, with its spans marked.

Import from `behavior`: ``from behavior import parse_description``.
"""

from behavior.free_text.agreement import LevelAgreement, SpanAgreement, compare_spans
from behavior.free_text.annotations import ImageAnnotation, image_annotations
from behavior.free_text.parser import parse_description
from behavior.free_text.scoring import FreeTextScores, LevelScores, judge_description, score_descriptions
from behavior.free_text.spans import Description, Span, read_descriptions, write_descriptions

__all__ = [
    "Description",
    "FreeTextScores",
    "ImageAnnotation",
    "LevelAgreement",
    "LevelScores",
    "Span",
    "SpanAgreement",
    "compare_spans",
    "image_annotations",
    "judge_description",
    "parse_description",
    "read_descriptions",
    "score_descriptions",
    "write_descriptions",
]
