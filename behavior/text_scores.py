"""Scores of whole candidate texts, for candidates that share their first token.

``red car`` and ``red bus`` begin with the same token, so their whole texts are compared: the score of a candidate is the
log-probability of its tokens after the prompt, summed, or divided by their number. The sum prefers short texts; the mean does
not, but is no probability (Brown et al. 2020, arXiv 2005.14165, section 2.4, use it for most tasks with several candidates).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from behavior.score_names import TEXT, TEXT_PER_TOKEN
from concepts.schema import Example
from groundscope.core.errors import DataError, ModelError
from lvlm.answer_keys import answer_tokens
from lvlm.answer_scores import answer_log_probabilities
from lvlm.decoding.prefix_run import PrefixBatch
from lvlm.model import Batch, Lvlm


def candidate_tokens(model: Lvlm, example: Example, score: str) -> list[list[int]]:
    """Return the tokens of each candidate of an example, as written, after its prompt and prefix.

    Raises
    ------
    DataError
        If a candidate has no tokens or unknown ones, two have the same, or, with the summed score, one begins another: its score
        could not be lower.
    """
    unknown = model.processor.tokenizer.unk_token_id
    tokens: list[list[int]] = []
    for candidate in example.candidates:
        ids = answer_tokens(model, example, candidate)
        if not ids or unknown in ids:
            msg = (
                f"example '{example.id}': the tokenizer of {model.name} cannot encode the candidate '{candidate}'; use another "
                "answer"
            )
            raise DataError(msg)
        tokens.append(ids)
    for i, first in enumerate(tokens):
        for j, second in enumerate(tokens):
            if i == j or second[: len(first)] != first:
                continue
            one, other = example.candidates[i], example.candidates[j]
            if first == second:
                msg = f"example '{example.id}': the candidates '{one}' and '{other}' have the same tokens; remove one"
                raise DataError(msg)
            if score == TEXT:
                msg = (
                    f"example '{example.id}': the candidate '{one}' begins '{other}', so its score cannot be lower; use "
                    f"score='{TEXT_PER_TOKEN}', or other candidates"
                )
                raise DataError(msg)
    return tokens


def score_texts(model: Lvlm, batch: Batch | PrefixBatch, score: str) -> list[tuple[list[float], list[float]]]:
    """Return for each example of a batch its candidates' scores and their texts' log-probabilities, in nats.

    One forward pass for each candidate, that of the example with the most.

    Raises
    ------
    ModelError
        If a log-probability is not a number.
    ConfigError
        If a decoding method is active.
    """
    tokens = [candidate_tokens(model, e.example, score) for e in batch.encodings]
    columns = [
        answer_log_probabilities(model, batch, [t[k] if k < len(t) else [] for t in tokens])
        for k in range(max(map(len, tokens)))
    ]
    table = torch.stack(columns, dim=1).tolist()  # [B, candidates]
    results = []
    for encoding, row, of_candidates in zip(batch.encodings, table, tokens, strict=True):
        log_p = row[: len(of_candidates)]
        if any(math.isnan(value) for value in log_p):
            msg = (
                f"example '{encoding.example.id}': the logits of {model.name} are not finite; lower the steering strength, or "
                "load the model in float32"
            )
            raise ModelError(msg)
        lengths: Sequence[int] = [len(ids) if score == TEXT_PER_TOKEN else 1 for ids in of_candidates]
        results.append(([value / n for value, n in zip(log_p, lengths, strict=True)], log_p))
    return results
