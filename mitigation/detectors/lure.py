"""LURE's signs of hallucination: objects late in an answer, and objects of uncertain words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from concepts.object_mentions import tokenize_words
from concepts.schema import Example
from mitigation.detectors.scores import MentionScores
from mitigation.detectors.written_tokens import WrittenTokens, read_written_tokens
from mitigation.training_free.method import check_range

if TYPE_CHECKING:
    from lvlm.model import Lvlm

UNCERTAIN = 0.9
LATE = 0.8


def lure_scores(
    model: Lvlm, examples: Sequence[Example], *, uncertain: float = UNCERTAIN, late: float = LATE
) -> MentionScores:
    """Score mentioned objects by the detector half of LURE (Zhou et al. 2023, arXiv 2310.00754); nothing is rewritten.

    Scores are ``uncertainty``, ``-ln p`` of the object's word; ``position``, the share of the answer's words before it;
    and ``flagged``, 1 if the uncertainty is above `uncertain` or the position at least `late`. As in the release, p
    belongs to the first token of the word tokenized alone, where this token first occurs in the answer; if it never
    occurs (many tokenizers write a word differently after a space), the uncertainty is NaN.

    Parameters
    ----------
    model
        The model that wrote the answers, or another one that reads them.
    examples
        Written answers with their mentions: ``gs.with_mentions(data, texts)``.
    uncertain
        Uncertainty above which an object is flagged.
    late
        Position from which on an object is flagged, in [0, 1].

    Raises
    ------
    ConfigError
        For a threshold out of range.
    DataError
        For an example without a written answer.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.detectors.lure import lure_scores
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["caption"])[:1]
    >>> written = gs.with_mentions(data, {data[0].id: "a yellow banana, a blue bus and a dog."}, vocabulary=["dog"])
    >>> scores = lure_scores(model, written)
    >>> scores.nouns, scores.hallucinated.tolist(), scores.values["position"].round(2).tolist()
    (('banana', 'bus', 'dog'), [0.0, 0.0, 1.0], [0.18, 0.55, 0.82])
    """
    check_range("uncertain", uncertain, 0)
    check_range("late", late, 0, 1)
    rows = [row for text in read_written_tokens(model, examples) for row in _rows(model, text)]
    uncertainty = np.array([row[3] for row in rows])
    position = np.array([row[4] for row in rows])
    return MentionScores(
        tuple(row[0].id for row in rows),
        tuple(row[0].group for row in rows),
        tuple(row[1] for row in rows),
        np.array([row[2] for row in rows]),
        {
            "uncertainty": uncertainty,
            "position": position,
            "flagged": ((uncertainty > uncertain) | (position >= late)).astype(np.float64),
        },
    )


def _rows(model: Lvlm, text: WrittenTokens) -> list[tuple[Example, str, float, float, float]]:
    written = text.example.prefix
    words = len(tokenize_words(written))
    rows = []
    for mention in text.example.mentions:
        alone = model.processor.tokenizer(written[mention.start : mention.stop], add_special_tokens=False)["input_ids"]
        first = text.tokens.index(alone[0]) if alone and alone[0] in text.tokens else None
        uncertainty = math.nan if first is None else -float(text.chosen[first])
        position = len(tokenize_words(written[: mention.start])) / words
        label = math.nan if mention.present is None else float(not mention.present)
        rows.append((text.example, mention.noun, label, uncertainty, position))
    return rows
